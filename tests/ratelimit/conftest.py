"""The service under test on a real Redis, and stores to look into it."""

from collections.abc import AsyncIterator, Callable

import pytest

from services.ratelimit.adapters.redis_link import PipelinedLink
from tests.ratelimit.callers import AtStore, Service, Stores, running_service, standard_terms
from tests.ratelimit.scripted_peer import running_peer
from tests.support.stores import RedisStore as RedisServer


@pytest.fixture(scope="session")
async def link(redis_server: RedisServer) -> AsyncIterator[PipelinedLink]:
    """A patient link: a busy machine must not look like a dead store."""
    opened = PipelinedLink(redis_server.url, timeout_seconds=5.0)
    yield opened
    await opened.close()


@pytest.fixture
async def at_store(link: PipelinedLink) -> Callable[..., AtStore]:
    """Makes a tenant at the store, with its limits and, for tests of time, a shorter window."""

    def make(*, window_seconds: float = 60.0, lease_seconds: float = 5.0, forget_seconds: float = 120.0, **limits: int) -> AtStore:
        stores = Stores(link, lease_seconds=lease_seconds, forget_seconds=forget_seconds)
        return AtStore(stores, link, standard_terms(window_seconds, **limits))

    return make


@pytest.fixture
async def service(redis_server: RedisServer) -> AsyncIterator[Service]:
    """The whole service with scripted peers."""
    async with running_peer() as peer, running_service(redis_server.url, peer, redis_timeout_seconds=2.0) as running:
        yield running
