"""Times on the wire: moments as messages, and messages as moments of UTC. Refuses what no calendar holds."""

from datetime import UTC, datetime
from typing import overload

from google.protobuf.timestamp_pb2 import Timestamp

from services.kernel.errors import InvalidRequest

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


@overload
def to_timestamp(moment: datetime) -> Timestamp: ...
@overload
def to_timestamp(moment: None) -> None: ...
def to_timestamp(moment: datetime | None) -> Timestamp | None:
    """Returns the moment as a message; None stays absent."""
    if moment is None:
        return None
    # Timestamp.FromDatetime goes by way of the calendar, at three times the price.
    since = moment - _EPOCH
    return Timestamp(seconds=since.days * 86_400 + since.seconds, nanos=since.microseconds * 1_000)


def from_timestamp(stamp: Timestamp) -> datetime:
    """Returns the message as a moment. Raises: ValueError for one out of the calendar, which no peer of the mesh sends."""
    try:
        moment: datetime = stamp.ToDatetime(tzinfo=UTC)
    except OverflowError as error:
        raise ValueError(str(error)) from None
    return moment


def parse_timestamp(stamp: Timestamp, field: str) -> datetime:
    """Reads a moment that a caller sent. Raises: InvalidRequest(field)."""
    try:
        return from_timestamp(stamp)
    except ValueError:
        raise InvalidRequest(field, "must be a moment between the years 1 and 9999") from None
