"""The way to Redis: concurrent commands share a pipeline, every wait has a limit, a dead Redis is refused at once.

Low-level connections instead of the client object: one batch then costs one write and one read, whatever it holds.
"""

import asyncio
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import Context
from typing import Protocol, cast

import structlog
from hiredis import Reader, pack_command
from redis import exceptions
from redis._parsers.hiredis import NOT_ENOUGH_DATA
from redis.asyncio import ConnectionPool, RedisCluster
from redis.asyncio.connection import AbstractConnection
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from services.kernel.batching import Batcher
from services.kernel.errors import Unavailable
from services.ratelimit.circuit_breaker import CircuitBreaker

log = structlog.get_logger(__name__)

Command = tuple[str | bytes | int, ...]

# Asking the nodes of a cluster, one after another, who leads.
_LOOK_SECONDS = 2.0
# Commands of one pipeline: so many scripts are over within the patience of those that come after them.
_MOST_PIPELINED = 64

# The store is there and cannot serve now: not a fault of the command.
_PASSING = (
    exceptions.ConnectionError,
    exceptions.TimeoutError,
    exceptions.ReadOnlyError,
    exceptions.OutOfMemoryError,
    exceptions.ClusterError,
    exceptions.ClusterDownError,
    exceptions.RedisClusterException,
    exceptions.TryAgainError,
    exceptions.MasterDownError,
    exceptions.AskError,
    exceptions.MovedError,
    OSError,
    TimeoutError,
)
# Of these, what says that a server did not answer at all.
_SILENCE = (exceptions.ConnectionError, exceptions.TimeoutError, OSError, TimeoutError)


class Link(Protocol):
    """Sends commands to the store."""

    async def send(self, *command: str | bytes | int) -> object:
        """Returns the reply. Raises: Unavailable("redis") within the link's limit; redis' ResponseError for a wrong command."""
        ...

    async def send_all(self, commands: Sequence[Command]) -> list[object | Exception]:
        """Sends commands in as few pipelines as may be; returns for each what `send` would, or the failure that it would raise."""
        ...

    async def scan(self, pattern: str, cursor: object) -> tuple[object, list[bytes]]:
        """Takes one bounded step through the keys of the whole store: where to go on (None at the end), and the keys met."""
        ...

    async def close(self) -> None:
        """Closes the connections."""
        ...


class PipelinedLink:
    """One Redis server. At most `connections` batches are under way; what arrives meanwhile makes the next batch."""

    def __init__(
        self,
        url: str,
        *,
        connections: int = 2,
        timeout_seconds: float = 0.04,
        max_batch: int = _MOST_PIPELINED,
        breaker: CircuitBreaker | None = None,
    ) -> None:
        # RESP2: nothing here needs maps or pushes, and its connection needs no extra round trip.
        self._pool = ConnectionPool.from_url(url, protocol=2, socket_timeout=None, retry=Retry(NoBackoff(), 0))
        self._idle: list[AbstractConnection] = []
        self._timeout_seconds = timeout_seconds
        self.breaker = breaker or CircuitBreaker()
        self._batcher: Batcher[Command, object] = Batcher(self._flush, max_batch=max_batch, max_in_flight=connections)

    async def send(self, *command: str | bytes | int) -> object:
        """Returns the reply; see Link."""
        return await self._batcher.submit(command)

    async def send_all(self, commands: Sequence[Command]) -> list[object | Exception]:
        """Sends commands; see Link."""
        return await self._batcher.submit_all(commands)

    async def scan(self, pattern: str, cursor: object) -> tuple[object, list[bytes]]:
        """Takes one bounded step; see Link."""
        reply = await self.send("SCAN", cast("int", cursor or 0), "MATCH", pattern, "COUNT", _SCAN_COUNT)
        following, found = cast("tuple[bytes, list[bytes]]", reply)
        return (int(following) or None), found

    async def close(self) -> None:
        """Waits for batches under way, then closes the connections."""
        await self._batcher.close()
        for connection in self._idle:
            await connection.disconnect()
        self._idle.clear()

    async def _flush(self, commands: list[Command]) -> Sequence[object | Exception]:
        if not self.breaker.admits():
            raise Unavailable("redis")
        connection = self._idle.pop() if self._idle else cast("AbstractConnection", self._pool.make_connection())  # type: ignore[no-untyped-call] # redis does not type it
        try:
            replies = await self._within_limit(connection, commands)
        except _PASSING as error:
            self.breaker.failed()
            log.warning("redis_unreachable", error=type(error).__name__, commands=len(commands))
            # Replies still under way would be taken for those of the next batch.
            await connection.disconnect(nowait=True)
            raise Unavailable("redis") from error
        except BaseException:
            await connection.disconnect(nowait=True)
            raise
        self.breaker.succeeded()
        self._idle.append(connection)
        return [Unavailable("redis") if isinstance(reply, _PASSING) else reply for reply in replies]

    async def _within_limit(self, connection: AbstractConnection, commands: list[Command]) -> list[object | Exception]:
        fresh = not connection.is_connected
        loop = asyncio.get_running_loop()
        task = asyncio.current_task()
        expired = False

        def expire() -> None:
            nonlocal expired
            expired = True
            if task is not None:
                task.cancel()

        timer = _Patience(loop, self._timeout_seconds, expire)
        try:
            try:
                return await _exchange(connection, commands)
            except (exceptions.ConnectionError, OSError):
                # A connection that died while idle says nothing about the server. Every script may be repeated.
                if fresh:
                    raise
                await connection.disconnect(nowait=True)
                return await _exchange(connection, commands)
        except asyncio.CancelledError:
            if expired and task is not None and task.uncancel() == 0:
                raise exceptions.TimeoutError from None
            raise
        finally:
            timer.cancel()


