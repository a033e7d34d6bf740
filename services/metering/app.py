"""Composition root of the metering service: builds everything by constructor, closes everything in reverse order."""

import asyncio
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import structlog

from mesh.common.v1.lifecycle_service_pb2_grpc import add_TenantLifecycleServiceServicer_to_server
from mesh.metering.v1.event_service_pb2_grpc import add_EventServiceServicer_to_server
from mesh.metering.v1.invoice_service_pb2_grpc import add_InvoiceServiceServicer_to_server
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
from services.metering.adapters.postgres_billing import PostgresBilling
from services.metering.adapters.postgres_billing_plans import billing_plan_changes, load_billing_plans
from services.metering.adapters.postgres_closings import PostgresClosings
from services.metering.adapters.postgres_epochs import PostgresEpochs
from services.metering.adapters.postgres_event_months import PostgresEventMonths
from services.metering.adapters.postgres_event_types import PostgresEventTypes
from services.metering.adapters.postgres_events import PostgresEvents
from services.metering.adapters.postgres_jobs import PostgresJobs
from services.metering.adapters.postgres_ledger import PostgresLedger
from services.metering.adapters.postgres_prices import PostgresPrices, load_price_book
from services.metering.adapters.postgres_refusals import PostgresRefusals
from services.metering.adapters.postgres_tenant_records import PostgresTenantRecords
from services.metering.adapters.postgres_usage import PostgresUsage
from services.metering.adapters.postgres_usage_queries import PostgresUsageQueries
from services.metering.adapters.ratelimit_client import RemoteLimits
from services.metering.adapters.tenant_calendars import TenantCalendars
from services.metering.adapters.tenant_plans_client import RemoteTenantPlans
from services.metering.billing.desk import InvoiceDesk
from services.metering.billing.monthly_job import MonthlyJob
from services.metering.billing.plan_file import BillingPlansRefused, describe, parse_billing_plans
from services.metering.billing.terms import PlanVersion
from services.metering.event_log import EventLog
from services.metering.event_months import EventMonths, make_months
from services.metering.event_types import EventTypeCatalog
from services.metering.lease_sweeper import LeaseSweeper
from services.metering.ledger import Ledger
from services.metering.outbox import OutboxRelay
from services.metering.price_book import PriceBookRefused, parse_price_book
from services.metering.price_catalog import PriceCatalog
from services.metering.refusal import RefusalBook
from services.metering.servicers.events import EventServicer
from services.metering.servicers.invoices import InvoiceServicer
from services.metering.servicers.ledger import LedgerServicer
from services.metering.servicers.lifecycle import LifecycleServicer
from services.metering.servicers.prices import PriceServicer
from services.metering.servicers.usage import UsageServicer
from services.metering.settings import MeteringSettings
from services.metering.tenant_proof import TenantProof
from services.metering.usage_folder import UsageFolder

log = structlog.get_logger(__name__)

MIGRATIONS = Path(__file__).parent / "migrations"
SCHEMA = "metering"
Clock = Callable[[], datetime]


def utc_now() -> datetime:
    """Returns the time."""
    return datetime.now(UTC)


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


async def build(settings: MeteringSettings, *, clock: Clock = utc_now) -> MeteringApp:
    """Builds the service. Starts while Postgres, the limits or the tenant service are down. `clock` judges events and ages their months."""
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
        proof = TenantProof(verifier)
        ledger = Ledger(PostgresLedger(database, lease_seconds=settings.lease_seconds), catalog, relay, tier_of=proof.tier_of)
        refusals = RefusalBook(PostgresRefusals(database), proof)
        # Closed before the loops: what its last batches end is still told.
        stack.push_async_callback(ledger.close)
        types = EventTypeCatalog(PostgresEventTypes(database, jobs))
        events = EventLog(PostgresEvents(database), types, clock=clock)
        stack.push_async_callback(events.close)
        billing, closings = PostgresBilling(database), PostgresClosings(jobs)
        desk = InvoiceDesk(billing, closings)
        grace = timedelta(hours=settings.invoice_grace_hours)
        monthly = MonthlyJob(closings, desk, RemoteTenantPlans(to_tenant), grace=grace, poll_seconds=settings.invoice_poll_seconds)
        invoices: Registration = (add_InvoiceServiceServicer_to_server, InvoiceServicer(billing, desk), "mesh.metering.v1.InvoiceService")
        usage = UsageServicer(
            PostgresUsage(database),
            await _usage_queries(stack, settings, database, jobs),
            TenantCalendars(TenantConfigCache(to_tenant, feed=feed)),
        )
        servicers = [*_of_calls(ledger, refusals, catalog, usage, database, jobs), _of_events(events, types), invoices]
        server = MeshServer(settings, servicers=servicers, resolver=resolver, verifier=verifier)
        await _keep_months(stack, settings, background, jobs, clock)
        background.start("outbox_deleter", relay.run_deleter)
        background.start("outbox_sender", relay.run_sender)
        background.start("outbox_poller", relay.run_poller)
        background.start("lease_sweeper", sweeper.run)
        background.start("monthly_invoices", monthly.run)
        background.start("usage_folder", UsageFolder(jobs_store, fold_seconds=settings.usage_fold_seconds).run)
        return MeteringApp(server, background, ledger, database, jobs, stack.pop_all())


