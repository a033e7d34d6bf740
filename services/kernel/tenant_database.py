"""The only place that acquires Postgres connections for tenant data. Refuses to run anything without saying whose data it is.

Connections go back to the pool without a reset: safe because the tenant is only ever set inside a transaction, which takes it along.
"""

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Any, Self, TypeAlias
from uuid import UUID

import asyncpg
import structlog

from services.kernel.errors import NotFound, Unavailable
from services.kernel.ids import TenantId
from services.kernel.request_context import remaining_seconds

log = structlog.get_logger(__name__)

# What a pool lends: a proxy that dies when it is given back.
Connection: TypeAlias = asyncpg.pool.PoolConnectionProxy
_ACQUIRE_SECONDS = 2.0
_ROLLBACK_SECONDS = 2.0
_WARM_SECONDS = 3.0
# Raised by the triggers that keep rows of erased tenants out.
_TENANT_ERASED = "TN001"
_UNREACHABLE = (
    OSError,
    TimeoutError,
    asyncpg.PostgresConnectionError,
    asyncpg.CannotConnectNowError,
    asyncpg.AdminShutdownError,
    asyncpg.CrashShutdownError,
    asyncpg.TooManyConnectionsError,
    asyncpg.QueryCanceledError,
)


class Database:
    """A pool that tolerates an absent server: it opens at once, and calls answer Unavailable until Postgres is back."""

    def __init__(self, pool: asyncpg.Pool) -> None:
        self._pool = pool

    @classmethod
    async def open(
        cls,
        dsn: str,
        *,
        min_size: int = 1,
        max_size: int = 8,
        statement_timeout_seconds: float = 5.0,
        application_name: str = "tenantry",
    ) -> Self:
        """Builds the pool and warms `min_size` connections if the server is there."""
        pool = asyncpg.create_pool(
            dsn,
            min_size=0,
            max_size=max_size,
            reset=_keep_session,
            timeout=_ACQUIRE_SECONDS,
            command_timeout=statement_timeout_seconds + 1.0,
            server_settings={
                "application_name": application_name,
                "statement_timeout": str(int(statement_timeout_seconds * 1000)),
                "idle_in_transaction_session_timeout": "15000",
            },
        )
        await pool
        database = cls(pool)
        await database._warm(min_size)
        return database

    async def close(self) -> None:
        """Waits for connections in use, then closes them all; after 5 s they are cut."""
        try:
            async with asyncio.timeout(5.0):
                await self._pool.close()
        except TimeoutError:
            self._pool.terminate()

    @asynccontextmanager
    async def _acquire(self) -> AsyncIterator[Connection]:
        limit = min(_ACQUIRE_SECONDS, remaining_seconds(_ACQUIRE_SECONDS))
        with unreachable_is_unavailable():
            connection = await self._pool.acquire(timeout=max(limit, 0.001))
        try:
            with unreachable_is_unavailable(connection):
                yield connection
        finally:
            await self._pool.release(connection)

    @asynccontextmanager
    async def _transaction(self, begin: str) -> AsyncIterator[Connection]:
        async with self._acquire() as connection:
            await connection.execute(begin)
            try:
                yield connection
            except BaseException:
                await _rollback(connection)
                raise
            else:
                await connection.execute("COMMIT")

    async def _fetch(self, sql: str, args: Sequence[object]) -> list[asyncpg.Record]:
        async with self._acquire() as connection:
            rows: list[asyncpg.Record] = await connection.fetch(sql, *args)
            return rows

    async def _warm(self, count: int) -> None:
        connections: list[Connection] = []
        try:
            async with asyncio.timeout(_WARM_SECONDS):
                for _ in range(count):
                    connections.append(await self._pool.acquire(timeout=_WARM_SECONDS))
        except (*_UNREACHABLE, asyncpg.InterfaceError, asyncpg.PostgresError) as error:
            log.warning("postgres_not_ready", error=type(error).__name__)
        finally:
            for connection in connections:
                await self._pool.release(connection)


