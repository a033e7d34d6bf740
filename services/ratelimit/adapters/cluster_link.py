"""The way to a Redis Cluster: each command to its own node, a node that is gone refused alone, and its replica found."""

import asyncio
from collections import defaultdict
from collections.abc import Awaitable, Callable, Sequence
from contextvars import Context
from typing import cast

import structlog
from redis import exceptions
from redis.asyncio import RedisCluster
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from services.kernel.errors import Unavailable
from services.ratelimit.adapters.redis_link import (
    MOST_PIPELINED,
    PASSING,
    SCAN_COUNT,
    SILENCE,
    Command,
    reset_is_a_connection_error,
)
from services.ratelimit.circuit_breaker import CircuitBreaker

log = structlog.get_logger(__name__)

# Asking the nodes of a cluster, one after another, who leads.
_LOOK_SECONDS = 2.0


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
                for start in range(0, len(places), MOST_PIPELINED):
                    group.create_task(send_some(node, places[start : start + MOST_PIPELINED]))
        return replies

    async def scan(self, pattern: str, cursor: object) -> tuple[object, list[bytes]]:
        """Takes one bounded step on the node at hand; see Link. The cursor is (how many nodes are done, the node's own cursor)."""
        done, position = cast("tuple[int, int]", cursor or (0, 0))
        await self._within_limit("", lambda: self._client.execute_command("PING"))
        nodes = sorted(self._client.get_primaries(), key=lambda node: node.name)
        if done >= len(nodes):
            return None, []
        scan: Command = ("SCAN", position, "MATCH", pattern, "COUNT", SCAN_COUNT)
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
            except SILENCE:
                # The client looks for other masters when a command fails, and not when a pipeline does. Every script may be repeated.
                return [await self._alone(commands[0]), *await self._exchanged(commands[1:])]

        try:
            replies = cast("list[object | Exception]", await self._within_limit(node, exchange))
        except Unavailable as error:
            return [error] * len(commands)
        return [Unavailable("redis") if isinstance(reply, PASSING) else reply for reply in replies]

    async def _exchanged(self, commands: Sequence[Command]) -> list[object | Exception]:
        pipeline = self._client.pipeline()
        for command in commands:
            pipeline.execute_command(*command)
        with reset_is_a_connection_error():
            # What lies at another node by now is sent there by the client.
            replies: list[object | Exception] = await pipeline.execute(raise_on_error=False)
        for reply in replies:
            if isinstance(reply, SILENCE):
                raise reply
        return replies

    async def _alone(self, command: Command) -> object | Exception:
        try:
            reply: object = await self._client.execute_command(*command)
        except SILENCE:
            raise
        except exceptions.RedisError as error:
            return error
        return reply

    async def _within_limit(self, node: str, exchange: Callable[[], Awaitable[object]]) -> object:
        breaker = self._breakers[node]
        if not breaker.admits():
            raise Unavailable("redis")
        try:
            with reset_is_a_connection_error():
                async with asyncio.timeout(self._timeout_seconds):
                    reply = await exchange()
        except PASSING as error:
            # A slot that moves, or waits for its new master, is answered for: that is one tenant's trouble and not the node's.
            if isinstance(error, SILENCE):
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
        except PASSING as error:
            log.warning("masters_not_found", error=type(error).__name__)


class _Breakers(dict[str, CircuitBreaker]):
    """A breaker for each name, beside that of the same name of others."""

    def __init__(self, beside: "_Breakers | None") -> None:
        super().__init__()
        self._beside = beside

    def __missing__(self, name: str) -> CircuitBreaker:
        made = self[name] = CircuitBreaker(beside=None if self._beside is None else self._beside[name])
        return made
