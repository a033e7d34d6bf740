"""One server for the tests that do not end it."""

from collections.abc import AsyncIterator, Iterator

import pytest
from qdrant_client import AsyncQdrantClient

from .front import Front, running_front, with_three_points


@pytest.fixture(scope="session")
def front(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Front]:
    """A running server."""
    with running_front(tmp_path_factory.mktemp("qdrant")) as running:
        yield running
        # Nothing reads the directory again: closing a hundred shards one by one would only cost time.
        running.kill()


@pytest.fixture(scope="session")
async def client(front: Front) -> AsyncIterator[AsyncQdrantClient]:
    """A client with the full rights of the API key."""
    async with front.client() as opened:
        yield opened


@pytest.fixture(scope="session")
async def documents(client: AsyncQdrantClient) -> str:
    """The three documents, for tests that only read."""
    return await with_three_points(client)
