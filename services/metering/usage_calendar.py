"""Hours, days, months and billing cycles in a time zone, as moments of UTC. Pure; right across changes of the clock."""

import calendar
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta, tzinfo
from enum import IntEnum
from typing import Protocol
from zoneinfo import ZoneInfo

from services.kernel.errors import InvalidRequest
from services.kernel.tenant_context import TenantContext

_HOUR = timedelta(hours=1)
_DAY = timedelta(days=1)


class Bucket(IntEnum):
    """How time is cut; the numbers are the contract's."""

    WHOLE = 0
    HOUR = 1
    DAY = 2
    MONTH = 3


@dataclass(frozen=True, slots=True)
class TenantCalendar:
    """A tenant's time zone, its name empty for UTC, and the day of the month its billing cycle begins on: 1–31."""

    zone_name: str
    zone: tzinfo
    anchor_day: int


class Calendars(Protocol):
    """Knows tenants' calendars."""

    async def of(self, context: TenantContext) -> TenantCalendar:
        """Returns the calendar of the context's tenant. Raises: MeshError."""
        ...


def zone_of(name: str, field: str) -> tzinfo:
    """Returns the zone of an IANA name, UTC for an empty one. Raises: InvalidRequest(field) for a name nobody knows."""
    zone = known_zone(name)
    if zone is UTC and name not in ("", "UTC"):
        raise InvalidRequest(field, f'no time zone is called "{name[:64]}"; give an IANA name such as "Europe/Berlin"')
    return zone


def known_zone(name: str) -> tzinfo:
    """Returns the zone of an IANA name; UTC for an empty or unknown one."""
    if name in ("", "UTC"):
        return UTC
    try:
        return ZoneInfo(name)
    except (KeyError, ValueError, OSError):
        return UTC


def bucket_starts(bucket: Bucket, start: datetime, end: datetime, zone: tzinfo) -> list[datetime]:
    """Returns where each bucket of a period begins, rising: the first one at `start`, none at or after `end`, which is after `start`."""
    starts = [start]
    for moment in _boundaries(bucket, start, zone):
        if moment >= end:
            break
        # A day that a zone left out begins when the next one does.
        if moment > starts[-1]:
            starts.append(moment)
    return starts


def month_start(now: datetime, zone: tzinfo) -> datetime:
    """Returns when the calendar month of a moment began in the zone."""
    return month_of(now, zone)[0]


def day_of(now: datetime, zone: tzinfo) -> tuple[datetime, datetime]:
    """Returns the start and end of the calendar day of a moment in the zone."""
    day = now.astimezone(zone).date()
    return _begins(day, zone), _begins(day + _DAY, zone)


def month_of(now: datetime, zone: tzinfo) -> tuple[datetime, datetime]:
    """Returns the start and end of the calendar month of a moment in the zone."""
    return cycle(now, zone, 1)


def cycle(now: datetime, zone: tzinfo, anchor_day: int) -> tuple[datetime, datetime]:
    """Returns the start and end of the billing cycle of a moment; `anchor_day`, 1–31, is clamped to the month's last day."""
    local = now.astimezone(zone)
    month = local.year * 12 + local.month - 1
    # An anchor later in the month, or a clock that is put back over midnight: the cycle is a neighbour's.
    first = next(each for each in (month + 1, month, month - 1) if _begins(_anchored(each, anchor_day), zone) <= now)
    return _begins(_anchored(first, anchor_day), zone), _begins(_anchored(first + 1, anchor_day), zone)


def _boundaries(bucket: Bucket, start: datetime, zone: tzinfo) -> Iterator[datetime]:
    match bucket:
        case Bucket.WHOLE:
            return
        case Bucket.HOUR:
            yield from _hours(start, zone)
        case Bucket.DAY:
            day = start.astimezone(zone).date()
            while True:
                yield _begins(day, zone)
                day += _DAY
        case Bucket.MONTH:
            local = start.astimezone(zone)
            month = local.year * 12 + local.month - 1
            while True:
                yield _begins(_anchored(month, 1), zone)
                month += 1


def _hours(start: datetime, zone: tzinfo) -> Iterator[datetime]:
    moment = start
    while True:
        local = moment.astimezone(zone)
        moment += _HOUR - timedelta(minutes=local.minute, seconds=local.second, microseconds=local.microsecond)
        yield moment


def _anchored(month: int, day: int) -> date:
    year, number = month // 12, month % 12 + 1
    return date(year, number, min(day, calendar.monthrange(year, number)[1]))


def _begins(day: date, zone: tzinfo) -> datetime:
    # fold=0: of a midnight that comes twice the first; one that never comes is the moment the clock is put forward over it.
    return datetime(day.year, day.month, day.day, tzinfo=zone).astimezone(UTC)
