"""What is kept one by one for a while: events by months, counts of refusals. Both leave their sums, so that what was made of them stays.

Refuses to drop a month that any tenant still needs, and says whose it is.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from typing import Protocol
from uuid import UUID

import structlog

from services.kernel.errors import MeshError
from services.kernel.telemetry.metrics import Counter

log = structlog.get_logger(__name__)

# A part takes well under a second, also of a tenant that records all day.
MOST_PER_PART = 20_000
# So long a round works before it lets others.
ROUND_SECONDS = 30.0
_DAY_SECONDS = 86_400.0
_RETRY_SECONDS = 60.0
_PAUSE_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class DueMonth:
    """A month of events that is past its retention: how many tenants still need it, and the first of them."""

    month: date
    holding: int
    held_by: UUID | None


class RetainedRows(Protocol):
    """Rows of all tenants that are past their retention, and their sums."""

    async def due(self, before: datetime) -> Sequence[DueMonth]:
        """Returns the months of events that ended by then, first first."""
        ...

    async def sum_events(self, month: date, most: int) -> int:
        """Adds up to `most` events of a month up; returns how many, 0 when all are, -1 while another replica does."""
        ...

    async def sum_refusals(self, before: datetime, most: int) -> int:
        """Adds up to `most` counts of earlier minutes up by the hour; returns how many."""
        ...


class DroppedMonths(Protocol):
    """The partitions of the table of events."""

    async def drop(self, month: date) -> None:
        """Removes the month's partition with everything in it, if it is there; from then on its sums count."""
        ...


@dataclass(frozen=True, slots=True)
class RetentionCounters:
    """What is counted of retention."""

    months_dropped: Counter
    months_held: Counter
    rows_summed: Counter


class Retention:
    """One loop for `BackgroundTasks`: `run`. Any number of replicas may run it: a part is added up once, a month dropped once."""

    def __init__(
        self,
        rows: RetainedRows,
        months: DroppedMonths | None,
        counters: RetentionCounters,
        *,
        retention_days: int,
        clock: Callable[[], datetime],
    ) -> None:
        """Without `months` no month is dropped."""
        self._rows = rows
        self._months = months
        self._counters = counters
        self._retention = timedelta(days=retention_days)
        self._clock = clock

    async def run(self) -> None:
        """Looks for ever: at once, then daily; sooner while there is more to do, and after a failure."""
        while True:
            try:
                pause = _DAY_SECONDS if await self.round() else _PAUSE_SECONDS
            except MeshError as error:
                log.warning("retention_failed", reason=error.reason_name)
                pause = _RETRY_SECONDS
            await asyncio.sleep(pause)

    async def round(self) -> bool:
        """Does what is due for at most half a minute; returns whether nothing is left to do."""
        deadline, before = time.monotonic() + ROUND_SECONDS, self._clock() - self._retention
        if not await self._sum_refusals(before, deadline):
            return False
        for due in await self._rows.due(before) if self._months is not None else ():
            if due.holding:
                self._counters.months_held.add(1)
                log.warning("event_month_held", month=due.month.isoformat(), tenants=due.holding, first_tenant=str(due.held_by))
            elif not await self._dropped(due.month, self._months, deadline):
                return False
        return True

    async def _dropped(self, month: date, months: DroppedMonths | None, deadline: float) -> bool:
        while (summed := await self._rows.sum_events(month, MOST_PER_PART)) != 0:
            if summed < 0 or time.monotonic() >= deadline:
                return False
            self._counters.rows_summed.add(summed, kind="event")
        if months is not None:
            await months.drop(month)
        self._counters.months_dropped.add(1)
        log.info("event_month_dropped", month=month.isoformat())
        return True

    async def _sum_refusals(self, before: datetime, deadline: float) -> bool:
        total = 0
        while (summed := await self._rows.sum_refusals(before, MOST_PER_PART)) > 0:
            total += summed
            self._counters.rows_summed.add(summed, kind="refusal")
            if time.monotonic() >= deadline:
                return False
        if total:
            log.info("refusals_summed", counts=total)
        return True
