"""The limits of the tenant that calls, out of its configuration at the tenant service."""

from collections.abc import Sequence

from mesh.common.v1.limit_rule_pb2 import LimitRule
from services.kernel.tenant_config import TenantConfigCache
from services.kernel.tenant_context import TenantContext


class TenantRules:
    """Implements RulesInForce."""

    def __init__(self, configs: TenantConfigCache) -> None:
        self._configs = configs

    async def of(self, context: TenantContext, *, newest: bool = False) -> Sequence[LimitRule]:
        """Returns the rules; with `newest` none that was remembered. Raises: NotFound when the tenant is gone; Unavailable."""
        config = await (self._configs.newest(context) if newest else self._configs.get(context))
        return config.limit_rules.rules
