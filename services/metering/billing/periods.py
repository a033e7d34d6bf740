"""Billing periods: months of UTC that begin on a tenant's anchor day. Pure."""

import calendar
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

SHORTEST = timedelta(days=28)
# What was used longer before it was recorded is late usage of its period, and begins nothing.
LATE_USE = timedelta(days=92)
DEFAULT_ANCHOR_DAY = 1


@dataclass(frozen=True, slots=True, order=True)
class BillingPeriod:
    """From `start_time`, inclusive, to `end_time`, exclusive; both midnights of UTC."""

    start_time: datetime
    end_time: datetime

    @property
    def seconds(self) -> int:
        """How long it is."""
        return (self.end_time - self.start_time) // timedelta(seconds=1)


def period_of(moment: datetime, anchor_day: int) -> BillingPeriod:
    """Returns the period that contains a moment. An anchor of 29–31 is the last day of months that are shorter."""
    utc = moment.astimezone(UTC)
    start = _anchor(utc.year * 12 + utc.month - 1, anchor_day)
    step = 0 if start <= utc else -1
    months = utc.year * 12 + utc.month - 1 + step
    return BillingPeriod(_anchor(months, anchor_day), _anchor(months + 1, anchor_day))


def _anchor(months: int, anchor_day: int) -> datetime:
    year, month = months // 12, months % 12 + 1
    return datetime(year, month, min(anchor_day, calendar.monthrange(year, month)[1]), tzinfo=UTC)
