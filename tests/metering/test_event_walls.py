"""What the database holds of events by itself: append-only rows; months with walls of their own, made ahead and dropped in time."""

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, date, datetime, timedelta
from uuid import UUID

import asyncpg
import pytest

from services.kernel.catalog import violations
from services.kernel.ids import TenantId
from services.kernel.tenant_database import JobsDatabase
from services.metering.adapters.postgres_event_months import PostgresEventMonths
from services.metering.event_months import EventMonths, months_from
from tests.metering import events
from tests.metering.mesh import SHARED_TABLES, Mesh, dsn_of, migrated, running_mesh
from tests.metering.peers import Peers
from tests.metering.retaining import retaining
from tests.support.stores import PostgresStore

MONTHS = (
    "SELECT c.relname FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid WHERE i.inhparent = 'metering.events'::regclass ORDER BY 1"
)
OLD = date(2024, 1, 1)
SUBSCRIBED = (
    "INSERT INTO metering.subscriptions (tenant_id, number, subscription_id, plan, effective_time, anchor_day, record_time) "
    "VALUES ($1, 1, uuidv7(), 'starter', '2024-01-01', 1, now())"
)
CLOSED = "CREATE OR REPLACE FUNCTION metering.closed_until(p_tenant uuid) RETURNS timestamptz LANGUAGE sql STABLE AS $$ SELECT {} $$"


@pytest.fixture
async def recorded(mesh: Mesh) -> UUID:
    """A tenant with an event."""
    await events.register(mesh)
    tenant = mesh.new_tenant()
    await events.record(mesh, tenant, [events.event()])
    return tenant.id


@pytest.mark.parametrize("table", ["events", "event_claims", "months"])
@pytest.mark.parametrize(
    "change",
    [
        "UPDATE metering.{} SET event_id = uuidv7()",
        "UPDATE metering.{} SET id = ''",
        "DELETE FROM metering.{}",
        "TRUNCATE metering.{}",
    ],
)
async def test_events_cannot_be_changed_even_by_an_administrator(mesh: Mesh, recorded: UUID, table: str, change: str) -> None:
    """The triggers refuse what the grants would not, by the table's name and by the name of a month."""
    name = f"events_{datetime.now(UTC):%Y_%m}" if table == "months" else table
    with pytest.raises(asyncpg.PostgresError, match="append-only"):
        await mesh.admin.execute(change.format(name))


@pytest.mark.parametrize("change", ["user_name = ''", "user_name = 'another'", "metadata = NULL", "feature = ''"])
async def test_names_are_forgotten_of_erased_tenants_alone(mesh: Mesh, recorded: UUID, change: str) -> None:
    """The service's role may blank names, which the trigger takes of an erased tenant only, and nothing but blanks."""
    with pytest.raises(asyncpg.RestrictViolationError):
        async with mesh.app.database.transaction(TenantId(recorded)) as connection:
            await connection.execute(f"UPDATE metering.events SET {change} WHERE tenant_id = $1", recorded)
    with pytest.raises(asyncpg.RestrictViolationError):
        async with mesh.app.database.transaction(TenantId(recorded)) as connection:
            await connection.execute("INSERT INTO metering.erased_tenants (tenant_id) VALUES ($1)", recorded)
            await connection.execute("UPDATE metering.events SET user_name = 'another' WHERE tenant_id = $1", recorded)


@pytest.mark.parametrize(
    "change", ["UPDATE metering.events SET quantity = 1", "DELETE FROM metering.events", "DELETE FROM metering.event_claims"]
)
@pytest.mark.parametrize("role", ["metering_service", "metering_jobs", "metering_partitions"])
async def test_no_role_has_the_right_to_rewrite_events(mesh: Mesh, ledger_dsn: str, role: str, change: str) -> None:
    """Neither the service, nor the jobs, nor who makes months as itself."""
    connection = await asyncpg.connect(dsn_of(ledger_dsn, role))
    try:
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await connection.execute(change)
    finally:
        await connection.close()


async def test_no_statement_can_record_a_shape_that_is_none(mesh: Mesh, recorded: UUID) -> None:
    """An event counts up, a reversal down, and none counts nothing."""
    copy = (
        "INSERT INTO metering.events SELECT tenant_id, uuidv7(), product, source, id, event_type, {}, occurred_at, record_time, user_name, "
        "feature, {}, metadata FROM metering.events WHERE tenant_id = $1"
    )
    for quantity, reverses in ((0, "NULL::uuid"), (-1, "NULL::uuid"), (1, "uuidv7()")):
        with pytest.raises(asyncpg.CheckViolationError):
            await mesh.admin.execute(copy.format(quantity, reverses), recorded)


def test_the_months_ahead_run_over_the_end_of_a_year() -> None:
    """The month of the day and two more."""
    assert months_from(date(2026, 11, 30)) == [date(2026, 11, 1), date(2026, 12, 1), date(2027, 1, 1)]


