"""What makes a delivery provable and bounded: the signature, the secret it is made with, and the pause before it is tried again.

Source: Standard Webhooks 1.0.
"""

import base64
import binascii
import hashlib
import hmac
import os
import random
from collections.abc import Sequence

MIN_SECRET_BYTES = 24
_NEW_SECRET_BYTES = 32
_SECRET_PREFIX = "whsec_"  # noqa: S105 - what a secret begins with
_FIRST_PAUSE_SECONDS = 1.0
_LONGEST_PAUSE_SECONDS = 3600.0


class DeliveryFailed(Exception):
    """The receiver did not take it; the message is one short line without its data."""


def signature_of(key: bytes, message_id: str, timestamp: int, body: bytes) -> str:
    """Returns `v1,<base64>`: HMAC-SHA-256 over id, time and body."""
    signed = f"{message_id}.{timestamp}.".encode() + body
    return "v1," + base64.b64encode(hmac.new(key, signed, hashlib.sha256).digest()).decode()


def signatures_of(keys: Sequence[bytes], message_id: str, timestamp: int, body: bytes) -> str:
    """Returns a signature by each key, parted by a space: while a secret is changed, a receiver that knows either one is content."""
    return " ".join(signature_of(key, message_id, timestamp, body) for key in keys)


def new_webhook_secret() -> str:
    """Returns a new secret of 32 random bytes: `whsec_<base64>`."""
    return _SECRET_PREFIX + base64.b64encode(os.urandom(_NEW_SECRET_BYTES)).decode()


def read_webhook_secret(text: str) -> bytes:
    """Returns the key of `whsec_<base64>`, or the bytes of any other text; at least 24. Raises: ValueError, repeating nothing of it."""
    key = text.strip().encode()
    if text.startswith(_SECRET_PREFIX):
        try:
            key = base64.b64decode(text.removeprefix(_SECRET_PREFIX), validate=True)
        except binascii.Error:
            key = b""
    if len(key) < MIN_SECRET_BYTES:
        msg = f"must hold a key of at least {MIN_SECRET_BYTES} bytes: set it to whsec_ and what `openssl rand -base64 32` prints"
        raise ValueError(msg)
    return key


def pause_seconds(attempts: int) -> float:
    """Returns how long to wait after so many attempts: doubled each time, capped, with full jitter above half."""
    return min(_LONGEST_PAUSE_SECONDS, _FIRST_PAUSE_SECONDS * 2.0 ** min(attempts - 1, 20)) * random.uniform(0.5, 1.0)  # noqa: S311 - jitter
