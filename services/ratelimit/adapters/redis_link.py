"""The way to Redis: concurrent commands share a pipeline, every wait has a limit, a dead Redis is refused at once.

Low-level connections instead of the client object: one batch then costs one write and one read, whatever it holds.
"""

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol, cast

import structlog
from hiredis import Reader, pack_command
from redis import exceptions
from redis._parsers.hiredis import NOT_ENOUGH_DATA
from redis.asyncio import ConnectionPool
from redis.asyncio.connection import AbstractConnection
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from services.kernel.batching import Batcher
from services.kernel.errors import Unavailable
from services.ratelimit.circuit_breaker import CircuitBreaker

log = structlog.get_logger(__name__)

Command = tuple[str | bytes | int, ...]

# Commands of one pipeline: so many scripts are over within the patience of those that come after them.
MOST_PIPELINED = 64
# Nobody waits longer than this behind a batch that is large, or that is not answered.
_BESIDE_SECONDS = 0.005
# Keys looked at in one step of a scan: a few hundred microseconds of the store's time.
SCAN_COUNT = 1000

# The store is there and cannot serve now: not a fault of the command.
PASSING = (
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
SILENCE = (exceptions.ConnectionError, exceptions.TimeoutError, OSError, TimeoutError)


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
    """One Redis server. At most `connections` batches are under way; what arrives meanwhile makes the next batch.

    A batch begins beside another when it is half full, or the other takes longer than most do: the server takes one after the other anyway,
    and few large ones cost this process less.
    """

    def __init__(
        self,
        url: str,
        *,
        connections: int = 2,
        timeout_seconds: float = 0.04,
        max_batch: int = MOST_PIPELINED,
        breaker: CircuitBreaker | None = None,
    ) -> None:
        # RESP2: nothing here needs maps or pushes, and its connection needs no extra round trip.
        self._pool = ConnectionPool.from_url(url, protocol=2, socket_timeout=None, retry=Retry(NoBackoff(), 0))
        self._idle: list[AbstractConnection] = []
        self._timeout_seconds = timeout_seconds
        self.breaker = breaker or CircuitBreaker()
        self._batcher: Batcher[Command, object] = Batcher(
            self._flush,
            max_batch=max_batch,
            max_in_flight=connections,
            enough=max(1, max_batch // 2),
            beside_seconds=_BESIDE_SECONDS,
        )

    async def send(self, *command: str | bytes | int) -> object:
        """Returns the reply; see Link."""
        return await self._batcher.submit(command)

    async def send_all(self, commands: Sequence[Command]) -> list[object | Exception]:
        """Sends commands; see Link."""
        return await self._batcher.submit_all(commands)

    async def scan(self, pattern: str, cursor: object) -> tuple[object, list[bytes]]:
        """Takes one bounded step; see Link."""
        reply = await self.send("SCAN", cast("int", cursor or 0), "MATCH", pattern, "COUNT", SCAN_COUNT)
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
        except PASSING as error:
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
        return [Unavailable("redis") if isinstance(reply, PASSING) else reply for reply in replies]

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


class _Parser(Protocol):
    """What turns the connection's bytes into replies. redis keeps its names to itself, and its version is pinned."""

    _reader: Reader

    async def read_from_socket(self) -> bool:
        """Reads on. Raises: ConnectionError at the end."""
        ...


async def _exchange(connection: AbstractConnection, commands: list[Command]) -> list[object | Exception]:
    with reset_is_a_connection_error():
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
def reset_is_a_connection_error() -> Iterator[None]:
    """What uvloop says of a reset connection, said as redis says it. Raises: ConnectionError of redis."""
    try:
        yield
    except RuntimeError as error:
        # uvloop's word for a write to a connection that the server reset while it was idle; asyncio says ConnectionResetError.
        raise exceptions.ConnectionError(str(error)) from error
