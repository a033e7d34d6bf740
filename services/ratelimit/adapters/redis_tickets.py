"""The lines of those who wait, in Redis: their tickets, and the calls by which a process hears that it may be somebody's turn."""

import asyncio
import random
from collections.abc import Callable, Sequence
from typing import cast
from urllib.parse import urlsplit, urlunsplit
from uuid import UUID

import structlog
from redis import exceptions
from redis.asyncio import Redis, RedisCluster
from redis.asyncio.client import PubSub

from services.kernel.ids import ReservationId, TenantId
from services.ratelimit.adapters.redis_shares import RedisShares
from services.ratelimit.adapters.tenant_scripts import TenantScripts
from services.ratelimit.waiting_room import WaitingRoom

log = structlog.get_logger(__name__)

# As scripts have it.
CHANNEL = b"tenantry:ratelimit:wakes"
_TICKETS_A_SCRIPT = 500
# A connection that says nothing for so long is asked, and given up when it says nothing to that either.
_SILENCE_SECONDS = 1.0
_CONNECT_SECONDS = 2.0
_FIRST_BACKOFF_SECONDS, _MOST_BACKOFF_SECONDS = 0.1, 2.0


class RedisTickets:
    """Implements TicketStore: a tenant's own line lies with its counters, a provider account's with the account."""

    def __init__(self, scripts: TenantScripts, shares: RedisShares) -> None:
        self._scripts = scripts
        self._shares = shares

    async def keep_places(self, tenant_id: TenantId, ids: Sequence[ReservationId], line: str = "") -> list[bool]:
        """Prolongs tickets; tells of each whether it still has its place. Raises: Unavailable."""
        if line:
            return await self._shares.keep_places(line, tenant_id, ids)
        kept: list[bool] = []
        for start in range(0, len(ids), _TICKETS_A_SCRIPT):
            some = [item.bytes for item in ids[start : start + _TICKETS_A_SCRIPT]]
            kept += [answer == 1 for answer in cast("list[int]", await self._scripts.run("keep_places", tenant_id, *some, bulk=True))]
        return kept

    async def leave(self, tenant_id: TenantId, ids: Sequence[ReservationId], line: str = "") -> None:
        """Takes tickets out of the line. Raises: Unavailable."""
        if line:
            await self._shares.leave(line, tenant_id, ids)
            return
        await self._scripts.run("leave", tenant_id, *(item.bytes for item in ids))


class WakeListener:
    """Hears the store's calls on one connection. A cluster passes them on to every node, so any node will do."""

    def __init__(self, url: str, room: WaitingRoom, *, cluster: bool = False) -> None:
        self._url = url
        self._room = room
        self._cluster = cluster

    async def run(self) -> None:
        """Listens until cancelled; after every gap all who wait ask again, as their call may have been in it."""
        url, backoff = self._url, _FIRST_BACKOFF_SECONDS
        while True:
            try:
                await self._listen(url, self._room.wake_all)
            except (exceptions.RedisError, OSError, TimeoutError) as error:
                log.warning("wakes_unheard", error=type(error).__name__)
            await asyncio.sleep(backoff * random.uniform(0.8, 1.2))  # noqa: S311 - jitter
            backoff = min(2 * backoff, _MOST_BACKOFF_SECONDS)
            url = await self._another(url)

    async def _listen(self, url: str, begun: Callable[[], None]) -> None:
        client = Redis.from_url(url, protocol=2, socket_connect_timeout=_CONNECT_SECONDS)
        channel = client.pubsub()
        try:
            async with asyncio.timeout(_CONNECT_SECONDS):
                await channel.subscribe(CHANNEL)
            await self._hear(channel, begun)
        finally:
            await channel.aclose()  # type: ignore[no-untyped-call] # redis does not type it
            await client.aclose()

    async def _hear(self, channel: PubSub, begun: Callable[[], None]) -> None:
        asked = False
        while True:
            message = await channel.get_message(timeout=_SILENCE_SECONDS)
            if message is None:
                if asked:
                    raise exceptions.TimeoutError
                await channel.ping()
                asked = True
                continue
            asked = False
            if message["type"] == "subscribe":
                begun()
            elif message["type"] == "message":
                data = cast("bytes", message["data"])
                self._room.wake(ReservationId(UUID(bytes=data[at : at + 16])) for at in range(0, len(data) - 15, 16))

    async def _another(self, url: str) -> str:
        """The address to try next: of a cluster any node that another one knows."""
        if not self._cluster:
            return url
        try:
            async with asyncio.timeout(_CONNECT_SECONDS), RedisCluster.from_url(self._url, protocol=2) as cluster:
                node = random.choice(cluster.get_primaries())  # noqa: S311 - any will do
        except (exceptions.RedisError, OSError, TimeoutError):
            return self._url
        parts = urlsplit(self._url)
        secret, at, _ = parts.netloc.rpartition("@")
        return urlunsplit(parts._replace(netloc=f"{secret}{at}{node.host}:{node.port}"))
