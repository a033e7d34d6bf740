"""The composition root: builds the service room by room by constructor, closes everything in reverse order."""

from contextlib import AsyncExitStack
from dataclasses import dataclass
from datetime import timedelta

import structlog

from mesh.common.v1.lifecycle_service_pb2_grpc import add_TenantLifecycleServiceServicer_to_server
from mesh.metering.v1.event_service_pb2_grpc import add_EventServiceServicer_to_server
from mesh.metering.v1.invoice_service_pb2_grpc import add_InvoiceServiceServicer_to_server
from mesh.metering.v1.ledger_service_pb2_grpc import add_LedgerServiceServicer_to_server
from mesh.metering.v1.usage_service_pb2_grpc import add_UsageServiceServicer_to_server
from services.kernel.background import BackgroundTasks
from services.kernel.change_feed import ChangeFeed
from services.kernel.credential_resolver import remote_trust
from services.kernel.rpc.server import MeshServer, Registration
from services.kernel.tenant_config import TenantConfigCache
from services.kernel.tenant_database import JobsDatabase, TenantDatabase
from services.metering.adapters.postgres_billing import PostgresBilling
from services.metering.adapters.postgres_closings import PostgresClosings
from services.metering.adapters.postgres_epochs import PostgresEpochs
from services.metering.adapters.postgres_event_types import PostgresEventTypes
from services.metering.adapters.postgres_events import PostgresEvents
from services.metering.adapters.postgres_jobs import PostgresJobs
from services.metering.adapters.postgres_ledger import PostgresLedger
from services.metering.adapters.postgres_prices import PostgresPrices
from services.metering.adapters.postgres_tenant_records import PostgresTenantRecords
from services.metering.adapters.postgres_usage import PostgresUsage
from services.metering.adapters.postgres_usage_queries import PostgresUsageQueries
from services.metering.adapters.ratelimit_client import RemoteLimits
from services.metering.adapters.tenant_calendars import RememberedCalendars, TenantCalendars
from services.metering.adapters.tenant_plans_client import RemoteTenantPlans
from services.metering.app.alerts import build_budgets, build_webhooks, open_sender
from services.metering.app.exporting import build_books, open_export_relays
from services.metering.app.parts import Clock, Parts, utc_now
from services.metering.app.pricing import build_prices
from services.metering.app.reconciling import build_reconciliations, open_usage_feed
from services.metering.app.retaining import keep_months, open_refusal_book
from services.metering.billing.desk import InvoiceDesk
from services.metering.billing.monthly_job import MonthlyJob
from services.metering.epoch import Epochs
from services.metering.event_log import EventLog
from services.metering.event_types import EventTypeCatalog
from services.metering.lease_sweeper import LeaseSweeper
from services.metering.ledger import Ledger
from services.metering.outbox import OutboxRelay
from services.metering.price_catalog import PriceCatalog
from services.metering.refusal import RefusalBook
from services.metering.servicers.events import OWN_CHECKS, EventServicer
from services.metering.servicers.invoices import InvoiceServicer
from services.metering.servicers.ledger import LedgerServicer
from services.metering.servicers.lifecycle import LifecycleServicer
from services.metering.servicers.usage import UsageServicer
from services.metering.settings import MeteringSettings
from services.metering.tenant_proof import TenantProof
from services.metering.usage_folder import UsageFolder

