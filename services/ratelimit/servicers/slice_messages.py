"""Slices as messages, and requests for them out of messages."""

from mesh.ratelimit.v1 import rate_limit_service_pb2 as messages
from services.kernel.ids import ReservationId, parse_uuid
from services.ratelimit.limit_rule import SECOND_US
from services.ratelimit.limits import subject_of
from services.ratelimit.servicers.limit_messages import duration, limit_messages
from services.ratelimit.slice import Slice, SliceRequest, SliceReturn

# As long as a message may ask for; the store gives less.
_LONGEST_LEASE_US = 2 * SECOND_US


def slice_request_of(message: messages.TakeSliceRequest) -> SliceRequest:
    """What a TakeSlice asks for."""
    return SliceRequest(
        ReservationId(parse_uuid(message.slice_id, "slice_id")),
        message.product_unit,
        message.quantity,
        message.lease.ToMicroseconds() if message.HasField("lease") else _LONGEST_LEASE_US,
        subject_of(message.user, message.feature),
    )


def slice_message(taken: Slice) -> messages.TakeSliceResponse:
    """A slice as a message."""
    answer = taken.answer
    return messages.TakeSliceResponse(
        granted=answer.quantity,
        epoch=answer.epoch,
        lease=duration(answer.lease_us / SECOND_US),
        largest_use=answer.largest_use,
        limits=limit_messages(taken.limits),
    )


def slice_return_of(message: messages.SliceReturn) -> SliceReturn:
    """A slice that is used no more."""
    return SliceReturn(ReservationId(parse_uuid(message.slice_id, "slice_id")), message.epoch, message.used)
