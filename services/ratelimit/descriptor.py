"""What a gateway's descriptor says: who is calling, and what would be used. Refuses keys it does not know.

A key with a slip in it would otherwise be a limit that is never reached.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from services.kernel.errors import InvalidRequest
from services.ratelimit.limits import Subject, subject_of

DOMAIN = "tenantry"
DEFAULT_UNIT = "gateway_requests"
KEYS = ("credential", "tenant_context", "remote_address", "unit", "user", "feature")
MOST_DESCRIPTORS = 20
_MOST_HITS = 1_000_000_000


@dataclass(frozen=True, slots=True)
class Proof:
    """What proves the tenant: a credential as its caller presented it, or a signed context. `remote_address`: where the caller was seen."""

    credential: str = ""
    tenant_context: str = ""
    remote_address: str = ""


@dataclass(frozen=True, slots=True)
class GatewayUse:
    """One descriptor: so many hits on a unit, for somebody."""

    product_unit: str
    hits: int
    subject: Subject


def read_descriptor(place: int, entries: Iterable[tuple[str, str]], hits: int) -> tuple[Proof, GatewayUse]:
    """Reads the entries of one descriptor. Raises: InvalidRequest naming the descriptor and what to correct."""
    field, values = f"descriptors[{place}]", dict[str, str]()
    for key, value in entries:
        if key not in KEYS:
            raise InvalidRequest(f"{field}.entries", f"has the key {key}; the keys are {', '.join(KEYS)}")
        if key in values:
            raise InvalidRequest(f"{field}.entries", f"has the key {key} more than once")
        values[key] = value
    if bool(values.get("credential")) == bool(values.get("tenant_context")):
        raise InvalidRequest(f"{field}.entries", "must prove the tenant by one of credential and tenant_context")
    if not 0 <= hits <= _MOST_HITS:
        raise InvalidRequest(f"{field}.hits_addend", f"must be from 0 to {_MOST_HITS}")
    proof = Proof(_without_scheme(values.get("credential", "")), values.get("tenant_context", ""), values.get("remote_address", ""))
    subject = subject_of(values.get("user", ""), values.get("feature", ""))
    return proof, GatewayUse(values.get("unit") or DEFAULT_UNIT, hits, subject)


def _without_scheme(header: str) -> str:
    scheme, _, credential = header.partition(" ")
    # Source: RFC 9110, 11.1: the scheme is case-insensitive.
    return credential.strip() if scheme.lower() == "bearer" else header
