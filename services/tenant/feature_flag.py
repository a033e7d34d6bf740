"""Feature flags: who gets what, decided the same way by everybody who asks. Pure; refuses a flag whose rules contradict each other."""

import hashlib
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from datetime import datetime
from enum import Enum, auto

from services.kernel.errors import InvalidRequest
from services.kernel.ids import TenantId

MAX_FLAGS = 200
# A context token carries the names of the flags that are on, and metadata is bounded.
MAX_NAME_BYTES = 4_000
MAX_LISTED_TENANTS = 1_000
BASIS_POINTS = 10_000
_REMEMBERED = 10_000
# A refusal travels in metadata, which is bounded.
_NAMED_TENANTS = 20


class FlagRule(Enum):
    """What decided a flag's value."""

    TENANT = auto()
    TIER = auto()
    PERCENTAGE = auto()
    DEFAULT = auto()


@dataclass(frozen=True, slots=True)
class Flag:
    """A flag's rules, in the order in which they are asked."""

    name: str
    description: str
    default_value: bool
    tenants_on: frozenset[TenantId]
    tenants_off: frozenset[TenantId]
    tiers_on: frozenset[str]
    tiers_off: frozenset[str]
    percentage_basis_points: int


@dataclass(frozen=True, slots=True)
class KeptFlag:
    """A flag as it is kept: `version` is that of the flag set at the flag's last change."""

    flag: Flag
    version: int
    update_time: datetime


@dataclass(frozen=True, slots=True)
class Evaluation:
    """A flag for one tenant, and what decided it."""

    name: str
    enabled: bool
    rule: FlagRule
    bucket: int


def bucket_of(name: str, tenant_id: TenantId) -> int:
    """Returns where the tenant stands in the flag's percentage: 0–9,999, spread evenly, another place for each flag."""
    # A name holds no NUL, so that no two pairs of name and tenant are written alike.
    digest = hashlib.sha256(name.encode() + b"\x00" + tenant_id.bytes).digest()
    return int.from_bytes(digest) % BASIS_POINTS


def evaluate(flag: Flag, tenant_id: TenantId, tier: str) -> Evaluation:
    """Returns the flag's value for the tenant: the tenant's own rule, its tier's, the percentage, the default."""
    bucket = bucket_of(flag.name, tenant_id)
    if tenant_id in flag.tenants_on or tenant_id in flag.tenants_off:
        return Evaluation(flag.name, tenant_id in flag.tenants_on, FlagRule.TENANT, bucket)
    if tier in flag.tiers_on or tier in flag.tiers_off:
        return Evaluation(flag.name, tier in flag.tiers_on, FlagRule.TIER, bucket)
    if bucket < flag.percentage_basis_points:
        return Evaluation(flag.name, True, FlagRule.PERCENTAGE, bucket)
    return Evaluation(flag.name, flag.default_value, FlagRule.DEFAULT, bucket)


def refuse_contradictions(flag: Flag, known_tiers: Iterable[str]) -> None:
    """Raises InvalidRequest for a tenant or tier that is listed both on and off, for too many tenants, and for a tier that is no plan."""
    if flag.tenants_on & flag.tenants_off:
        raise InvalidRequest("flag.tenants_off", "must not list a tenant that tenants_on lists")
    if flag.tiers_on & flag.tiers_off:
        raise InvalidRequest("flag.tiers_off", "must not list a tier that tiers_on lists")
    if len(flag.tenants_on) + len(flag.tenants_off) > MAX_LISTED_TENANTS:
        raise InvalidRequest("flag.tenants_on", f"must list at most {MAX_LISTED_TENANTS} tenants together with tenants_off")
    unknown = (flag.tiers_on | flag.tiers_off) - set(known_tiers)
    if unknown:
        raise InvalidRequest("flag.tiers_on" if unknown & flag.tiers_on else "flag.tiers_off", f"no plan is called {min(unknown)}")


def refuse_unknown_tenants(flag: Flag, known: Collection[TenantId]) -> None:
    """Raises InvalidRequest for listed ids that are no tenant's: at most 20 of them are named."""
    for path, listed in (("flag.tenants_on", flag.tenants_on), ("flag.tenants_off", flag.tenants_off)):
        unknown = sorted(str(tenant_id) for tenant_id in listed if tenant_id not in known)
        if unknown:
            others = len(unknown) - _NAMED_TENANTS
            named = ", ".join(unknown[:_NAMED_TENANTS]) + (f" and {others} more" if others > 0 else "")
            raise InvalidRequest(path, f"no tenant has the id {named}", metadata={"tenant_ids": ",".join(unknown[:_NAMED_TENANTS])})


@dataclass(frozen=True, slots=True)
class FlagSet:
    """All flags at one version. Remembers what it decided for the tenants that were asked for most lately."""

    version: int
    flags: tuple[Flag, ...]
    _decided: dict[tuple[TenantId, str], frozenset[str]] = field(default_factory=dict, compare=False, repr=False)

    def enabled(self, tenant_id: TenantId, tier: str) -> frozenset[str]:
        """Returns the names of the flags that are on for the tenant."""
        key = (tenant_id, tier)
        names = self._decided.get(key)
        if names is None:
            names = frozenset(flag.name for flag in self.flags if evaluate(flag, tenant_id, tier).enabled)
            if len(self._decided) >= _REMEMBERED:
                del self._decided[next(iter(self._decided))]
            self._decided[key] = names
        return names
