"""Guards of tenants in Redis: each method is one script a tenant."""

from collections.abc import Mapping, Sequence
from typing import cast

from services.kernel.ids import TenantId
from services.ratelimit.abuse_guard import AbuseCause, GuardState
from services.ratelimit.adapters.tenant_scripts import TenantScripts, each_tenant
from services.ratelimit.limit_rule import SECOND_US
from services.ratelimit.terms import GuardTerms

_CAUSES = {1: AbuseCause.REFUSALS, 2: AbuseCause.AUTH_FAILURES}


class RedisGuards:
    """Implements GuardStore."""

    def __init__(self, scripts: TenantScripts) -> None:
        self._scripts = scripts

    async def look(self, tenant_id: TenantId, terms: GuardTerms, refusals: int = 0) -> GuardState:
        """Counts refusals, opens the guard where that is due, and returns how it stands. Raises: Unavailable."""
        lengths = (terms.first_seconds * SECOND_US, max(terms.first_seconds, terms.most_seconds) * SECOND_US)
        most = (terms.auth_failures_per_minute, terms.refusals_per_minute)
        reply = await self._scripts.run("guard", tenant_id, 0, refusals, *most, *lengths)
        now_us, until_us, cause, counted = cast("tuple[int, int, int, int]", reply)
        return GuardState(now_us, until_us, _CAUSES[cause], counted)

    async def add_failures(self, failures: Mapping[TenantId, int]) -> None:
        """Counts failed authentications. Raises: Unavailable."""

        async def add(tenant_id: TenantId, _: Sequence[int]) -> None:
            await self._scripts.run("guard", tenant_id, failures[tenant_id], 0, 0, 0, 0, 0, bulk=True)

        await each_tenant(list(failures), 1, add)

    async def lift(self, tenant_id: TenantId) -> bool:
        """Closes it and forgets; tells whether it was open. Raises: Unavailable."""
        return await self._scripts.run("lift_guard", tenant_id) == 1
