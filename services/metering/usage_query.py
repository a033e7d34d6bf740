"""What is asked of use and what is answered, as values; and the port that answers. A period is cut here, and bounded."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta, tzinfo
from enum import IntEnum
from functools import lru_cache
from typing import Protocol
from uuid import UUID

from services.kernel.errors import InvalidRequest
from services.kernel.ids import TenantId
from services.metering.call import TokenUsage
from services.metering.usage_calendar import Bucket, bucket_starts, month_start
from services.metering.usage_plan import (
    LATENCIES,
    LEVELS,
    TENANTS_ALONE,
    USER_LEVELS,
    USERS_ALONE,
    WITH_USERS,
    WITHOUT_USERS,
    Grain,
    Range,
    Segment,
    ranges,
    segments,
)

MAX_PERIOD = timedelta(days=400)
MAX_PERIOD_OF_HOURS = timedelta(days=32)
# The same periods are asked about again and again, by all tenants.
_KEPT_PERIODS = 256
# Whatever the zone, the calendar holds the buckets before and after.
_EARLIEST, _LATEST = datetime(1970, 1, 1, tzinfo=UTC), datetime(9999, 1, 1, tzinfo=UTC)


class Dimension(IntEnum):
    """What use is told apart by; the numbers are the contract's."""

    TENANT = 1
    USER = 2
    FEATURE = 3
    MODEL = 4
    PROMPT_VERSION = 5
    PROVIDER = 6
    TIER = 7
    PRODUCT_UNIT = 8
    EVENT_TYPE = 9
    REFUSAL_REASON = 10
    REFUSAL_RULE = 11


class Measure(IntEnum):
    """What rows are ordered by; the numbers are the contract's."""

    TIME = 0
    COST = 1
    SETTLED = 2
    FAILED = 3
    FAILED_SHARE = 4
    RETRIES = 5
    RETRY_SHARE = 6
    TOKENS = 7
    CACHE_HIT_SHARE = 8
    QUANTITY = 9
    FIRST_TOKEN_P95 = 10
    TOTAL_P95 = 11
    REFUSALS = 12


@dataclass(frozen=True, slots=True)
class UsageFilter:
    """What is counted: any of the names of a list, all where it is empty."""

    users: Sequence[str] = ()
    features: Sequence[str] = ()
    models: Sequence[str] = ()
    prompt_versions: Sequence[str] = ()
    providers: Sequence[str] = ()
    tiers: Sequence[str] = ()
    product_units: Sequence[str] = ()
    event_types: Sequence[str] = ()
    refusal_reasons: Sequence[str] = ()
    refusal_rules: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class UsageQuery:
    """From `start` to before `end`, UTC, in buckets of the zone."""

    start: datetime
    end: datetime
    zone: tzinfo = UTC
    bucket: Bucket = Bucket.WHOLE
    group_by: frozenset[Dimension] = frozenset()
    filter: UsageFilter = field(default_factory=UsageFilter)
    order_by: Measure = Measure.TIME
    ascending: bool = False
    with_latencies: bool = False

    @property
    def of_users(self) -> bool:
        """True when users matter: sums without them cannot answer."""
        return Dimension.USER in self.group_by or bool(self.filter.users)

    @property
    def tells_latencies(self) -> bool:
        """True when latencies are read."""
        return self.with_latencies or self.order_by in (Measure.FIRST_TOKEN_P95, Measure.TOTAL_P95)

    def bucket_starts(self) -> Sequence[datetime]:
        """Returns where each bucket begins."""
        return _starts(self.bucket, self.start, self.end, self.zone)

    def segments(self) -> list[Segment]:
        """Returns the parts of the period with the sums that answer for them."""
        return segments(self.bucket_starts(), self.end, self._grains())

    def ranges(self) -> Sequence[Range]:
        """Returns the same without the buckets."""
        return _ranges(self.bucket, self.start, self.end, self.zone, self._grains())

    def _grains(self) -> Sequence[Grain]:
        others = self.group_by - {Dimension.TENANT, Dimension.USER} or self.filter != UsageFilter(users=self.filter.users)
        if self.of_users:
            return WITH_USERS if others else USERS_ALONE
        return WITHOUT_USERS if others else TENANTS_ALONE

    def level_ranges(self) -> Sequence[Range]:
        """As `ranges`, for levels of which the highest counts."""
        return _ranges(self.bucket, self.start, self.end, self.zone, USER_LEVELS if self.of_users else LEVELS)

    def latency_segments(self) -> list[Segment]:
        """As `segments`, for latencies."""
        return segments(self.bucket_starts(), self.end, self._latency_grains())

    def latency_ranges(self) -> Sequence[Range]:
        """As `ranges`, for latencies."""
        return _ranges(self.bucket, self.start, self.end, self.zone, self._latency_grains())

    def _latency_grains(self) -> Sequence[Grain]:
        return () if self.of_users else LATENCIES


