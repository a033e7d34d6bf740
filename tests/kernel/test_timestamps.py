"""Times on the wire: the same moment on both sides, and no moment outside the calendar."""

from datetime import UTC, datetime, timedelta, timezone

import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from hypothesis import given
from hypothesis import strategies as st

from services.kernel.errors import InvalidRequest
from services.kernel.timestamps import from_timestamp, parse_timestamp, to_timestamp

ZONES = st.sampled_from([UTC, timezone(timedelta(hours=-8))])
MOMENTS = st.datetimes(datetime(2, 1, 1), datetime(9998, 1, 1), timezones=ZONES)  # noqa: DTZ001 - hypothesis wants naive bounds


@given(MOMENTS)
def test_a_moment_survives_the_wire_to_the_microsecond(moment: datetime) -> None:
    """A moment of any zone comes back as the same moment of UTC."""
    assert from_timestamp(to_timestamp(moment)) == moment
    assert from_timestamp(to_timestamp(moment)).tzinfo is UTC


def test_an_absent_moment_stays_absent() -> None:
    """None is no message, not the year 1970."""
    assert to_timestamp(None) is None


@pytest.mark.parametrize("stamp", [Timestamp(seconds=1 << 40), Timestamp(seconds=-(1 << 40)), Timestamp(nanos=-1), Timestamp(nanos=10**9)])
def test_a_time_out_of_the_calendar_is_refused_with_its_field(stamp: Timestamp) -> None:
    """What a caller sent is INVALID_REQUEST, naming the field; what a peer sent is a fault."""
    with pytest.raises(InvalidRequest) as refused:
        parse_timestamp(stamp, "start_time")
    assert [violation.field for violation in refused.value.field_violations] == ["start_time"]
    with pytest.raises(ValueError, match=r"."):
        from_timestamp(stamp)
