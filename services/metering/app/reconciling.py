"""How the ledger is compared with the provider's own account of usage."""

from datetime import timedelta
from typing import assert_never

from mesh.metering.v1.reconciliation_service_pb2_grpc import add_ReconciliationServiceServicer_to_server
from services.kernel.rpc.server import Registration
from services.kernel.telemetry.metrics import Counter, otlp_counters
from services.kernel.telemetry.names import RECONCILIATION_DRIFTS, RECONCILIATION_ROWS_SET_ASIDE
from services.metering.adapters.anthropic_usage_report import AnthropicUsageReport
from services.metering.adapters.postgres_reconciliation_ledger import PostgresReconciliationLedger
from services.metering.adapters.postgres_reconciliations import PostgresReconciliations
from services.metering.adapters.request_feed import RequestFeed
from services.metering.app.parts import Parts
from services.metering.ledger import EndSink
from services.metering.price_catalog import PriceCatalog
from services.metering.reconciliation.comparing import Comparison, RequestsComparison, SumsComparison, Terms
from services.metering.reconciliation.feed import Accounts
from services.metering.reconciliation.job import ReconciliationJob
from services.metering.reconciliation.reconciler import Reconciler
from services.metering.reconciliation.report import Thresholds
from services.metering.servicers.reconciliations import ReconciliationServicer
from services.metering.settings import MeteringSettings

# As inference opens its calls.
PROVIDER = "anthropic"


def open_usage_feed(parts: Parts) -> RequestFeed | AnthropicUsageReport | None:
    """Opens what tells the provider's own account of usage; None where nothing does."""
    settings, stack = parts.settings, parts.stack
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


def build_reconciliations(
    parts: Parts, feed: RequestFeed | AnthropicUsageReport | None, catalog: PriceCatalog, ends: EndSink
) -> Registration:
    """Builds the comparisons, and the job that makes them where one is wanted."""
    settings, terms = parts.settings, _terms(parts.settings, catalog)
    reports, ledger, reconciler = PostgresReconciliations(parts.jobs), PostgresReconciliationLedger(parts.jobs), None
    if feed is not None:
        lag = timedelta(seconds=settings.reconciliation_lag_seconds)
        comparison: Comparison = (
            RequestsComparison(feed, ledger, terms, ends) if isinstance(feed, RequestFeed) else SumsComparison(feed, ledger, terms, lag=lag)
        )
        reconciler = Reconciler(comparison, reports, *_counters(parts))
        if settings.reconciliation_poll_seconds:
            parts.background.start("reconciliation", _reconciliation_job(settings, reconciler, reports, terms).run)
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


def _counters(parts: Parts) -> tuple[Counter, Counter]:
    counters = otlp_counters(parts.settings.service_name, parts.settings.otlp_metrics_endpoint)
    parts.stack.callback(counters.close)
    return (
        counters.counter(RECONCILIATION_DRIFTS, "reports of the provider's usage that raised the alarm"),
        counters.counter(RECONCILIATION_ROWS_SET_ASIDE, "rows of the provider's usage that could not be read, each time they were told"),
    )


def _terms(settings: MeteringSettings, catalog: PriceCatalog) -> Terms:
    thresholds = Thresholds(settings.reconciliation_drift_nano_usd, settings.reconciliation_drift_per_million)
    return Terms(PROVIDER, _accounts(settings), catalog, thresholds)


def _accounts(settings: MeteringSettings) -> Accounts:
    return Accounts(settings.reconciliation_accounts)
