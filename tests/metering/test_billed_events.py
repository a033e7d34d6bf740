"""Events as they are billed: by the aggregation of their type, in any order, late or taken back, to the nano-dollar, and ever after."""

import random
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from fractions import Fraction

import pytest

from mesh.metering.v1 import event_service_pb2 as events_pb
from mesh.metering.v1 import invoice_service_pb2 as pb
from services.kernel.ids import TenantId
from services.kernel.tenant_database import JobsDatabase
from services.metering.adapters.postgres_billing_plans import load_billing_plans
from services.metering.adapters.postgres_closings import PostgresClosings
from services.metering.adapters.postgres_retention import PostgresRetention
from services.metering.billing.plan_file import parse_billing_plans
from tests.metering.billing import ask, close, ended, lines_of, recomputed, subscribe
from tests.metering.events import DUPLICATE, PRODUCT, RECORDED, event, outcomes, register, reverse
from tests.metering.mesh import Mesh, Tenant
from tests.metering.test_monthly_job import closed_starts, job, provisioned

PLAN = """
currency: USD
versions:
  - plan: by-events
    version: "1"
    effective_time: "2020-01-01T00:00:00Z"
    charges:
      - {meter: documents, included: 1_000, graduated: [{up_to: 5_000, price: "1.503"}, {price: "0.337"}]}
      - {meter: candidates, included: 2, unit: {price: "0.07", per: 4}}
      - {meter: seats, package: {size: 5, price: "1.20"}}
"""
SUM, COUNT, MAX = events_pb.AGGREGATION_SUM, events_pb.AGGREGATION_COUNT, events_pb.AGGREGATION_MAX
# Two types of one unit are each aggregated by itself.
TYPES = {
    "billed.pages": ("documents", SUM),
    "billed.scans": ("documents", SUM),
    "billed.candidate": ("candidates", COUNT),
    "billed.seats": ("seats", MAX),
    "billed.guests": ("seats", MAX),
}
HOUR = timedelta(hours=1)
OLD = date(2022, 1, 1)


@pytest.fixture(autouse=True)
async def plan(mesh: Mesh, ledger_dsn: str) -> AsyncIterator[None]:
    """The types are known and the plan is loaded."""
    for name, (unit, aggregation) in TYPES.items():
        await register(mesh, name, unit=unit, aggregation=aggregation)
    owner = await JobsDatabase.open(ledger_dsn, max_size=1, application_name="test-billed-events")
    await load_billing_plans(owner, parse_billing_plans(PLAN))
    await owner.close()
    yield


@dataclass(frozen=True, slots=True)
class Log:
    """Events to record, and those of them to take back."""

    events: list[events_pb.Event]
    reversed_ids: set[str]

    def total(self) -> int:
        """What all periods together cost, by fractions, each product rounded once."""
        return sum(_cost(self.of(ended(ago).start_time, ended(ago).end_time)) for ago in (3, 2, 1))

    def of(self, start: datetime, end: datetime) -> list[tuple[str, int]]:
        """Type and quantity of what stands of a period."""
        kept = [item for item in self.events if item.id not in self.reversed_ids]
        return [(item.type, item.data.quantity) for item in kept if start <= item.time.ToDatetime(UTC) < end]


