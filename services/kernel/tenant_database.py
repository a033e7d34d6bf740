"""The only place that acquires Postgres connections for tenant data. Refuses to run anything without saying whose data it is.

Connections go back to the pool without a reset: safe because the tenant, and the schema of a tenant that has its own, are only ever set
inside a transaction, which takes them along.

Behind a pooler in transaction mode a session is nobody's: everything runs in a transaction, and each begins by putting right whatever
another client may have left on the server's connection.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any, Self, TypeAlias
from uuid import UUID

import asyncpg
import structlog

from services.kernel.errors import Unavailable
from services.kernel.ids import TenantId
from services.kernel.lost_connection import UNREACHABLE, is_gone, unreachable_is_unavailable
from services.kernel.placement import HOME, Place, PlaceDirectory, PlacementKind
from services.kernel.request_context import remaining_seconds

if TYPE_CHECKING:
    from services.kernel.silo_pools import SiloPools

log = structlog.get_logger(__name__)

# What a pool lends: a proxy that dies when it is given back.
Connection: TypeAlias = asyncpg.pool.PoolConnectionProxy
_ACQUIRE_SECONDS = 2.0
_ROLLBACK_SECONDS = 2.0
_WARM_SECONDS = 3.0
_IDLE_MS = "15000"
_READ_COMMITTED = " ISOLATION LEVEL READ COMMITTED READ WRITE"
# What a place answers that a tenant has left; raised by each service's own `…_assert_here`.
_MOVED_AWAY = "TM001"
# A schema, database or role of its own that is not there: not made yet, or dropped with its tenant.
_PLACE_MISSING = (
    asyncpg.UndefinedFunctionError,
    asyncpg.InvalidSchemaNameError,
    asyncpg.InvalidCatalogNameError,
    asyncpg.InvalidAuthorizationSpecificationError,
)


class Database:
    """A pool that tolerates an absent server: it opens at once, and calls answer Unavailable until Postgres is back."""

    def __init__(self, pool: asyncpg.Pool, *, pooled_begin: str = "") -> None:
        """`pooled_begin` begins every transaction behind a pooler; without one it is empty."""
        self._pool = pool
        self._pooled_begin = pooled_begin

    @classmethod
    async def open(
        cls,
        dsn: str,
        *,
        min_size: int = 1,
        max_size: int = 8,
        statement_timeout_seconds: float = 5.0,
        application_name: str = "tenantry",
        transaction_pooling: bool = False,
    ) -> Self:
        """Builds the pool and warms `min_size` connections if the server is there.

        With `transaction_pooling` nothing outlives a transaction: no prepared statement and no setting of the session.
        """
        limits = {"statement_timeout": str(int(statement_timeout_seconds * 1000)), "idle_in_transaction_session_timeout": _IDLE_MS}
        pool = asyncpg.create_pool(
            dsn,
            min_size=0,
            max_size=max_size,
            reset=_keep_session,
            timeout=_ACQUIRE_SECONDS,
            command_timeout=statement_timeout_seconds + 1.0,
            # A pooler's server connections are not this client's: it refuses limits at the start, and a name alone gets through.
            server_settings={"application_name": application_name} | ({} if transaction_pooling else limits),
            **({"statement_cache_size": 0} if transaction_pooling else {}),
        )
        await pool
        database = cls(pool, pooled_begin=_pooled_begin(limits) if transaction_pooling else "")
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
        except BaseException:
            await self._give_back(connection)
            raise
        await self._pool.release(connection)

    async def _give_back(self, connection: Connection) -> None:
        """Gives back a connection that may be broken: the pool cuts one that cannot be put right, which is all there is to do."""
        given = asyncio.get_running_loop().create_task(self._pool.release(connection))
        given.add_done_callback(lambda done: done.cancelled() or done.exception())
        with suppress(*UNREACHABLE, asyncpg.InterfaceError):
            await asyncio.shield(given)

    @asynccontextmanager
    async def _transaction(self, begin: str) -> AsyncIterator[Connection]:
        async with self._acquire() as connection:
            try:
                # Inside: whoever leaves while it begins may leave a transaction open, and this tenant on it.
                await connection.execute(begin)
                yield connection
            except BaseException:
                await _rollback(connection)
                raise
            else:
                await connection.execute("COMMIT")

    async def _fetch(self, sql: str, args: Sequence[object]) -> list[asyncpg.Record]:
        # Behind a pooler parsing and running are two visits, which only a transaction keeps on one server connection.
        async with self._transaction(self._pooled_begin) if self._pooled_begin else self._acquire() as connection:
            rows: list[asyncpg.Record] = await connection.fetch(sql, *args)
            return rows

    async def _warm(self, count: int) -> None:
        connections: list[Connection] = []
        try:
            async with asyncio.timeout(_WARM_SECONDS):
                for _ in range(count):
                    connections.append(await self._pool.acquire(timeout=_WARM_SECONDS))
        except (*UNREACHABLE, asyncpg.InterfaceError, asyncpg.PostgresError) as error:
            log.warning("postgres_not_ready", error=type(error).__name__)
        finally:
            for connection in connections:
                await self._pool.release(connection)


class PlaceMissing(Unavailable):
    """The tenant's own schema or database is not there."""

    def __init__(self) -> None:
        super().__init__("placement", "the tenant's own place is not there: repeat the call once the tenant is provisioned")