class ClusterLink:
    """A Redis Cluster. Each command finds its own node by its key; a tenant's keys share one slot.

    Each node has a breaker of its own: one that is gone is no reason to refuse the tenants of the others.
    """

    def __init__(self, url: str, *, timeout_seconds: float = 0.04, beside: "ClusterLink | None" = None) -> None:
        self._client = RedisCluster.from_url(
            url, protocol=2, socket_connect_timeout=timeout_seconds, socket_timeout=timeout_seconds, retry=Retry(NoBackoff(), 0)
        )
        self._timeout_seconds = timeout_seconds
        # By the node's address; "" stands for the cluster as long as its nodes are not known.
        self._breakers: _Breakers = _Breakers(None if beside is None else beside._breakers)
        self._looking: asyncio.Task[None] | None = None

    async def send(self, *command: str | bytes | int) -> object:
        """Returns the reply; see Link."""
        return await self._within_limit(self._node_of(command), lambda: self._client.execute_command(*command))

    async def send_all(self, commands: Sequence[Command]) -> list[object | Exception]:
        """Sends commands, those of a node in one pipeline; see Link. A node that is gone fails its own commands alone."""
        replies: list[object | Exception] = [None] * len(commands)
        by_node: defaultdict[str, list[int]] = defaultdict(list)
        for place, command in enumerate(commands):
            by_node[self._node_of(command)].append(place)

        async def send_some(node: str, places: Sequence[int]) -> None:
            for place, reply in zip(places, await self._pipelined(node, [commands[place] for place in places]), strict=True):
                replies[place] = reply

        async with asyncio.TaskGroup() as group:
            for node, places in by_node.items():
                for start in range(0, len(places), _MOST_PIPELINED):
                    group.create_task(send_some(node, places[start : start + _MOST_PIPELINED]))
        return replies

    async def scan(self, pattern: str, cursor: object) -> tuple[object, list[bytes]]:
        """Takes one bounded step on the node at hand; see Link. The cursor is (how many nodes are done, the node's own cursor)."""
        done, position = cast("tuple[int, int]", cursor or (0, 0))
        await self._within_limit("", lambda: self._client.execute_command("PING"))
        nodes = sorted(self._client.get_primaries(), key=lambda node: node.name)
        if done >= len(nodes):
            return None, []
        scan: Command = ("SCAN", position, "MATCH", pattern, "COUNT", _SCAN_COUNT)
        node = nodes[done]
        reply = await self._within_limit(node.name, lambda: self._client.execute_command(*scan, target_nodes=node))
        positions, found = cast("tuple[dict[str, int] | int, list[bytes]]", reply)
        following = next(iter(positions.values())) if isinstance(positions, dict) else int(positions)
        if following:
            return (done, following), found
        return ((done + 1, 0) if done + 1 < len(nodes) else None), found

    async def close(self) -> None:
        """Closes the connections."""
        if self._looking is not None:
            self._looking.cancel()
            await asyncio.wait([self._looking])
        await self._client.aclose()

    def _node_of(self, command: Command) -> str:
        # A script's keys follow their number; other commands begin with their key.
        place = 3 if command[0] in ("EVALSHA", "EVAL") else 1
        try:
            node = self._client.get_node_from_key(cast("str", command[place]))
        except (IndexError, exceptions.RedisClusterException):
            node = None
        return node.name if node else ""

    async def _pipelined(self, node: str, commands: Sequence[Command]) -> Sequence[object | Exception]:
        async def exchange() -> list[object | Exception]:
            try:
                return await self._exchanged(commands)
            except _SILENCE:
                # The client looks for other masters when a command fails, and not when a pipeline does. Every script may be repeated.
                return [await self._alone(commands[0]), *await self._exchanged(commands[1:])]

        try:
            replies = cast("list[object | Exception]", await self._within_limit(node, exchange))
        except Unavailable as error:
            return [error] * len(commands)
        return [Unavailable("redis") if isinstance(reply, _PASSING) else reply for reply in replies]

    async def _exchanged(self, commands: Sequence[Command]) -> list[object | Exception]:
        pipeline = self._client.pipeline()
        for command in commands:
            pipeline.execute_command(*command)
        with _reset_is_a_connection_error():
            # What lies at another node by now is sent there by the client.
            replies: list[object | Exception] = await pipeline.execute(raise_on_error=False)
        for reply in replies:
            if isinstance(reply, _SILENCE):
                raise reply
        return replies

    async def _alone(self, command: Command) -> object | Exception:
        try:
            reply: object = await self._client.execute_command(*command)
        except _SILENCE:
            raise
        except exceptions.RedisError as error:
            return error
        return reply

    async def _within_limit(self, node: str, exchange: Callable[[], Awaitable[object]]) -> object:
        breaker = self._breakers[node]
        if not breaker.admits():
            raise Unavailable("redis")
        try:
            with _reset_is_a_connection_error():
                async with asyncio.timeout(self._timeout_seconds):
                    reply = await exchange()
        except _PASSING as error:
            # A slot that moves, or waits for its new master, is answered for: that is one tenant's trouble and not the node's.
            if isinstance(error, _SILENCE):
                breaker.failed()
                self._look_for_masters(node)
            else:
                breaker.succeeded()
            log.warning("redis_unreachable", error=type(error).__name__)
            raise Unavailable("redis") from error
        breaker.succeeded()
        return reply

    def _look_for_masters(self, silent: str) -> None:
        # The client looks for them itself when a node refuses it. One that says nothing outlasts our limit: the client hears of no failure.
        if self._looking is None or self._looking.done():
            looking = self._masters(silent or None)
            self._looking = asyncio.get_running_loop().create_task(looking, name="redis.masters", context=Context())

    async def _masters(self, silent: str | None) -> None:
        try:
            async with asyncio.timeout(_LOOK_SECONDS):
                await self._client.nodes_manager.initialize(last_failed_node_name=silent)
        except _PASSING as error:
            log.warning("masters_not_found", error=type(error).__name__)