class TenantDatabase(Database):
    """Connections of the service's own role, under row-level security."""

    @asynccontextmanager
    async def transaction(self, tenant_id: TenantId) -> AsyncIterator[Connection]:
        """Yields a connection inside a transaction that sees only this tenant; commits at the end, rolls back on any exception.

        Savepoints inside are plain `SAVEPOINT` statements: the driver's own nesting does not know this transaction.
        """
        async with self._transaction(_begin_for(tenant_id)) as connection:
            yield connection

    async def call(self, tenant_id: TenantId | None, sql: str, *args: object) -> list[asyncpg.Record]:
        """Runs one statement in one round trip and returns its rows.

        The statement calls an SQL function that sets the tenant itself. With `tenant_id` the id must be among the arguments: a statement
        that does not name its tenant is refused with ValueError. None is for statements on shared reference data and for batches that
        name their tenants item by item.
        """
        _require_named(tenant_id, args)
        return await self._fetch(sql, args)

    async def fetch_row(self, tenant_id: TenantId | None, sql: str, *args: object) -> asyncpg.Record | None:
        """As `call`, returning the first row or None."""
        _require_named(tenant_id, args)
        rows = await self._fetch(sql, args)
        return rows[0] if rows else None

    async def fetch_value(self, tenant_id: TenantId | None, sql: str, *args: object) -> Any:
        """As `call`, returning the first column of the first row or None."""
        row = await self.fetch_row(tenant_id, sql, *args)
        return None if row is None else row[0]


class JobsDatabase(Database):
    """Connections of the separate role for cross-tenant sweeps, with policies of its own and never BYPASSRLS."""

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[Connection]:
        """Yields a connection inside a transaction; commits at the end, rolls back on any exception."""
        async with self._transaction("BEGIN") as connection:
            yield connection

    async def call(self, sql: str, *args: object) -> list[asyncpg.Record]:
        """Runs one statement in one round trip and returns its rows."""
        return await self._fetch(sql, args)

    async def fetch_row(self, sql: str, *args: object) -> asyncpg.Record | None:
        """As `call`, returning the first row or None."""
        rows = await self._fetch(sql, args)
        return rows[0] if rows else None

    async def fetch_value(self, sql: str, *args: object) -> Any:
        """As `call`, returning the first column of the first row or None."""
        row = await self.fetch_row(sql, *args)
        return None if row is None else row[0]


@contextmanager
def unreachable_is_unavailable(connection: Connection | None = None) -> Iterator[None]:
    """Turns the driver's ways of saying "no server" into Unavailable, and a row of an erased tenant into NotFound."""
    try:
        yield
    except asyncpg.PostgresError as error:
        if error.sqlstate == _TENANT_ERASED:
            raise NotFound("tenant") from None
        if isinstance(error, _UNREACHABLE):
            raise Unavailable("postgres") from error
        raise
    except _UNREACHABLE as error:
        raise Unavailable("postgres") from error
    except (asyncpg.InterfaceError, asyncpg.InternalClientError) as error:
        # The driver's own words for a connection that the server cut while it was idle.
        if connection is None or connection.is_closed():
            raise Unavailable("postgres") from error
        raise


def _begin_for(tenant_id: TenantId) -> str:
    # The simple protocol takes no parameters but runs both statements in one round trip; a UUID's own text cannot carry SQL.
    if not isinstance(tenant_id, UUID):
        msg = "a tenant transaction needs the tenant's UUID"
        raise TypeError(msg)
    return f"BEGIN; SELECT set_config('app.tenant_id', '{UUID(int=tenant_id.int)}', true)"


def _require_named(tenant_id: TenantId | None, args: Sequence[object]) -> None:
    if tenant_id is not None and tenant_id not in args:
        msg = "the statement does not name its tenant: pass tenant_id among its arguments"
        raise ValueError(msg)


async def _rollback(connection: Connection) -> None:
    if connection.is_closed():
        return
    try:
        await connection.execute("ROLLBACK", timeout=_ROLLBACK_SECONDS)
    except (*_UNREACHABLE, asyncpg.InterfaceError):
        # Cut rather than returned: a connection whose transaction may still be open must not reach another tenant.
        connection.terminate()


async def _keep_session(connection: Connection) -> None:
    """Leaves the session as it is: the default reset costs a round trip and there is nothing to undo."""
