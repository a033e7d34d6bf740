"""Days, months and billing cycles in a tenant's time zone, as spans of microseconds. Pure; right across changes of the clock."""

import calendar as months
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta, tzinfo
from zoneinfo import ZoneInfo

import structlog

from services.ratelimit.limit_rule import Window

log = structlog.get_logger(__name__)

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_TICK = timedelta(microseconds=1)
_DAY = timedelta(days=1)

# Four boundaries: the starts of the period before, of this one, of the next one, and of the one after that.
Boundaries = tuple[int, int, int, int]


def moment(us: int) -> datetime:
    """The UTC time of a count of microseconds, exactly."""
    return _EPOCH + timedelta(microseconds=us)


def microseconds(time: datetime) -> int:
    """The count of microseconds of a time, exactly."""
    return (time - _EPOCH) // _TICK


def time_zone(name: str) -> tzinfo:
    """The zone of an IANA name; UTC for an empty or unknown one, because a tenant's calls must not fail by its spelling."""
    if not name:
        return UTC
    try:
        return ZoneInfo(name)
    except (KeyError, ValueError, OSError):
        log.warning("time_zone_unknown", time_zone=name[:64])
        return UTC


@dataclass(frozen=True, slots=True)
class Calendar:
    """When a tenant's periods begin. `anchor_day` is the day of the month its billing cycle begins on: 1–31."""

    zone: tzinfo = UTC
    anchor_day: int = 1

    def boundaries(self, window: Window, now_us: int) -> Boundaries:
        """The boundaries around a moment: boundaries[1] <= now < boundaries[2], strictly rising."""
        start, end = self._period(window, now_us)
        before, _ = self._period(window, start - 1)
        _, after = self._period(window, end)
        return before, start, end, after

    def period(self, window: Window, us: int) -> tuple[int, int]:
        """The period that contains a moment: its start, inclusive, and its end, exclusive."""
        return self._period(window, us)

    def _period(self, window: Window, us: int) -> tuple[int, int]:
        local = moment(us).astimezone(self.zone).date()
        first = local if window is Window.DAY else _clamped(local.year, local.month, self._first_day(window))
        # A clock that is put back over midnight, or a billing day later in the month: the period that contains the moment is a neighbour.
        while self._begins(first) > us:
            first = self._neighbour(window, first, -1)
        following = self._neighbour(window, first, 1)
        while self._begins(following) <= us:
            first, following = following, self._neighbour(window, following, 1)
        return self._begins(first), self._begins(following)

    def _first_day(self, window: Window) -> int:
        return self.anchor_day if window is Window.CYCLE else 1

    def _neighbour(self, window: Window, first: date, step: int) -> date:
        if window is Window.DAY:
            return first + _DAY * step
        months = first.year * 12 + first.month - 1 + step
        return _clamped(months // 12, months % 12 + 1, self._first_day(window))

    def _begins(self, day: date) -> int:
        # fold=0: of a midnight that comes twice the first; one that never comes is the moment the clock is put forward over it.
        return microseconds(datetime(day.year, day.month, day.day, tzinfo=self.zone).astimezone(UTC))


def _clamped(year: int, month: int, day: int) -> date:
    return date(year, month, min(day, months.monthrange(year, month)[1]))
