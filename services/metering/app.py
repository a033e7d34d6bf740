"""Composition root of the metering service: builds everything by constructor, closes everything in reverse order."""

from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

from mesh.common.v1.lifecycle_service_pb2_grpc import add_TenantLifecycleServiceServicer_to_server
from mesh.metering.v1.ledger_service_pb2_grpc import add_LedgerServiceServicer_to_server
from mesh.metering.v1.price_service_pb2_grpc import add_PriceServiceServicer_to_server
from mesh.metering.v1.usage_service_pb2_grpc import add_UsageServiceServicer_to_server
from services.kernel.background import BackgroundTasks
from services.kernel.change_feed import ChangeFeed
from services.kernel.credential_resolver import remote_trust
from services.kernel.migrate import MigrationRefused, migrate
from services.kernel.rpc.channel import MeshChannel
from services.kernel.rpc.server import MeshServer, Registration
from services.kernel.tenant_config import TenantConfigCache
from services.kernel.tenant_database import JobsDatabase, TenantDatabase
from services.metering.adapters.postgres_epochs import PostgresEpochs
from services.metering.adapters.postgres_jobs import PostgresJobs
from services.metering.adapters.postgres_ledger import PostgresLedger
from services.metering.adapters.postgres_prices import PostgresPrices, load_price_book
from services.metering.adapters.postgres_tenant_records import PostgresTenantRecords
from services.metering.adapters.postgres_usage import PostgresUsage
from services.metering.adapters.postgres_usage_queries import PostgresUsageQueries
from services.metering.adapters.ratelimit_client import RemoteLimits
from services.metering.adapters.tenant_calendars import TenantCalendars
from services.metering.lease_sweeper import LeaseSweeper
from services.metering.ledger import Ledger
from services.metering.outbox import OutboxRelay
from services.metering.price_book import PriceBookRefused, parse_price_book
from services.metering.price_catalog import PriceCatalog
from services.metering.servicers.ledger import LedgerServicer
from services.metering.servicers.lifecycle import LifecycleServicer
from services.metering.servicers.prices import PriceServicer
from services.metering.servicers.usage import UsageServicer
from services.metering.settings import MeteringSettings
from services.metering.tenant_proof import TenantProof
from services.metering.usage_folder import UsageFolder

MIGRATIONS = Path(__file__).parent / "migrations"
SCHEMA = "metering"


@dataclass(frozen=True, slots=True)
class MeteringApp:
    """Everything that runs, and how it ends."""

    server: MeshServer
    background: BackgroundTasks
    ledger: Ledger
    database: TenantDatabase
    jobs: JobsDatabase
    closing: AsyncExitStack

    async def close(self) -> None:
        """Finishes accepted batches, stops the loops, then closes pools and channels; one that fails does not keep the rest open."""
        await self.closing.aclose()


async def build(settings: MeteringSettings) -> MeteringApp:
    """Builds the service. Starts while Postgres, the limits or the tenant service are down."""
    async with AsyncExitStack() as stack:
        to_limits = _channel(stack, settings, settings.ratelimit_address, "ratelimit")
        to_tenant = _channel(stack, settings, settings.tenant_address, "tenant")
        database, jobs = await _databases(stack, settings)
        background = BackgroundTasks()
        stack.push_async_callback(background.close)
        feed = ChangeFeed(to_tenant)
        background.start("change_feed", feed.run)
        resolver, verifier = remote_trust(to_tenant, feed=feed, outage_seconds=settings.credential_outage_seconds)
        catalog = PriceCatalog(PostgresPrices(database))
        jobs_store = PostgresJobs(jobs)
        relay = OutboxRelay(jobs_store, RemoteLimits(to_limits), poll_seconds=settings.relay_poll_seconds)
        sweeper = LeaseSweeper(jobs_store, relay, lease_seconds=settings.lease_seconds, sweep_seconds=settings.sweep_seconds)
        ledger = Ledger(
            PostgresLedger(database, lease_seconds=settings.lease_seconds), catalog, relay, tier_of=TenantProof(verifier).tier_of
        )
        # Closed before the loops: what its last batches end is still told.
        stack.push_async_callback(ledger.close)
        usage = UsageServicer(
            PostgresUsage(database),
            await _usage_queries(stack, settings, database, jobs),
            TenantCalendars(TenantConfigCache(to_tenant, feed=feed)),
        )
        server = MeshServer(
            settings, servicers=_registrations(ledger, catalog, usage, database, jobs), resolver=resolver, verifier=verifier
        )
        background.start("outbox_deleter", relay.run_deleter)
        background.start("outbox_sender", relay.run_sender)
        background.start("outbox_poller", relay.run_poller)
        background.start("lease_sweeper", sweeper.run)
        background.start("usage_folder", UsageFolder(jobs_store, fold_seconds=settings.usage_fold_seconds).run)
        return MeteringApp(server, background, ledger, database, jobs, stack.pop_all())