log = structlog.get_logger(__name__)


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
        parts = await Parts.opened(settings, stack, clock)
        to_limits = parts.channel(settings.ratelimit_address, "ratelimit")
        to_tenant = parts.channel(settings.tenant_address, "tenant")
        # What loops use is opened before them, and so closed after them.
        usage_feed, sender, exports = open_usage_feed(parts), open_sender(parts), open_export_relays(parts)
        database, jobs, background = parts.database, parts.jobs, parts.background
        stack.push_async_callback(background.close)
        feed = ChangeFeed(to_tenant)
        background.start("change_feed", feed.run)
        resolver, verifier = remote_trust(to_tenant, feed=feed, outage_seconds=settings.credential_outage_seconds)
        catalog, jobs_store, proof = PriceCatalog(PostgresPrices(database)), PostgresJobs(jobs), TenantProof(verifier)
        relay = OutboxRelay(jobs_store, RemoteLimits(to_limits), poll_seconds=settings.relay_poll_seconds)
        sweeper = LeaseSweeper(jobs_store, relay, lease_seconds=settings.lease_seconds, sweep_seconds=settings.sweep_seconds)
        ledger = Ledger(PostgresLedger(database, lease_seconds=settings.lease_seconds), catalog, relay, tier_of=proof.tier_of)
        # Closed before the loops: what its last batches end is still told.
        stack.push_async_callback(ledger.close)
        configs, plans = TenantConfigCache(to_tenant, feed=feed), RemoteTenantPlans(to_tenant)
        queries = await _usage_queries(parts)
        usage = UsageServicer(PostgresUsage(database), queries, TenantCalendars(configs))
        servicers = [
            *_of_calls(parts, ledger, Epochs(PostgresEpochs(database), relay), open_refusal_book(parts, proof), usage),
            build_prices(parts, catalog),
            _of_events(parts),
            _of_invoices(parts, plans),
            *build_books(parts, queries, catalog),
            build_budgets(parts, configs, RememberedCalendars(plans, feed)),
            build_webhooks(parts, sender),
            build_reconciliations(parts, usage_feed, catalog, relay),
        ]
        server = MeshServer(settings, servicers=servicers, resolver=resolver, verifier=verifier, own_checks=OWN_CHECKS)
        await keep_months(parts)
        for name, export_relay in exports.items():
            background.start(name, export_relay.run)
        background.start("outbox_deleter", relay.run_deleter)
        background.start("outbox_sender", relay.run_sender)
        background.start("outbox_poller", relay.run_poller)
        background.start("lease_sweeper", sweeper.run)
        background.start("usage_folder", UsageFolder(jobs_store, fold_seconds=settings.usage_fold_seconds).run)
        return MeteringApp(server, background, ledger, database, jobs, stack.pop_all())


async def _usage_queries(parts: Parts) -> PostgresUsageQueries:
    settings, stack, database = parts.settings, parts.stack, parts.database
    reading, reading_all, pooling = database, parts.jobs, settings.postgres_transaction_pooling
    if dsn := settings.postgres_read_dsn.get_secret_value():
        reading = await TenantDatabase.open(dsn, max_size=6, application_name="metering-read", transaction_pooling=pooling)
        stack.push_async_callback(reading.close)
    if dsn := settings.postgres_jobs_read_dsn.get_secret_value():
        reading_all = await JobsDatabase.open(dsn, max_size=2, application_name="metering-jobs-read", transaction_pooling=pooling)
        stack.push_async_callback(reading_all.close)
    return PostgresUsageQueries(database, reading, reading_all)


def _of_calls(parts: Parts, ledger: Ledger, epochs: Epochs, refusals: RefusalBook, usage: UsageServicer) -> list[Registration]:
    records = PostgresTenantRecords(parts.database, parts.jobs)
    return [
        (
            add_LedgerServiceServicer_to_server,
            LedgerServicer(ledger, epochs, refusals),
            "mesh.metering.v1.LedgerService",
        ),
        (add_UsageServiceServicer_to_server, usage, "mesh.metering.v1.UsageService"),
        (add_TenantLifecycleServiceServicer_to_server, LifecycleServicer(records), "mesh.common.v1.TenantLifecycleService"),
    ]


def _of_events(parts: Parts) -> Registration:
    types = EventTypeCatalog(PostgresEventTypes(parts.database, parts.jobs))
    events = EventLog(PostgresEvents(parts.database), types, clock=parts.clock)
    parts.stack.push_async_callback(events.close)
    return add_EventServiceServicer_to_server, EventServicer(events, types), "mesh.metering.v1.EventService"


def _of_invoices(parts: Parts, plans: RemoteTenantPlans) -> Registration:
    billing, closings = PostgresBilling(parts.database), PostgresClosings(parts.jobs)
    desk = InvoiceDesk(billing, closings)
    grace = timedelta(hours=parts.settings.invoice_grace_hours)
    monthly = MonthlyJob(closings, desk, plans, grace=grace, poll_seconds=parts.settings.invoice_poll_seconds)
    parts.background.start("monthly_invoices", monthly.run)
    return add_InvoiceServiceServicer_to_server, InvoiceServicer(billing, desk), "mesh.metering.v1.InvoiceService"
