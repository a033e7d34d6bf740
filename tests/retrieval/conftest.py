"""The retrieval service's library over a real Postgres and the real Qdrant engine."""

import secrets
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from pydantic import SecretStr

from services.kernel.ids import TenantId, new_uuid7
from services.kernel.migrate import migrate
from services.kernel.tenant_database import JobsDatabase, TenantDatabase
from services.retrieval.adapters.postgres import PostgresDocumentStore, PostgresOwedWork
from services.retrieval.adapters.qdrant import QdrantIndex
from services.retrieval.app import MIGRATIONS
from services.retrieval.embedding import HashingEmbedder
from services.retrieval.library import Library
from tests.devstack.qdrant_front.front import API_KEY, running_front
from tests.support.stores import PostgresStore


@dataclass(frozen=True, slots=True)
class Shelf:
    """Everything a test of the library may want to touch."""

    library: Library
    store: PostgresDocumentStore
    index: QdrantIndex
    owed: PostgresOwedWork
    admin_dsn: str
    qdrant_url: str
    qdrant_api_key: str

    async def new_tenant(self) -> TenantId:
        """A tenant with a collection of its own."""
        tenant_id = TenantId(new_uuid7())
        await self.index.provision(tenant_id)
        return tenant_id


@pytest.fixture(scope="session")
async def shelf(postgres: PostgresStore, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Shelf]:
    """A migrated database, a running engine and the library over both."""
    admin_dsn = await postgres.fresh_database()
    database_name = urlsplit(admin_dsn).path.strip("/")
    service_dsn = postgres.dsn(database_name, "retrieval_service", secrets.token_hex(8))
    jobs_dsn = postgres.dsn(database_name, "retrieval_jobs", secrets.token_hex(8))
    await migrate(admin_dsn, "retrieval", Path(MIGRATIONS), {"service": service_dsn, "jobs": jobs_dsn})
    database = await TenantDatabase.open(service_dsn)
    jobs = await JobsDatabase.open(jobs_dsn)
    with running_front(tmp_path_factory.mktemp("qdrant")) as front:
        embedder = HashingEmbedder()
        url = f"http://127.0.0.1:{front.port}"
        index = QdrantIndex(url, SecretStr(API_KEY), embedder.dimensions)
        store = PostgresDocumentStore(database, jobs)
        yield Shelf(Library(store, index, embedder), store, index, PostgresOwedWork(jobs), admin_dsn, url, API_KEY)
        await index.close()
        front.kill()
    await jobs.close()
    await database.close()
