"""Looks at the budgets of tenants that take too long for the others: one tenant after another, each until it is done.

What is set aside is known to this process alone. Another, or this one when it begins anew, finds out again.
"""

import asyncio
import time

import structlog

from services.kernel.errors import MeshError, NotFound
from services.kernel.ids import TenantId
from services.metering.budgets.look import BudgetLook
from services.metering.budgets.ports import MOST_MARKS, BudgetMarks

log = structlog.get_logger(__name__)

_TENANT_SECONDS = 600.0
# After its look a tenant is left alone for so long: by then it may be quick again, and is looked at among the others.
_ASIDE_SECONDS = 60.0


class LongLooks:
    """One loop for `BackgroundTasks`: `run`."""

    def __init__(self, marks: BudgetMarks, look: BudgetLook) -> None:
        self._marks = marks
        self._look = look
        # Until when each is left alone; None: it waits for its look, in this order, or has it now.
        self._until: dict[TenantId, float | None] = {}
        self._any = asyncio.Event()

    def put(self, tenant_id: TenantId) -> None:
        """Sets a tenant aside, to be looked at here."""
        self._until[tenant_id] = None
        self._any.set()

    def tenants(self) -> set[TenantId]:
        """Who is set aside now."""
        now = time.monotonic()
        self._until = {tenant_id: until for tenant_id, until in self._until.items() if until is None or until > now}
        return set(self._until)

    async def run(self) -> None:
        """Looks for ever."""
        while True:
            while waiting := [tenant_id for tenant_id, until in self._until.items() if until is None]:
                try:
                    await self._look_at(waiting[0])
                finally:
                    # The last of all, should it be set aside again.
                    del self._until[waiting[0]]
                    self._until[waiting[0]] = time.monotonic() + _ASIDE_SECONDS
            # After the look and not before it: a loop that crashed and begins anew finds those who still wait.
            self._any.clear()
            await self._any.wait()

    async def _look_at(self, tenant_id: TenantId) -> None:
        began = time.monotonic()
        try:
            async with asyncio.timeout(_TENANT_SECONDS):
                while await self._look_once(tenant_id) == MOST_MARKS:
                    pass
        except (MeshError, TimeoutError) as error:
            reason = error.reason_name if isinstance(error, MeshError) else "DEADLINE_EXCEEDED"
            log.warning("budgets_not_looked_at", tenant_id=str(tenant_id), reason=reason, seconds=round(time.monotonic() - began))
        else:
            log.info("budgets_took_long", tenant_id=str(tenant_id), seconds=round(time.monotonic() - began))

    async def _look_once(self, tenant_id: TenantId) -> int:
        """Looks at some of its marks; returns how many."""
        async with self._marks.take_of(tenant_id, MOST_MARKS) as taken:
            for marked in taken.tenants:
                try:
                    await self._look.fire(marked)
                except NotFound:
                    log.info("budgets_of_nobody", tenant_id=str(tenant_id))
                taken.done.add(marked.tenant_id)
        return taken.count
