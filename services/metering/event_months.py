"""The months of events, made ahead of the events."""

import asyncio
from collections.abc import Callable
from datetime import UTC, date, datetime
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


def months_from(day: date) -> list[date]:
    """Returns the first days of the day's month and of those that are kept ahead of it."""
    return [date(day.year + (day.month - 1 + ahead) // 12, (day.month - 1 + ahead) % 12 + 1, 1) for ahead in range(MONTHS_AHEAD + 1)]


async def make_months(store: MonthStore, now: datetime) -> list[date]:
    """Makes the months that must be there at this moment, and returns those that were not. Idempotent."""
    return [month for month in months_from(now.astimezone(UTC).date()) if await store.make(month)]


class EventMonths:
    """One loop for `BackgroundTasks`: `run`."""

    def __init__(self, store: MonthStore, *, clock: Callable[[], datetime]) -> None:
        self._store = store
        self._clock = clock

    async def run(self) -> None:
        """Makes months for ever: at once, then daily; sooner after a failure."""
        while True:
            try:
                await self.keep()
                pause = _DAY_SECONDS
            except MeshError as error:
                log.warning("event_months_failed", reason=error.reason_name)
                pause = _RETRY_SECONDS
            await asyncio.sleep(pause)

    async def keep(self) -> None:
        """Makes what must be there."""
        for month in await make_months(self._store, self._clock()):
            log.info("event_month_made", month=month.isoformat())
