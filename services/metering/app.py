"""Composition root of the metering service: builds everything by constructor, closes everything in reverse order."""

import asyncio
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import assert_never

import structlog

from mesh.common.v1.lifecycle_service_pb2_grpc import add_TenantLifecycleServiceServicer_to_server
from mesh.metering.v1.budget_service_pb2_grpc import add_BudgetServiceServicer_to_server
from mesh.metering.v1.event_service_pb2_grpc import add_EventServiceServicer_to_server
from mesh.metering.v1.export_service_pb2_grpc import add_ExportServiceServicer_to_server
from mesh.metering.v1.export_sink_service_pb2_grpc import add_ExportSinkServiceServicer_to_server
from mesh.metering.v1.invoice_service_pb2_grpc import add_InvoiceServiceServicer_to_server
from mesh.metering.v1.ledger_service_pb2_grpc import add_LedgerServiceServicer_to_server
from mesh.metering.v1.price_service_pb2_grpc import add_PriceServiceServicer_to_server
from mesh.metering.v1.reconciliation_service_pb2_grpc import add_ReconciliationServiceServicer_to_server
from mesh.metering.v1.usage_service_pb2_grpc import add_UsageServiceServicer_to_server
from mesh.metering.v1.verification_service_pb2_grpc import add_VerificationServiceServicer_to_server
from mesh.metering.v1.webhook_service_pb2_grpc import add_WebhookServiceServicer_to_server
from services.kernel.background import BackgroundTasks
from services.kernel.change_feed import ChangeFeed
from services.kernel.credential_resolver import remote_trust
from services.kernel.migrate import MigrationRefused, migrate
from services.kernel.rpc.channel import MeshChannel
from services.kernel.rpc.server import MeshServer, Registration
from services.kernel.telemetry.metrics import Counter, otlp_counters
from services.kernel.telemetry.names import RECONCILIATION_DRIFTS
from services.kernel.tenant_config import TenantConfigCache
from services.kernel.tenant_database import JobsDatabase, TenantDatabase
from services.kernel.webhook_sender import WebhookSender
from services.metering.adapters.anthropic_usage_report import AnthropicUsageReport
from services.metering.adapters.export_endpoint import ExportEndpoint
from services.metering.adapters.postgres_billing import PostgresBilling
from services.metering.adapters.postgres_billing_plans import billing_plan_changes, load_billing_plans
from services.metering.adapters.postgres_budget_marks import PostgresBudgetMarks
from services.metering.adapters.postgres_budgets import PostgresBudgets
from services.metering.adapters.postgres_closings import PostgresClosings
from services.metering.adapters.postgres_deliveries import PostgresDeliveries
from services.metering.adapters.postgres_epochs import PostgresEpochs
from services.metering.adapters.postgres_event_months import PostgresEventMonths
from services.metering.adapters.postgres_event_types import PostgresEventTypes
from services.metering.adapters.postgres_events import PostgresEvents
from services.metering.adapters.postgres_export import PostgresExport
from services.metering.adapters.postgres_export_outbox import PostgresExportOutbox
from services.metering.adapters.postgres_export_settings import PostgresExportSettings
from services.metering.adapters.postgres_jobs import PostgresJobs
from services.metering.adapters.postgres_ledger import PostgresLedger
from services.metering.adapters.postgres_prices import PostgresPriceBook, PostgresPrices, load_price_book, price_book_changes
from services.metering.adapters.postgres_reconciliation_ledger import PostgresReconciliationLedger
from services.metering.adapters.postgres_reconciliations import PostgresReconciliations
from services.metering.adapters.postgres_refusals import PostgresRefusals
from services.metering.adapters.postgres_reratings import PostgresReratings
from services.metering.adapters.postgres_tenant_records import PostgresTenantRecords
from services.metering.adapters.postgres_usage import PostgresUsage
from services.metering.adapters.postgres_usage_queries import PostgresUsageQueries
from services.metering.adapters.postgres_verification import PostgresVerification
from services.metering.adapters.postgres_webhooks import PostgresWebhooks
from services.metering.adapters.ratelimit_client import RemoteLimits
from services.metering.adapters.request_feed import RequestFeed
from services.metering.adapters.tenant_calendars import RememberedCalendars, TenantCalendars
from services.metering.adapters.tenant_plans_client import RemoteTenantPlans
from services.metering.adapters.tenant_rules import TenantRules
from services.metering.billing.desk import InvoiceDesk
from services.metering.billing.monthly_job import MonthlyJob
from services.metering.billing.plan_file import BillingPlansRefused, parse_billing_plans
from services.metering.billing.plan_file import describe as describe_plans
from services.metering.billing.terms import PlanVersion
from services.metering.budgets.desk import BudgetDesk
from services.metering.budgets.keeper import BudgetKeeper
from services.metering.budgets.spending import UsageSpending
from services.metering.event_log import EventLog
from services.metering.event_months import EventMonths, make_months
from services.metering.event_types import EventTypeCatalog
from services.metering.exports.outgoing import Sink, Teller
from services.metering.exports.relay import ExportRelay
from services.metering.lease_sweeper import LeaseSweeper
from services.metering.ledger import EndSink, Ledger
from services.metering.outbox import OutboxRelay
from services.metering.price_book import PriceBookRefused, PriceVersion, parse_price_book
from services.metering.price_catalog import PriceCatalog
from services.metering.price_loading import PriceLoading
from services.metering.price_loading import describe as describe_prices
from services.metering.reconciliation.comparing import Comparison, RequestsComparison, SumsComparison, Terms
from services.metering.reconciliation.feed import Accounts
from services.metering.reconciliation.job import ReconciliationJob
from services.metering.reconciliation.reconciler import Reconciler
from services.metering.reconciliation.report import Thresholds
from services.metering.refusal import RefusalBook
from services.metering.rerating import RerateDesk
from services.metering.servicers.budgets import BudgetServicer
from services.metering.servicers.events import EventServicer
from services.metering.servicers.export_sinks import ExportSinkServicer
from services.metering.servicers.exports import ExportServicer
from services.metering.servicers.invoices import InvoiceServicer
from services.metering.servicers.ledger import LedgerServicer
from services.metering.servicers.lifecycle import LifecycleServicer
from services.metering.servicers.prices import PriceServicer
from services.metering.servicers.reconciliations import ReconciliationServicer
from services.metering.servicers.usage import UsageServicer
from services.metering.servicers.verification import VerificationServicer
from services.metering.servicers.webhooks import WebhookServicer
from services.metering.settings import MeteringSettings
from services.metering.tenant_proof import TenantProof
from services.metering.usage_folder import UsageFolder
from services.metering.verification import Verifier
from services.metering.webhooks.desk import WebhookDesk
from services.metering.webhooks.relay import DeliveryRelay
from services.metering.webhooks.secrets import EndpointSecrets, parse_seal_keys

