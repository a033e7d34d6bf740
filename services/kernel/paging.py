"""Pages of a list: how many items, where the next page starts, and its opaque token. Refuses tokens this service did not make for the list.

A token carries a position, never a right: its check is no signature, and whoever computes one reads no more than they may read anyway.
"""

import base64
import binascii
import hashlib
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import TypeVar

from services.kernel.errors import InvalidRequest

Item = TypeVar("Item")

DEFAULT_PAGE_SIZE = 100
_VERSION = b"\x01"
_CHECK_BYTES = 12
# Never part of a position: Postgres keeps no text that holds it.
_SEPARATOR = "\x00"


def page_size(asked: int) -> int:
    """Returns how many items a page holds: what was asked for, or the default for 0."""
    return asked or DEFAULT_PAGE_SIZE


def cut_page(found: Sequence[Item], size: int, token_after: Callable[[Item], str]) -> tuple[Sequence[Item], str]:
    """Cuts what a store found for `size + 1` items: the page, and the token of the next one, empty when this is the last."""
    if len(found) <= size:
        return found, ""
    return found[:size], token_after(found[size - 1])


def encode_page_token(listing: str, position: Sequence[str]) -> str:
    """Returns the token that goes on after a position of the named list, whose name says its tenant and filter where they matter."""
    body = _SEPARATOR.join(position).encode()
    return base64.urlsafe_b64encode(_VERSION + _check(listing, body) + body).rstrip(b"=").decode()


def decode_page_token(token: str, listing: str, length: int) -> tuple[str, ...] | None:
    """Returns the position, of `length` texts, or None for the first page. Raises: InvalidRequest(page_token)."""
    if not token:
        return None
    try:
        raw = base64.b64decode(token + "=" * (-len(token) % 4), altchars=b"-_", validate=True)
        check, body = raw[len(_VERSION) :][:_CHECK_BYTES], raw[len(_VERSION) + _CHECK_BYTES :]
        position = tuple(body.decode().split(_SEPARATOR))
    except (binascii.Error, ValueError):
        raise refused_page_token() from None
    if not raw.startswith(_VERSION) or check != _check(listing, body) or len(position) != length:
        raise refused_page_token()
    return position


def position_time(text: str) -> datetime:
    """Reads a moment out of a position, as `isoformat` wrote it. Raises: InvalidRequest(page_token)."""
    try:
        moment = datetime.fromisoformat(text)
        if moment.tzinfo is not None:
            return moment.astimezone(UTC)
    except (ValueError, OverflowError):
        pass
    raise refused_page_token()


def refused_page_token() -> InvalidRequest:
    """Builds the refusal of a token that is none, or another list's."""
    return InvalidRequest("page_token", "must be the next_page_token of an earlier page of the same list, its filter unchanged")


def _check(listing: str, body: bytes) -> bytes:
    return hashlib.sha256(listing.encode() + _SEPARATOR.encode() + body).digest()[:_CHECK_BYTES]