def _cost(used: list[tuple[str, int]]) -> int:
    documents = sum(quantity for name, quantity in used if TYPES[name][0] == "documents")
    candidates = sum(TYPES[name][0] == "candidates" for name, _ in used)
    seats = sum(max((quantity for name, quantity in used if name == kind), default=0) for kind in ("billed.seats", "billed.guests"))
    beyond = max(0, documents - 1_000)
    parts = [
        (min(beyond, 5_000), Fraction("1.503")),
        (max(0, beyond - 5_000), Fraction("0.337")),
        (max(0, candidates - 2), Fraction("0.07") / 4),
        (-(-seats // 5), Fraction("1.20")),
    ]
    return sum(round(quantity * price * 10**9) for quantity, price in parts)


def log_of(chance: random.Random, count: int = 120) -> Log:
    """Events over three ended periods, a third of which are taken back; quantities of a MAX are often equal."""
    spread = int((ended(1).end_time - ended(3).start_time).total_seconds() * 1_000_000)
    made = []
    for index in range(count):
        name = chance.choice(list(TYPES))
        quantity = chance.randint(1, 12) if TYPES[name][1] == MAX else chance.randint(1, 1_000)
        time = ended(3).start_time + timedelta(microseconds=chance.randrange(spread))
        made.append(event(f"billed-{index}", type=name, quantity=quantity, time=time))
    return Log(made, {item.id for item in chance.sample(made, count // 3)})


async def bill_in_any_order(mesh: Mesh, log: Log, chance: random.Random) -> tuple[Tenant, list[pb.Invoice]]:
    """Records a log in an order of its own, with replays, takes back what is to be, and closes the three periods in between."""
    tenant = mesh.new_tenant()
    await subscribe(mesh, tenant, "by-events", ended(3).start_time)
    waiting, recorded, invoices = chance.sample(log.events, len(log.events)), [], []
    for ago in (3, 2, 1):
        part = waiting if ago == 1 else waiting[: chance.randrange(len(waiting) + 1)]
        waiting = [item for item in waiting if item not in part]
        for batch in (part[: len(part) // 2], part[len(part) // 2 :]):
            if batch:
                await outcomes(mesh, tenant, *batch)
        recorded += part
        back = [item for item in recorded if item.id in log.reversed_ids and (ago == 1 or chance.random() < 0.4)]
        if back:
            await reverse(mesh, tenant, *back)
        if recorded:
            assert set(await outcomes(mesh, tenant, *recorded)) == {DUPLICATE}
        invoices.append(await close(mesh, tenant, ended(ago)))
    return tenant, invoices


def charges(invoices: list[pb.Invoice]) -> int:
    """What invoices charge together."""
    return sum(invoice.content.charges.nano_usd for invoice in invoices)


@pytest.mark.parametrize("seed", [1, 20_261_128])
async def test_all_orders_of_events_reversals_and_closings_cost_the_same(mesh: Mesh, seed: int) -> None:
    """Two tenants with one log in two orders pay what fractions say; after more events and replays every invoice is made again."""
    chance = random.Random(seed)
    log = log_of(chance)
    billed = [await bill_in_any_order(mesh, log, chance) for _ in range(2)]
    assert [charges(invoices) for _, invoices in billed] == [log.total()] * 2
    for tenant, invoices in billed:
        more = [event(type=name, quantity=99, time=ended(2).start_time + HOUR) for name in TYPES]
        assert set(await outcomes(mesh, tenant, *more)) == {RECORDED}
        await reverse(mesh, tenant, *log.events[:40])
        assert set(await outcomes(mesh, tenant, *log.events)) == {DUPLICATE}
        assert await recomputed(mesh, tenant) == []
        listed = (await ask(mesh, tenant, "ListInvoices", pb.ListInvoicesRequest())).invoices
        assert [item.SerializeToString(deterministic=True) for item in listed] == [
            item.SerializeToString(deterministic=True) for item in invoices
        ]


async def test_a_maximum_forgets_what_was_taken_back_from_then_on(mesh: Mesh) -> None:
    """The closed invoice keeps the level it knew; the next takes back down to the highest that stands, of two equal ones the other."""
    tenant, time = mesh.new_tenant(), ended(3).start_time + HOUR
    await subscribe(mesh, tenant, "by-events", ended(3).start_time)
    levels = [event(type="billed.seats", quantity=quantity, time=time) for quantity in (40, 30, 30, 7)]
    await outcomes(mesh, tenant, *levels)
    first = await close(mesh, tenant, ended(3))
    await reverse(mesh, tenant, levels[0], levels[1])
    second = await close(mesh, tenant, ended(2))
    await reverse(mesh, tenant, *levels)
    third = await close(mesh, tenant, ended(1))
    assert [charges([invoice]) for invoice in (first, second, third)] == [9_600_000_000, -2_400_000_000, -7_200_000_000]
    assert await recomputed(mesh, tenant) == []


async def test_lines_trace_to_events_and_a_tenant_to_its_own_alone(mesh: Mesh) -> None:
    """Each record is the ledger's event with what it adds; another tenant's events are on no line, in no sum, and are not read."""
    tenant, other = mesh.new_tenant(), mesh.new_tenant()
    for each, quantity in ((tenant, 1_200), (other, 77)):
        await subscribe(mesh, each, "by-events", ended(2).start_time)
        sent = [event(type=name, quantity=quantity, time=ended(2).start_time + HOUR) for name in ("billed.pages", "billed.candidate")]
        await outcomes(mesh, each, *sent, event(type="billed.candidate", quantity=5, time=ended(2).start_time))
        if each is tenant:
            await reverse(mesh, each, sent[1])
    invoice = await close(mesh, tenant, ended(2))
    assert [line[:3] for line in lines_of(invoice)] == [("documents", 0, 1_000), ("documents", 1, 200), ("candidates", 0, 1)]
    found = {}
    for line in invoice.content.lines:
        request = pb.ListInvoiceLineEntriesRequest(invoice_id=invoice.invoice_id, line_number=line.line_number)
        found[line.name] = (await ask(mesh, tenant, "ListInvoiceLineEntries", request)).entries
    assert {name: sorted(entry.quantity for entry in entries) for name, entries in found.items()} == {
        "documents": [1_200],
        "candidates": [-1, 1, 1],
    }
    rows = await mesh.admin.fetch("SELECT event_id FROM metering.events WHERE tenant_id = $1", tenant.id)
    entries = [entry for entries in found.values() for entry in entries]
    assert {entry.usage_id for entry in entries} == {str(row["event_id"]) for row in rows}
    assert {entry.source for entry in entries} == {pb.USAGE_SOURCE_EVENT}
    async with mesh.app.database.transaction(TenantId(tenant.id)) as connection:
        # Asked for the other by name, within this tenant's walls.
        assert await connection.fetchval("SELECT count(*) FROM metering.billable_usage WHERE tenant_id = $1", other.id) == 0


async def test_the_job_begins_with_the_first_event(mesh: Mesh) -> None:
    """A tenant that has nothing but events is billed from the period of the earliest of them."""
    tenant = await provisioned(mesh, "starter")
    for time in (ended(1).start_time, ended(2).end_time - timedelta(microseconds=1), datetime.now(UTC)):
        await outcomes(mesh, tenant, event(type="billed.pages", time=time))
    await job(mesh).round()
    assert await closed_starts(mesh, tenant) == [ended(2).start_time, ended(1).start_time]
    assert await recomputed(mesh, tenant) == []


async def test_an_event_of_long_ago_begins_no_billing(mesh: Mesh) -> None:
    """A mistyped year is late usage of its month, and no month of fees is closed for it."""
    tenant = await provisioned(mesh, "starter")
    await outcomes(mesh, tenant, event(type="billed.pages", time=datetime(1970, 1, 1, tzinfo=UTC)))
    await job(mesh).round()
    assert await closed_starts(mesh, tenant) == []
    await outcomes(mesh, tenant, event(type="billed.pages", time=ended(2).end_time - timedelta(microseconds=1)))
    await job(mesh).round()
    assert await closed_starts(mesh, tenant) == [ended(2).start_time, ended(1).start_time]
    assert await recomputed(mesh, tenant) == []


async def old_rows(mesh: Mesh, tenant: Tenant, rows: list[tuple[str, int, datetime, datetime]]) -> None:
    """Puts events there as they would have been recorded long ago: type, quantity, time of use, time of record."""
    async with mesh.admin.acquire() as connection, connection.transaction():
        await connection.execute("SET LOCAL ROLE metering_owner")
        for month in sorted({record_time.date().replace(day=1) for *_, record_time in rows}):
            await connection.execute("SELECT metering.make_event_month($1)", month)
    await mesh.admin.executemany(
        "INSERT INTO metering.events (tenant_id, event_id, product, source, id, event_type, quantity, occurred_at, record_time, user_name, "
        "feature) VALUES ($1, uuidv7(), $2, 's', 'i', $3, $4, $5, $6, '', '')",
        [(tenant.id, PRODUCT, *row) for row in rows],
    )


async def test_sums_and_late_days_find_events_however_far_from_their_use_they_were_recorded(mesh: Mesh) -> None:
    """Around every bound, a day before the use to months after it, also where a clock ran wrong: exactly what the times say."""
    chance, tenant = random.Random(7), mesh.new_tenant()
    start, end = datetime(2024, 2, 1, tzinfo=UTC), datetime(2024, 3, 1, tzinfo=UTC)
    tick, day = timedelta(microseconds=1), timedelta(days=1)
    lags = [lag + nudge for lag in (-2 * day, -day, 0 * day, day, 40 * day) for nudge in (-tick, 0 * tick, tick)]
    uses = [start - tick, start, start + 9 * day, end - tick, end]
    rows = [("billed.pages", chance.randint(1, 99), use, use + lag) for use in uses for lag in lags]
    await old_rows(mesh, tenant, rows)
    moments = [start - day, start + 9 * day, end, end + day, end + day + 2 * tick, end + 40 * day, end + 50 * day]
    async with PostgresClosings(mesh.app.jobs).reading(TenantId(tenant.id)) as reader:
        for moment in moments:
            found = await reader._connection.fetch(
                "SELECT quantity FROM metering.usage_sums($1, $2, $3, $4, $5)", tenant.id, [start], [end], moment, ["documents"]
            )
            expected = sum(quantity for _, quantity, use, record in rows if start <= use < end and record < moment)
            assert sum(row["quantity"] for row in found) == expected
            for until in (moment + day, end + 45 * day) if moment >= end else ():
                days = await reader.late_days(end, moment, until)
                late = [use for _, _, use, record in rows if use < end and moment <= record < until]
                assert days == sorted({use.replace(hour=0, minute=0, second=0, microsecond=0) for use in late})
        first = await reader._connection.fetchval("SELECT metering.first_event_time($1)", tenant.id)
    assert first == start - tick


async def test_a_period_is_read_in_its_own_months_by_index(mesh: Mesh) -> None:
    """Nothing is scanned; of other months no row is fetched but those of the period's use, however many there are."""
    tenant, start, end = mesh.new_tenant(), datetime(2023, 7, 1, tzinfo=UTC), datetime(2023, 8, 1, tzinfo=UTC)
    months = [datetime(2023, month, 3, tzinfo=UTC) for month in (5, 6, 7, 8, 9)]
    rows = [("billed.pages", 1, month + n * HOUR / 2, month + n * HOUR / 2) for month in months for n in range(1_000)]
    await old_rows(mesh, tenant, rows + [("billed.pages", 1, start + n * HOUR, end + timedelta(days=5)) for n in range(3)])
    await mesh.admin.execute("ANALYZE metering.events")
    read = "SELECT relname, seq_tup_read, idx_tup_fetch FROM pg_stat_xact_user_tables WHERE relname LIKE 'events\\_2023%'"
    async with PostgresClosings(mesh.app.jobs).reading(TenantId(tenant.id)) as reader:
        (row,) = await reader._connection.fetch(
            "SELECT quantity FROM metering.usage_sums($1, $2, $3, 'infinity', $4)", tenant.id, [start], [end], ["documents"]
        )
        assert await reader.late_days(end, end, None) == [start]
        found = await reader._connection.fetch(read)
        first = await reader._connection.fetchval("SELECT metering.first_event_time($1)", tenant.id)
    assert (row["quantity"], first) == (1_003, months[0])
    fetched = {item["relname"]: item["idx_tup_fetch"] for item in found if item["idx_tup_fetch"]}
    assert set(fetched) == {"events_2023_07", "events_2023_08"}
    assert (fetched["events_2023_07"] <= 1_003, fetched["events_2023_08"] <= 9) == (True, True)
    assert sum(item["seq_tup_read"] for item in found) == 0


async def test_a_month_that_an_invoice_is_still_made_of_is_held(mesh: Mesh) -> None:
    """However old it is: only the invoice that is closed a day beyond its end lets it go."""
    tenant, time = mesh.new_tenant(), datetime(2022, 1, 15, tzinfo=UTC)
    await old_rows(mesh, tenant, [("billed.seats", 5, time, time)])
    await subscribe(mesh, tenant, "by-events", time.replace(day=1))
    rows = PostgresRetention(mesh.app.jobs)

    async def held() -> list[int]:
        return [due.holding for due in await rows.due(datetime.now(UTC)) if due.month == OLD]

    assert await held() == [1]
    invoice = await close(mesh, tenant, ended(1))
    assert lines_of(invoice) == [("seats", 1, 1, 1_200_000_000)]
    assert await held() == [0]
    assert await recomputed(mesh, tenant) == []
