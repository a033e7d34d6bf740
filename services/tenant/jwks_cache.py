"""Issuers' public keys, remembered. Refuses to ask an address more than once in five seconds, whoever sends what.

Keys are fresh for 300 s. While their address does not answer they serve 300 s longer, and then nobody can tell who signed.
"""

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import structlog

from services.kernel.errors import Unavailable
from services.kernel.request_context import remaining_seconds
from services.kernel.telemetry.shared_work import context_under, span_parent
from services.tenant.json_web_key import JsonWebKey, JwksMalformed, read_jwks

log = structlog.get_logger(__name__)

FRESH_SECONDS = 300.0
GRACE_SECONDS = 300.0
REFETCH_SECONDS = 5.0
_CACHE_SIZE = 10_000
_WAIT_SECONDS = 3.0
_ANSWER_SECONDS = 0.3


class JwksDown(Exception):
    """The address does not answer, or answers that it cannot."""


class JwksPrivate(JwksMalformed):
    """The address leads into a private network, and nothing was sent there."""


class JwksSource(Protocol):
    """Where key sets come from."""

    async def fetch(self, uri: str) -> bytes:
        """Returns what stands at the address.

        Raises: JwksDown; JwksPrivate; JwksMalformed for a redirect, another refusal and what is too large.
        """
        ...


@dataclass(slots=True)
class _Entry:
    keys: Mapping[str, JsonWebKey] = field(default_factory=dict)
    fetched_at: float | None = None
    attempted_at: float | None = None
    has_failed: bool = False
    fetching: "asyncio.Task[None] | None" = None


class JwksCache:
    """The keys at each address; at most one fetch of an address at a time."""

    def __init__(self, source: JwksSource, *, monotonic: Callable[[], float] = time.monotonic, cache_size: int = _CACHE_SIZE) -> None:
        self._source = source
        self._monotonic = monotonic
        self._cache_size = cache_size
        self._entries: OrderedDict[str, _Entry] = OrderedDict()

    async def find(self, uri: str, key_id: str) -> JsonWebKey | None:
        """Returns the key of this name, fetching the set when it is old or does not know the name; None for a name nobody has.

        Raises: Unavailable("jwks") when nobody can tell.
        """
        entry = self._entry(uri)
        if not self._is_known(entry, key_id, FRESH_SECONDS) and self._may_fetch(entry):
            await self._fetch(uri, entry)
        if self._is_known(entry, key_id, FRESH_SECONDS + GRACE_SECONDS):
            return entry.keys[key_id]
        if entry.has_failed or entry.fetching is not None or not self._is_younger(entry, FRESH_SECONDS + GRACE_SECONDS):
            raise Unavailable("jwks", "the issuer's keys cannot be had; try again shortly", REFETCH_SECONDS)
        return None

    def _is_known(self, entry: _Entry, key_id: str, seconds: float) -> bool:
        return key_id in entry.keys and self._is_younger(entry, seconds)

    def _is_younger(self, entry: _Entry, seconds: float) -> bool:
        return entry.fetched_at is not None and self._monotonic() - entry.fetched_at <= seconds

    def _may_fetch(self, entry: _Entry) -> bool:
        if entry.fetching is not None:
            return True
        return entry.attempted_at is None or self._monotonic() - entry.attempted_at >= REFETCH_SECONDS

    async def _fetch(self, uri: str, entry: _Entry) -> None:
        if entry.fetching is None:
            # In a task of its own: a caller who gives up must neither stop the fetch for others nor make room for another one.
            entry.fetching = asyncio.get_running_loop().create_task(self._run(uri, entry), context=context_under(span_parent()))
        # Left in time to answer: a caller cut off by its own deadline would take the whole service for absent.
        await asyncio.wait([entry.fetching], timeout=max(0.0, remaining_seconds(_WAIT_SECONDS) - _ANSWER_SECONDS))

    async def _run(self, uri: str, entry: _Entry) -> None:
        started = self._monotonic()
        entry.attempted_at = started
        try:
            entry.keys = read_jwks(await self._source.fetch(uri))
            entry.fetched_at, entry.has_failed = started, False
        except (JwksDown, JwksMalformed) as error:
            entry.has_failed = True
            log.warning("jwks_not_fetched", jwks_uri=uri, error=type(error).__name__)
        finally:
            entry.fetching = None

    def _entry(self, uri: str) -> _Entry:
        entry = self._entries.get(uri)
        if entry is None:
            entry = self._entries[uri] = _Entry()
            if len(self._entries) > self._cache_size:
                self._entries.popitem(last=False)
        self._entries.move_to_end(uri)
        return entry
