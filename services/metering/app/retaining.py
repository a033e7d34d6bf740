"""What is kept for a while: months of events, made ahead and dropped in time, and counts of refusals."""

import structlog

from services.kernel.telemetry.metrics import otlp_counters
from services.kernel.telemetry.names import RETENTION_MONTHS_DROPPED, RETENTION_MONTHS_HELD, RETENTION_ROWS_SUMMED
from services.kernel.tenant_database import JobsDatabase
from services.metering.adapters.postgres_event_months import PostgresEventMonths
from services.metering.adapters.postgres_refusals import PostgresRefusals
from services.metering.adapters.postgres_retention import PostgresRetention
from services.metering.app.parts import Parts
from services.metering.event_months import EventMonths
from services.metering.refusal import RefusalBook
from services.metering.retention import Retention, RetentionCounters
from services.metering.tenant_proof import TenantProof

log = structlog.get_logger(__name__)


def open_refusal_book(parts: Parts, proof: TenantProof) -> RefusalBook:
    """Opens the book of refusals, which takes no count that may be added up already."""
    return RefusalBook(PostgresRefusals(parts.database), proof, retention_days=parts.settings.event_retention_days, clock=parts.clock)


async def keep_months(parts: Parts) -> None:
    """Starts the loops that make months, and that add up and drop what is past its retention."""
    months = await _open_months(parts)
    if months is not None:
        parts.background.start("event_months", EventMonths(months, clock=parts.clock).run)
    retention = Retention(
        PostgresRetention(parts.jobs),
        months,
        _counters(parts),
        retention_days=parts.settings.event_retention_days,
        clock=parts.clock,
    )
    parts.background.start("retention", retention.run)


async def _open_months(parts: Parts) -> PostgresEventMonths | None:
    settings = parts.settings
    dsn = settings.postgres_partitions_dsn.get_secret_value()
    if not dsn:
        log.warning("event_months_not_kept", setting="TENANTRY_POSTGRES_PARTITIONS_DSN")
        return None
    owners = await JobsDatabase.open(
        dsn, max_size=1, application_name="metering-partitions", transaction_pooling=settings.postgres_transaction_pooling
    )
    parts.stack.push_async_callback(owners.close)
    return PostgresEventMonths(owners)


def _counters(parts: Parts) -> RetentionCounters:
    counters = otlp_counters(parts.settings.service_name, parts.settings.otlp_metrics_endpoint)
    parts.stack.callback(counters.close)
    return RetentionCounters(
        counters.counter(RETENTION_MONTHS_DROPPED, "months of events that were dropped"),
        counters.counter(RETENTION_MONTHS_HELD, "months past their retention that a tenant still needs, once a day each"),
        counters.counter(RETENTION_ROWS_SUMMED, "events and counts of refusals that were added up"),
    )
