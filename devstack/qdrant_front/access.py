"""Who a caller is and what it may do, by Qdrant's own rules: the API key, or a JWT signed HS256 with that key as the secret.

The trap: a token without an `access` claim has full rights. `exp` is honoured with 30 seconds of leeway for clock skew.
Aliases: a collection-scoped token is checked against the name written in the request, before the alias is resolved, and never again after.
So a token for an alias reaches whatever the alias points at, also after a swap, and a token for the collection does not admit its alias;
listing shows an alias only to a token that names both. Refuses the `value_exists` claim and every algorithm other than HS256.
Source: qdrant/qdrant, lib/storage/src/rbac, src/common/auth and pull request 3863.
"""

import base64
import binascii
import hashlib
import hmac
import json
from collections.abc import Iterable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from enum import Enum
from typing import Literal, cast

from .failure import Failure, forbidden, unauthenticated, unimplemented

EXPIRY_LEEWAY_SECONDS = 30

CollectionMode = Literal["r", "rw", "prw"]
Json = None | bool | int | float | str | list["Json"] | dict[str, "Json"]


class Need(Enum):
    """What an operation on one collection needs of the caller."""

    READ = "read"
    WRITE_POINTS = "write points"
    WRITE_SCHEMA = "write payload indexes"


@dataclass(frozen=True, slots=True)
class Access:
    """The rights of one caller: global (`manages` or read only) when `collections` is None, else those collections alone."""

    manages: bool
    collections: Mapping[str, CollectionMode] | None = None

    def require_manage(self) -> None:
        """Admit only a caller that may create, delete and rename collections."""
        if self.collections is not None:
            raise forbidden("Global access is required")
        if not self.manages:
            raise forbidden("Global manage access is required")

    def require(self, collection_name: str, need: Need) -> None:
        """Admit a caller that may do this to the collection of exactly this name."""
        if self.collections is None:
            if need is not Need.READ and not self.manages:
                raise forbidden("Global manage access is required")
            return
        mode = self.collections.get(collection_name)
        if mode is None:
            raise forbidden(f"Access to collection {collection_name} is required")
        if need is Need.WRITE_SCHEMA and mode == "prw":
            raise forbidden(f"Only points access is allowed for collection {collection_name}")
        if need is not Need.READ and mode == "r":
            raise forbidden(f"Write access to collection {collection_name} is required")

    def sees(self, name: str) -> bool:
        """Tell whether listings show this name to the caller."""
        return self.collections is None or name in self.collections


FULL_ACCESS = Access(manages=True)
CURRENT_ACCESS: ContextVar[Access] = ContextVar("qdrant_front_access")


class Authenticator:
    """Turns the metadata of a call into the caller's rights."""

    def __init__(self, api_key: str) -> None:
        if not api_key:
            raise ValueError("the API key is empty")
        self._key = api_key.encode()

    def authenticate(self, metadata: Iterable[tuple[str, str | bytes]], now_unix_seconds: float) -> Access:
        """Read `api-key`, or failing that `authorization: Bearer`.

        Raises:
            Failure: UNAUTHENTICATED when there is no usable credential, PERMISSION_DENIED for a bad signature or an expired token.
        """
        credential = _credential(metadata)
        if hmac.compare_digest(credential.encode(), self._key):
            return FULL_ACCESS
        return self._from_token(credential, now_unix_seconds)

    def _from_token(self, token: str, now_unix_seconds: float) -> Access:
        header_text, _, rest = token.partition(".")
        claims_text, _, signature_text = rest.partition(".")
        try:
            header = _json_object(header_text)
            signature = _base64url(signature_text)
        except ValueError:
            raise _not_a_credential() from None
        if header.get("alg") != "HS256":
            raise _not_a_credential()
        expected = hmac.digest(self._key, f"{header_text}.{claims_text}".encode(), hashlib.sha256)
        if not hmac.compare_digest(signature, expected):
            raise Failure(forbidden("").code, "InvalidSignature")
        try:
            return _access_of(_json_object(claims_text), now_unix_seconds)
        except ValueError:
            raise _not_a_credential() from None


def _credential(metadata: Iterable[tuple[str, str | bytes]]) -> str:
    headers = {key: value for key, value in metadata if isinstance(value, str)}
    bearer = headers.get("authorization", "")
    if "api-key" in headers:
        return headers["api-key"]
    if bearer.startswith("Bearer "):
        return bearer.removeprefix("Bearer ")
    raise unauthenticated("Must provide an API key or an Authorization bearer token")


def _not_a_credential() -> Failure:
    return unauthenticated("Invalid API key or JWT")


def _base64url(text: str) -> bytes:
    if "=" in text or "+" in text or "/" in text:
        raise ValueError("not unpadded base64url")
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
    except binascii.Error as error:
        raise ValueError("not base64url") from error


def _unique(pairs: list[tuple[str, Json]]) -> dict[str, Json]:
    # A claim given twice is two answers to one question; the strict reading refuses the token.
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key is given twice")
    return found


def _json_object(encoded: str) -> dict[str, Json]:
    try:
        decoded = json.loads(_base64url(encoded), object_pairs_hook=_unique)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(decoded, dict):
        raise ValueError("not a JSON object")
    return cast(dict[str, Json], decoded)


def _access_of(claims: dict[str, Json], now_unix_seconds: float) -> Access:
    expiry = claims.get("exp")
    if expiry is not None:
        if not isinstance(expiry, int) or isinstance(expiry, bool) or expiry < 0:
            raise ValueError("exp is not a time")
        if expiry < now_unix_seconds - EXPIRY_LEEWAY_SECONDS:
            raise Failure(forbidden("").code, "ExpiredSignature")
    if claims.get("value_exists") is not None:
        raise unimplemented("The JWT claim value_exists")
    if "access" not in claims:
        return FULL_ACCESS
    match claims["access"]:
        case "r":
            return Access(manages=False)
        case "m":
            return FULL_ACCESS
        case list() as entries:
            return Access(manages=False, collections=_collections_of(entries))
    raise ValueError("access is neither r, m nor a list")


def _collections_of(entries: list[Json]) -> dict[str, CollectionMode]:
    collections: dict[str, CollectionMode] = {}
    for entry in entries:
        if not isinstance(entry, dict):
            raise ValueError("an access entry is not an object")
        name, mode = entry.get("collection"), entry.get("access")
        if not isinstance(name, str) or mode not in ("r", "rw", "prw"):
            raise ValueError("an access entry lacks its collection or its mode")
        if entry.get("payload") is not None:
            raise unauthenticated("The 'payload' constraint is deprecated and should not be used")
        if name in collections:
            raise unauthenticated(f"Collection name should be unique: {name}")
        collections[name] = cast(CollectionMode, mode)
    return collections