async def _databases(stack: AsyncExitStack, settings: MeteringSettings) -> tuple[TenantDatabase, JobsDatabase]:
    dsn, jobs_dsn = settings.postgres_dsn.get_secret_value(), settings.postgres_jobs_dsn.get_secret_value()
    pooling = settings.postgres_transaction_pooling
    database = await TenantDatabase.open(dsn, max_size=12, application_name="metering", transaction_pooling=pooling)
    stack.push_async_callback(database.close)
    jobs = await JobsDatabase.open(jobs_dsn, max_size=3, application_name="metering-jobs", transaction_pooling=pooling)
    stack.push_async_callback(jobs.close)
    return database, jobs


async def _usage_queries(
    stack: AsyncExitStack, settings: MeteringSettings, database: TenantDatabase, jobs: JobsDatabase
) -> PostgresUsageQueries:
    reading, reading_all, pooling = database, jobs, settings.postgres_transaction_pooling
    if dsn := settings.postgres_read_dsn.get_secret_value():
        reading = await TenantDatabase.open(dsn, max_size=6, application_name="metering-read", transaction_pooling=pooling)
        stack.push_async_callback(reading.close)
    if dsn := settings.postgres_jobs_read_dsn.get_secret_value():
        reading_all = await JobsDatabase.open(dsn, max_size=2, application_name="metering-jobs-read", transaction_pooling=pooling)
        stack.push_async_callback(reading_all.close)
    return PostgresUsageQueries(database, reading, reading_all)


def _registrations(
    ledger: Ledger, catalog: PriceCatalog, usage: UsageServicer, database: TenantDatabase, jobs: JobsDatabase
) -> list[Registration]:
    records = PostgresTenantRecords(database, jobs)
    return [
        (add_LedgerServiceServicer_to_server, LedgerServicer(ledger, PostgresEpochs(database)), "mesh.metering.v1.LedgerService"),
        (add_PriceServiceServicer_to_server, PriceServicer(catalog), "mesh.metering.v1.PriceService"),
        (add_UsageServiceServicer_to_server, usage, "mesh.metering.v1.UsageService"),
        (add_TenantLifecycleServiceServicer_to_server, LifecycleServicer(records), "mesh.common.v1.TenantLifecycleService"),
    ]


def _channel(stack: AsyncExitStack, settings: MeteringSettings, address: str, service: str) -> MeshChannel:
    channel = MeshChannel(address, settings=settings, target_service=service)
    stack.push_async_callback(channel.close)
    return channel


async def migrate_schema(settings: MeteringSettings) -> None:
    """Brings the schema forward, then loads the price book. Idempotent. Raises: MigrationRefused."""
    admin_dsn = settings.postgres_admin_dsn.get_secret_value()
    try:
        versions = parse_price_book(settings.price_book_path.read_text())
    except OSError as error:
        raise MigrationRefused(f"the price book {settings.price_book_path} cannot be read: {error.strerror}") from None
    except PriceBookRefused as error:
        raise MigrationRefused(str(error)) from None
    roles = {"service": settings.postgres_dsn.get_secret_value(), "jobs": settings.postgres_jobs_dsn.get_secret_value()}
    await migrate(admin_dsn, SCHEMA, MIGRATIONS, roles)
    admin = await JobsDatabase.open(admin_dsn, max_size=1, application_name="metering-migrate")
    try:
        await load_price_book(admin, versions)
    except PriceBookRefused as error:
        raise MigrationRefused(str(error)) from None
    finally:
        await admin.close()
