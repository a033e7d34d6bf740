"""Reads the request and refuses what its contract does not allow: too many bytes, such that do not parse, unknown fields, broken rules.

Reading happens here and not in grpc, which answers INTERNAL for text that is not UTF-8 and spends the work before the caller is known.
"""

from collections.abc import AsyncIterator, Collection
from typing import Any

import grpc
import protovalidate
from google.protobuf.message import DecodeError, Message
from google.protobuf.unknown_fields import UnknownFieldSet

from mesh.common.v1 import error_reason_pb2
from services.kernel.errors import FieldViolation, InvalidRequest, MeshError
from services.kernel.rpc.encoded import Serializer, as_it_is
from services.kernel.rpc.interceptor import Behavior, Deserializer, MeshInterceptor, Method

_MAX_VIOLATIONS = 20
_validator = protovalidate.Validator()


class ValidationInterceptor(MeshInterceptor):
    """Hands only requests that keep their contract to the servicer.

    `own_checks` are the paths of unary methods whose servicers hold the rules themselves while they read, and ask `refuse_broken` in doubt.
    """

    def __init__(self, own_checks: Collection[str] = (), *, max_bytes: int = 4 * 1024 * 1024) -> None:
        super().__init__()
        self._own_checks = own_checks
        self._max_bytes = max_bytes

    def deserializer(self, current: Deserializer | None) -> Deserializer | None:
        """Takes the bytes as they are: this interceptor reads them itself."""
        return None

    def serializer(self, current: Serializer | None) -> Serializer | None:
        """Lets a servicer write bytes itself."""
        return as_it_is(current)

    def wrap(self, method: Method, inner: Behavior, deserialize: Deserializer | None) -> Behavior:
        """Returns the behaviour for raw bytes, or for a stream of them."""
        if deserialize is None:
            msg = f"{method.path} has no request type to validate"
            raise TypeError(msg)

        def read(raw: bytes) -> Message:
            if len(raw) > self._max_bytes:
                raise _too_large(len(raw), self._max_bytes)
            message: Message = deserialize(raw)
            return message

        parse = _parse_known if method.path in self._own_checks else parse_valid

        async def one(request: bytes, context: Any) -> Any:
            return await inner(parse(request, read), context)

        async def many(requests: AsyncIterator[bytes], context: Any) -> Any:
            return await inner(_each(requests, read), context)

        return many if method.request_streaming else one


def parse_valid(raw: bytes, read: Deserializer) -> Message:
    """Reads one message. Raises: MeshError INVALID_REQUEST with every violation, or UNKNOWN_FIELDS."""
    message = _parse_known(raw, read)
    refuse_broken(message)
    return message


def refuse_broken(message: Message) -> None:
    """Holds a message to the rules of its contract. Raises: MeshError INVALID_REQUEST with every violation."""
    violations = _validator.collect_violations(message)
    if violations:
        raise _refusal(violations)


def _parse_known(raw: bytes, read: Deserializer) -> Message:
    try:
        message: Message = read(raw)
    except DecodeError:
        raise InvalidRequest("", "the bytes are no such message, or a text in it is not UTF-8") from None
    if raw:
        _refuse_unknown(message, raw, read)
    return message


def _too_large(size: int, most: int) -> MeshError:
    # The code is the transport's, for messages that are larger still.
    return MeshError(
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        error_reason_pb2.ERROR_REASON_REQUEST_TOO_LARGE,
        f"the message has {size} bytes and at most {most} are taken: send less at once",
        metadata={"rule": "max_message_bytes", "limit": str(most), "requested": str(size)},
    )


async def _each(requests: AsyncIterator[bytes], read: Deserializer) -> AsyncIterator[Message]:
    async for raw in requests:
        yield parse_valid(raw, read)


def _refuse_unknown(message: Message, raw: bytes, read: Deserializer) -> None:
    # Dropping unknown fields and measuring is one pass in native code; walking the message in Python is not.
    message.DiscardUnknownFields()
    known = message.ByteSize()
    if known == len(raw):
        return
    # Unlike sizes may also come from another encoding of the same content, which is allowed.
    again: Message = read(raw)
    if again.ByteSize() == known:
        return
    raise MeshError(
        InvalidRequest("", "").code,
        error_reason_pb2.ERROR_REASON_UNKNOWN_FIELDS,
        "the request carries fields this version does not know; update the contract or leave them out",
        metadata={"message_type": _type_with_unknown(again) or message.DESCRIPTOR.full_name},
    )


def _type_with_unknown(message: Message) -> str | None:
    if len(UnknownFieldSet(message)):
        return message.DESCRIPTOR.full_name
    for field, value in message.ListFields():
        if field.message_type is None:
            continue
        for inner in _messages_in(value):
            found = _type_with_unknown(inner)
            if found is not None:
                return found
    return None


def _messages_in(value: Any) -> list[Message]:
    if isinstance(value, Message):
        return [value]
    items = value.values() if hasattr(value, "values") else value
    return [item for item in items if isinstance(item, Message)]


def _refusal(violations: list[protovalidate.Violation]) -> MeshError:
    found = [_violation(violation) for violation in violations[:_MAX_VIOLATIONS]]
    refusal = InvalidRequest(found[0].field, found[0].description)
    refusal.field_violations = tuple(found)
    return refusal


def _violation(violation: protovalidate.Violation) -> FieldViolation:
    path = ""
    proto = violation.proto
    for element in proto.field.elements if proto.field is not None else ():
        path += f".{element.field_name}" if path else element.field_name
        path += _subscript(element.subscript)
    return FieldViolation(path, proto.message or proto.rule_id)


def _subscript(subscript: Any) -> str:
    if subscript is None:
        return ""
    return f"[{subscript.value!r}]" if isinstance(subscript.value, str) else f"[{subscript.value}]"
