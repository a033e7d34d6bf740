"""Puts the retrieval service together from its settings, and takes it apart again."""

from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

from mesh.common.v1.lifecycle_service_pb2_grpc import add_TenantLifecycleServiceServicer_to_server
from mesh.retrieval.v1.document_service_pb2_grpc import add_DocumentServiceServicer_to_server
from mesh.retrieval.v1.search_service_pb2_grpc import add_SearchServiceServicer_to_server
from services.kernel.background import BackgroundTasks
from services.kernel.credential_resolver import remote_trust
from services.kernel.migrate import migrate
from services.kernel.rpc.channel import MeshChannel
from services.kernel.rpc.server import MeshServer, Registration
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
SCHEMA = "retrieval"


@dataclass(frozen=True, slots=True)
class RetrievalApp:
    """The running parts."""

    server: MeshServer
    closing: AsyncExitStack

    async def close(self) -> None:
        """Stops the repairs, then closes clients and pools; one that fails does not keep the rest open."""
        await self.closing.aclose()


async def build(settings: RetrievalSettings) -> RetrievalApp:
    """Builds the service; stores that are away are tried again by each call."""
    async with AsyncExitStack() as stack:
        to_tenant = MeshChannel(settings.tenant_address, settings=settings, target_service="tenant")
        stack.push_async_callback(to_tenant.close)
        database = await TenantDatabase.open(settings.postgres_dsn.get_secret_value(), application_name="retrieval")
        stack.push_async_callback(database.close)
        jobs = await JobsDatabase.open(settings.postgres_jobs_dsn.get_secret_value(), application_name="retrieval-jobs", max_size=2)
        stack.push_async_callback(jobs.close)
        embedder = HashingEmbedder()
        index = QdrantIndex(settings.qdrant_url, settings.qdrant_api_key, embedder.dimensions)
        stack.push_async_callback(index.close)
        store = PostgresDocumentStore(database, jobs)
        library = Library(store, index, embedder)
        background = BackgroundTasks()
        stack.push_async_callback(background.close)
        owed = PostgresOwedWork(jobs)
        background.start("repair", lambda: repair_forever(owed, library))
        resolver, verifier = remote_trust(to_tenant)
        lifecycle = LifecycleServicer(store, index)
        server = MeshServer(settings, servicers=_registrations(library, lifecycle), resolver=resolver, verifier=verifier)
        return RetrievalApp(server, stack.pop_all())


def _registrations(library: Library, lifecycle: LifecycleServicer) -> list[Registration]:
    return [
        (add_DocumentServiceServicer_to_server, DocumentServicer(library), "mesh.retrieval.v1.DocumentService"),
        (add_SearchServiceServicer_to_server, SearchServicer(library), "mesh.retrieval.v1.SearchService"),
        (add_TenantLifecycleServiceServicer_to_server, lifecycle, "mesh.common.v1.TenantLifecycleService"),
    ]


async def migrate_schema(settings: RetrievalSettings) -> None:
    """Brings the schema forward."""
    roles = {"service": settings.postgres_dsn.get_secret_value(), "jobs": settings.postgres_jobs_dsn.get_secret_value()}
    await migrate(settings.postgres_admin_dsn.get_secret_value(), SCHEMA, MIGRATIONS, roles)
