"""Makes one service's tables where a tenant lives outside the pool, with the same files as at home, and keeps the list of who does.

The list is the wall: whoever is on it is neither read nor written in the pool.
"""

from pathlib import Path
from typing import Protocol
from urllib.parse import unquote, urlsplit

from pydantic import SecretStr

from services.kernel.errors import NotFound, WrongState
from services.kernel.ids import TenantId
from services.kernel.migrate import Destination, migrate_place, role_names
from services.kernel.placement import HOME, Place, PlacementKind, Whereabouts
from services.kernel.tenant_context import TenantContext
from services.kernel.tenant_database import Connection, TenantDatabase

_PLACEMENT = "_placement"


class TableSource(Protocol):
    """Who knows where a tenant is and what its tables are made with."""

    async def fetch(self, tenant_id: TenantId, context: TenantContext | None, *, for_tables: bool = False) -> Whereabouts:
        """Returns where the tenant is."""
        ...


class PlaceMaker:
    """One service's part of tenants' own places."""

    def __init__(self, database: TenantDatabase, source: TableSource, home_schema: str, migrations: Path, placement_dsn: SecretStr) -> None:
        self._database = database
        self._source = source
        self._home = home_schema
        self._migrations = migrations
        self._placement_dsn = placement_dsn

    async def make(self, context: TenantContext) -> list[str]:
        """Makes or brings forward the tables of a tenant outside the pool; returns what was made, for people. Idempotent."""
        if context.tenant_id is None or context.placement == PlacementKind.POOL:
            return []
        whereabouts = await self._source.fetch(context.tenant_id, context, for_tables=True)
        await self.note_away(context.tenant_id, whereabouts.place)
        return await self.make_tables(whereabouts.place, whereabouts.migration_dsn)

    async def make_tables(self, place: Place, migration_dsn: SecretStr) -> list[str]:
        """Applies the files that are missing at the place."""
        destination, dsn = self.destination(place, migration_dsn)
        if not dsn:
            raise WrongState("placement", "NO_PLACEMENT_DSN", f"set TENANTRY_POSTGRES_PLACEMENT_DSN at {self._home}, then repeat the call")
        await migrate_place(dsn, destination, self._migrations)
        return [f"postgres {place.kind.value} {destination.schema}"]

    def destination(self, place: Place, migration_dsn: SecretStr) -> tuple[Destination, str]:
        """Returns whose tables are made where, and the DSN to make them with."""
        if place.kind is PlacementKind.BRIDGE:
            names = role_names(self._home)
            return Destination(self._home, place.schema, names["owner"], names["service"]), self._placement_dsn.get_secret_value()
        dsn = migration_dsn.get_secret_value()
        maker = unquote(urlsplit(dsn).username or "")
        # A role that only logs in to make tables is called after the owner it becomes, as at home; any other owns them itself.
        owner = f"{maker.removesuffix(_PLACEMENT)}_owner" if maker.endswith(_PLACEMENT) else maker
        service = unquote(urlsplit(place.dsn.get_secret_value()).username or "")
        return Destination(self._home, self._home, owner, service), dsn

    async def note_away(self, tenant_id: TenantId, place: Place) -> None:
        """Puts the tenant on the list: from now on the pool refuses it. Raises: NotFound for an erased tenant."""
        async with self._database.transaction_at(HOME, tenant_id, walled=False) as connection:
            await hold_off_erasure(connection, self._home, tenant_id)
            await connection.execute(
                f"INSERT INTO {self._home}_placed_tenants (tenant_id, kind, state) VALUES ($1, $2, 'AWAY') "  # noqa: S608 - a schema's name
                "ON CONFLICT (tenant_id) DO UPDATE SET kind = excluded.kind, state = 'AWAY', update_time = clock_timestamp()",
                tenant_id,
                place.kind.value,
            )

    async def forget(self, tenant_id: TenantId) -> None:
        """Takes an erased tenant off the list, and out of memory: its place is dropped next. Idempotent."""
        async with self._database.transaction_at(HOME, tenant_id, walled=False) as connection:
            await connection.execute(f"DELETE FROM {self._home}_placed_tenants WHERE tenant_id = $1", tenant_id)  # noqa: S608 - as above
        self._database.forget_place(tenant_id)


async def refuse_erased(connection: Connection, home_schema: str, tenant_id: TenantId) -> None:
    """Looks for the tombstone that the service keeps at home. Raises: NotFound for an erased tenant."""
    if await connection.fetchval(f"SELECT true FROM {home_schema}.erased_tenants WHERE tenant_id = $1", tenant_id):  # noqa: S608 - as above
        raise NotFound("tenant")


async def hold_off_erasure(connection: Connection, home_schema: str, tenant_id: TenantId) -> None:
    """Lets no erasure begin before this transaction has ended; one that began is waited for. Raises: NotFound for an erased tenant."""
    # The look is a statement of its own after the lock: in one statement it would see what was there before the wait.
    await connection.execute(f"SELECT pg_advisory_xact_lock_shared({home_schema}.erasure_lock($1))", tenant_id)
    await refuse_erased(connection, home_schema, tenant_id)
