"""What a tenant used in a period and what it costs: exact sums over the calls opened in it."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from services.kernel.errors import InvalidRequest
from services.metering.call import CallState, TokenUsage

MAX_PERIOD = timedelta(days=400)


@dataclass(frozen=True, slots=True)
class UsageGroup:
    """Calls opened in the period that share state, model, feature and price version, summed by the store."""

    state: CallState
    model: str
    feature: str
    price_version: str
    call_count: int
    usage: TokenUsage
    cost_nano_usd: int
    bound_nano_usd: int


@dataclass(frozen=True, slots=True)
class UsageLine:
    """Billed calls that share a model, a feature and a price version."""

    model: str
    feature: str
    price_version: str
    call_count: int
    usage: TokenUsage
    cost_nano_usd: int


@dataclass(frozen=True, slots=True)
class UsageReport:
    """The sums of a period. A call belongs to the period it was opened in, whenever it was settled."""

    start_time: datetime
    end_time: datetime
    lines: Sequence[UsageLine]
    total_nano_usd: int
    settled_count: int
    void_count: int
    open_count: int
    unresolved_count: int
    outstanding_bound_nano_usd: int


def refuse_bad_period(start: datetime, end: datetime) -> None:
    """Refuses a period that ends before it starts or is longer than 400 days. Raises: InvalidRequest."""
    if end < start:
        raise InvalidRequest("end_time", f"the period ends before it starts ({start.isoformat()}); give an end_time after the start_time")
    if end - start > MAX_PERIOD:
        raise InvalidRequest("start_time", "the period is longer than 400 days; ask for a shorter one")


def build_report(start: datetime, end: datetime, groups: Sequence[UsageGroup]) -> UsageReport:
    """Folds the store's sums into lines, by cost, highest first, and counts."""
    billed: dict[tuple[str, str, str], UsageLine] = {}
    counts = dict.fromkeys(CallState, 0)
    outstanding = 0
    for group in groups:
        counts[group.state] += group.call_count
        if group.state in (CallState.SETTLED, CallState.RECONCILED):
            key = (group.model, group.feature, group.price_version)
            billed[key] = _added(billed.get(key), group)
        elif group.state in (CallState.OPEN, CallState.UNRESOLVED):
            outstanding += group.bound_nano_usd
    lines = sorted(billed.values(), key=lambda line: (-line.cost_nano_usd, line.model, line.feature, line.price_version))
    return UsageReport(
        start_time=start,
        end_time=end,
        lines=lines,
        total_nano_usd=sum(line.cost_nano_usd for line in lines),
        settled_count=counts[CallState.SETTLED] + counts[CallState.RECONCILED],
        void_count=counts[CallState.VOID],
        open_count=counts[CallState.OPEN],
        unresolved_count=counts[CallState.UNRESOLVED],
        outstanding_bound_nano_usd=outstanding,
    )


def _added(line: UsageLine | None, group: UsageGroup) -> UsageLine:
    before = line or UsageLine(group.model, group.feature, group.price_version, 0, TokenUsage(), 0)
    usage = TokenUsage(
        before.usage.input + group.usage.input,
        before.usage.output + group.usage.output,
        before.usage.cache_read + group.usage.cache_read,
        before.usage.cache_write_5m + group.usage.cache_write_5m,
        before.usage.cache_write_1h + group.usage.cache_write_1h,
    )
    return UsageLine(
        group.model,
        group.feature,
        group.price_version,
        before.call_count + group.call_count,
        usage,
        before.cost_nano_usd + group.cost_nano_usd,
    )
