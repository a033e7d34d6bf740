"""Real stores for tests: one Postgres and one Redis a session, a fresh database whenever one is wanted."""

import asyncio
import secrets
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import asyncpg

from devstack.embedded_postgres import EmbeddedPostgres
from devstack.embedded_redis import EmbeddedRedis
from devstack.ports import free_port


class PostgresStore:
    """A running server that hands out empty databases."""

    def __init__(self, server: EmbeddedPostgres) -> None:
        self.server = server

    async def fresh_database(self) -> str:
        """Creates an empty database and returns the superuser's DSN for it."""
        name = f"test_{secrets.token_hex(6)}"
        connection = await asyncpg.connect(self.server.dsn())
        try:
            await connection.execute(f'CREATE DATABASE "{name}"')
        finally:
            await connection.close()
        return self.server.dsn(name)

    def dsn(self, database: str, role: str, password: str) -> str:
        """Returns the DSN of a role of a database."""
        return self.server.dsn(database, role=role, password=password)


class RedisStore:
    """A running server that can be emptied, restarted and stopped as a crash would."""

    def __init__(self, server: EmbeddedRedis) -> None:
        self.server = server

    @property
    def url(self) -> str:
        """The server's URL with its password."""
        return self.server.url

    async def flush(self) -> None:
        """Loses all data, as a Redis without persistence does when it restarts."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.server.port)
        writer.write(f"AUTH {self.server._password}\r\nFLUSHALL\r\n".encode())
        await reader.readline()
        assert await reader.readline() == b"+OK\r\n"
        writer.close()
        await writer.wait_closed()

    async def restart(self) -> None:
        """Stops the server and starts it again on the same data."""
        await self.server.stop()
        await self.server.start()


@asynccontextmanager
async def running_postgres() -> AsyncIterator[PostgresStore]:
    """A Postgres of its own on a free port, gone at the end."""
    with tempfile.TemporaryDirectory(prefix="tenantry-pg-") as folder:
        Path(folder).chmod(0o755)
        server = EmbeddedPostgres(
            Path(folder) / "data", port=free_port(), password=secrets.token_hex(16), log_path=Path(folder) / "postgres.log"
        )
        await server.start()
        try:
            yield PostgresStore(server)
        finally:
            await server.stop()


@asynccontextmanager
async def running_redis() -> AsyncIterator[RedisStore]:
    """A Redis of its own on a free port, gone at the end."""
    with tempfile.TemporaryDirectory(prefix="tenantry-redis-") as folder:
        server = EmbeddedRedis(
            Path(folder) / "data", port=free_port(), password=secrets.token_hex(16), log_path=Path(folder) / "redis.log", durable=False
        )
        await server.start()
        try:
            yield RedisStore(server)
        finally:
            await server.stop()