log = structlog.get_logger(__name__)

MIGRATIONS = Path(__file__).parent / "migrations"
SCHEMA = "metering"
# As inference opens its calls.
PROVIDER = "anthropic"
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
        usage_feed = _usage_feed(stack, settings)
        sender = WebhookSender(private_addresses=settings.webhook_private_addresses)
        stack.push_async_callback(sender.close)
        # Before the loops, so that its connections are closed after them.
        exports = _export_relay(stack, settings, jobs)
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
        invoices: Registration = (add_InvoiceServiceServicer_to_server, InvoiceServicer(billing, desk), "mesh.metering.v1.InvoiceService")
        configs, plans = TenantConfigCache(to_tenant, feed=feed), RemoteTenantPlans(to_tenant)
        monthly = MonthlyJob(closings, desk, plans, grace=grace, poll_seconds=settings.invoice_poll_seconds)
        queries = await _usage_queries(stack, settings, database, jobs)
        usage = UsageServicer(PostgresUsage(database), queries, TenantCalendars(configs))
        servicers = [*_of_calls(ledger, refusals, usage, database, jobs), _of_prices(settings, catalog, database, jobs)]
        servicers += [_of_events(events, types), invoices, *_of_books(database, jobs, queries)]
        servicers += [_of_budgets(settings, background, database, jobs, configs, RememberedCalendars(plans, feed), clock)]
        servicers += [_of_webhooks(settings, background, sender, database, jobs)]
        servicers += [_reconciliations(stack, settings, background, jobs, usage_feed, _terms(settings, catalog), relay)]
        server = MeshServer(settings, servicers=servicers, resolver=resolver, verifier=verifier)
        await _keep_months(stack, settings, background, jobs, clock)
        if exports is not None:
            background.start("export_relay", exports.run)
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
    jobs = await JobsDatabase.open(jobs_dsn, max_size=7, application_name="metering-jobs", transaction_pooling=pooling)
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
    ledger: Ledger, refusals: RefusalBook, usage: UsageServicer, database: TenantDatabase, jobs: JobsDatabase
) -> list[Registration]:
    records = PostgresTenantRecords(database, jobs)
    return [
        (add_LedgerServiceServicer_to_server, LedgerServicer(ledger, PostgresEpochs(database), refusals), "mesh.metering.v1.LedgerService"),
        (add_UsageServiceServicer_to_server, usage, "mesh.metering.v1.UsageService"),
        (add_TenantLifecycleServiceServicer_to_server, LifecycleServicer(records), "mesh.common.v1.TenantLifecycleService"),
    ]


