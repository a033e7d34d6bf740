"""Replies of the store are those of their own commands: whoever gave up meanwhile, and wherever in a reply a connection ends."""

import asyncio
import random
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from urllib.parse import urlsplit

import pytest
from redis.exceptions import ResponseError

from services.kernel.errors import Unavailable
from services.ratelimit.adapters.redis_link import Command, PipelinedLink
from services.ratelimit.circuit_breaker import CircuitBreaker
from tests.support.stores import RedisStore as RedisServer

# A text, a long one, a list with a failure within, and a failure, each with the command's own number in it.
COMMANDS = (
    ("EVAL", "return ARGV[1]"),
    ("EVAL", "return string.rep(ARGV[1] .. ',', 20000)"),
    ("EVAL", "return {ARGV[1], redis.error_reply('CLUSTERDOWN ' .. ARGV[1]), ARGV[1]}"),
    ("EVAL", "return redis.error_reply('NONE ' .. ARGV[1])"),
)
PATIENCE_SECONDS = 0.1


class CuttingProxy:
    """Stands between a link and the store: passes on so many bytes of replies, then ends the connection or is silent for a while."""

    def __init__(self, rng: random.Random, host: str, port: int) -> None:
        self.rng = rng
        self.store = (host, port)
        self.cuts = 0

    async def connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        from_store, to_store = await asyncio.open_connection(*self.store)
        asking = asyncio.ensure_future(self._pass_on(reader, to_store))
        with suppress(OSError):
            for _ in range(self.rng.randrange(3)):
                if not await self._passed_some(from_store, writer):
                    break
                # Longer than the link waits; then the rest comes.
                await asyncio.sleep(3 * PATIENCE_SECONDS)
        asking.cancel()
        for stream in (writer, to_store):
            stream.transport.abort()

    async def _passed_some(self, from_store: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        left = self.rng.randrange(500_000)
        while left and (found := await from_store.read(min(left, 7_000))):
            left -= len(found)
            writer.write(found)
            await writer.drain()
        self.cuts += not left
        return not left

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while found := await reader.read(65_536):
                writer.write(found)
                await writer.drain()
        # Whoever asked is gone.
        writer.transport.abort()


@asynccontextmanager
async def cut(url: str, rng: random.Random) -> AsyncIterator[tuple[str, CuttingProxy]]:
    """The way to a store through such a proxy."""
    parts = urlsplit(url)
    proxy = CuttingProxy(rng, str(parts.hostname), int(parts.port or 0))
    server = await asyncio.start_server(proxy.connected, "127.0.0.1", 0)
    try:
        yield url.replace(f":{parts.port}", f":{server.sockets[0].getsockname()[1]}"), proxy
    finally:
        server.close()


def is_answer_to(command: Command, reply: object) -> bool:
    """Whether a reply is the one of that command."""
    text = str(command[-1]).encode()
    match COMMANDS.index(command[:2]), reply:
        case 0, bytes():
            return reply == text
        case 1, bytes():
            return reply == (text + b",") * 20_000
        case 2, [first, ResponseError() as failure, last]:
            return first == last == text and str(failure) == text.decode()
        case 3, ResponseError():
            return str(reply) == f"NONE {text.decode()}"
    return False


async def test_a_reply_is_never_taken_for_that_of_another_command(redis_server: RedisServer) -> None:
    """Long ones, failures and lists of them, over connections that end or fall silent within a reply, for callers who leave or stay."""
    rng = random.Random(5)
    seen = dict.fromkeys(("answered", "unavailable", "left"), 0)

    async def ask(link: PipelinedLink, number: int) -> None:
        some: list[Command] = [(*rng.choice(COMMANDS), 0, f"{number}-{place}") for place in range(rng.randrange(1, 5))]
        try:
            async with asyncio.timeout(rng.choice((0.002, 0.02, 60))):
                replies = await asked(link, some)
        except TimeoutError:
            seen["left"] += 1
            return
        for command, reply in zip(some, replies, strict=True):
            if isinstance(reply, Unavailable):
                seen["unavailable"] += 1
            else:
                assert is_answer_to(command, reply), (command, str(reply)[:80])
                seen["answered"] += 1

    async with cut(redis_server.url, rng) as (url, proxy):
        link = PipelinedLink(url, timeout_seconds=PATIENCE_SECONDS, max_batch=8, breaker=CircuitBreaker(failure_threshold=10**9))
        for start in range(0, 300, 20):
            async with asyncio.TaskGroup() as group:
                for number in range(start, start + 20):
                    group.create_task(ask(link, number))
        await link.close()
    assert proxy.cuts > 3
    assert all(seen.values())


async def asked(link: PipelinedLink, commands: Sequence[Command]) -> list[object]:
    """Replies to commands that go together, or alone where there is one."""
    if len(commands) > 1:
        return list(await link.send_all(commands))
    try:
        return [await link.send(*commands[0])]
    except (Unavailable, ResponseError) as error:
        return [error]


@pytest.mark.parametrize("command", COMMANDS)
async def test_each_kind_of_reply_is_told_as_it_came(redis_server: RedisServer, command: tuple[str, str]) -> None:
    """A failure within a list is a part of the reply: the list's command did not fail."""
    link = PipelinedLink(redis_server.url, timeout_seconds=5.0)
    for text in ("a", "b"):
        whole: Command = (*command, 0, text)
        assert is_answer_to(whole, (await asked(link, [whole]))[0])
    await link.close()
