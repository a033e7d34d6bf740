"""Puts the retrieval service together from its settings, and takes it apart again."""

from dataclasses import dataclass
from pathlib import Path

from mesh.common.v1 import lifecycle_service_pb2_grpc
from mesh.retrieval.v1 import document_service_pb2_grpc, search_service_pb2_grpc
from services.kernel.background import BackgroundTasks
from services.kernel.credential_resolver import remote_trust
from services.kernel.migrate import migrate
from services.kernel.rpc.channel import MeshChannel
from services.kernel.rpc.server import MeshServer
from services.kernel.tenant_database import JobsDatabase, TenantDatabase
from services.retrieval.adapters.postgres import PostgresDocumentStore, PostgresOwedWork
from services.retrieval.adapters.qdrant import QdrantIndex
from services.retrieval.embedding import HashingEmbedder
from services.retrieval.library import Library
from services.retrieval.repairing import repair_forever
from services.retrieval.servicers.documents import DocumentServicer
from services.retrieval.servicers.lifecycle import LifecycleServicer
from services.retrieval.servicers.search import SearchServicer
from services.retrieval.settings import RetrievalSettings

MIGRATIONS = Path(__file__).parent / "migrations"


@dataclass(frozen=True, slots=True)
class RetrievalApp:
    """The running parts, closed in reverse order of their making."""

    server: MeshServer
    tenant_channel: MeshChannel
    database: TenantDatabase
    jobs_database: JobsDatabase
    index: QdrantIndex
    background: BackgroundTasks

    async def close(self) -> None:
        """Closes everything."""
        await self.background.close()
        await self.index.close()
        await self.jobs_database.close()
        await self.database.close()
        await self.tenant_channel.close()


async def build(settings: RetrievalSettings) -> RetrievalApp:
    """Builds the service; stores that are away are tried again by each call."""
    tenant_channel = MeshChannel(settings.tenant_address, settings=settings, target_service="tenant")
    resolver, verifier = remote_trust(tenant_channel)
    database = await TenantDatabase.open(settings.postgres_dsn.get_secret_value(), application_name="retrieval")
    jobs_database = await JobsDatabase.open(settings.postgres_jobs_dsn.get_secret_value(), application_name="retrieval-jobs", max_size=2)
    embedder = HashingEmbedder()
    index = QdrantIndex(settings.qdrant_url, settings.qdrant_api_key, embedder.dimensions)
    store = PostgresDocumentStore(database)
    library = Library(store, index, embedder)
    background = BackgroundTasks()
    owed = PostgresOwedWork(jobs_database)
    background.start("repair", lambda: repair_forever(owed, library))
    server = MeshServer(
        settings,
        servicers=[
            (
                document_service_pb2_grpc.add_DocumentServiceServicer_to_server,
                DocumentServicer(library),
                "mesh.retrieval.v1.DocumentService",
            ),
            (search_service_pb2_grpc.add_SearchServiceServicer_to_server, SearchServicer(library), "mesh.retrieval.v1.SearchService"),
            (
                lifecycle_service_pb2_grpc.add_TenantLifecycleServiceServicer_to_server,
                LifecycleServicer(store, index),
                "mesh.common.v1.TenantLifecycleService",
            ),
        ],
        resolver=resolver,
        verifier=verifier,
    )
    return RetrievalApp(server, tenant_channel, database, jobs_database, index, background)


async def migrate_store(settings: RetrievalSettings) -> None:
    """Brings schema `retrieval` forward."""
    roles = {"service": settings.postgres_dsn.get_secret_value(), "jobs": settings.postgres_jobs_dsn.get_secret_value()}
    await migrate(settings.postgres_admin_dsn.get_secret_value(), "retrieval", MIGRATIONS, roles)
