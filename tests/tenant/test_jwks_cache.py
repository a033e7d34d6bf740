"""Remembered key sets, fetched over HTTP with time in the test's hand: fresh, old, lost, and asked for by many at once."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from services.kernel.errors import Unavailable
from services.tenant.adapters.http_jwks import HttpJwksSource
from services.tenant.json_web_key import JsonWebKey
from services.tenant.jwks_cache import FRESH_SECONDS, GRACE_SECONDS, REFETCH_SECONDS, JwksCache
from tests.support.jwks import JwksServer, SigningKey, running_jwks


class Bench:
    """A cache on a real server."""

    def __init__(self, server: JwksServer, key: SigningKey, source: HttpJwksSource) -> None:
        self.server = server
        self.key = key
        self.seconds = 0.0
        self.cache = JwksCache(source, monotonic=lambda: self.seconds, cache_size=2)

    async def find(self, kid: str = "") -> JsonWebKey | None:
        return await self.cache.find(self.server.uri, kid or self.key.kid)

    @property
    def fetched(self) -> int:
        return len(self.server.requests)


@asynccontextmanager
async def bench() -> AsyncIterator[Bench]:
    """A bench of its own."""
    key, source = SigningKey(), HttpJwksSource(private_addresses=True)
    async with running_jwks(key) as server:
        try:
            yield Bench(server, key, source)
        finally:
            await source.close()


async def test_a_set_is_fetched_once_for_all_who_ask_at_once() -> None:
    """Fifty callers at a cold cache cost one request, and one who gives up takes nothing from the others."""
    async with bench() as b:
        async with asyncio.TaskGroup() as group:
            first = group.create_task(b.find())
            others = [group.create_task(b.find()) for _ in range(50)]
            await asyncio.sleep(0)
            first.cancel()
        assert first.cancelled()
        assert all(other.result() is not None for other in others)
        assert b.fetched == 1


async def test_a_set_is_fresh_for_300_seconds() -> None:
    """Until then nobody asks again; then a removed key is gone."""
    async with bench() as b:
        await b.find()
        b.server.keys = []
        b.seconds = FRESH_SECONDS
        assert await b.find() is not None
        assert b.fetched == 1
        b.seconds += 0.1
        assert await b.find() is None
        assert b.fetched == 2


async def test_a_lost_address_is_survived_for_300_seconds_more() -> None:
    """Known keys serve while the address is down, which is tried every 5 s; then nobody can tell; when it is back, all is well."""
    async with bench() as b:
        await b.find()
        b.server.status = 503
        b.seconds = FRESH_SECONDS + 1
        for _ in range(5):
            assert await b.find() is not None
        assert b.fetched == 2
        with pytest.raises(Unavailable) as lost:
            await b.find("unknown")
        assert lost.value.metadata == {"dependency": "jwks"}
        b.seconds = FRESH_SECONDS + GRACE_SECONDS
        assert await b.find() is not None
        b.seconds += 0.1
        with pytest.raises(Unavailable):
            await b.find()
        b.server.status = 200
        b.seconds += REFETCH_SECONDS
        assert await b.find() is not None


async def test_an_unknown_name_is_looked_for_once_in_five_seconds() -> None:
    """Within them it is nobody's, without a request; after them the set is fetched again and a new key is found."""
    async with bench() as b:
        await b.find()
        new = SigningKey()
        b.server.keys.append(new.public_jwk())
        b.seconds = REFETCH_SECONDS - 0.1
        assert await b.find(new.kid) is None
        assert b.fetched == 1
        b.seconds = REFETCH_SECONDS
        assert await b.find(new.kid) is not None
        assert await b.find() is not None
        assert b.fetched == 2


async def test_the_memory_of_sets_is_bounded() -> None:
    """The set that was asked for longest ago gives way."""
    async with bench() as b:
        for path in ("a", "b", "c", "a"):
            await b.cache.find(f"{b.server.base}/{path}", b.key.kid)
        assert b.server.requests == ["/a", "/b", "/c", "/a"]


async def test_an_address_that_never_answers_is_given_up_after_two_seconds() -> None:
    """A connection that is taken and left hanging is a JWKS that is down."""
    hang = asyncio.Event()

    async def hold(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await hang.wait()
        writer.close()

    server, source = await asyncio.start_server(hold, "127.0.0.1", 0), HttpJwksSource(private_addresses=True)
    try:
        port = server.sockets[0].getsockname()[1]
        async with asyncio.timeout(10):
            with pytest.raises(Unavailable):
                await JwksCache(source).find(f"http://127.0.0.1:{port}/keys", "any")
    finally:
        hang.set()
        await source.close()
        server.close()
        await server.wait_closed()
