"""Time as it is cut for questions about use: buckets of any zone, and the sums that answer for them."""

from datetime import UTC, datetime, timedelta
from itertools import pairwise
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.kernel.errors import InvalidRequest
from services.metering.usage_calendar import Bucket, bucket_starts, cycle, month_start, zone_of
from services.metering.usage_plan import (
    LATENCIES,
    LENGTHS,
    TENANTS_ALONE,
    USERS_ALONE,
    WITH_USERS,
    WITHOUT_USERS,
    Grain,
    ranges,
    segments,
)
from services.metering.usage_query import Dimension, UsageFilter, UsageQuery, period

ZONES = (
    "UTC",
    "Europe/Berlin",
    "America/New_York",
    "Asia/Kolkata",
    "Asia/Kathmandu",
    "Australia/Lord_Howe",
    "Pacific/Apia",
    "America/Sao_Paulo",
)
moments = st.integers(min_value=0, max_value=20 * 365 * 86_400 * 10**6).map(
    lambda us: datetime(2010, 1, 1, tzinfo=UTC) + timedelta(microseconds=us)
)
lengths = st.timedeltas(min_value=timedelta(microseconds=1), max_value=timedelta(days=45))
zones = st.sampled_from(ZONES).map(ZoneInfo)
MONDAY = datetime(2010, 1, 4, tzinfo=UTC)
EVERY_SUMS = (WITHOUT_USERS, WITH_USERS, USERS_ALONE, TENANTS_ALONE, LATENCIES, ())


@given(moments, lengths, zones, st.sampled_from(Bucket), st.sampled_from(EVERY_SUMS))
def test_segments_cover_a_period_once(
    start: datetime, length: timedelta, zone: ZoneInfo, bucket: Bucket, grains: tuple[Grain, ...]
) -> None:
    """They follow each other from start to end, each inside its bucket, and those of sums begin and end where sums do."""
    end = start + length
    starts = bucket_starts(bucket, start, end, zone)
    found = segments(starts, end, grains)
    assert [found[0].start, *(part.end for part in found)] == [*(part.start for part in found), end]
    assert found[0].start == start
    for part in found:
        assert starts[part.bucket] <= part.start < part.end <= [*starts[1:], end][part.bucket]
        if part.grain is not Grain.CALLS:
            assert part.grain in grains
            assert all((moment - MONDAY) % LENGTHS[part.grain] == timedelta() for moment in (part.start, part.end))


@given(moments, lengths, zones, st.sampled_from(Bucket), st.sampled_from(EVERY_SUMS))
def test_ranges_are_the_segments_of_a_grain_joined(
    start: datetime, length: timedelta, zone: ZoneInfo, bucket: Bucket, grains: tuple[Grain, ...]
) -> None:
    """They follow each other without a gap, no two of one grain, and each segment lies in the one of its grain."""
    parts = segments(bucket_starts(bucket, start, start + length, zone), start + length, grains)
    joined = ranges(parts)
    assert [joined[0].start, *(each.end for each in joined)] == [*(each.start for each in joined), start + length]
    assert all(earlier.grain is not later.grain for earlier, later in pairwise(joined))
    for part in parts:
        assert [each.grain for each in joined if each.start <= part.start < part.end <= each.end] == [part.grain]


@given(moments, lengths)
def test_single_calls_are_read_for_less_than_an_hour_at_each_end(start: datetime, length: timedelta) -> None:
    """Without users, in a zone of whole hours, sums answer for all but the broken hours."""
    found = segments([start], start + length, WITHOUT_USERS)
    single = [part for part in found if part.grain is Grain.CALLS]
    assert all(part.end - part.start < timedelta(hours=1) or length < timedelta(hours=2) for part in single)
    assert len(single) <= 2


@given(moments, lengths, zones, st.sampled_from((Bucket.HOUR, Bucket.DAY, Bucket.MONTH)))
def test_buckets_begin_where_the_clock_says(start: datetime, length: timedelta, zone: ZoneInfo, bucket: Bucket) -> None:
    """The first begins with the period; the others rise, each at a full hour, day or month of the zone, or after a leap of its clock."""
    starts = bucket_starts(bucket, start, start + length, zone)
    assert starts[0] == start
    assert all(earlier < later < start + length for earlier, later in pairwise(starts))
    for moment in starts[1:]:
        local, before = moment.astimezone(zone), (moment - timedelta(microseconds=1)).astimezone(zone)
        leapt = local.utcoffset() != before.utcoffset()
        assert leapt or (local.minute, local.second, local.microsecond) == (0, 0, 0)
        if bucket is not Bucket.HOUR:
            assert leapt or local.hour == 0
            assert local.date() != before.date()
        if bucket is Bucket.MONTH:
            assert local.month != before.month