@lru_cache(maxsize=_KEPT_PERIODS)
def _starts(bucket: Bucket, start: datetime, end: datetime, zone: tzinfo) -> Sequence[datetime]:
    return tuple(bucket_starts(bucket, start, end, zone))


@lru_cache(maxsize=_KEPT_PERIODS)
def _ranges(bucket: Bucket, start: datetime, end: datetime, zone: tzinfo, grains: Sequence[Grain]) -> Sequence[Range]:
    return tuple(ranges(segments(_starts(bucket, start, end, zone), end, grains)))


def period(start: datetime | None, end: datetime | None, bucket: Bucket, zone: tzinfo, now: datetime) -> tuple[datetime, datetime]:
    """Returns a period with its defaults: from the month's start in the zone to the end of the UTC day. Raises: InvalidRequest."""
    first = month_start(now, zone) if start is None else start
    last = now.astimezone(UTC).replace(hour=0, minute=0, second=0, microsecond=0) + timedelta(days=1) if end is None else end
    if last <= first:
        raise InvalidRequest(
            "query.end_time", f"the period ends before it starts ({first.isoformat()}); give an end_time after the start_time"
        )
    if first < _EARLIEST or last > _LATEST:
        field_name = "query.start_time" if first < _EARLIEST else "query.end_time"
        raise InvalidRequest(field_name, "must be a moment from 1970 to 9998")
    longest = MAX_PERIOD_OF_HOURS if bucket is Bucket.HOUR else MAX_PERIOD
    if last - first > longest:
        raise InvalidRequest("query.start_time", f"the period is longer than {longest.days} days; ask for a shorter one")
    return first, last


@dataclass(frozen=True, slots=True)
class Failures:
    """Attempts by why they ended without a bill."""

    refused: int
    overloaded: int
    provider_failed: int
    cancelled: int
    deadline: int
    lost: int
    other: int


@dataclass(frozen=True, slots=True)
class Latency:
    """Percentiles in milliseconds, each within 5 %, of so many attempts."""

    count: int
    p50_ms: float
    p95_ms: float
    p99_ms: float


@dataclass(frozen=True, slots=True)
class GroupKey:
    """Which group of which bucket: names that were not asked for are empty."""

    bucket: int
    tenant_id: UUID
    names: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class GroupUse:
    """What a group used. `names` of the key stand in the order of Dimension, from USER on. A quantity that is cut is beyond an int64."""

    key: GroupKey
    rank: int
    settled: int
    void: int
    unresolved: int
    reconciled: int
    retries: int
    failures: Failures
    usage: TokenUsage
    cost_nano_usd: int
    quantity: int
    is_quantity_cut: bool
    refusals: int
    first_token: Latency | None
    total: Latency | None

    @property
    def cache_hit_share(self) -> float:
        """The share of input that was read from the provider's cache: 0–1."""
        written = self.usage.cache_write_5m + self.usage.cache_write_1h
        read, whole = self.usage.cache_read, self.usage.input + self.usage.cache_read + written
        return read / whole if whole > 0 else 0.0


@dataclass(frozen=True, slots=True)
class RowPosition:
    """The last row of the page before: its rank, which rises along the rows, and its key."""

    rank: int
    key: GroupKey


@dataclass(frozen=True, slots=True)
class UnitUsed:
    """What was used of a unit."""

    product_unit: str
    quantity: int


@dataclass(frozen=True, slots=True)
class Balance:
    """What was used of a cycle at a moment, and what may still come."""

    read_time: datetime
    cost_nano_usd: int
    settled_count: int
    usage: TokenUsage
    units: Sequence[UnitUsed]
    outstanding_count: int
    outstanding_nano_usd: int


class UsageQueries(Protocol):
    """Answers from the sums, and from what is not in them yet."""

    async def of_tenant(self, tenant_id: TenantId, query: UsageQuery, after: RowPosition | None, size: int) -> Sequence[GroupUse]:
        """Returns up to `size` groups of the tenant after the position."""
        ...

    async def of_tenants(self, tenant_ids: Sequence[UUID], query: UsageQuery, after: RowPosition | None, size: int) -> Sequence[GroupUse]:
        """As `of_tenant`, over these tenants; all where the list is empty."""
        ...

    async def balance(self, tenant_id: TenantId, start: datetime, end: datetime) -> Balance:
        """Returns what the tenant used of a cycle, at one moment."""
        ...
