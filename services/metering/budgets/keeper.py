"""Looks at budgets whose usage changed.

Marks in the store say of whom that is. They go when a look has ended, so it does no harm that a replica is killed meanwhile or that two
look at once.
"""

import asyncio
import random
import time
from collections.abc import Callable

import structlog

from services.kernel.errors import MeshError, NotFound
from services.kernel.ids import TenantId
from services.metering.budgets.long_looks import LongLooks
from services.metering.budgets.look import BudgetLook
from services.metering.budgets.ports import MOST_MARKS, BudgetMarks, Marked

log = structlog.get_logger(__name__)

# The store gives up on who holds marks for 15 s: the last tenant that is begun with ends before.
_HOLDING_SECONDS, _TENANT_SECONDS = 3.0, 10.0


class BudgetKeeper:
    """One loop for `BackgroundTasks`: `run`. Whoever takes too long for the others is left to `long_looks`."""

    def __init__(self, marks: BudgetMarks, look: BudgetLook, long_looks: LongLooks, *, poll_seconds: float) -> None:
        self._marks = marks
        self._look = look
        self._long_looks = long_looks
        self._poll_seconds = poll_seconds

    async def run(self) -> None:
        """Looks for ever."""
        while True:
            try:
                await self.look()
            except MeshError as error:
                log.warning("budget_look_failed", reason=error.reason_name)
            await asyncio.sleep(self._poll_seconds * random.uniform(0.8, 1.2))  # noqa: S311 - jitter

    async def look(self) -> int:
        """Looks at whatever is marked, unless another process does; returns how many thresholds fired."""
        fired, more = 0, True
        # Who cannot be looked at now keeps nobody else from it, and is looked at the next time.
        failed = self._long_looks.tenants()
        while more:
            of_round, more = await self._look_round(failed)
            fired += of_round
        return fired

    async def _look_round(self, failed: set[TenantId]) -> tuple[int, bool]:
        """Looks once at each who is marked: nobody comes again before all others. Tells also whether marks may be left of somebody."""
        fired, more, seen = 0, False, set(failed)
        while True:
            until = time.monotonic() + _HOLDING_SECONDS
            async with self._marks.take(MOST_MARKS, seen) as taken:
                begun: list[TenantId] = []
                for marked in taken.tenants:
                    fired += await self._look_at(marked, taken.done.add)
                    begun.append(marked.tenant_id)
                    if time.monotonic() > until:
                        break
            seen.update(begun)
            failed.update(set(begun) - taken.done)
            whole = len(begun) == len(taken.tenants)
            if whole and taken.count < MOST_MARKS:
                return fired, more
            more = more or whole

    async def _look_at(self, marked: Marked, done: Callable[[TenantId], None]) -> int:
        began = time.monotonic()
        try:
            async with asyncio.timeout(_TENANT_SECONDS):
                fired = await self._look.fire(marked)
        except NotFound:
            # Nobody's any more: whatever was kept of it goes by its erasure.
            fired = 0
        except (MeshError, TimeoutError) as error:
            reason = error.reason_name if isinstance(error, MeshError) else "DEADLINE_EXCEEDED"
            log.warning("budgets_not_looked_at", tenant_id=str(marked.tenant_id), reason=reason)
            if isinstance(error, TimeoutError) or time.monotonic() - began > _HOLDING_SECONDS:
                # It would take as long again.
                self._long_looks.put(marked.tenant_id)
            return 0
        except Exception:
            # Whatever it is, it is this tenant's: raised, it would keep those after it from their looks, each time anew.
            log.exception("budget_look_crashed", tenant_id=str(marked.tenant_id))
            self._long_looks.put(marked.tenant_id)
            return 0
        done(marked.tenant_id)
        return fired
