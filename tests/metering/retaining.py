"""Short ways to age events, to close old periods, and to keep what is kept for a while, at a time of the test's own."""

from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta

from services.kernel.ids import TenantId
from services.kernel.telemetry.metrics import otlp_counters
from services.metering.adapters.postgres_billing import PostgresBilling
from services.metering.adapters.postgres_closings import PostgresClosings
from services.metering.adapters.postgres_event_months import PostgresEventMonths
from services.metering.adapters.postgres_retention import PostgresRetention
from services.metering.billing.desk import InvoiceDesk
from services.metering.billing.periods import BillingPeriod, period_of
from services.metering.retention import Retention, RetentionCounters
from tests.metering.mesh import Mesh, Tenant

PLANT_CLOSING = """
INSERT INTO metering.invoice_closings (tenant_id, number, invoice_id, period_start, period_end, close_time, tier_plan)
SELECT $1, count(*) + 1, uuidv7(), $2, $3, $4, '' FROM metering.invoice_closings WHERE tenant_id = $1
"""
AGE_EVENTS = """
UPDATE metering.events e SET record_time = a.record_time FROM unnest($2::text[], $3::timestamptz[]) AS a (id, record_time)
WHERE e.tenant_id = $1 AND e.id = a.id AND e.reverses IS NULL
"""
# A reversal was recorded an hour after its event.
AGE_REVERSALS = """
UPDATE metering.events e SET record_time = a.record_time + interval '1 hour'
FROM unnest($2::text[], $3::timestamptz[]) AS a (id, record_time)
WHERE e.tenant_id = $1 AND e.id = a.id AND e.reverses IS NOT NULL
"""
AGE_CLAIMS = """
UPDATE metering.event_claims k SET record_time = e.record_time FROM metering.events e
WHERE k.tenant_id = $1 AND e.tenant_id = $1 AND e.event_id = k.event_id
"""


def retaining(mesh: Mesh, months: PostgresEventMonths | None, now: datetime, retention_days: int = 100) -> Retention:
    """What keeps events and refusals as it would at that time."""
    counters = otlp_counters("metering", "")
    counted = RetentionCounters(*(counters.counter(name, name) for name in ("dropped", "held", "summed")))
    return Retention(PostgresRetention(mesh.app.jobs), months, counted, retention_days=retention_days, clock=lambda: now)


async def age(mesh: Mesh, months: PostgresEventMonths, tenant: Tenant, recorded: Mapping[str, datetime]) -> None:
    """Lets a tenant's events have been recorded at these times, by id, and what took one back an hour later."""
    for month in {time.date().replace(day=1) for moment in recorded.values() for time in (moment, moment + timedelta(hours=1))}:
        await months.make(month)
    async with mesh.admin.acquire() as connection, connection.transaction():
        await connection.execute("SET LOCAL session_replication_role = replica")
        await connection.execute(AGE_EVENTS, tenant.id, list(recorded), list(recorded.values()))
        await connection.execute(AGE_REVERSALS, tenant.id, list(recorded), list(recorded.values()))
        await connection.execute(AGE_CLAIMS, tenant.id)


def periods(first: datetime, count: int) -> Sequence[BillingPeriod]:
    """So many months of UTC, one after the other."""
    found = [period_of(first, 1)]
    while len(found) < count:
        found.append(period_of(found[-1].end_time, 1))
    return found


async def closed(mesh: Mesh, tenant: Tenant, of: Sequence[BillingPeriod]) -> None:
    """Closes periods as if each had been two days after its end, and writes their invoices."""
    for period in of:
        times = (period.start_time, period.end_time, period.end_time + timedelta(days=2))
        await mesh.admin.execute(PLANT_CLOSING, tenant.id, *times)
    await InvoiceDesk(PostgresBilling(mesh.app.database), PostgresClosings(mesh.app.jobs)).finish(TenantId(tenant.id))