class Months:
    """A service on a database of its own, whose months may be made and dropped."""

    def __init__(self, mesh: Mesh, store: PostgresEventMonths) -> None:
        self.mesh = mesh
        self.store = store

    async def names(self) -> list[str]:
        """The months that are there."""
        return [row["relname"] for row in await self.mesh.admin.fetch(MONTHS)]

    async def keep(self, now: datetime, retention_days: int = 100) -> list[str]:
        """Does what is due at that time, and returns the months that are there."""
        await EventMonths(self.store, clock=lambda: now).keep()
        await retaining(self.mesh, self.store, now, retention_days).round()
        return await self.names()

    async def old_event(self) -> UUID:
        """Records an event as it would have been in an old month, and returns its tenant."""
        tenant = self.mesh.new_tenant()
        await self.mesh.admin.execute(
            "INSERT INTO metering.events (tenant_id, event_id, product, source, id, event_type, quantity, occurred_at, record_time, "
            "user_name, feature) VALUES ($1, uuidv7(), 'p', 's', 'i', 't', 1, $2, $2, '', '')",
            tenant.id,
            datetime(2024, 1, 31, 23, 59, 59, 999_999, tzinfo=UTC),
        )
        return tenant.id


@pytest.fixture
async def months(postgres: PostgresStore, peers: Peers) -> AsyncIterator[Months]:
    """As above, with a month of long ago."""
    dsn = await postgres.fresh_database()
    await migrated(dsn, peers)
    owners = await JobsDatabase.open(dsn_of(dsn, "metering_partitions"), max_size=1)
    async with asyncpg.create_pool(dsn, min_size=1, max_size=1) as admin:
        # The service's own loop lets the old month be: it would drop it while it is empty.
        mesh = await running_mesh(dsn, peers, admin, event_retention_days=10_000)
        store = PostgresEventMonths(owners)
        await store.make(OLD)
        yield Months(mesh, store)
        await mesh.close()
    await owners.close()


async def test_months_are_there_before_they_begin(months: Months) -> None:
    """After `migrate` this month and two more; at any later time again two more, each once, whoever makes them at once."""
    now = datetime.now(UTC)
    here = [f"events_{month:%Y_%m}" for month in months_from(now.date())]
    assert [name for name in await months.names() if name > "events_2024_12"] == here
    later = now + timedelta(days=70)
    async with asyncio.TaskGroup() as group:
        for _ in range(4):
            group.create_task(months.keep(later))
    assert set(await months.names()) >= {f"events_{month:%Y_%m}" for month in months_from(later.date())}
    connection = await asyncpg.connect(dsn_of_admin(months))
    try:
        assert await violations(connection, "metering", shared_tables=SHARED_TABLES) == []
    finally:
        await connection.close()


def dsn_of_admin(months: Months) -> str:
    """An administrator's DSN of the database."""
    return months.mesh.settings.postgres_admin_dsn.get_secret_value()


async def test_a_month_goes_when_it_is_old_and_closed_and_no_sooner(months: Months) -> None:
    """Not while it is younger than the retention, nor while one tenant with events in it has not closed a day beyond its end."""
    name, admin = "events_2024_01", months.mesh.admin
    for tenant in (await months.old_event(), slow := await months.old_event()):
        await admin.execute(SUBSCRIBED, tenant)
    # No invoice is closed: what is billed is never dropped.
    assert name in await months.keep(datetime(2030, 1, 1, tzinfo=UTC))
    await admin.execute(
        CLOSED.format(f"CASE WHEN p_tenant = '{slow}' THEN timestamptz '2024-02-01 23:59Z' ELSE timestamptz 'infinity' END")
    )
    assert name in await months.keep(datetime(2030, 1, 1, tzinfo=UTC))
    await admin.execute(CLOSED.format("timestamptz '2024-02-02 00:00Z'"))
    assert name in await months.keep(datetime(2024, 2, 1, tzinfo=UTC) + timedelta(days=99, hours=23))
    assert name not in await months.keep(datetime(2024, 2, 1, tzinfo=UTC) + timedelta(days=100))


async def test_an_event_of_a_dropped_month_is_still_a_duplicate(months: Months) -> None:
    """Claims outlive the rows: a repeat is no new event, and what is gone cannot be taken back, it was billed."""
    mesh, tenant, sent = months.mesh, months.mesh.new_tenant(), events.event("one")
    await events.register(mesh)
    await events.record(mesh, tenant, [sent, events.event("two")])
    await events.reverse(mesh, tenant, events.event("two"))
    await months.store.drop(datetime.now(UTC).date())
    assert await events.listed(mesh, tenant) == []
    await months.keep(datetime.now(UTC))
    assert await events.outcomes(mesh, tenant, sent, events.event("one", quantity=2)) == [events.DUPLICATE, events.CONFLICT]
    expired, before = await events.reverse(mesh, tenant, sent, events.event("two"))
    assert (expired.outcome, before.outcome) == (3, 1)
    assert await events.listed(mesh, tenant) == []


async def test_a_month_that_is_missing_refuses_and_claims_nothing(months: Months) -> None:
    """UNAVAILABLE for one and for many, and the ids are free: recorded once the month is made. What was there before is still told."""
    mesh, tenant, sent = months.mesh, months.mesh.new_tenant(), events.event("one")
    before, many = ([events.event(f"{when}-{index}") for index in range(20)] for when in ("before", "many"))
    await events.register(mesh)
    await events.record(mesh, tenant, before)
    await months.store.drop(datetime.now(UTC).date())
    for batch in ([sent], many):
        with pytest.raises(Exception, match="month of events is not made") as refused:
            await events.record(mesh, tenant, batch)
        assert refused.value.reason_name == "DEPENDENCY_UNAVAILABLE"  # type: ignore[attr-defined] # a MeshError
    assert await events.outcomes(mesh, tenant, *before) == [events.DUPLICATE] * 20
    await months.keep(datetime.now(UTC))
    assert await events.outcomes(mesh, tenant, sent, *many) == [events.RECORDED] * 21
