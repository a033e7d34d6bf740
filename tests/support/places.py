"""Places of tenants for tests of one service: real schemas and databases, and a directory that knows them as the tenant service would."""

from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

from pydantic import SecretStr

from services.inference.app import MIGRATIONS as INFERENCE_MIGRATIONS
from services.kernel.ids import TenantId
from services.kernel.migrate import migrate
from services.kernel.place_making import PlaceMaker
from services.kernel.placement import HOME, Place, PlaceDirectory, PlacementKind, Whereabouts
from services.kernel.silo_pools import SiloPools
from services.kernel.tenant_context import TenantContext
from services.kernel.tenant_database import TenantDatabase
from services.retrieval.app import MIGRATIONS as RETRIEVAL_MIGRATIONS
from services.tenant.adapters.schema_maker import PostgresSchemaMaker, prepare_schema_maker
from services.tenant.adapters.silo_maker import PostgresSiloMaker

# One for every role: roles are shared by all databases of the server.
PASSWORD = "service-password"
PLACEMENTS = tuple(PlacementKind)
MIGRATIONS = {"inference": Path(INFERENCE_MIGRATIONS), "retrieval": Path(RETRIEVAL_MIGRATIONS)}


@dataclass
class KnownPlaces:
    """Makes places, and answers where tenants are."""

    admin_dsn: str
    home: str
    where: dict[TenantId, Whereabouts] = field(default_factory=dict)
    asked: list[TenantId] = field(default_factory=list)

    async def fetch(self, tenant_id: TenantId, context: TenantContext | None, *, for_tables: bool = False) -> Whereabouts:
        """Answers as the tenant service does, to whoever asks."""
        self.asked.append(tenant_id)
        return self.where.get(tenant_id, Whereabouts(HOME))

    def follow(self, database: TenantDatabase, *, pools: int = 50) -> tuple[PlaceMaker, SiloPools, PlaceDirectory]:
        """Makes a database go where its tenants are."""
        silos, directory = SiloPools(pools), PlaceDirectory(self)
        database.follow(self.home, directory, silos)
        return PlaceMaker(database, self, self.home, MIGRATIONS[self.home], SecretStr(self.dsn(f"{self.home}_placement"))), silos, directory

    async def migrate(self) -> None:
        """Brings both services' own schemas forward: a bridge is granted to both."""
        for schema, files in MIGRATIONS.items():
            roles = {kind: self.dsn(f"{schema}_{kind}") for kind in ("service", "jobs", "placement")}
            await migrate(self.admin_dsn, schema, files, roles)
        await prepare_schema_maker(self.admin_dsn, self.dsn("tenant_placement"))

    async def place(self, tenant_id: TenantId, kind: PlacementKind, maker: PlaceMaker) -> Whereabouts:
        """Gives a tenant a place with tables in it, and puts it on the service's list."""
        found = await self.make(tenant_id, kind)
        if kind is not PlacementKind.POOL:
            await maker.make_tables(found.place, found.migration_dsn)
            await maker.note_away(tenant_id, found.place)
        self.where[tenant_id] = found
        return found

    async def make(self, tenant_id: TenantId, kind: PlacementKind) -> Whereabouts:
        """Makes schema or database, empty."""
        match kind:
            case PlacementKind.POOL:
                return Whereabouts(HOME)
            case PlacementKind.BRIDGE:
                await PostgresSchemaMaker(self.dsn("tenant_placement"), 10_000).make(tenant_id)
                return Whereabouts(Place(kind, schema=f"t_{tenant_id.hex}"))
            case PlacementKind.SILO:
                silos = PostgresSiloMaker(self.admin_dsn)
                stores = silos.plan(tenant_id)
                await silos.make(tenant_id, stores)
                return Whereabouts(Place(kind, dsn=SecretStr(stores.dsn_for(self.home))), None, SecretStr(stores.owner_dsn_for(self.home)))

    async def drop(self, tenant_id: TenantId) -> None:
        """Drops schema or database, as the tenant service does at the end; there is none for a tenant of the pool."""
        match self.where[tenant_id].place.kind:
            case PlacementKind.POOL:
                return
            case PlacementKind.BRIDGE:
                await PostgresSchemaMaker(self.dsn("tenant_placement"), 10_000).drop(tenant_id)
            case PlacementKind.SILO:
                await PostgresSiloMaker(self.admin_dsn).drop(tenant_id)

    def dsn(self, role: str) -> str:
        """The shared database as a role with the tests' password."""
        parts = urlsplit(self.admin_dsn)
        return urlunsplit(parts._replace(netloc=f"{role}:{PASSWORD}@{parts.hostname}:{parts.port}"))
