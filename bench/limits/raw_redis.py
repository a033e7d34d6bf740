"""What no service can be faster than: the very script with the very arguments, sent over bare connections."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Sequence
from itertools import chain
from typing import cast

import hiredis

from bench.limits.demands import Shape, ask
from devstack.ports import LOOPBACK
from services.kernel.ids import TenantId, new_uuid7
from services.ratelimit.adapters.redis_link import Command
from services.ratelimit.adapters.redis_store import RedisStore
from services.ratelimit.adapters.tenant_scripts import TenantScripts

_READ_BYTES = 1 << 18


class RawConnection:
    """One connection; a pipeline at a time."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._replies = hiredis.Reader()

    @classmethod
    async def open(cls, port: int, password: str) -> RawConnection:
        """Connects and logs in."""
        connection = cls(*await asyncio.open_connection(LOOPBACK, port))
        await connection.exchange(packed(("AUTH", password)), 1)
        return connection

    async def exchange(self, commands: bytes, count: int) -> list[object]:
        """Sends packed commands and returns as many replies. Raises: the first that is an error."""
        self._writer.write(commands)
        replies: list[object] = []
        while len(replies) < count:
            reply = self._replies.gets()
            if reply is False:
                self._replies.feed(await self._reader.read(_READ_BYTES))
                continue
            if isinstance(reply, Exception):
                raise reply
            replies.append(reply)
        return replies

    async def close(self) -> None:
        """Ends it."""
        self._writer.close()
        await self._writer.wait_closed()


class RawPool:
    """As many connections as there are calls at once."""

    def __init__(self, connections: Sequence[RawConnection]) -> None:
        self._all = connections
        self._idle = list(connections)

    @classmethod
    async def open(cls, url: str, size: int) -> RawPool:
        """Connects all of them."""
        password, port = url.removeprefix("redis://:").split("@")[0], int(url.rsplit(":", 1)[1].split("/")[0])
        return cls([await RawConnection.open(port, password) for _ in range(size)])

    async def exchange(self, commands: bytes, count: int) -> list[object]:
        """One pipeline on one of them."""
        connection = self._idle.pop()
        try:
            return await connection.exchange(commands, count)
        finally:
            self._idle.append(connection)

    async def close(self) -> None:
        """Ends them."""
        for connection in self._all:
            await connection.close()


class Decisions:
    """The script calls that the service makes for a shape, taken down as it would send them; each use gets ids of its own."""

    def __init__(self, calls: Sequence[list[bytes]], pool: RawPool, size: int) -> None:
        self._calls = calls
        self._pool = pool
        self._size = size
        self._next = 0

    @classmethod
    async def of(cls, shape: Shape, pool: RawPool, size: int) -> Decisions:
        """Takes down calls of `size` demands each, for every tenant, or for the one tenant with every mix of users."""
        count = max(len(shape.tenant_ids), 20)
        paper = _Paper()
        store = RedisStore(TenantScripts(paper, paper))
        return cls([await _taken_down(store, shape, number, size) for number in range(count)], pool, size)

    async def run(self, calls: int) -> None:
        """Makes so many script calls in one pipeline. Raises when anything is not held."""
        packed_calls = []
        for _ in range(calls):
            segments = self._calls[self._next % len(self._calls)]
            ids = [uuid.uuid4().bytes for _ in range(self._size)]
            packed_calls.append(b"".join(chain.from_iterable(zip(segments, ids, strict=False))) + segments[-1])
            self._next += 1
        for reply in await self._pool.exchange(b"".join(packed_calls), calls):
            head, _, _, *items = cast("list[object]", reply)
            if head != b"ok" or any(item[0] != 1 for item in cast("list[list[int]]", items)):
                raise RuntimeError(f"not held: {reply!r}")


class _TakenDown(Exception):
    # Not an error: how a command is had without being sent.
    def __init__(self, command: Command) -> None:
        super().__init__()
        self.command = command


class _Paper:
    """A link that sends nothing."""

    async def send(self, *command: str | bytes | int) -> object:
        raise _TakenDown(command)

    async def send_all(self, commands: Sequence[Command]) -> list[object | Exception]:
        raise _TakenDown(commands[0])

    async def scan(self, pattern: str, cursor: object) -> tuple[object, list[bytes]]:
        return None, []

    async def close(self) -> None:
        """Nothing is open."""


async def _taken_down(store: RedisStore, shape: Shape, number: int, size: int) -> list[bytes]:
    """The packed call, cut where the ids are."""
    tenant_id: TenantId = shape.tenant_ids[number % len(shape.tenant_ids)]
    asks = [ask(shape.terms, number + place, new_uuid7()) for place in range(size)]
    try:
        await store.reserve(tenant_id, shape.terms, asks)
    except _TakenDown as taken:
        rest, segments = packed(taken.command), []
        for item in asks:
            segment, _, rest = rest.partition(item.reservation_id.bytes)
            segments.append(segment)
        return [*segments, rest]
    raise AssertionError("a decision is one command")


def packed(command: Command) -> bytes:
    """The command as the wire has it."""
    return cast("bytes", hiredis.pack_command(cast("tuple[str]", command)))
