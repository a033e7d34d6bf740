"""Page tokens: where a list goes on, as opaque text. Refuses text that this service did not make for the same list.

A token only carries a position, never a right: a made-up one that fits reads no more than a caller may read anyway.
"""

import base64
import binascii
import json
from collections.abc import Sequence

from services.kernel.errors import InvalidRequest

DEFAULT_PAGE_SIZE = 100


def encode(listing: str, position: Sequence[str]) -> str:
    """Returns the token for going on after this position of the named list."""
    raw = json.dumps([listing, *position], separators=(",", ":"), ensure_ascii=True).encode()
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def decode(token: str, listing: str, length: int) -> list[str] | None:
    """Returns the position, or None for the first page. Raises: InvalidRequest(page_token)."""
    if not token:
        return None
    try:
        raw = base64.b64decode(token + "=" * (-len(token) % 4), altchars=b"-_", validate=True)
        parts = json.loads(raw)
    except (binascii.Error, ValueError, RecursionError):
        raise invalid() from None
    if not isinstance(parts, list) or len(parts) != length + 1 or parts[0] != listing:
        raise invalid()
    if not all(isinstance(part, str) and part.isascii() and part.isprintable() for part in parts):
        raise invalid()
    return [str(part) for part in parts[1:]]


def page_size(asked: int) -> int:
    """Returns how many items a page holds: what was asked for, or the default for 0."""
    return asked or DEFAULT_PAGE_SIZE


def invalid() -> InvalidRequest:
    """Builds the refusal of a token that is none."""
    return InvalidRequest("page_token", "must be the next_page_token of an earlier answer of the same list")
