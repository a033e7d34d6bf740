"""Puts the retrieval service together from its settings, and takes it apart again."""

from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

from mesh.common.v1.lifecycle_service_pb2_grpc import add_TenantLifecycleServiceServicer_to_server
from mesh.retrieval.v1.document_service_pb2_grpc import add_DocumentServiceServicer_to_server
from mesh.retrieval.v1.search_service_pb2_grpc import add_SearchServiceServicer_to_server
from services.kernel.audit_client import AuditClient
from services.kernel.background import BackgroundTasks
from services.kernel.change_feed import ChangeFeed
from services.kernel.credential_resolver import remote_trust
from services.kernel.migrate import migrate, migrate_all_places
from services.kernel.place_making import PlaceMaker
from services.kernel.placement import PlaceDirectory, RemotePlaces
from services.kernel.rpc.channel import MeshChannel
from services.kernel.rpc.server import MeshServer, Registration
from services.kernel.silo_pools import SiloPools
from services.kernel.table_copying import TenantTable
from services.kernel.tenant_cipher import RemoteDataKeys, TenantCipher
from services.kernel.tenant_database import JobsDatabase, TenantDatabase
from services.kernel.tenant_moving import TenantMover
from services.retrieval.adapters.moving_points import MovingPoints
from services.retrieval.adapters.placed_index import PlacedIndex
from services.retrieval.adapters.postgres import PostgresDocumentStore, PostgresOwedWork
from services.retrieval.adapters.postgres_sealing import PostgresSealedRows
from services.retrieval.adapters.qdrant import QdrantIndex
from services.retrieval.embedding import HashingEmbedder
from services.retrieval.library import Library
from services.retrieval.read_audit import ReadAudit
from services.retrieval.repairing import repair_forever
from services.retrieval.servicers.documents import DocumentServicer
from services.retrieval.servicers.lifecycle import LifecycleServicer
from services.retrieval.servicers.search import SearchServicer
from services.retrieval.settings import RetrievalSettings

MIGRATIONS = Path(__file__).parent / "migrations"
SCHEMA = "retrieval"
# Parents first.
TENANT_TABLES = (
    TenantTable("documents", ("document_id",)),
    TenantTable("chunks", ("chunk_id",)),
    TenantTable("removed_documents", ("document_id",)),
    TenantTable("retrieval_sealing", ("tenant_id",)),
)


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
        feed = ChangeFeed(to_tenant)
        database = await TenantDatabase.open(
            settings.postgres_dsn.get_secret_value(),
            application_name="retrieval",
            transaction_pooling=settings.postgres_transaction_pooling,
        )
        stack.push_async_callback(database.close)
        jobs = await JobsDatabase.open(
            settings.postgres_jobs_dsn.get_secret_value(),
            application_name="retrieval-jobs",
            max_size=2,
            transaction_pooling=settings.postgres_transaction_pooling,
        )
        stack.push_async_callback(jobs.close)
        places = _follow_placements(stack, settings, database, to_tenant, feed)
        embedder = HashingEmbedder()
        shared = QdrantIndex(settings.qdrant_url, settings.qdrant_api_key, embedder.dimensions)
        stack.push_async_callback(shared.close)
        index = PlacedIndex(shared, database, embedder.dimensions, limit=settings.max_silo_pools)
        stack.push_async_callback(index.close)
        cipher = TenantCipher(RemoteDataKeys(to_tenant))
        store = PostgresDocumentStore(database, jobs, cipher)
        library = Library(store, index, embedder)
        reads = ReadAudit(AuditClient(to_tenant).record)
        stack.push_async_callback(reads.close)
        background = BackgroundTasks()
        stack.push_async_callback(background.close)
        owed = PostgresOwedWork(jobs, database)
        background.start("repair", lambda: repair_forever(owed, library))
        feed.forget_on({"DATA_KEY", "STATE"}, cipher.forget)
        background.start("change_feed", feed.run)
        resolver, verifier = remote_trust(to_tenant, feed=feed, outage_seconds=settings.credential_outage_seconds)
        mover = TenantMover(database, RemotePlaces(to_tenant), places, SCHEMA, TENANT_TABLES, MovingPoints(index))
        lifecycle = LifecycleServicer(store, index, places, mover, PostgresSealedRows(database, cipher))
        server = MeshServer(settings, servicers=_registrations(library, reads, lifecycle), resolver=resolver, verifier=verifier)
        return RetrievalApp(server, stack.pop_all())


def _follow_placements(
    stack: AsyncExitStack, settings: RetrievalSettings, database: TenantDatabase, to_tenant: MeshChannel, feed: ChangeFeed
) -> PlaceMaker:
    remote = RemotePlaces(to_tenant)
    silos = SiloPools(settings.max_silo_pools, application_name="retrieval")
    stack.push_async_callback(silos.close)
    directory = PlaceDirectory(remote)
    feed.forget_on({"PLACEMENT", "STATE"}, directory.forget)
    database.follow(SCHEMA, directory, silos)
    return PlaceMaker(database, remote, SCHEMA, MIGRATIONS, settings.postgres_placement_dsn)


def _registrations(library: Library, reads: ReadAudit, lifecycle: LifecycleServicer) -> list[Registration]:
    return [
        (add_DocumentServiceServicer_to_server, DocumentServicer(library, reads), "mesh.retrieval.v1.DocumentService"),
        (add_SearchServiceServicer_to_server, SearchServicer(library, reads), "mesh.retrieval.v1.SearchService"),
        (add_TenantLifecycleServiceServicer_to_server, lifecycle, "mesh.common.v1.TenantLifecycleService"),
    ]


async def migrate_schema(settings: RetrievalSettings) -> None:
    """Brings the schema forward."""
    admin_dsn = settings.postgres_admin_dsn.get_secret_value()
    roles = {
        "service": settings.postgres_dsn.get_secret_value(),
        "jobs": settings.postgres_jobs_dsn.get_secret_value(),
        "placement": settings.postgres_placement_dsn.get_secret_value(),
    }
    await migrate(admin_dsn, SCHEMA, MIGRATIONS, roles)
    await migrate_all_places(admin_dsn, settings.silo_migration_dsn.get_secret_value(), SCHEMA, MIGRATIONS)