class TenantDatabase(Database):
    """Connections of the service's own role, under row-level security, wherever the tenant lives."""

    _home_schema = ""
    _places: PlaceDirectory | None = None
    _silos: "SiloPools | None" = None

    def follow(self, home_schema: str, places: PlaceDirectory, silos: "SiloPools") -> None:
        """Makes every statement go where its tenant lives; a database that follows nobody has every tenant in its own pool.

        SQL names its tables without a schema: at home the role's own search path finds them, elsewhere the transaction's.
        """
        self._home_schema, self._places, self._silos = home_schema, places, silos
        if self._pooled_begin:
            # Where names are found is a setting of the session too, and another client may have left its own.
            self._pooled_begin += f"; SET LOCAL search_path = {home_schema}, pg_temp"

    async def place_of(self, tenant_id: TenantId) -> Place:
        """Returns where the tenant lives, as far as is known here."""
        return HOME if self._places is None else await self._places.find(tenant_id)

    async def find_place(self, tenant_id: TenantId) -> Place:
        """Returns where the tenant lives, as the places themselves say. Raises: Unavailable, NotFound, PlaceMissing."""
        place = await self.place_of(tenant_id)
        while True:
            try:
                async with self.transaction_at(place, tenant_id):
                    return place
            except asyncpg.PostgresError as error:
                if error.sqlstate != _MOVED_AWAY or self._places is None:
                    raise
            place = await self._places.moved(tenant_id, place)

    def known_place(self, tenant_id: TenantId, kind: PlacementKind) -> Place | None:
        """Returns the place of a tenant of that kind without asking anybody; None for a silo that no call of its tenant made known."""
        known = None if self._places is None else self._places.peek(tenant_id)
        if known is not None:
            return known
        return Place(kind, schema=f"t_{tenant_id.hex}") if kind is PlacementKind.BRIDGE else None

    @asynccontextmanager
    async def transaction(self, tenant_id: TenantId, *, settings: str = "") -> AsyncIterator[Connection]:
        """Yields a connection inside a transaction that sees only this tenant; commits at the end, rolls back on any exception.

        `settings` are `SET LOCAL` statements: they go with the begin, in one round trip. Savepoints inside are plain `SAVEPOINT`
        statements: the driver's own nesting does not know this transaction.
        """
        async with AsyncExitStack() as stack:
            yield await self._begin(stack, tenant_id, settings)

    @asynccontextmanager
    async def transaction_at(
        self, place: Place, tenant_id: TenantId, *, walled: bool = True, snapshot: bool = False, settings: str = ""
    ) -> AsyncIterator[Connection]:
        """As `transaction`, at this place whatever is known of the tenant; without its wall only for the wall's own books and for moves.

        With `snapshot` every statement sees the same moment, and none writes.

        Raises: asyncpg.PostgresError with SQLSTATE TM001 when the tenant lives elsewhere; PlaceMissing.
        """
        begin = _with_settings(self._begin_at(place, tenant_id, walled=walled), settings)
        if snapshot:
            # Behind a pooler the transaction says its level already, and of two levels the last one counts.
            begin = begin.replace(_READ_COMMITTED, "", 1).replace("BEGIN", "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY", 1)
        async with AsyncExitStack() as stack:
            try:
                pool: Database = self
                if place.kind is PlacementKind.SILO and self._silos is not None:
                    pool = await stack.enter_async_context(self._silos.lend(place.dsn))
                connection = await stack.enter_async_context(pool._transaction(begin))
            except _PLACE_MISSING as error:
                if place.kind is PlacementKind.POOL:
                    raise
                self.forget_place(tenant_id)
                raise PlaceMissing from error
            yield connection

    async def call(self, tenant_id: TenantId | None, sql: str, *args: object) -> list[asyncpg.Record]:
        """Runs one statement and returns its rows: in one round trip where the service is at home.

        The statement calls an SQL function that sets the tenant itself. With `tenant_id` the id must be among the arguments: a statement
        that does not name its tenant is refused with ValueError. None is for statements on shared reference data and for batches that
        name their tenants item by item.
        """
        _require_named(tenant_id, args)
        if tenant_id is None or self._places is None:
            return await self._fetch(sql, args)
        place = await self._places.find(tenant_id)
        if place.kind is PlacementKind.POOL:
            try:
                return await self._fetch(sql, args)
            except asyncpg.PostgresError as error:
                if error.sqlstate != _MOVED_AWAY:
                    raise
            await self._places.moved(tenant_id, place)
        async with self.transaction(tenant_id) as connection:
            rows: list[asyncpg.Record] = await connection.fetch(sql, *args)
            return rows

    async def fetch_row(self, tenant_id: TenantId | None, sql: str, *args: object) -> asyncpg.Record | None:
        """As `call`, returning the first row or None."""
        rows = await self.call(tenant_id, sql, *args)
        return rows[0] if rows else None

    async def fetch_value(self, tenant_id: TenantId | None, sql: str, *args: object) -> Any:
        """As `call`, returning the first column of the first row or None."""
        row = await self.fetch_row(tenant_id, sql, *args)
        return None if row is None else row[0]

    async def _begin(self, stack: AsyncExitStack, tenant_id: TenantId, settings: str) -> Connection:
        place = await self.place_of(tenant_id)
        while True:
            try:
                return await stack.enter_async_context(self.transaction_at(place, tenant_id, settings=settings))
            except asyncpg.PostgresError as error:
                if error.sqlstate != _MOVED_AWAY or self._places is None:
                    raise
            place = await self._places.moved(tenant_id, place)

    def _begin_at(self, place: Place, tenant_id: TenantId, *, walled: bool) -> str:
        schema = place.schema or self._home_schema
        begin = _begin_for(tenant_id, self._pooled_begin or "BEGIN")
        if place.kind is not PlacementKind.POOL:
            begin += f"; SET LOCAL search_path = {schema}, pg_temp"
        if walled and self._places is not None:
            begin += f"; SELECT {schema}.{self._home_schema}_assert_here('{UUID(int=tenant_id.int)}')"
        return begin

    def forget_place(self, tenant_id: TenantId) -> None:
        """Forgets where the tenant lives: the next call asks again."""
        if self._places is not None:
            self._places.forget(tenant_id)


