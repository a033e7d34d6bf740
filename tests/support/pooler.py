"""PgBouncer in transaction mode for tests, and a client that misbehaves behind it."""

import asyncio
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from urllib.parse import urlsplit

import asyncpg
import pytest

from devstack.pgbouncer import PgBouncer, find_pgbouncer
from devstack.ports import free_port

MISSING = "pgbouncer is not installed (on Debian: apt install pgbouncer): nothing is tried through it"


def require_pgbouncer() -> None:
    """Skips where there is no pgbouncer, and says so."""
    if find_pgbouncer() is None:
        pytest.skip(MISSING)


@asynccontextmanager
async def running_pgbouncer(role_dsns: Sequence[str], *, server_connections: int = 2) -> AsyncIterator[list[str]]:
    """A pooler before the server of these DSNs; yields the same DSNs through it."""
    require_pgbouncer()
    # Not pytest's folder: each run of pytest that begins closes it to everybody but its owner, and the pooler refuses to be root.
    with tempfile.TemporaryDirectory(prefix="tenantry-pgbouncer-") as name:
        folder, log = Path(name) / "pgbouncer", Path(name) / "pgbouncer.log"
        pooler = PgBouncer(folder, port=free_port(), role_dsns=role_dsns, log_path=log, server_connections=server_connections)
        await pooler.start()
        try:
            yield [through(dsn, pooler.port) for dsn in role_dsns]
        finally:
            await pooler.stop()


def through(dsn: str, port: int) -> str:
    """The DSN with another port."""
    parts = urlsplit(dsn)
    return dsn.replace(f":{parts.port}/", f":{port}/", 1)


async def leave_behind(dsn: str, settings: dict[str, str], *, server_connections: int = 2) -> None:
    """A faulty client: SETs for the session on every server connection of its role's pool, and leaves."""
    everybody = asyncio.Barrier(server_connections)

    async def one() -> None:
        connection = await asyncpg.connect(dsn, statement_cache_size=0)
        try:
            async with connection.transaction():
                # Held until each holds one: so no two of them are on the same.
                await everybody.wait()
                for name, value in settings.items():
                    await connection.execute(f"SET {name} = '{value}'")
        finally:
            await connection.close()

    async with asyncio.TaskGroup() as group:
        for _ in range(server_connections):
            group.create_task(one())
