"""The months of events: made ahead, and dropped once they are past their retention and no invoice needs them."""

import asyncio
from collections.abc import Callable, Sequence
from datetime import UTC, date, datetime, timedelta
from typing import Protocol

import structlog

from services.kernel.errors import MeshError

log = structlog.get_logger(__name__)

MONTHS_AHEAD = 2
_DAY_SECONDS = 86_400.0
_RETRY_SECONDS = 60.0


class MonthStore(Protocol):
    """The partitions of the table of events, a UTC month each."""

    async def make(self, month: date) -> bool:
        """Makes the month's partition unless it is there; tells whether it did."""
        ...

    async def droppable(self, before: datetime) -> Sequence[date]:
        """Returns the months that ended by then and whose events no invoice needs, first first."""
        ...

    async def drop(self, month: date) -> None:
        """Removes the month's partition with everything in it, if it is there."""
        ...


def months_from(day: date) -> list[date]:
    """Returns the first days of the day's month and of those that are kept ahead of it."""
    return [date(day.year + (day.month - 1 + ahead) // 12, (day.month - 1 + ahead) % 12 + 1, 1) for ahead in range(MONTHS_AHEAD + 1)]


async def make_months(store: MonthStore, now: datetime) -> list[date]:
    """Makes the months that must be there at this moment, and returns those that were not. Idempotent."""
    return [month for month in months_from(now.astimezone(UTC).date()) if await store.make(month)]


class EventMonths:
    """One loop for `BackgroundTasks`: `run`."""

    def __init__(self, store: MonthStore, *, retention_days: int, clock: Callable[[], datetime]) -> None:
        self._store = store
        self._retention = timedelta(days=retention_days)
        self._clock = clock

    async def run(self) -> None:
        """Keeps the months for ever: at once, then daily; sooner after a failure."""
        while True:
            try:
                await self.keep()
                pause = _DAY_SECONDS
            except MeshError as error:
                log.warning("event_months_failed", reason=error.reason_name)
                pause = _RETRY_SECONDS
            await asyncio.sleep(pause)

    async def keep(self) -> None:
        """Makes what must be there and drops what may go."""
        now = self._clock()
        for month in await make_months(self._store, now):
            log.info("event_month_made", month=month.isoformat())
        for month in await self._store.droppable(now - self._retention):
            await self._store.drop(month)
            log.info("event_month_dropped", month=month.isoformat())