class _Breakers(dict[str, CircuitBreaker]):
    """A breaker for each name, beside that of the same name of others."""

    def __init__(self, beside: "_Breakers | None") -> None:
        super().__init__()
        self._beside = beside

    def __missing__(self, name: str) -> CircuitBreaker:
        made = self[name] = CircuitBreaker(beside=None if self._beside is None else self._beside[name])
        return made


class _Patience:
    """Calls back when the store has had its time, unless cancelled.

    Time counts in ticks, and a tick that comes late does not: a machine that keeps this process waiting does the same to the store, and
    taking that for a dead store would refuse callers for nothing. `_MOST_TICKS` bounds the patience all the same.
    """

    __slots__ = ("_callback", "_cancelled", "_due", "_late", "_left", "_loop", "_tick_seconds", "_timer", "_turns")

    def __init__(self, loop: asyncio.AbstractEventLoop, seconds: float, callback: Callable[[], None]) -> None:
        self._loop = loop
        self._callback = callback
        self._tick_seconds = seconds / _TICKS
        self._left = _TICKS
        self._late = 0
        # A reply may lie in the socket as the last tick comes: two turns of the loop let it be read.
        self._turns = 2
        self._cancelled = False
        self._due = loop.time() + self._tick_seconds
        self._timer: asyncio.Handle = loop.call_at(self._due, self._tick)

    def cancel(self) -> None:
        """Ends the waiting."""
        self._cancelled = True
        self._timer.cancel()

    def _tick(self) -> None:
        now = self._loop.time()
        if now - self._due > _LATE_SECONDS and self._late < _MOST_TICKS - _TICKS:
            self._late += 1
        else:
            self._left -= 1
        if self._left:
            self._due = now + self._tick_seconds
            self._timer = self._loop.call_at(self._due, self._tick)
        else:
            self._timer = self._loop.call_soon(self._turn)

    def _turn(self) -> None:
        if self._cancelled:
            return
        if self._turns:
            self._turns -= 1
            self._timer = self._loop.call_soon(self._turn)
        else:
            self._callback()


_TICKS = 8
_MOST_TICKS = 32
_LATE_SECONDS = 0.002
# hiredis types its argument as a tuple of one.
_PACK = cast("Callable[[Command], bytes]", pack_command)
# Keys looked at in one step of a scan: a few hundred microseconds of the store's time.
_SCAN_COUNT = 1000


class _Parser(Protocol):
    """What turns the connection's bytes into replies. redis keeps its names to itself, and its version is pinned."""

    _reader: Reader

    async def read_from_socket(self) -> bool:
        """Reads on. Raises: ConnectionError at the end."""
        ...


async def _exchange(connection: AbstractConnection, commands: list[Command]) -> list[object | Exception]:
    with _reset_is_a_connection_error():
        # hiredis packs in C what redis' own packer does argument by argument in Python.
        await connection.send_packed_command(b"".join(map(_PACK, commands)), check_health=False)
    # redis' own reading is three calls of Python for each reply, and none of what they see to can happen here.
    parser = cast("_Parser", connection._parser)
    replies: list[object | Exception] = []
    while len(replies) < len(commands):
        # One command's fault is its reply, not the batch's.
        reply = parser._reader.gets()
        if reply is NOT_ENOUGH_DATA:
            await parser.read_from_socket()
        elif isinstance(reply, exceptions.ConnectionError):
            raise reply
        else:
            replies.append(reply)
    return replies


@contextmanager
def _reset_is_a_connection_error() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        # uvloop's word for a write to a connection that the server reset while it was idle; asyncio says ConnectionResetError.
        raise exceptions.ConnectionError(str(error)) from error
