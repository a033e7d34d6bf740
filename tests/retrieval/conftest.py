"""The retrieval service's library over a real Postgres and the real Qdrant engine, for tenants in every kind of place."""

import secrets
from collections.abc import AsyncIterator
from dataclasses import dataclass

import pytest
from pydantic import SecretStr

from services.kernel.ids import TenantId, new_uuid7
from services.kernel.place_making import PlaceMaker
from services.kernel.placement import PlacementKind
from services.kernel.sealing import TenantKeys
from services.kernel.tenant_cipher import TenantCipher
from services.kernel.tenant_context import TenantContext
from services.kernel.tenant_database import JobsDatabase, TenantDatabase
from services.retrieval.adapters.placed_index import PlacedIndex
from services.retrieval.adapters.postgres import PostgresDocumentStore, PostgresOwedWork
from services.retrieval.adapters.qdrant import QdrantIndex
from services.retrieval.embedding import HashingEmbedder
from services.retrieval.library import Library
from tests.devstack.qdrant_front.front import API_KEY, running_front
from tests.support.places import PLACEMENTS, KnownPlaces
from tests.support.stores import PostgresStore


class ScriptedKeys:
    """The tenant service's data keys: version 1 for everybody until a test says otherwise."""

    def __init__(self) -> None:
        self.of: dict[TenantId, dict[int, bytes]] = {}
        self.fetched = 0

    async def fetch(self, context: TenantContext, tenant_id: TenantId) -> TenantKeys:
        self.fetched += 1
        keys = self.of.setdefault(tenant_id, {1: secrets.token_bytes(32)})
        return TenantKeys.of(tenant_id, dict(keys), max(keys))


@dataclass(frozen=True, slots=True)
class Shelf:
    """Everything a test of the library may want to touch."""

    library: Library
    store: PostgresDocumentStore
    index: PlacedIndex
    owed: PostgresOwedWork
    kind: PlacementKind
    places: KnownPlaces
    maker: PlaceMaker
    admin_dsn: str
    qdrant_url: str
    qdrant_api_key: str
    keys: ScriptedKeys
    database: TenantDatabase
    jobs: JobsDatabase
    embedder: HashingEmbedder
    service_dsn: str

    async def new_tenant(self) -> TenantId:
        """A tenant with a collection of its own, in the shelf's kind of place."""
        tenant_id = TenantId(new_uuid7())
        await self.places.place(tenant_id, self.kind, self.maker)
        await self.index.provision(tenant_id)
        return tenant_id


@pytest.fixture(scope="session", params=PLACEMENTS, ids=str)
async def shelf(request: pytest.FixtureRequest, postgres: PostgresStore, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Shelf]:
    """A migrated database, a running engine and the library over both; its tenants live in one kind of place."""
    admin_dsn = await postgres.fresh_database()
    places = KnownPlaces(admin_dsn, "retrieval")
    await places.migrate()
    database = await TenantDatabase.open(places.dsn("retrieval_service"))
    jobs = await JobsDatabase.open(places.dsn("retrieval_jobs"))
    maker, silos, _ = places.follow(database)
    with running_front(tmp_path_factory.mktemp("qdrant")) as front:
        embedder = HashingEmbedder()
        url = f"http://127.0.0.1:{front.port}"
        shared = QdrantIndex(url, SecretStr(API_KEY), embedder.dimensions)
        index = PlacedIndex(shared, database, embedder.dimensions)
        keys = ScriptedKeys()
        store = PostgresDocumentStore(database, jobs, TenantCipher(keys))
        library, owed = Library(store, index, embedder), PostgresOwedWork(jobs, database)
        service_dsn = places.dsn("retrieval_service")
        yield Shelf(
            library=library,
            store=store,
            index=index,
            owed=owed,
            kind=request.param,
            places=places,
            maker=maker,
            admin_dsn=admin_dsn,
            qdrant_url=url,
            qdrant_api_key=API_KEY,
            keys=keys,
            database=database,
            jobs=jobs,
            embedder=embedder,
            service_dsn=service_dsn,
        )
        await index.close()
        await shared.close()
        front.kill()
    await silos.close()
    await jobs.close()
    await database.close()
