"""The job that closes what ended a grace ago: by itself, once whoever runs it, and never what is none of its business."""

import asyncio
from datetime import datetime, timedelta

from mesh.common.v1 import lifecycle_service_pb2 as lifecycle_pb
from services.kernel.errors import Unavailable
from services.kernel.ids import TenantId, new_uuid7
from services.metering.adapters.postgres_billing import PostgresBilling
from services.metering.adapters.postgres_closings import PostgresClosings
from services.metering.adapters.tenant_plans_client import RemoteTenantPlans
from services.metering.billing.desk import InvoiceDesk
from services.metering.billing.monthly_job import MonthlyJob
from tests.metering.billing import USD, ended, recomputed, rows_of, subscribe, use_units
from tests.metering.mesh import Mesh, Tenant

GRACE = timedelta(hours=48)


def job(mesh: Mesh, now: datetime | None = None) -> MonthlyJob:
    """A replica's job, at a time: by default when the last period's grace is over, whatever day of the month it is."""
    books = PostgresClosings(mesh.app.jobs)
    desk = InvoiceDesk(PostgresBilling(mesh.app.database), books)
    tiers = RemoteTenantPlans(mesh.to_peers)
    return MonthlyJob(books, desk, tiers, grace=GRACE, poll_seconds=1.0, clock=lambda: now or ended(1).end_time + GRACE)


async def provisioned(mesh: Mesh, tier: str = "") -> Tenant:
    """A tenant that the tenant service knows, on a tier."""
    tenant = mesh.new_tenant()
    if tier:
        mesh.peers.tenants.tiers[tenant.id] = tier
    caller = mesh.tenant_service
    await caller.channel.unary(
        caller.lifecycle.ProvisionTenant, lifecycle_pb.ProvisionTenantRequest(), timeout_seconds=10, tenant=tenant.context
    )
    return tenant


async def closed_starts(mesh: Mesh, tenant: Tenant) -> list[datetime]:
    """When the tenant's closed periods begin."""
    rows = await mesh.admin.fetch("SELECT period_start FROM metering.invoice_closings WHERE tenant_id = $1 ORDER BY number", tenant.id)
    return [row["period_start"] for row in rows]


async def test_job_closes_what_ended_longer_than_the_grace_ago(mesh: Mesh) -> None:
    """One microsecond before the grace is over nothing happens; then the period is closed, and no later one."""
    tenant = await provisioned(mesh)
    await subscribe(mesh, tenant, "starter", ended(1).start_time)
    # The database's clock says what has ended; the job's, only how long ago.
    await job(mesh, ended(1).end_time + GRACE - timedelta(microseconds=1)).round()
    assert await closed_starts(mesh, tenant) == []
    await job(mesh, ended(1).end_time + GRACE).round()
    assert await closed_starts(mesh, tenant) == [ended(1).start_time]
    due = "SELECT due_nano_usd FROM metering.invoices WHERE tenant_id = $1"
    assert await mesh.admin.fetchval(due, tenant.id) == 29 * USD


async def test_replicas_close_each_period_once(mesh: Mesh) -> None:
    """Several jobs at once, behind by three periods: each period has one closing and one invoice, and all of them verify."""
    tenants = [await provisioned(mesh) for _ in range(3)]
    for tenant in tenants:
        await subscribe(mesh, tenant, "starter", ended(3).start_time)
    await asyncio.gather(*[job(mesh).round() for _ in range(3)])
    for tenant in tenants:
        assert await closed_starts(mesh, tenant) == [ended(ago).start_time for ago in (3, 2, 1)]
        assert (await rows_of(mesh, tenant))[2:5] == [3, 3, 3]
        assert await recomputed(mesh, tenant) == []


async def test_a_tenant_without_a_subscription_is_billed_by_its_tier_from_its_first_use(mesh: Mesh) -> None:
    """Who used something is billed by the tier the tenant service tells; who used nothing, or is not known there, is not."""
    user, idle, unknown = await provisioned(mesh, "starter"), await provisioned(mesh, "starter"), await provisioned(mesh)
    for tenant in (user, unknown):
        await use_units(mesh, tenant, ended(2).start_time, quantity=21)
    await job(mesh).round()
    assert await closed_starts(mesh, user) == [ended(2).start_time, ended(1).start_time]
    assert [await closed_starts(mesh, tenant) for tenant in (idle, unknown)] == [[], []]
    charges = "SELECT charges_nano_usd FROM metering.invoices WHERE tenant_id = $1 ORDER BY number"
    assert [row[0] for row in await mesh.admin.fetch(charges, user.id)] == [31 * USD, 29 * USD]


