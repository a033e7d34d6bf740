"""Which sums answer for which part of a period: the coarsest that fit, and the calls themselves where none does. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import IntEnum
from itertools import groupby

# A Monday, on which weeks begin.
_EPOCH = datetime(1970, 1, 5, tzinfo=UTC)


class Grain(IntEnum):
    """How much one sum holds; the numbers are the database's. CALLS is none: the calls are read one by one."""

    CALLS = 0
    HOUR = 1
    DAY = 2
    USER_DAY = 3
    # Of one user, whatever it was used for.
    USER_ALONE_DAY = 4
    # Of the tenant, likewise.
    TENANT_DAY = 5
    # The same by weeks and hours.
    WEEK = 6
    USER_ALONE_WEEK = 7
    TENANT_WEEK = 8
    TENANT_HOUR = 9


# Coarsest first.
WITHOUT_USERS = (Grain.WEEK, Grain.DAY, Grain.HOUR)
WITH_USERS = (Grain.USER_DAY,)
USERS_ALONE = (Grain.USER_ALONE_WEEK, Grain.USER_ALONE_DAY)
TENANTS_ALONE = (Grain.TENANT_WEEK, Grain.TENANT_DAY, Grain.TENANT_HOUR)
LATENCIES = (Grain.DAY,)
LEVELS = (Grain.DAY, Grain.HOUR)
USER_LEVELS = (Grain.USER_DAY,)
_HOUR, _DAY, _WEEK = timedelta(hours=1), timedelta(days=1), timedelta(days=7)
LENGTHS = {
    Grain.HOUR: _HOUR,
    Grain.DAY: _DAY,
    Grain.USER_DAY: _DAY,
    Grain.USER_ALONE_DAY: _DAY,
    Grain.TENANT_DAY: _DAY,
    Grain.WEEK: _WEEK,
    Grain.USER_ALONE_WEEK: _WEEK,
    Grain.TENANT_WEEK: _WEEK,
    Grain.TENANT_HOUR: _HOUR,
}


@dataclass(frozen=True, slots=True)
class Segment:
    """From `start` to before `end`, both where sums of the grain begin: a part of the bucket of that number, from 0."""

    start: datetime
    end: datetime
    bucket: int
    grain: Grain


@dataclass(frozen=True, slots=True)
class Range:
    """From `start` to before `end`, over any number of buckets, all of it read in one grain."""

    start: datetime
    end: datetime
    grain: Grain


def segments(starts: Sequence[datetime], end: datetime, grains: Sequence[Grain]) -> list[Segment]:
    """Cuts the buckets that begin at `starts`, the last of which ends at `end`, into segments: in order, without a gap or an overlap."""
    found: list[Segment] = []
    for bucket, (first, last) in enumerate(zip(starts, [*starts[1:], end], strict=True)):
        found += _cover(first, last, bucket, grains)
    return found


def ranges(parts: Sequence[Segment]) -> list[Range]:
    """Joins segments that follow each other in one grain: each range is one look into an index, however many buckets it feeds."""
    joined = [list(group) for _, group in groupby(parts, key=lambda part: part.grain)]
    return [Range(group[0].start, group[-1].end, group[0].grain) for group in joined]


def _cover(first: datetime, last: datetime, bucket: int, grains: Sequence[Grain]) -> list[Segment]:
    if first >= last:
        return []
    if not grains:
        return [Segment(first, last, bucket, Grain.CALLS)]
    grain, finer = grains[0], grains[1:]
    length = LENGTHS[grain]
    if last - first < length:
        return _cover(first, last, bucket, finer)
    low, high = _EPOCH + -((_EPOCH - first) // length) * length, _EPOCH + (last - _EPOCH) // length * length
    if low >= high:
        return _cover(first, last, bucket, finer)
    return [*_cover(first, low, bucket, finer), Segment(low, high, bucket, grain), *_cover(high, last, bucket, finer)]
