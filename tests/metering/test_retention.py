"""Months of events are dropped once nobody needs them one by one, and whatever was made of them can be made again, now and later."""

import random
from collections.abc import AsyncIterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import asyncpg
import pytest

from mesh.metering.v1 import event_service_pb2 as events_pb
from mesh.metering.v1 import invoice_service_pb2 as pb
from mesh.metering.v1 import ledger_service_pb2 as ledger_pb
from mesh.metering.v1 import usage_service_pb2 as usage_pb
from services.kernel.errors import MeshError, Unavailable
from services.kernel.ids import TenantId
from services.kernel.placement import HOME
from services.kernel.tenant_database import JobsDatabase
from services.metering.adapters.postgres_billing_plans import load_billing_plans
from services.metering.adapters.postgres_billing_reader import hold_months
from services.metering.adapters.postgres_event_months import PostgresEventMonths
from services.metering.adapters.postgres_retention import PostgresRetention
from services.metering.billing.periods import BillingPeriod
from services.metering.billing.plan_file import parse_billing_plans
from tests.metering.billing import ask, close, recomputed, subscribe
from tests.metering.events import CONFLICT, DUPLICATE, RECORDED, event, listed, outcomes, register, reverse
from tests.metering.mesh import Mesh, Tenant, dsn_of, migrated, running_mesh
from tests.metering.peers import Peers
from tests.metering.replicas import running_replicas
from tests.metering.retaining import age, closed, periods, retaining
from tests.metering.test_billed_events import PLAN, TYPES, Log
from tests.metering.test_lifecycle import erase
from tests.metering.usage import asking, every_row, fold
from tests.metering.verifying import differences, verified
from tests.support.stores import PostgresStore
from tests.support.waiting import eventually

MONTHS = "SELECT relname FROM pg_class WHERE relkind = 'r' AND relname LIKE 'events\\_20%' AND relnamespace = 'metering'::regnamespace"
NOW = datetime(2026, 6, 1, tzinfo=UTC)
HOUR, DAY = timedelta(hours=1), timedelta(days=1)
# After a first of January.
CUT = timedelta(days=40, hours=5, minutes=10)
USER, FEATURE, TYPE = usage_pb.USAGE_DIMENSION_USER, usage_pb.USAGE_DIMENSION_FEATURE, usage_pb.USAGE_DIMENSION_EVENT_TYPE