async def _databases(stack: AsyncExitStack, settings: MeteringSettings) -> tuple[TenantDatabase, JobsDatabase]:
    dsn, jobs_dsn = settings.postgres_dsn.get_secret_value(), settings.postgres_jobs_dsn.get_secret_value()
    pooling = settings.postgres_transaction_pooling
    database = await TenantDatabase.open(dsn, max_size=12, application_name="metering", transaction_pooling=pooling)
    stack.push_async_callback(database.close)
    jobs = await JobsDatabase.open(jobs_dsn, max_size=5, application_name="metering-jobs", transaction_pooling=pooling)
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


def _of_calls(
    ledger: Ledger,
    refusals: RefusalBook,
    catalog: PriceCatalog,
    usage: UsageServicer,
    database: TenantDatabase,
    jobs: JobsDatabase,
) -> list[Registration]:
    records = PostgresTenantRecords(database, jobs)
    return [
        (add_LedgerServiceServicer_to_server, LedgerServicer(ledger, PostgresEpochs(database), refusals), "mesh.metering.v1.LedgerService"),
        (add_PriceServiceServicer_to_server, PriceServicer(catalog), "mesh.metering.v1.PriceService"),
        (add_UsageServiceServicer_to_server, usage, "mesh.metering.v1.UsageService"),
        (add_TenantLifecycleServiceServicer_to_server, LifecycleServicer(records), "mesh.common.v1.TenantLifecycleService"),
    ]


def _of_events(events: EventLog, types: EventTypeCatalog) -> Registration:
    return add_EventServiceServicer_to_server, EventServicer(events, types), "mesh.metering.v1.EventService"


async def _keep_months(
    stack: AsyncExitStack, settings: MeteringSettings, background: BackgroundTasks, jobs: JobsDatabase, clock: Clock
) -> None:
    dsn = settings.postgres_partitions_dsn.get_secret_value()
    if not dsn:
        log.warning("event_months_not_kept", setting="TENANTRY_POSTGRES_PARTITIONS_DSN")
        return
    owners = await JobsDatabase.open(
        dsn, max_size=1, application_name="metering-partitions", transaction_pooling=settings.postgres_transaction_pooling
    )
    stack.push_async_callback(owners.close)
    months = EventMonths(PostgresEventMonths(owners, jobs), retention_days=settings.event_retention_days, clock=clock)
    background.start("event_months", months.run)


def _channel(stack: AsyncExitStack, settings: MeteringSettings, address: str, service: str) -> MeshChannel:
    channel = MeshChannel(address, settings=settings, target_service=service)
    stack.push_async_callback(channel.close)
    return channel


async def migrate_schema(settings: MeteringSettings) -> None:
    """Brings the schema forward, makes the months of events, loads prices and billing plans. Idempotent. Raises: MigrationRefused."""
    admin_dsn = settings.postgres_admin_dsn.get_secret_value()
    try:
        versions = parse_price_book(settings.price_book_path.read_text())
    except OSError as error:
        raise MigrationRefused(f"the price book {settings.price_book_path} cannot be read: {error.strerror}") from None
    except PriceBookRefused as error:
        raise MigrationRefused(str(error)) from None
    plans = _read_billing_plans(settings)
    roles = {
        "service": settings.postgres_dsn.get_secret_value(),
        "jobs": settings.postgres_jobs_dsn.get_secret_value(),
        "partitions": settings.postgres_partitions_dsn.get_secret_value(),
    }
    await migrate(admin_dsn, SCHEMA, MIGRATIONS, roles)
    admin = await JobsDatabase.open(admin_dsn, max_size=1, application_name="metering-migrate")
    try:
        await make_months(PostgresEventMonths(admin, admin), utc_now())
        await load_price_book(admin, versions)
        await load_billing_plans(admin, plans)
    except (PriceBookRefused, BillingPlansRefused) as error:
        raise MigrationRefused(str(error)) from None
    finally:
        await admin.close()


def preview_billing_plans(settings: MeteringSettings) -> str:
    """Says in a line each what `migrate` would load of the billing plans, and loads nothing. Raises: MigrationRefused."""
    return asyncio.run(_preview(settings))


async def _preview(settings: MeteringSettings) -> str:
    plans = _read_billing_plans(settings)
    admin = await JobsDatabase.open(settings.postgres_admin_dsn.get_secret_value(), max_size=1, application_name="metering-preview")
    try:
        return describe(await billing_plan_changes(admin, plans))
    except BillingPlansRefused as error:
        raise MigrationRefused(str(error)) from None
    finally:
        await admin.close()


def _read_billing_plans(settings: MeteringSettings) -> list[PlanVersion]:
    try:
        return parse_billing_plans(settings.billing_plans_path.read_text())
    except OSError as error:
        raise MigrationRefused(f"the billing plans {settings.billing_plans_path} cannot be read: {error.strerror}") from None
    except BillingPlansRefused as error:
        raise MigrationRefused(str(error)) from None