class JobsDatabase(Database):
    """Connections of the separate role for cross-tenant sweeps, with policies of its own and never BYPASSRLS."""

    @asynccontextmanager
    async def transaction(self, *, settings: str = "") -> AsyncIterator[Connection]:
        """Yields a connection inside a transaction, with `SET LOCAL` statements; commits at the end, rolls back on any exception."""
        async with self._transaction(_with_settings(self._pooled_begin or "BEGIN", settings)) as connection:
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


@asynccontextmanager
async def listening(dsn: str, channel: str, on_notice: Callable[[], None], *, application_name: str) -> AsyncIterator[asyncio.Event]:
    """Calls `on_notice` for every notification on a channel; yields an event that is set when the connection has ended.

    A connection outside of any pool, which reads no table. Raises: Unavailable.
    """
    ended = asyncio.Event()
    with unreachable_is_unavailable():
        connection = await asyncpg.connect(  # noqa: TID251 - this is one of the two places
            dsn, timeout=_ACQUIRE_SECONDS, command_timeout=_ACQUIRE_SECONDS, server_settings={"application_name": application_name}
        )
    try:
        connection.add_termination_listener(lambda _: ended.set())
        with unreachable_is_unavailable(connection):
            await connection.add_listener(channel, lambda *_: on_notice())
        yield ended
    finally:
        # Without a goodbye: it could wait for a server that is gone.
        connection.terminate()


def _pooled_begin(limits: Mapping[str, str]) -> str:
    # One visit in the simple protocol. What a faulty client has SET for the session is overruled until the end of this transaction:
    # above all a tenant, which would otherwise be lent to a statement that forgot its own.
    settings = {"app.tenant_id": "", "lock_timeout": "0", "row_security": "on"} | dict(limits)
    overruled = ", ".join(f"set_config('{name}', '{value}', true)" for name, value in settings.items())
    return f"BEGIN{_READ_COMMITTED}; SET LOCAL search_path TO DEFAULT; SELECT {overruled}"


def _begin_for(tenant_id: TenantId, begin: str) -> str:
    # The simple protocol takes no parameters but runs both statements in one round trip; a UUID's own text cannot carry SQL.
    if not isinstance(tenant_id, UUID):
        msg = "a tenant transaction needs the tenant's UUID"
        raise TypeError(msg)
    return f"{begin}; SELECT set_config('app.tenant_id', '{UUID(int=tenant_id.int)}', true)"


def _with_settings(begin: str, settings: str) -> str:
    return f"{begin}; {settings}" if settings else begin


def _require_named(tenant_id: TenantId | None, args: Sequence[object]) -> None:
    if tenant_id is not None and tenant_id not in args:
        msg = "the statement does not name its tenant: pass tenant_id among its arguments"
        raise ValueError(msg)


async def _rollback(connection: Connection) -> None:
    if is_gone(connection):
        return
    try:
        await connection.execute("ROLLBACK", timeout=_ROLLBACK_SECONDS)
    except (*UNREACHABLE, asyncpg.InterfaceError):
        if not is_gone(connection):
            # Cut rather than returned: a connection whose transaction may still be open must not reach another tenant.
            connection.terminate()


async def _keep_session(connection: Connection) -> None:
    """Leaves the session as it is: the default reset costs a round trip and there is nothing to undo."""
