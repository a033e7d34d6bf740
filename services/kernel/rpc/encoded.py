"""Answers that a servicer serialises itself: what it wrote goes out as it is. For those that come by the thousand.

To put a message into another serialises and parses it, and then the whole is serialised again; bytes are only put together.
"""

from collections.abc import Callable
from typing import Any, TypeVar, cast

from google.protobuf.message import Message

M = TypeVar("M", bound=Message)
Serializer = Callable[[Any], bytes]

_LENGTH_DELIMITED = 2


class _Encoded:
    # Not bytes with another name: grpc takes nothing but bytes themselves.
    __slots__ = ("content",)

    def __init__(self, content: bytes) -> None:
        self.content = content


def encoded(kind: type[M], content: bytes) -> M:
    """The serialised message, for a servicer to return. Nothing but sending it is possible."""
    return cast("M", _Encoded(content))


def as_it_is(serialize: Serializer | None) -> Serializer | None:
    """The serialiser of a method, which leaves alone what is serialised."""
    if serialize is None:
        return None

    def written(response: Any) -> bytes:
        return response.content if type(response) is _Encoded else serialize(response)

    return written


def submessage(number: int, content: bytes) -> bytes:
    """A serialised message as the field of another. Source: the Protocol Buffers encoding, length-delimited records."""
    return _varint(number << 3 | _LENGTH_DELIMITED) + _varint(len(content)) + content


def _varint(value: int) -> bytes:
    if value < 0x80:
        return bytes((value,))
    digits = bytearray()
    while value > 0x7F:
        digits.append(value & 0x7F | 0x80)
        value >>= 7
    digits.append(value)
    return bytes(digits)
