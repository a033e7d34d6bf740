"""Mints the tokens that Qdrant itself enforces: one collection, reading or reading and writing, for a short time.

A Qdrant token without an `access` claim has full rights, so this is the only place that makes one and it always writes the claim.
"""

import base64
import hashlib
import hmac
import json
import time
from collections import OrderedDict
from typing import Literal

from pydantic import SecretStr

LIFETIME_SECONDS = 240
REUSE_SECONDS = 120
CAPACITY = 10_000

_HEADER = base64.urlsafe_b64encode(b'{"alg":"HS256","typ":"JWT"}').rstrip(b"=")


class CollectionTokens:
    """Tokens for single collections, reused for half of their life."""

    def __init__(self, api_key: SecretStr) -> None:
        self._key = api_key.get_secret_value().encode()
        self._known: OrderedDict[tuple[str, str], tuple[str, float]] = OrderedDict()

    def mint(self, collection: str, access: Literal["r", "rw"]) -> str:
        """Returns a token for exactly this name, good for at least two minutes more."""
        known = self._known.get((collection, access))
        if known is not None and known[1] > time.monotonic():
            return known[0]
        token = self._sign(
            {"exp": time.time_ns() // 1_000_000_000 + LIFETIME_SECONDS, "access": [{"collection": collection, "access": access}]}
        )
        self._known[(collection, access)] = (token, time.monotonic() + REUSE_SECONDS)
        self._known.move_to_end((collection, access))
        if len(self._known) > CAPACITY:
            self._known.popitem(last=False)
        return token

    def _sign(self, claims: dict[str, object]) -> str:
        payload = base64.urlsafe_b64encode(json.dumps(claims, separators=(",", ":")).encode()).rstrip(b"=")
        signed = _HEADER + b"." + payload
        signature = base64.urlsafe_b64encode(hmac.new(self._key, signed, hashlib.sha256).digest()).rstrip(b"=")
        return (signed + b"." + signature).decode()
