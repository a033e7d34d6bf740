"""What a credential may be allowed to do. Refuses to widen: nobody hands out a scope they do not hold."""

from collections.abc import Iterable

from mesh.common.v1 import error_reason_pb2
from services.kernel.errors import Forbidden

OPERATOR_SCOPE = "operator:tenants"
# A front end asks which tenant a host names, and nothing else.
RESOLVE_SCOPE = "operator:resolve"
GENERATE_SCOPE = "inference:generate"
CONSUME_SCOPE = "limits:consume"
RECORD_SCOPE = "usage:write"
TENANT_SCOPES = frozenset(
    (
        GENERATE_SCOPE,
        "documents:read",
        "documents:write",
        "prompts:read",
        "prompts:write",
        "conversations:read",
        "conversations:write",
        "limits:read",
        CONSUME_SCOPE,
        "usage:read",
        RECORD_SCOPE,
        "tenant:read",
        "tenant:admin",
    )
)
# What costs the tenant something: its money, its units, or an entry on its bill.
_SPENDING_SCOPES = frozenset((GENERATE_SCOPE, CONSUME_SCOPE, RECORD_SCOPE))
# An operator looks after a tenant but never spends for it.
OPERATOR_TENANT_SCOPES = (TENANT_SCOPES - _SPENDING_SCOPES) | {OPERATOR_SCOPE, RESOLVE_SCOPE}
# Operators register issuers, and whoever has an issuer's key makes tokens: a new issuer grants at most what an operator may hand out.
# More is the tenant's own to grant.
ISSUER_SCOPES = TENANT_SCOPES - _SPENDING_SCOPES
FRONT_SCOPES = frozenset((RESOLVE_SCOPE,))
OPERATOR_SCOPES = frozenset((OPERATOR_SCOPE, RESOLVE_SCOPE))


def grantable(wanted: Iterable[str], held: frozenset[str]) -> list[str]:
    """Returns the wanted scopes, sorted. Raises: Forbidden(SCOPE_MISSING) for the first one the caller cannot hand out.

    An operator's own scope is not a tenant's to hold, so no key carries it whoever asks.
    """
    scopes = sorted(set(wanted))
    for scope in scopes:
        if scope not in held or scope not in TENANT_SCOPES:
            raise Forbidden(
                error_reason_pb2.ERROR_REASON_SCOPE_MISSING,
                f"your credential does not hold the scope {scope}, so it cannot hand it out",
                scope=scope,
            )
    return scopes
