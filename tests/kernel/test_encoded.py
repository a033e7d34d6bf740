"""What a servicer serialises itself arrives as what it is."""

import pytest
from google.protobuf.unknown_fields import UnknownFieldSet
from hypothesis import given
from hypothesis import strategies as st

from mesh.ratelimit.v1 import rate_limit_service_pb2 as messages
from services.kernel.rpc.encoded import as_it_is, encoded, submessage


@given(st.lists(st.binary(max_size=300) | st.integers(120, 70_000).map(bytes), max_size=5))
def test_contents_put_together_are_the_message_that_has_them(contents: list[bytes]) -> None:
    """Of every length, and in order."""
    held = messages.ReserveBatchOutcome(held=messages.ReserveResponse(epoch=7))
    failed = [messages.ReserveBatchOutcome(error_status=content) for content in contents]
    together = b"".join(submessage(1, item.SerializeToString()) for item in (held, *failed))
    assert together == messages.ReserveBatchResponse(outcomes=[held, *failed]).SerializeToString()


@pytest.mark.parametrize("number", [15, 16, 2_047, 2_048, 536_870_911])
def test_every_field_number_is_written_as_protobuf_does(number: int) -> None:
    """A reader that does not know the field keeps it as it came."""
    written = submessage(number, b"abc")
    (unknown,) = UnknownFieldSet(messages.ReserveBatchOutcome.FromString(written))
    assert (unknown.field_number, unknown.wire_type, unknown.data) == (number, 2, b"abc")


def test_only_what_was_serialised_is_left_alone() -> None:
    """A message is serialised as before, and bytes that nobody called a message are refused by its type."""
    kind = messages.ReserveResponse
    serialize = as_it_is(kind.SerializeToString)
    assert serialize is not None
    message = kind(epoch=3)
    assert serialize(message) == serialize(encoded(kind, message.SerializeToString())) == message.SerializeToString()
    with pytest.raises(TypeError):
        serialize(b"\x08\x03")
    assert as_it_is(None) is None