class Kept:
    """A service on a database of its own, whose months may be made, aged and dropped."""

    def __init__(self, mesh: Mesh, months: PostgresEventMonths) -> None:
        self.mesh = mesh
        self.months = months

    async def there(self) -> set[str]:
        """The months that are there, such as 2024_01."""
        return {row["relname"].removeprefix("events_") for row in await self.mesh.admin.fetch(MONTHS)}

    async def retain(self, now: datetime = NOW) -> bool:
        """Does what is due at that time."""
        return await retaining(self.mesh, self.months, now).round()

    async def used(self, first: datetime, count: int = 60) -> tuple[Tenant, Log, Sequence[BillingPeriod]]:
        """A tenant with events over three months, some taken back, some recorded late, that is billed for four."""
        chance, tenant, of = random.Random(first.toordinal()), self.mesh.new_tenant(), periods(first, 4)
        await subscribe(self.mesh, tenant, "by-events", first)
        # Another plan, from a second within an hour on.
        await subscribe(self.mesh, tenant, "by-events-too", first + CUT + timedelta(minutes=7, seconds=3))
        spread = int((of[2].end_time - first).total_seconds())
        made = [
            event(
                f"kept-{first:%Y}-{number}",
                type=(name := chance.choice(list(TYPES))),
                quantity=chance.randint(1, 12 if "seats" in name or "guests" in name else 900),
                time=first + timedelta(seconds=chance.randrange(spread)),
                subject=f"user-{chance.randrange(4)}",
            )
            for number in range(count)
        ]
        chosen = {item.id for item in chance.sample(made, count // 4)}
        lags = {item.id: chance.choice((timedelta(0), timedelta(minutes=3), 4 * DAY)) for item in made}
        for name, time, lag in (
            # On both sides of where a plan begins within an hour, and of a closing.
            ("before", CUT, timedelta(0)),
            ("after", CUT + timedelta(minutes=9), timedelta(0)),
            ("in time", 31 * DAY - HOUR, DAY),
            ("late", 31 * DAY - HOUR, 4 * DAY),
            ("last", of[2].end_time - first - HOUR, 4 * DAY),
        ):
            made.append(event(f"kept-{first:%Y}-{name}", type="billed.pages", quantity=1_700, time=first + time, subject="user-1"))
            lags[made[-1].id] = lag
        log = Log(made, chosen)
        for half in (made[::2], made[1::2]):
            assert set(await outcomes(self.mesh, tenant, *half)) == {RECORDED}
        await reverse(self.mesh, tenant, *(item for item in made if item.id in log.reversed_ids))
        recorded = {item.id: min(item.time.ToDatetime(UTC) + lags[item.id], of[2].end_time + 5 * DAY) for item in made}
        await age(self.mesh, self.months, tenant, recorded)
        await closed(self.mesh, tenant, of)
        await fold(self.mesh)
        return tenant, log, of


@pytest.fixture(scope="module")
async def kept(postgres: PostgresStore, peers: Peers) -> AsyncIterator[Kept]:
    """As above; the service's own loop lets old months be."""
    dsn = await postgres.fresh_database()
    await migrated(dsn, peers)
    owners = await JobsDatabase.open(dsn_of(dsn, "metering_partitions"), max_size=1)
    admin = await JobsDatabase.open(dsn, max_size=1)
    for plan in (PLAN, PLAN.replace("by-events", "by-events-too")):
        await load_billing_plans(admin, parse_billing_plans(plan))
    await admin.close()
    async with asyncpg.create_pool(dsn, min_size=1, max_size=3) as pool:
        mesh = await running_mesh(dsn, peers, pool, event_retention_days=10_000, usage_fold_seconds=3_600.0)
        for name, (unit, aggregation) in TYPES.items():
            await register(mesh, name, unit=unit, aggregation=aggregation)
        yield Kept(mesh, PostgresEventMonths(owners))
        await mesh.close()
    await owners.close()


async def said(mesh: Mesh, tenant: Tenant) -> list[object]:
    """All that invoices, their documents and questions about use say of a tenant's first months."""
    answer = await ask(mesh, tenant, "ListInvoices", pb.ListInvoicesRequest())
    documents = [
        (await ask(mesh, tenant, "RenderInvoice", pb.RenderInvoiceRequest(invoice_id=invoice.invoice_id, format=form))).document
        for invoice in answer.invoices
        for form in (pb.INVOICE_FORMAT_JSON, pb.INVOICE_FORMAT_CSV)
    ]
    start = answer.invoices[0].content.period_start.ToDatetime(UTC)
    end = answer.invoices[-1].content.period_end.ToDatetime(UTC)
    questions = [
        asking(USER, FEATURE, TYPE, start=start, end=end, bucket=usage_pb.USAGE_BUCKET_DAY, page_size=1_000),
        asking(TYPE, start=start, end=start + 28 * DAY, bucket=usage_pb.USAGE_BUCKET_HOUR, page_size=1_000),
        asking(start=start, end=end, page_size=1_000),
    ]
    return [list(answer.invoices), documents, *[await every_row(mesh, tenant, question) for question in questions]]


async def entries(mesh: Mesh, tenant: Tenant) -> tuple[dict[tuple[str, str], int], set[int], int]:
    """What the records behind each meter of each span add up to, what they are, and how many they stand for."""
    sums, sources, count = dict[tuple[str, str], int](), set[int](), 0
    for invoice in (await ask(mesh, tenant, "ListInvoices", pb.ListInvoicesRequest())).invoices:
        seen = set()
        for line in invoice.content.lines:
            key = (line.span_start.ToJsonString() + str(invoice.number), line.name)
            if line.kind != pb.INVOICE_LINE_KIND_USAGE or line.name == "seats" or key in seen:
                continue
            seen.add(key)
            request = pb.ListInvoiceLineEntriesRequest(invoice_id=invoice.invoice_id, line_number=line.line_number, page_size=1_000)
            for entry in (await ask(mesh, tenant, "ListInvoiceLineEntries", request)).entries:
                sums[key] = sums.get(key, 0) + entry.quantity
                sources.add(entry.source)
                count += entry.record_count
    return sums, sources, count


async def test_dropped_months_leave_every_figure_as_it_was(kept: Kept) -> None:
    """Invoices, their documents, use and verification say the same; ids are known, and what is used late is billed as a difference."""
    mesh, first = kept.mesh, datetime(2024, 1, 1, tzinfo=UTC)
    (tenant, log, of), (twin, *_) = [await kept.used(first) for _ in range(2)]
    charged = await late_use(mesh, twin, of)
    before, (sums, sources, count) = await said(mesh, tenant), await entries(mesh, tenant)
    assert await differences(mesh, tenant) == [] and await recomputed(mesh, tenant) == []
    assert {month for page in await verified(mesh, tenant) for month in page.summed_months} == set()
    assert {"2024_01", "2024_02", "2024_03", "2024_04"} <= await kept.there() and sources == {pb.USAGE_SOURCE_EVENT}
    # A month is held until a day beyond its end is closed: April is not.
    assert await kept.retain()
    assert {"2024_01", "2024_02", "2024_03"} & await kept.there() == set() and "2024_04" in await kept.there()
    assert await said(mesh, tenant) == before
    assert await recomputed(mesh, tenant) == [] and await differences(mesh, tenant) == []
    assert {month for page in await verified(mesh, tenant) for month in page.summed_months} == {"2024-01", "2024-02", "2024-03"}
    summed, sources, stood = await entries(mesh, tenant)
    assert (summed, stood) == (sums, count) and pb.USAGE_SOURCE_DROPPED_EVENTS in sources
    # The ids are known for ever, whatever else is told of them, and nothing is counted again.
    assert set(await outcomes(mesh, tenant, *log.events)) == {DUPLICATE}
    other = events_pb.Event()
    other.CopyFrom(log.events[0])
    other.data.quantity += 1
    assert await outcomes(mesh, tenant, other) == [CONFLICT]
    # What was dropped is taken back no more; what was taken back before is.
    gone = {item.id for item in log.events} - {row.event.id for row in await listed(mesh, tenant)}
    back = [item for item in log.events if item.id in gone and item.id in log.reversed_ids]
    standing = [item for item in log.events if item.id in gone and item.id not in log.reversed_ids]
    assert {result.outcome for result in await reverse(mesh, tenant, *standing)} == {events_pb.REVERSE_EVENT_OUTCOME_EXPIRED}
    assert {result.outcome for result in await reverse(mesh, tenant, *back)} == {events_pb.REVERSE_EVENT_OUTCOME_REVERSED}
    assert await said(mesh, tenant) == before
    # What was used in a dropped month and comes now is the difference to all there was.
    assert await late_use(mesh, tenant, of) == charged
    for one in (tenant, twin):
        assert await recomputed(mesh, one) == [] and await differences(mesh, one) == []


async def paid(mesh: Mesh, tenant: Tenant) -> int:
    """What all invoices charge together."""
    answer = await ask(mesh, tenant, "ListInvoices", pb.ListInvoicesRequest())
    return sum(invoice.content.charges.nano_usd for invoice in answer.invoices)


async def late_use(mesh: Mesh, tenant: Tenant, of: Sequence[BillingPeriod]) -> int:
    """Records two events of long ago, closes the next period, and returns what all invoices charge together."""
    made = [
        event("late-pages", type="billed.pages", quantity=3_333, time=of[0].start_time + CUT),
        event("late-seats", type="billed.seats", quantity=77, time=of[1].start_time + 20 * DAY),
    ]
    assert await outcomes(mesh, tenant, *made) == [RECORDED, RECORDED]
    await close(mesh, tenant, periods(of[-1].end_time, 1)[0])
    await fold(mesh)
    return await paid(mesh, tenant)


async def test_killed_in_the_middle_it_is_ended_by_whoever_comes_next(kept: Kept, tmp_path: Path) -> None:
    """Kill -9 with one tenant's events added up and another's not: nothing is counted twice meanwhile, and nothing afterwards."""
    mesh, first = kept.mesh, datetime(2022, 1, 1, tzinfo=UTC)
    one, two = sorted([(await kept.used(first, 30))[0] for _ in range(2)], key=lambda tenant: tenant.id)
    before = [await said(mesh, tenant) for tenant in (one, two)]
    summed = "SELECT count(*) FROM metering.event_sums WHERE tenant_id = $1"

    async def is_in_the_middle() -> bool:
        waiting = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND mode = 'ShareLock' AND NOT granted"
        return await mesh.admin.fetchval(summed, one.id) > 0 and await mesh.admin.fetchval(waiting) > 0

    async with mesh.admin.acquire() as holder, holder.transaction():
        await holder.execute("SELECT pg_advisory_xact_lock(metering.tenant_lock($1))", two.id)
        async with running_replicas(mesh, tmp_path, 1, event_retention_days=92) as (replica,):
            await eventually(is_in_the_middle, within_seconds=60.0)
            await replica.kill()
        assert await mesh.admin.fetchval(summed, two.id) == 0 and "2022_01" in await kept.there()
    # The part that waited may yet be done by the server, which does not know that nobody waits for it.
    assert [await said(mesh, tenant) for tenant in (one, two)] == before
    assert await differences(mesh, one) == []
    await eventually(kept.retain, within_seconds=30.0)
    assert {"2022_01", "2022_02", "2022_03"} & await kept.there() == set()
    assert [await said(mesh, tenant) for tenant in (one, two)] == before
    for tenant in (one, two):
        assert await differences(mesh, tenant) == []


async def test_two_at_once_add_up_once_and_in_parts(kept: Kept) -> None:
    """Of two that add up a month at once one leaves off; parts are bounded, and events of one moment are never parted."""
    mesh, first = kept.mesh, datetime(2021, 1, 1, tzinfo=UTC)
    tenant, *_ = await kept.used(first, 30)
    rows = PostgresRetention(mesh.app.jobs)
    async with mesh.admin.acquire() as holder, holder.transaction():
        await holder.execute("SELECT pg_advisory_xact_lock(7405, 2)")
        assert await rows.sum_events(first.date(), 10) == -1
        assert not await kept.retain()
    counts = []
    while (count := await rows.sum_events(first.date(), 2)) > 0:
        counts.append(count)
    of_month = "SELECT count(*) FROM metering.events WHERE tenant_id = $1 AND record_time < '2021-02-01T00:00:00Z'"
    assert sum(counts) == await mesh.admin.fetchval(of_month, tenant.id) and len(counts) > 2
    before = await said(mesh, tenant)
    assert await kept.retain()
    assert await said(mesh, tenant) == before
    assert await differences(mesh, tenant) == []


async def test_a_month_is_held_by_who_needs_it_and_by_nobody_else(kept: Kept) -> None:
    """Whose invoice is not closed, and who is still to be told; who is not billed waits for nothing, and may be billed yet."""
    mesh, first, of = kept.mesh, datetime(2020, 1, 1, tzinfo=UTC), periods(datetime(2020, 1, 1, tzinfo=UTC), 3)
    rows, used_at = PostgresRetention(mesh.app.jobs), first + 9 * DAY + timedelta(minutes=17)
    free, billed = mesh.new_tenant(), mesh.new_tenant()
    for tenant in (free, billed):
        await outcomes(mesh, tenant, event("held", type="billed.pages", quantity=5_000, time=used_at))
        await age(mesh, kept.months, tenant, {"held": used_at})
    await subscribe(mesh, billed, "by-events", first)
    await fold(mesh)

    async def held() -> list[int]:
        return [due.holding for due in await rows.due(NOW) if due.month == first.date()]

    assert await held() == [1] and (await rows.due(NOW))[0].held_by == billed.id
    await kept.retain()
    assert "2020_01" in await kept.there()
    await closed(mesh, billed, of)
    assert await held() == [0]
    export = "INSERT INTO metering.export_outbox VALUES ($1, 2, uuidv7(), '', '', 3, 0, $2, $2, NULL, false, 0, now() + interval '1 h')"
    await mesh.admin.execute(export, billed.id, used_at)
    assert await held() == [1]
    await mesh.admin.execute("DELETE FROM metering.export_outbox WHERE tenant_id = $1", billed.id)
    assert await kept.retain() and "2020_01" not in await kept.there()
    for tenant in (free, billed):
        assert await differences(mesh, tenant) == []
    assert [row.quantity for row in await every_row(mesh, free, asking(start=first, end=of[0].end_time))] == [5_000]
    # A plan may begin with the hour of a sum, not within it; then the use of a dropped month is on the first invoice.
    with pytest.raises(MeshError) as refused:
        await subscribe(mesh, free, "by-events", used_at - timedelta(minutes=1))
    assert (refused.value.reason_name, refused.value.metadata["resource"]) == ("WRONG_STATE", "billing_period")
    await subscribe(mesh, free, "by-events", used_at.replace(minute=0))
    await closed(mesh, free, of)
    assert await paid(mesh, free) == await paid(mesh, billed) > 0
    assert await recomputed(mesh, free) == []


async def test_no_month_is_dropped_under_who_reads(kept: Kept) -> None:
    """A reader that holds the months keeps them; one whose moment is before a drop it did not see is told to come again."""
    mesh, month = kept.mesh, datetime(2019, 3, 1, tzinfo=UTC).date()
    tenant = TenantId(mesh.new_tenant().id)
    await kept.months.make(month)
    async with mesh.app.database.transaction_at(HOME, tenant, snapshot=True) as connection:
        await hold_months(connection)
        with pytest.raises(Unavailable):
            await kept.months.drop(month)
    assert "2019_03" in await kept.there()
    with pytest.raises(Unavailable, match="dropped"):
        async with mesh.app.database.transaction_at(HOME, tenant, snapshot=True) as connection:
            await kept.months.drop(month)
            await hold_months(connection)


async def test_an_erased_tenants_sums_hold_no_names(kept: Kept) -> None:
    """Erased while it is added up, before the drop or after it: names are gone, amounts are not."""
    mesh, first = kept.mesh, datetime(2018, 1, 1, tzinfo=UTC)
    tenants = [(await kept.used(first, 20))[0] for _ in range(3)]
    # An erasure that was begun: nothing is blanked yet.
    await mesh.admin.execute("INSERT INTO metering.erased_tenants (tenant_id) VALUES ($1)", tenants[0].id)
    while await PostgresRetention(mesh.app.jobs).sum_events(first.date(), 1_000) > 0:
        continue
    await erase(mesh, tenants[1])
    assert await kept.retain()
    named = "SELECT count(*) FROM metering.event_sums WHERE tenant_id = $1 AND (user_name <> '' OR feature <> '')"
    assert [await mesh.admin.fetchval(named, tenant.id) > 0 for tenant in tenants] == [False, False, True]
    for tenant in (tenants[0], tenants[2]):
        await erase(mesh, tenant)
    for tenant in tenants:
        assert await mesh.admin.fetchval(named, tenant.id) == 0
        assert await mesh.admin.fetchval("SELECT sum(event_count) FROM metering.event_sums WHERE tenant_id = $1", tenant.id) > 0
        assert await differences(mesh, tenant) == []


async def test_counts_of_refusals_are_added_up_once_they_are_folded(kept: Kept) -> None:
    """By the hour, over replicas, a part at a time; not while the log of them waits; a count of so long ago is taken no more."""
    mesh, minute = kept.mesh, datetime(2024, 5, 1, 10, tzinfo=UTC)
    tenant = mesh.new_tenant()
    for replica, count in ((b"a" * 16, 3), (b"b" * 16, 4)):
        told = [mesh.refusals(tenant, count, minute_time=minute + number * timedelta(minutes=20)) for number in range(5)]
        await mesh.refuse(*told, replica_id=replica)
    rows, count_rows = PostgresRetention(mesh.app.jobs), "SELECT count(*) FROM metering.refusals WHERE tenant_id = $1"
    async with mesh.admin.acquire() as holder:
        assert await rows.sum_refusals(NOW, 100) == 0
        await fold(mesh)
        await holder.execute("SELECT pg_advisory_lock(7405, 0)")
        try:
            assert await rows.sum_refusals(NOW, 100) == 0
        finally:
            await holder.execute("SELECT pg_advisory_unlock(7405, 0)")
    question = asking(USER, start=minute, end=minute + 2 * HOUR, bucket=usage_pb.USAGE_BUCKET_HOUR)
    before = await every_row(mesh, tenant, question)
    assert [row.refusal_count for row in before] == [21, 14] and await mesh.admin.fetchval(count_rows, tenant.id) == 10
    # Part by part, and an hour in two of them.
    assert await rows.sum_refusals(minute + timedelta(minutes=30), 3) == 3
    assert await kept.retain()
    assert await mesh.admin.fetchval(count_rows, tenant.id) == 2
    assert await every_row(mesh, tenant, question) == before
    assert await differences(mesh, tenant) == []
    assert {month for page in await verified(mesh, tenant) for month in page.summed_months} == {"2024-05"}
    too_old = mesh.refusals(tenant, 1, minute_time=datetime(1990, 1, 1, tzinfo=UTC))
    assert await mesh.refuse(too_old) == [ledger_pb.RECORD_REFUSALS_OUTCOME_TOO_OLD]
    assert await mesh.admin.fetchval(count_rows, tenant.id) == 2