def _of_prices(settings: MeteringSettings, catalog: PriceCatalog, database: TenantDatabase, jobs: JobsDatabase) -> Registration:
    async def read() -> str:
        return await asyncio.to_thread(_price_book_text, settings)

    loading = PriceLoading(read, PostgresPriceBook(jobs), catalog)
    desk = RerateDesk(PostgresReratings(database), catalog)
    return add_PriceServiceServicer_to_server, PriceServicer(catalog, loading, desk), "mesh.metering.v1.PriceService"


def _of_events(events: EventLog, types: EventTypeCatalog) -> Registration:
    return add_EventServiceServicer_to_server, EventServicer(events, types), "mesh.metering.v1.EventService"


def _usage_feed(stack: AsyncExitStack, settings: MeteringSettings) -> RequestFeed | AnthropicUsageReport | None:
    url, key, accounts = settings.reconciliation_url, settings.reconciliation_api_key.get_secret_value(), _accounts(settings)
    match settings.reconciliation_feed:
        case "none":
            return None
        case "requests":
            requests = RequestFeed(url=url, api_key=key, accounts=accounts)
            stack.push_async_callback(requests.close)
            return requests
        case "anthropic":
            report = AnthropicUsageReport(base_url=url, admin_key=key, accounts=accounts, width=settings.reconciliation_bucket)
            stack.push_async_callback(report.close)
            return report
        case other:
            assert_never(other)


def _reconciliations(
    stack: AsyncExitStack,
    settings: MeteringSettings,
    background: BackgroundTasks,
    jobs: JobsDatabase,
    feed: RequestFeed | AnthropicUsageReport | None,
    terms: Terms,
    ends: EndSink,
) -> Registration:
    reports, ledger, reconciler = PostgresReconciliations(jobs), PostgresReconciliationLedger(jobs), None
    if feed is not None:
        lag = timedelta(seconds=settings.reconciliation_lag_seconds)
        comparison: Comparison = (
            RequestsComparison(feed, ledger, terms, ends) if isinstance(feed, RequestFeed) else SumsComparison(feed, ledger, terms, lag=lag)
        )
        reconciler = Reconciler(comparison, reports, _drifts(stack, settings))
        if settings.reconciliation_poll_seconds:
            background.start("reconciliation", _reconciliation_job(settings, reconciler, reports, terms).run)
    servicer = ReconciliationServicer(reports, reconciler, settings.reconciliation_bucket)
    return add_ReconciliationServiceServicer_to_server, servicer, "mesh.metering.v1.ReconciliationService"


def _reconciliation_job(
    settings: MeteringSettings, reconciler: Reconciler, reports: PostgresReconciliations, terms: Terms
) -> ReconciliationJob:
    return ReconciliationJob(
        reconciler,
        reports,
        terms.provider,
        terms.accounts,
        width=settings.reconciliation_bucket,
        lookback=timedelta(hours=settings.reconciliation_lookback_hours),
        poll_seconds=settings.reconciliation_poll_seconds,
    )


def _drifts(stack: AsyncExitStack, settings: MeteringSettings) -> Counter:
    counters = otlp_counters(settings.service_name, settings.otlp_metrics_endpoint)
    stack.callback(counters.close)
    return counters.counter(RECONCILIATION_DRIFTS, "reports of the provider's usage that raised the alarm")


def _terms(settings: MeteringSettings, catalog: PriceCatalog) -> Terms:
    thresholds = Thresholds(settings.reconciliation_drift_nano_usd, settings.reconciliation_drift_per_million)
    return Terms(PROVIDER, _accounts(settings), catalog, thresholds)


def _accounts(settings: MeteringSettings) -> Accounts:
    return Accounts(settings.reconciliation_accounts)


def _of_budgets(
    settings: MeteringSettings,
    background: BackgroundTasks,
    database: TenantDatabase,
    jobs: JobsDatabase,
    configs: TenantConfigCache,
    calendars: RememberedCalendars,
    clock: Clock,
) -> Registration:
    store = PostgresBudgets(database)
    # On the primary: what is committed is counted.
    spending = UsageSpending(PostgresUsageQueries(database, database, jobs))
    keeper = BudgetKeeper(PostgresBudgetMarks(jobs), store, spending, calendars, poll_seconds=settings.budget_poll_seconds)
    background.start("budget_keeper", keeper.run)
    desk = BudgetDesk(store, spending, TenantCalendars(configs), TenantRules(configs), clock=clock)
    return add_BudgetServiceServicer_to_server, BudgetServicer(desk), "mesh.metering.v1.BudgetService"


