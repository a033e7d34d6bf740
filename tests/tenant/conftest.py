"""One running tenant service a session; every test makes tenants of its own."""

from collections.abc import AsyncIterator

import pytest

from tests.support.stores import PostgresStore
from tests.tenant.harness import Harness, running_service


@pytest.fixture(scope="session")
async def session_harness(postgres: PostgresStore) -> AsyncIterator[Harness]:
    """The running service."""
    async with running_service(postgres) as harness:
        yield harness


@pytest.fixture
def harness(session_harness: Harness) -> Harness:
    """The running service, with peers that answer at once."""
    for peer in session_harness.peers.values():
        peer.reset()
    return session_harness
