"""JSON Web Tokens as text: taken apart before anything is believed. Refuses what has more than one reading.

Nothing here is proven: `verify` in json_web_key proves the signature over the very text that was taken apart.
"""

import base64
import binascii
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass

MAX_TOKEN_LENGTH = 4096
MAX_AUDIENCES = 10
_SHAPE = re.compile(r"[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+")
_MAX_KEY_ID_LENGTH = 256

Claims = Mapping[str, object]


@dataclass(frozen=True, slots=True, repr=False)
class JsonWebToken:
    """A token taken apart. It has no repr: its text is a credential."""

    text: str
    algorithm: str
    key_id: str
    issuer: str
    audiences: tuple[str, ...]
    claims: Claims


def parse_token(text: str) -> JsonWebToken | None:
    """Takes a token apart; None for what is no signed token of the one form that is taken."""
    if len(text) > MAX_TOKEN_LENGTH or not _SHAPE.fullmatch(text):
        return None
    header, claims = (_object(part) for part in text.split(".")[:2])
    # `crit` lists what a reader must understand, and `b64` changes what is signed: neither is understood here.
    if header is None or claims is None or "crit" in header or "b64" in header:
        return None
    algorithm, key_id, issuer = header.get("alg"), header.get("kid"), claims.get("iss")
    audiences = _audiences(claims.get("aud"))
    if not isinstance(algorithm, str) or not isinstance(key_id, str) or not isinstance(issuer, str):
        return None
    if not 1 <= len(key_id) <= _MAX_KEY_ID_LENGTH or not audiences or not issuer.isprintable():
        return None
    return JsonWebToken(text, algorithm, key_id, issuer, audiences, claims)


def _audiences(claim: object) -> tuple[str, ...]:
    named = [claim] if isinstance(claim, str) else claim
    if not isinstance(named, list) or len(named) > MAX_AUDIENCES:
        return ()
    if not all(isinstance(name, str) and "\x00" not in name and name.isprintable() for name in named):
        return ()
    return tuple(dict.fromkeys(named))


def _object(part: str) -> Claims | None:
    try:
        raw = base64.b64decode(part + "=" * (-len(part) % 4), altchars=b"-_", validate=True)
        read = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
    except (binascii.Error, ValueError, RecursionError):
        return None
    return read if isinstance(read, dict) else None


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    # A name said twice is read one way by one reader and another way by the next.
    found = dict(pairs)
    if len(found) != len(pairs):
        msg = "a name occurs twice"
        raise ValueError(msg)
    return found


def _no_constant(name: str) -> object:
    msg = f"{name} is no JSON"
    raise ValueError(msg)