async def test_an_erased_tenant_is_billed_for_the_last_time_for_the_period_of_its_erasure(mesh: Mesh) -> None:
    """Its books are closed to the end; no fee is asked for a period that began after it was gone."""
    tenant = await provisioned(mesh)
    await subscribe(mesh, tenant, "starter", ended(3).start_time)
    erasure = "INSERT INTO metering.erased_tenants (tenant_id, erase_time) VALUES ($1, $2)"
    await mesh.admin.execute(erasure, tenant.id, ended(2).start_time + timedelta(days=3))
    await job(mesh).round()
    assert await closed_starts(mesh, tenant) == [ended(3).start_time, ended(2).start_time]


async def test_job_finishes_what_a_crash_left(mesh: Mesh) -> None:
    """A closing without an invoice gets one in the next round."""
    tenant = await provisioned(mesh)
    await subscribe(mesh, tenant, "starter", ended(1).start_time)
    await PostgresClosings(mesh.app.jobs).close(TenantId(tenant.id), new_uuid7(), ended(1), "", 1)
    assert (await rows_of(mesh, tenant))[2:4] == [1, 0]
    await job(mesh, ended(1).start_time).round()
    assert (await rows_of(mesh, tenant))[2:4] == [1, 1]
    assert await recomputed(mesh, tenant) == []


async def test_one_tenant_that_cannot_be_billed_keeps_no_other_waiting(mesh: Mesh) -> None:
    """A tier without terms, and a tenant service that is away for one, are passed over and tried again."""
    planless, fine = await provisioned(mesh, "unheard-of"), await provisioned(mesh)
    await use_units(mesh, planless, ended(1).start_time)
    await subscribe(mesh, fine, "starter", ended(1).start_time)
    await job(mesh).round()
    assert [len(await closed_starts(mesh, tenant)) for tenant in (planless, fine)] == [0, 1]
    mesh.peers.tenants.tiers[planless.id] = "free"
    await job(mesh).round()
    assert len(await closed_starts(mesh, planless)) == 1


async def test_a_tenant_service_that_is_away_stops_no_billing_by_subscriptions(mesh: Mesh) -> None:
    """Who has a subscription is billed without asking anybody."""

    class Away:
        """A directory nobody reaches."""

        async def tier(self, tenant_id: TenantId) -> str:
            raise Unavailable("tenant")

    tenant, by_tier = await provisioned(mesh), await provisioned(mesh, "starter")
    await subscribe(mesh, tenant, "starter", ended(1).start_time)
    await use_units(mesh, by_tier, ended(1).start_time)
    books = PostgresClosings(mesh.app.jobs)
    desk = InvoiceDesk(PostgresBilling(mesh.app.database), books)
    now = ended(1).end_time + GRACE
    await MonthlyJob(books, desk, Away(), grace=GRACE, poll_seconds=1.0, clock=lambda: now).round()
    assert [len(await closed_starts(mesh, found)) for found in (tenant, by_tier)] == [1, 0]


async def test_books_that_nobody_can_read_stop_no_other_tenant(mesh: Mesh) -> None:
    """A row that the code does not expect keeps its own tenant's period open; the tenants after it are closed in the same round."""
    broken, sound = await provisioned(mesh), await provisioned(mesh)
    for tenant in (broken, sound):
        await subscribe(mesh, tenant, "starter", ended(1).start_time)
    await mesh.admin.execute(
        "INSERT INTO metering.credits (tenant_id, credit_id, amount_nano_usd, priority, effective_time, reason, digest, record_time) "
        "VALUES ($1, $2, 1, 0, '-infinity', '', sha256(''), clock_timestamp())",
        broken.id,
        new_uuid7(),
    )
    await job(mesh).round()
    assert (await closed_starts(mesh, broken), await closed_starts(mesh, sound)) == ([], [ended(1).start_time])
