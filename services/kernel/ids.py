"""Ids of the mesh: typed UUIDs, minted as RFC 9562 version 7. Refuses text that is not a canonical UUID."""

import re
import secrets
import threading
import time
from datetime import UTC, datetime
from functools import lru_cache
from typing import NewType
from uuid import UUID

from services.kernel.errors import InvalidRequest

TenantId = NewType("TenantId", UUID)
CallId = NewType("CallId", UUID)
ReservationId = NewType("ReservationId", UUID)
DocumentId = NewType("DocumentId", UUID)

# The tenant in whose name stands what concerns no tenant, or all of them.
NO_TENANT = TenantId(UUID(int=0))

_CANONICAL = re.compile(r"[0-9A-Fa-f]{8}-[0-9A-Fa-f]{4}-[0-9A-Fa-f]{4}-[0-9A-Fa-f]{4}-[0-9A-Fa-f]{12}")

# As many tenants as a process knows at a time.
_KNOWN_TEXTS = 10_000

_RANDOM_BITS = 74
_LOW_BITS = 62
_LAST_GROUP_BITS = 48
_lock = threading.Lock()
_last: tuple[int, int] = (0, 0)


def new_uuid7(now: datetime | None = None) -> UUID:
    """Mints an id that sorts after every id minted before it in this process.

    With `now` the id carries that time and takes no part in the order. Source: RFC 9562 §5.7 and §6.2 method 2.
    """
    if now is not None:
        return _compose(int(now.timestamp() * 1000), secrets.randbits(_RANDOM_BITS))
    global _last
    with _lock:
        milliseconds = time.time_ns() // 1_000_000
        # The top random bit starts clear, so a burst within one millisecond has room to count up.
        # A clock that stands or steps back must not break the order: the id counts on from the last one.
        _last = (milliseconds, secrets.randbits(_RANDOM_BITS - 1)) if milliseconds > _last[0] else _increment(*_last)
        return _compose(*_last)


def new_uuid7s(count: int) -> list[bytes]:
    """Mints the ids of a batch as their 16 bytes: each sorts after the one before it, and all after every id minted before in this process.

    Source: RFC 9562 §6.2 method 2.
    """
    first = _first_of(count)
    return [(first + index).to_bytes(16, "big") for index in range(count)]


def new_uuid7_texts(count: int) -> list[str]:
    """Mints the ids of a batch as `new_uuid7s` does, in their canonical form."""
    return _texts(_first_of(count), count)


def uuid7_time(value: UUID) -> datetime | None:
    """Returns when a version 7 id was minted, to the millisecond; None for any other version."""
    if value.version != 7:
        return None
    try:
        return datetime.fromtimestamp((value.int >> 80) / 1000, tz=UTC)
    except (ValueError, OverflowError, OSError):
        return None


def parse_uuid(text: str, field: str) -> UUID:
    """Parses the canonical 36-character form, in either case.

    Raises: InvalidRequest(field) for anything else; braces, URNs and bare hex are other spellings of the same id and are refused.
    """
    if _CANONICAL.fullmatch(text):
        # From its number: UUID takes a text apart again to learn what is known here, and every call has two.
        return UUID(int=int(text.replace("-", ""), 16))
    raise InvalidRequest(field, "must be a UUID such as 01900000-0000-7000-8000-000000000000")


@lru_cache(maxsize=_KNOWN_TEXTS)
def uuid_text(value: UUID) -> str:
    """Returns the canonical form of an id that is written with every call, such as a proven tenant's."""
    return str(value)


def uuid_from_bytes(value: bytes, field: str) -> UUID:
    """Reads the 16 bytes of an id from a message. Raises: InvalidRequest(field) for any other length."""
    if len(value) != 16:
        raise InvalidRequest(field, "must be the 16 bytes of a UUID")
    return UUID(bytes=value)


def _increment(milliseconds: int, random: int) -> tuple[int, int]:
    following = random + 1 + secrets.randbits(32)
    if following >> _RANDOM_BITS:
        return milliseconds + 1, secrets.randbits(_RANDOM_BITS - 1)
    return milliseconds, following


def _compose(milliseconds: int, random: int) -> UUID:
    high = random >> _LOW_BITS
    low = random & ((1 << _LOW_BITS) - 1)
    return UUID(int=(milliseconds & ((1 << 48) - 1)) << 80 | 0x7 << 76 | high << 64 | 0b10 << 62 | low)


def _first_of(count: int) -> int:
    global _last
    with _lock:
        now = time.time_ns() // 1_000_000
        milliseconds, random = (now, secrets.randbits(_RANDOM_BITS - 1)) if now > _last[0] else _increment(*_last)
        if (random % (1 << _LOW_BITS)) + count >= 1 << _LOW_BITS:
            # They count up in the bits below the variant alone: where these would run over, a new stretch begins.
            milliseconds, random = milliseconds + 1, secrets.randbits(_LOW_BITS - 1)
        _last = (milliseconds, random + count)
    return _compose(milliseconds, random).int


def _texts(first: int, count: int) -> list[str]:
    last_group = first % (1 << _LAST_GROUP_BITS)
    if last_group + count > 1 << _LAST_GROUP_BITS:
        return [str(UUID(int=first + index)) for index in range(count)]
    # All have the other groups in common: written once.
    others = str(UUID(int=first))[:-12]
    return [f"{others}{last_group + index:012x}" for index in range(count)]
