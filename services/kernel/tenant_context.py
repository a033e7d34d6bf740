"""Who a call acts for, once it has been proven. Built only by verifiers and resolvers; servicers read it."""

from dataclasses import dataclass, field
from datetime import datetime

from services.kernel.ids import TenantId


@dataclass(frozen=True, slots=True)
class TenantContext:
    """A proven tenant and actor.

    `tenant_id` is None only for an operator who named no tenant. `token` is the signed form, passed on to other services.
    `flags` are the feature flags that are on. `placement` is pool, bridge or silo.
    """

    tenant_id: TenantId | None
    tier: str
    region: str
    subject: str
    scopes: frozenset[str]
    config_version: int
    expire_time: datetime
    operator: bool
    token: str = field(repr=False)
    flags: frozenset[str] = frozenset()
    placement: str = "pool"
    encrypt_content: bool = False
