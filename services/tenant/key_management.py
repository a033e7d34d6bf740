"""Where master keys are: a port that wraps and unwraps data keys, and how master keys are written in the environment.

A master key never leaves the port. Refuses text that names none, or the same one twice, without repeating it.
"""

import base64
import binascii
import re
from dataclasses import dataclass
from typing import Protocol

from services.kernel.errors import WrongState

MASTER_KEY_BYTES = 32
_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")


@dataclass(frozen=True, slots=True, repr=False)
class WrappedKey:
    """A data key as it may be stored: useless without the named master key. No repr: nothing of it belongs in a log."""

    master_key_id: str
    wrapped: bytes


class MasterKeyMissing(WrongState):
    """A data key is wrapped with a master key that is not configured here, or none is configured at all."""

    def __init__(self, master_key_id: str) -> None:
        named = f"the master key {master_key_id}" if master_key_id else "any master key"
        super().__init__("master_key", "MISSING", f"{named} is missing from TENANTRY_MASTER_KEYS; the operator has to add it")


class UnwrapFailed(Exception):
    """A wrapped key does not open under its master key and what it belongs to: it was altered, or moved to another row."""


class KeyManagement(Protocol):
    """A key management service, or the environment in its place."""

    @property
    def active_master_key_id(self) -> str:
        """Names the master key that new wrappings are made with; empty when there is none."""
        ...

    async def wrap(self, data_key: bytes, associated: bytes) -> WrappedKey:
        """Wraps with the active master key; `associated` says what the key belongs to. Raises: MasterKeyMissing, Unavailable."""
        ...

    async def unwrap(self, wrapped: WrappedKey, associated: bytes) -> bytes:
        """Returns the data key. Raises: UnwrapFailed, MasterKeyMissing, Unavailable."""
        ...


def parse_master_keys(text: str) -> dict[str, bytes]:
    """Reads `id:base64,id2:base64`, first one active. Raises: ValueError with a sentence that repeats no key."""
    keys: dict[str, bytes] = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        name, _, encoded = item.partition(":")
        try:
            key = base64.b64decode(encoded, validate=True)
        except binascii.Error:
            key = b""
        if not _NAME.fullmatch(name) or len(key) != MASTER_KEY_BYTES:
            msg = f"must list id:base64 of {MASTER_KEY_BYTES} bytes each, comma separated, the active one first"
            raise ValueError(msg)
        if name in keys:
            msg = "names the same master key twice"
            raise ValueError(msg)
        keys[name] = key
    return keys
