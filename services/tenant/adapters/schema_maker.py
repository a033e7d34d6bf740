"""Makes bridge schemas `t_<hex>` in the shared database, as a role that may do nothing else. Refuses more than the catalog bears."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from urllib.parse import unquote, urlsplit

import asyncpg

from services.kernel.errors import Unavailable
from services.kernel.ids import TenantId
from services.kernel.migrate import MigrationRefused, ensure_role
from services.tenant.placement import CONTENT_SERVICES, Refusal, bridge_full, never, no_schema_maker

ROLE = "tenant_placement"
_CONNECT_SECONDS = 5.0
_STATEMENT_SECONDS = 30.0
LOCK = "SELECT pg_advisory_xact_lock(hashtextextended('tenant.bridge_schemas', 0))"
SCHEMA_EXISTS = "SELECT true FROM pg_namespace WHERE nspname = $1"
COUNT_SCHEMAS = "SELECT count(*) FROM pg_namespace WHERE nspname ~ '^t_[0-9a-f]{32}$'"


class PostgresSchemaMaker:
    """The shared database, reached as `tenant_placement`."""

    def __init__(self, dsn: str, limit: int) -> None:
        self._dsn = dsn
        self._limit = limit

    async def refuse_full(self) -> None:
        """Raises: WrongState when no further schema may be made."""
        async with self._connection() as connection:
            await self._refuse_full(connection)

    async def make(self, tenant_id: TenantId, refuse_unwanted: Refusal = never) -> None:
        """Makes the schema and lets the services' owners make tables in it."""
        name = f"t_{tenant_id.hex}"
        owners = ", ".join(f"{service}_owner" for service in CONTENT_SERVICES)
        readers = ", ".join(f"{service}_service" for service in CONTENT_SERVICES)
        async with self._connection() as connection, connection.transaction():
            await connection.execute(LOCK)
            await refuse_unwanted()
            if await connection.fetchval(SCHEMA_EXISTS, name):
                return
            await self._refuse_full(connection)
            await connection.execute(f"CREATE SCHEMA {name}")
            await connection.execute(f"GRANT USAGE, CREATE ON SCHEMA {name} TO {owners}")
            await connection.execute(f"GRANT USAGE ON SCHEMA {name} TO {readers}")

    async def drop(self, tenant_id: TenantId) -> None:
        """Drops the schema; its owner may drop what others made in it."""
        async with self._connection() as connection, connection.transaction():
            # Behind who is making it: afterwards nobody begins to.
            await connection.execute(LOCK)
            await connection.execute(f"DROP SCHEMA IF EXISTS t_{tenant_id.hex} CASCADE")

    async def _refuse_full(self, connection: asyncpg.Connection) -> None:
        if await connection.fetchval(COUNT_SCHEMAS) >= self._limit:
            raise bridge_full(self._limit)

    @asynccontextmanager
    async def _connection(self) -> AsyncIterator[asyncpg.Connection]:
        if not self._dsn:
            raise no_schema_maker()
        try:
            connection = await asyncpg.connect(  # noqa: TID251 - for DDL alone, a moment at a time: no pool
                self._dsn, timeout=_CONNECT_SECONDS, command_timeout=_STATEMENT_SECONDS
            )
        except (OSError, TimeoutError, asyncpg.PostgresConnectionError, asyncpg.CannotConnectNowError):
            raise Unavailable("postgres") from None
        try:
            yield connection
        finally:
            await connection.close()


async def prepare_schema_maker(admin_dsn: str, placement_dsn: str) -> None:
    """Makes the role that makes schemas; nothing without a DSN for it. Raises: MigrationRefused for a DSN of another role."""
    if not placement_dsn:
        return
    parts = urlsplit(placement_dsn)
    if parts.username != ROLE or not parts.password:
        raise MigrationRefused(f"the placement DSN of the tenant service must log in as {ROLE}, with a password")
    connection = await asyncpg.connect(admin_dsn)  # noqa: TID251 - as migrate does
    try:
        await ensure_role(connection, ROLE, login=True, password=unquote(parts.password))
        database = await connection.fetchval("SELECT quote_ident(current_database())")
        await connection.execute(f"GRANT CREATE ON DATABASE {database} TO {ROLE}")
    finally:
        await connection.close()
