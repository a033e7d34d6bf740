"""What changes at the tenant service, heard as it happens, so that what is remembered here can be trusted or forgotten.

Refuses to call itself fresh on a word it did not just get: a feed that fell silent is blind, and its readers ask instead.
"""

import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable, Collection
from enum import Enum
from typing import TypeAlias
from uuid import UUID

import grpc
import structlog

from mesh.tenant.v1 import authentication_service_pb2 as messages
from mesh.tenant.v1 import authentication_service_pb2_grpc
from services.kernel.errors import MeshError, Unavailable
from services.kernel.ids import TenantId
from services.kernel.rpc.channel import MeshChannel

log = structlog.get_logger(__name__)

# What a subscriber is told: whose change, None for everybody's, and its kind; EVERYTHING when nobody can say what was missed.
Listener: TypeAlias = Callable[[TenantId | None, str], None]
EVERYTHING = "EVERYTHING"

FRESH_SECONDS = 0.75
# A stream ends by itself now and then, so that replicas that came later get their share of watchers.
_WATCH_SECONDS = 300.0
_SILENT_SECONDS = 2.0
_FIRST_BACKOFF_SECONDS = 0.05
_MAX_BACKOFF_SECONDS = 1.0
_UNSERVED_SECONDS = 10.0
_EVERYBODY = UUID(int=0)


class FeedState(Enum):
    """How far what is remembered can be trusted now."""

    FRESH = "FRESH"
    # Silent, cut off, or not begun yet: something may have changed unheard.
    STALE = "STALE"
    # The tenant service is of a version that has no feed.
    UNSERVED = "UNSERVED"


class ChangeFeed:
    """Watches on one channel; `run` is a loop for BackgroundTasks."""

    def __init__(
        self,
        channel: MeshChannel,
        *,
        monotonic: Callable[[], float] = time.monotonic,
        silent_seconds: float = _SILENT_SECONDS,
        unserved_seconds: float = _UNSERVED_SECONDS,
    ) -> None:
        self._channel = channel
        self._stub = authentication_service_pb2_grpc.AuthenticationServiceStub(channel.channel)
        self._monotonic = monotonic
        self._silent_seconds = silent_seconds
        self._unserved_seconds = unserved_seconds
        self._listeners: list[Listener] = []
        self._position = 0
        self._read_at = float("-inf")
        self._is_unserved = False
        self._failures = 0

    def subscribe(self, listener: Listener) -> None:
        """Calls back for every change from now on, in order, before the feed vouches for it. The callback must not raise or wait."""
        self._listeners.append(listener)

    def forget_on(self, kinds: Collection[str], forget: Callable[[TenantId | None], None]) -> None:
        """Has a cache forget a tenant when a change of these kinds is told, and everybody when nobody can say what was missed."""
        self.subscribe(lambda tenant_id, kind: forget(tenant_id) if tenant_id is None or kind in kinds else None)

    @property
    def position(self) -> int:
        """The change up to which everything was heard."""
        return self._position

    @property
    def read_at(self) -> float:
        """When the table of changes was last known to be read, on time.monotonic(): every change committed before was heard."""
        return self._read_at

    @property
    def state(self) -> FeedState:
        """How far what is remembered can be trusted now."""
        if self._monotonic() - self._read_at <= FRESH_SECONDS:
            return FeedState.FRESH
        return FeedState.UNSERVED if self._is_unserved else FeedState.STALE

    @property
    def is_fresh(self) -> bool:
        """True while every change of more than 750 ms ago has certainly been heard."""
        return self._monotonic() - self._read_at <= FRESH_SECONDS

    async def run(self) -> None:
        """Watches until cancelled, coming back at once when a stream ends and later when it ends again."""
        while True:
            try:
                await self._watch()
                # The service ended it in good order, or told nothing at all.
            except MeshError as error:
                self._note(error)
            await asyncio.sleep(self._pause())

    async def _watch(self) -> None:
        request = messages.WatchChangesRequest(after_change_id=self._position)
        limit = _WATCH_SECONDS * random.uniform(0.8, 1.0)  # noqa: S311 - jitter
        async with self._channel.stream(self._stub.WatchChanges, request, timeout_seconds=limit) as stream:
            responses = aiter(stream)
            while (response := await self._next(responses)) is not None:
                self._hear(response)

    async def _next(self, responses: AsyncIterator[messages.WatchChangesResponse]) -> messages.WatchChangesResponse | None:
        try:
            async with asyncio.timeout(self._silent_seconds):
                return await anext(responses, None)
        except TimeoutError:
            # A connection that is dead without a word: nothing but our own patience ends it.
            raise Unavailable("tenant") from None

    def _hear(self, response: messages.WatchChangesResponse) -> None:
        # Taken before the listeners run: whatever they take counts against the feed.
        read_at = self._monotonic() - response.read_age.ToNanoseconds() / 1e9
        if response.forget_everything:
            self._tell(None, EVERYTHING)
        for change in response.changes:
            whose = UUID(bytes=change.tenant_id)
            self._tell(None if whose == _EVERYBODY else TenantId(whose), change.kind)
        self._position = response.change_id
        self._read_at = max(self._read_at, read_at)
        self._is_unserved, self._failures = False, 0

    def _tell(self, tenant_id: TenantId | None, kind: str) -> None:
        for listener in self._listeners:
            listener(tenant_id, kind)

    def _note(self, error: MeshError) -> None:
        self._is_unserved = error.code is grpc.StatusCode.UNIMPLEMENTED
        if error.code not in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.UNIMPLEMENTED):
            log.warning("change_feed_refused", code=error.code.name, reason=error.reason_name)

    def _pause(self) -> float:
        if self._is_unserved:
            return self._unserved_seconds
        ceiling = min(_FIRST_BACKOFF_SECONDS * 2.0**self._failures, _MAX_BACKOFF_SECONDS)
        self._failures = min(self._failures + 1, 10)
        # The first return is at once, or nearly: many watchers lose one replica in the same moment.
        return ceiling * random.uniform(0.0 if self._failures == 1 else 0.5, 1.0)  # noqa: S311 - jitter
