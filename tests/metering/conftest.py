"""One database and one running service for all ledger tests; each test has tenants of its own."""

from collections.abc import AsyncIterator

import asyncpg
import pytest

from tests.metering.mesh import Mesh, migrated, running_mesh
from tests.metering.peers import Peers
from tests.support.stores import PostgresStore


@pytest.fixture(scope="session")
async def peers() -> AsyncIterator[Peers]:
    """The scripted tenant service and limits."""
    running = Peers()
    await running.start()
    yield running
    await running.stop()


@pytest.fixture(scope="session")
async def ledger_dsn(postgres: PostgresStore, peers: Peers) -> str:
    """An administrator's DSN of a migrated database."""
    dsn = await postgres.fresh_database()
    await migrated(dsn, peers)
    return dsn


@pytest.fixture(scope="session")
async def admin(ledger_dsn: str) -> AsyncIterator[asyncpg.Pool]:
    """An administrator's connections, past row-level security."""
    async with asyncpg.create_pool(ledger_dsn, min_size=1, max_size=4) as pool:
        yield pool


@pytest.fixture(scope="session")
async def mesh(ledger_dsn: str, peers: Peers, admin: asyncpg.Pool) -> AsyncIterator[Mesh]:
    """The running service."""
    running = await running_mesh(ledger_dsn, peers, admin)
    yield running
    await running.close()
