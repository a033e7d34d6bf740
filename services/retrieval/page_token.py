"""Page tokens: the last key of a page, opaque to callers. Refuses what it did not make."""

import base64
import binascii

from services.kernel.errors import InvalidRequest


def encode(last_key: str) -> str:
    """Makes the token that goes on after a key."""
    return base64.urlsafe_b64encode(b"k" + last_key.encode()).decode().rstrip("=")


def decode(token: str) -> str:
    """Returns the key to go on after; empty for an empty token. Raises: InvalidRequest."""
    if not token:
        return ""
    try:
        raw = base64.b64decode(token + "=" * (-len(token) % 4), altchars=b"-_", validate=True).decode()
    except (binascii.Error, ValueError):
        raw = ""
    if not raw.startswith("k") or "\x00" in raw:
        raise InvalidRequest("page_token", "is not one this service made: pass next_page_token of the page before, unchanged")
    return raw[1:]
