"""What the store says is used, and when each window gives something back.

Times are microseconds of the store's clock; calendars are UTC.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from services.ratelimit.limits import Limits, Rule

MICROSECONDS = 1_000_000
_DAY_US = 86_400 * MICROSECONDS
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class Usage:
    """One look at a tenant's counters.

    `…_free_us` is when that sliding window has room for the call in question; 0 when it has, or never will.
    """

    now_us: int
    epoch: int
    reserve_us: int
    expired_holds: int
    requests: int
    tokens_minute: int
    tokens_day: int
    cost_month: int
    running: int
    oldest_us: int
    requests_free_us: int
    tokens_free_us: int

    def in_order(self) -> tuple[int, int, int, int, int]:
        """What is used, held and pinned, in the order of `Rule`."""
        return (self.requests, self.tokens_minute, self.tokens_day, self.cost_month, self.running)


@dataclass(frozen=True, slots=True)
class LimitStatus:
    """One limit as it stands. `reset_us` is None where no clock gives anything back."""

    rule: Rule
    limit: int
    used: int
    reset_us: int | None

    @property
    def remaining(self) -> int:
        """What is left: never below 0, as more may be used than was held."""
        return max(0, self.limit - self.used)


def statuses(limits: Limits, usage: Usage, window_us: int) -> list[LimitStatus]:
    """Every limited rule as it stands, in the order of `Rule`."""
    resets = _resets(usage, window_us)
    return [
        LimitStatus(rule, limit, used, reset)
        for rule, limit, used, reset in zip(Rule, limits.in_order(), usage.in_order(), resets, strict=True)
        if limit
    ]


def day_end_us(now_us: int) -> int:
    """When the UTC day of `now_us` ends."""
    return now_us - now_us % _DAY_US + _DAY_US


def month_end_us(now_us: int) -> int:
    """When the UTC month of `now_us` ends."""
    now = moment(now_us)
    following = datetime(now.year + now.month // 12, now.month % 12 + 1, 1, tzinfo=UTC)
    return microseconds(following)


def moment(us: int) -> datetime:
    """The UTC time of a count of microseconds, exactly."""
    return _EPOCH + timedelta(microseconds=us)


def microseconds(time: datetime) -> int:
    """The count of microseconds of a time, exactly."""
    return (time - _EPOCH) // timedelta(microseconds=1)


def _resets(usage: Usage, window_us: int) -> Sequence[int | None]:
    # An empty window has nothing to give back: it is as free as it will be now.
    sliding = usage.oldest_us + window_us if usage.oldest_us else usage.now_us
    return (sliding, sliding, day_end_us(usage.now_us), month_end_us(usage.now_us), None)