def _of_webhooks(
    settings: MeteringSettings, background: BackgroundTasks, sender: WebhookSender, database: TenantDatabase, jobs: JobsDatabase
) -> Registration:
    secrets = EndpointSecrets(parse_seal_keys(settings.webhook_seal_keys.get_secret_value()))
    relay = DeliveryRelay(
        PostgresDeliveries(jobs),
        sender,
        secrets,
        region=settings.region,
        poll_seconds=settings.webhook_poll_seconds,
        max_attempts=settings.webhook_max_attempts,
        history_days=settings.webhook_history_days,
    )
    background.start("webhook_relay", relay.run)
    desk = WebhookDesk(PostgresWebhooks(database), secrets, private_addresses=settings.webhook_private_addresses)
    return add_WebhookServiceServicer_to_server, WebhookServicer(desk), "mesh.metering.v1.WebhookService"


def _of_books(database: TenantDatabase, jobs: JobsDatabase, queries: PostgresUsageQueries) -> list[Registration]:
    verifying = VerificationServicer(Verifier(PostgresVerification(database, jobs)))
    exporting = ExportServicer(PostgresExport(database), queries)
    telling = ExportSinkServicer(PostgresExportSettings(database, jobs))
    return [
        (add_VerificationServiceServicer_to_server, verifying, "mesh.metering.v1.VerificationService"),
        (add_ExportServiceServicer_to_server, exporting, "mesh.metering.v1.ExportService"),
        (add_ExportSinkServiceServicer_to_server, telling, "mesh.metering.v1.ExportSinkService"),
    ]


def _export_relay(stack: AsyncExitStack, settings: MeteringSettings, jobs: JobsDatabase) -> ExportRelay | None:
    outbox, tellers = PostgresExportOutbox(jobs), dict[Sink, Teller]()
    if key := settings.stripe_secret_key.get_secret_value():
        # Loaded where it is used: it is larger than the rest of the service.
        from services.metering.adapters.stripe_meter_events import StripeMeterEvents

        stripe = StripeMeterEvents(key, settings.stripe_url)
        stack.push_async_callback(stripe.close)
        tellers[Sink.STRIPE] = stripe
    if url := settings.export_endpoint_url:
        sender = WebhookSender(private_addresses=True)
        stack.push_async_callback(sender.close)
        tellers[Sink.ENDPOINT] = ExportEndpoint(sender, outbox, url, settings.export_signing_key(), region=settings.region)
    if not tellers:
        return None
    return ExportRelay(outbox, tellers, poll_seconds=settings.export_poll_seconds, max_attempts=settings.export_max_attempts)


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
    versions = _read_price_book(settings)
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
    return asyncio.run(_preview_plans(settings))


def preview_price_book(settings: MeteringSettings) -> str:
    """Says in a line each what `migrate` would load of the price book, and loads nothing. Raises: MigrationRefused."""
    return asyncio.run(_preview_prices(settings))


async def _preview_prices(settings: MeteringSettings) -> str:
    versions = _read_price_book(settings)
    admin = await JobsDatabase.open(settings.postgres_admin_dsn.get_secret_value(), max_size=1, application_name="metering-preview")
    try:
        return describe_prices(await price_book_changes(admin, versions))
    except PriceBookRefused as error:
        raise MigrationRefused(str(error)) from None
    finally:
        await admin.close()


async def _preview_plans(settings: MeteringSettings) -> str:
    plans = _read_billing_plans(settings)
    admin = await JobsDatabase.open(settings.postgres_admin_dsn.get_secret_value(), max_size=1, application_name="metering-preview")
    try:
        return describe_plans(await billing_plan_changes(admin, plans))
    except BillingPlansRefused as error:
        raise MigrationRefused(str(error)) from None
    finally:
        await admin.close()


def _price_book_text(settings: MeteringSettings) -> str:
    try:
        return settings.price_book_path.read_text()
    except OSError as error:
        raise PriceBookRefused(f"the price book {settings.price_book_path} cannot be read: {error.strerror}") from None


def _read_price_book(settings: MeteringSettings) -> list[PriceVersion]:
    try:
        return parse_price_book(_price_book_text(settings))
    except PriceBookRefused as error:
        raise MigrationRefused(str(error)) from None


def _read_billing_plans(settings: MeteringSettings) -> list[PlanVersion]:
    try:
        return parse_billing_plans(settings.billing_plans_path.read_text())
    except OSError as error:
        raise MigrationRefused(f"the billing plans {settings.billing_plans_path} cannot be read: {error.strerror}") from None
    except BillingPlansRefused as error:
        raise MigrationRefused(str(error)) from None
