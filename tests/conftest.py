"""What every test may ask for: real stores, started once a session and only when wanted."""

from collections.abc import AsyncIterator

import pytest

from tests.support.mesh import Mesh, running_mesh
from tests.support.stores import PostgresStore, RedisStore, running_postgres, running_redis


@pytest.fixture(scope="session")
async def postgres() -> AsyncIterator[PostgresStore]:
    """A real PostgreSQL."""
    async with running_postgres() as store:
        yield store


@pytest.fixture(scope="session")
async def redis_server() -> AsyncIterator[RedisStore]:
    """A real Redis."""
    async with running_redis() as store:
        yield store


@pytest.fixture(scope="session")
async def mesh() -> AsyncIterator[Mesh]:
    """A whole running mesh. Tests make tenants of their own and leave its processes alone."""
    async with running_mesh() as running:
        yield running