def test_days_across_changes_of_the_clock() -> None:
    """The day the clock is put forward has 23 hours, the other one 25; a day that a zone left out has no bucket."""
    berlin = ZoneInfo("Europe/Berlin")
    spring = bucket_starts(Bucket.DAY, datetime(2026, 3, 28, 23, tzinfo=UTC), datetime(2026, 3, 30, 22, tzinfo=UTC), berlin)
    assert [later - earlier for earlier, later in pairwise(spring)] == [timedelta(hours=23)]
    autumn = bucket_starts(Bucket.DAY, datetime(2026, 10, 24, 22, tzinfo=UTC), datetime(2026, 10, 26, 22, tzinfo=UTC), berlin)
    assert [later - earlier for earlier, later in pairwise(autumn)] == [timedelta(hours=25)]
    apia = bucket_starts(Bucket.DAY, datetime(2011, 12, 29, 10, tzinfo=UTC), datetime(2012, 1, 1, 9, tzinfo=UTC), ZoneInfo("Pacific/Apia"))
    assert [moment.astimezone(ZoneInfo("Pacific/Apia")).day for moment in apia] == [29, 31, 1]


@given(moments, zones, st.integers(min_value=1, max_value=31))
def test_every_moment_has_one_cycle(now: datetime, zone: ZoneInfo, anchor_day: int) -> None:
    """It contains the moment, and the one that begins where it ends is the next."""
    start, end = cycle(now, zone, anchor_day)
    assert start <= now < end
    assert cycle(end, zone, anchor_day)[0] == end
    assert cycle(end - timedelta(microseconds=1), zone, anchor_day) == (start, end)
    assert start.astimezone(zone).day in (anchor_day, 28, 29, 30, 31, 1)


def test_an_anchor_is_clamped_to_the_month() -> None:
    """The 31st is the last day of a shorter month."""
    assert cycle(datetime(2026, 2, 28, 1, tzinfo=UTC), UTC, 31) == (datetime(2026, 2, 28, tzinfo=UTC), datetime(2026, 3, 31, tzinfo=UTC))
    assert month_start(datetime(2026, 2, 28, 1, tzinfo=UTC), UTC) == datetime(2026, 2, 1, tzinfo=UTC)


def test_a_period_has_defaults() -> None:
    """From the month's start in the zone to the end of the UTC day."""
    now = datetime(2026, 11, 28, 20, 15, tzinfo=UTC)
    first, last = period(None, None, Bucket.WHOLE, ZoneInfo("Asia/Tokyo"), now)
    assert (first, last) == (datetime(2026, 10, 31, 15, tzinfo=UTC), datetime(2026, 11, 29, tzinfo=UTC))


def test_unknown_zones_are_refused() -> None:
    """By the name of the field that named them."""
    assert (zone_of("", "zone"), zone_of("UTC", "zone")) == (UTC, UTC)
    for name in ("Europe/Atlantis", "../etc/passwd", "x" * 64):
        with pytest.raises(InvalidRequest):
            zone_of(name, "zone")


def test_weeks_answer_for_months() -> None:
    """Of thirty days the whole weeks are read as weeks, with users and without, and the days before and after as days."""
    start, whole = datetime(2026, 10, 29, tzinfo=UTC), [datetime(2026, 11, 2, tzinfo=UTC), datetime(2026, 11, 23, tzinfo=UTC)]
    for group_by, week in ((Dimension.USER, Grain.USER_ALONE_WEEK), (Dimension.MODEL, Grain.WEEK), (Dimension.TENANT, Grain.TENANT_WEEK)):
        query = UsageQuery(start, start + timedelta(days=30), group_by=frozenset({group_by}))
        parts = query.segments()
        assert [[part.start, part.end] for part in parts if part.grain is week] == [whole]
        assert [part.end - part.start for part in parts if part.grain is not week] == [timedelta(days=4), timedelta(days=5)]


def test_users_are_read_from_sums_that_know_them() -> None:
    """Whoever asks for users, or names some, is answered from days of users and from calls alone."""
    start = datetime(2026, 11, 1, 5, tzinfo=UTC)
    query = UsageQuery(start, start + timedelta(days=3))
    assert not query.of_users
    assert {part.grain for part in query.segments()} == {Grain.TENANT_HOUR, Grain.TENANT_DAY}
    by_model = UsageQuery(start, start + timedelta(days=3), group_by=frozenset({Dimension.MODEL}))
    assert {part.grain for part in by_model.segments()} == {Grain.HOUR, Grain.DAY}
    assert {part.grain for part in query.latency_segments()} == {Grain.DAY, Grain.CALLS}
    users, chat = frozenset({Dimension.USER}), UsageFilter(users=("user-1",), features=("chat",))
    for group_by, wanted, grain in (
        (users, UsageFilter(), Grain.USER_ALONE_DAY),
        (frozenset(), UsageFilter(users=("user-1",)), Grain.USER_ALONE_DAY),
        (users | {Dimension.MODEL}, UsageFilter(), Grain.USER_DAY),
        (frozenset(), chat, Grain.USER_DAY),
        (users, UsageFilter(product_units=("",)), Grain.USER_DAY),
    ):
        of_users = UsageQuery(start, start + timedelta(days=3), group_by=group_by, filter=wanted)
        assert {part.grain for part in of_users.segments()} == {grain, Grain.CALLS}
        assert {part.grain for part in of_users.latency_segments()} == {Grain.CALLS}
