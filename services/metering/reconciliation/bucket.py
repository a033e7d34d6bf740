"""Buckets of time that are reconciled each by itself: minutes, hours or days of UTC. Pure."""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import StrEnum

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class BucketWidth(StrEnum):
    """How long a bucket is, in the words of usage reports."""

    MINUTE = "1m"
    HOUR = "1h"
    DAY = "1d"

    @property
    def length(self) -> timedelta:
        """The same as a duration."""
        return _LENGTHS[self]


_LENGTHS = {BucketWidth.MINUTE: timedelta(minutes=1), BucketWidth.HOUR: timedelta(hours=1), BucketWidth.DAY: timedelta(days=1)}


@dataclass(frozen=True, slots=True)
class Bucket:
    """From `start` to before `end`."""

    start: datetime
    end: datetime

    def holds(self, moment: datetime) -> bool:
        """Tells whether the moment is in it."""
        return self.start <= moment < self.end


def buckets(start: datetime, end: datetime, width: BucketWidth) -> Iterator[Bucket]:
    """Yields the buckets that touch the stretch from `start` to before `end`, first first."""
    begin = start - (start - _EPOCH) % width.length
    while begin < end:
        yield Bucket(begin, begin + width.length)
        begin += width.length


def bucket_count(start: datetime, end: datetime, width: BucketWidth) -> int:
    """Returns how many there are."""
    begin = start - (start - _EPOCH) % width.length
    return max(0, -((begin - end) // width.length))
