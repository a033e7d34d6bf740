"""The database's own walls: append-only entries, row-level security, roles, and constraints that hold without the service."""

from datetime import UTC, datetime, timedelta
from uuid import UUID

import asyncpg
import pytest

from devstack.ports import free_port
from mesh.common.v1.money_pb2 import NanoUsd
from mesh.metering.v1 import invoice_service_pb2 as invoice_pb
from mesh.metering.v1.event_service_pb2 import AGGREGATION_MAX
from services.kernel.catalog import violations
from services.kernel.ids import TenantId, new_uuid7
from tests.metering import events
from tests.metering.billing import USD, ask, close, ended, grant, subscribe
from tests.metering.budgets import new_tenant, put, receiver_at, use, wait_fired
from tests.metering.mesh import SHARED_TABLES, Mesh, Tenant, bill, dsn_of
from tests.metering.rerating import load_versions, order, rerated
from tests.metering.usage import fold

BILLING = ("subscriptions", "credits", "invoice_closings", "invoices", "invoice_lines", "credit_uses", "credit_notes")
RERATING = ("reratings", "rerating_ends")
USAGE = ("refusals", "usage_latencies", "usage_levels", "usage_pending", "usage_rollups")
EXPORTS = ("stripe_customers", "export_outbox")
BUDGETS = ("budgets", "budget_alerts", "budget_marks", "webhook_endpoints", "webhook_deliveries")
TENANT_TABLES = (
    *("calls", "call_leases", "entries", "outbox", "tenant_epochs", "unit_entries", "events", "event_claims"),
    *("event_sums", "summed_event_months"),
    *BILLING,
    *USAGE,
    *RERATING,
    *BUDGETS,
    *EXPORTS,
)
BOOKS = ("entries", "unit_entries")
PLANT_CUSTOMER = "INSERT INTO metering.stripe_customers (tenant_id, customer_id) VALUES ($1, 'cus_1')"
PLANT_EXPORT = """
INSERT INTO metering.export_outbox (tenant_id, sink, usage_id, meter, event_name, source, quantity, use_time, record_time, due_time)
VALUES ($1, 1, uuidv7(), 'documents', 'documents', 3, 1, now(), now(), now() + interval '1 day')
"""


# Of a month that is not dropped: nobody counts them.
PLANT_SUMS = (
    "INSERT INTO metering.event_sums VALUES ($1, '1990-01-01', uuidv7(), '1990-01-01', '1990-01-01', '1990-01-01', 'p', 't', NULL, '', '', "
    "1, 1)",
    "INSERT INTO metering.summed_event_months VALUES ($1, '1990-01-01', '1990-02-01', 1) ON CONFLICT DO NOTHING",
)


async def bill_whole(mesh: Mesh, tenant: Tenant) -> None:
    """Leaves a row in every billing table: a plan, a credit, a closed invoice with lines that the credit pays in part, a note."""
    await subscribe(mesh, tenant, "starter", ended(2).start_time)
    await grant(mesh, tenant, USD)
    invoice = await close(mesh, tenant, ended(2))
    request = invoice_pb.IssueCreditNoteRequest(
        credit_note_id=str(new_uuid7()), invoice_id=invoice.invoice_id, amount=NanoUsd(nano_usd=1), reason="wrong"
    )
    await ask(mesh, tenant, "IssueCreditNote", request, operator=True)


async def budgeted(mesh: Mesh) -> Tenant:
    """A tenant with a budget that fired, a receiver that is away, and what waits for it."""
    tenant = new_tenant(mesh)
    await receiver_at(mesh, tenant, f"http://127.0.0.1:{free_port()}/events")
    await put(mesh, tenant, amount=1, thresholds_percent=[100])
    await use(mesh, tenant, 1)
    await wait_fired(mesh, tenant, [100])
    return tenant


async def billed(mesh: Mesh) -> Tenant:
    """A tenant with a row in every billing table."""
    tenant = mesh.new_tenant()
    await bill_whole(mesh, tenant)
    return tenant


async def plant_exports(mesh: Mesh, tenant: Tenant) -> None:
    """Leaves a row in what is told to others, which waits until tomorrow."""
    for statement in (PLANT_CUSTOMER, PLANT_EXPORT):
        await mesh.admin.execute(statement, tenant.id)


async def plant_sums(mesh: Mesh, tenant: Tenant) -> None:
    """Leaves a sum of events, and how far they are added up."""
    for statement in PLANT_SUMS:
        await mesh.admin.execute(statement, tenant.id)


async def test_schema_keeps_every_isolation_rule(mesh: Mesh, ledger_dsn: str) -> None:
    """The catalog shows forced row-level security, one policy shape, leading tenant ids and powerless roles."""
    connection = await asyncpg.connect(ledger_dsn)
    try:
        assert await violations(connection, "metering", shared_tables=SHARED_TABLES) == []
    finally:
        await connection.close()


@pytest.mark.parametrize("table", BOOKS)
@pytest.mark.parametrize("change", ["UPDATE metering.{} SET epoch = 0", "DELETE FROM metering.{}", "TRUNCATE metering.{}"])
async def test_entries_cannot_be_changed_even_by_an_administrator(mesh: Mesh, table: str, change: str) -> None:
    """The trigger refuses what the grants would not."""
    tenant = mesh.new_tenant()
    await mesh.settle(bill((await mesh.opened(tenant)).ref))
    await mesh.record(mesh.use(tenant))
    with pytest.raises(asyncpg.PostgresError, match="append-only"):
        await mesh.admin.execute(change.format(table))


async def test_an_alert_never_changes(mesh: Mesh, ledger_dsn: str) -> None:
    """Neither role may remove one or change what it says; an administrator, who may, is stopped by the trigger."""
    tenant = await budgeted(mesh)
    changes = ("UPDATE metering.budget_alerts SET used = used + 1", "UPDATE metering.budget_alerts SET user_name = ''")
    for change in (*changes, "DELETE FROM metering.budget_alerts", "TRUNCATE metering.budget_alerts"):
        with pytest.raises(asyncpg.PostgresError, match="append-only"):
            await mesh.admin.execute(change)
    for role, may_forget in (("metering_service", True), ("metering_jobs", False)):
        connection = await asyncpg.connect(dsn_of(ledger_dsn, role))
        try:
            for change in (changes[0], "DELETE FROM metering.budget_alerts", *(() if may_forget else changes[1:])):
                with pytest.raises(asyncpg.InsufficientPrivilegeError):
                    await connection.execute(change)
        finally:
            await connection.close()
    assert await mesh.admin.fetchval("SELECT count(*) FROM metering.budget_alerts WHERE tenant_id = $1", tenant.id) == 1


@pytest.mark.parametrize("table", [*BILLING, *RERATING, "billing_plan_versions", "dropped_event_months"])
@pytest.mark.parametrize("change", ["UPDATE metering.{0} SET {1} = {1}", "DELETE FROM metering.{0}", "TRUNCATE metering.{0} CASCADE"])
async def test_what_was_billed_cannot_be_changed_by_anybody(mesh: Mesh, ledger_dsn: str, table: str, change: str) -> None:
    """Neither role has the right; an administrator, who has it, is stopped by the trigger."""
    column = {"billing_plan_versions": "plan", "dropped_event_months": "month"}.get(table, "tenant_id")
    statement = change.format(table, column)
    with pytest.raises(asyncpg.PostgresError, match="append-only"):
        await mesh.admin.execute(statement)
    for role in ("metering_service", "metering_jobs"):
        connection = await asyncpg.connect(dsn_of(ledger_dsn, role))
        try:
            with pytest.raises(asyncpg.InsufficientPrivilegeError):
                await connection.execute(statement)
        finally:
            await connection.close()


@pytest.mark.parametrize("table", ["invoice_closings", "invoices", "invoice_lines", "credit_uses"])
async def test_no_tenants_transaction_can_make_an_invoice(mesh: Mesh, table: str) -> None:
    """The service's role reads invoices and writes none, not even for the tenant at hand; credits and plans the jobs role cannot write."""
    tenant = await billed(mesh)
    with pytest.raises(asyncpg.InsufficientPrivilegeError):
        async with mesh.app.database.transaction(TenantId(tenant.id)) as connection:
            await connection.execute(f"INSERT INTO metering.{table} SELECT * FROM metering.{table} WHERE tenant_id = $1", tenant.id)
    for given in ("subscriptions", "credits", "credit_notes"):
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await mesh.app.jobs.call(f"INSERT INTO metering.{given} SELECT * FROM metering.{given} WHERE tenant_id = $1", tenant.id)


@pytest.mark.parametrize("role", ["metering_service", "metering_jobs"])
@pytest.mark.parametrize(
    "change",
    [
        "UPDATE metering.entries SET cost_nano_usd = 0",
        "UPDATE metering.unit_entries SET quantity = 1",
        *(f"DELETE FROM metering.{table}" for table in (*BOOKS, "calls")),
    ],
)
async def test_roles_have_no_right_to_rewrite_the_ledger(ledger_dsn: str, mesh: Mesh, role: str, change: str) -> None:
    """Neither role was granted update or delete of entries, or delete of calls."""
    connection = await asyncpg.connect(dsn_of(ledger_dsn, role))
    try:
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await connection.execute(change)
    finally:
        await connection.close()


@pytest.mark.parametrize("table", TENANT_TABLES)
async def test_service_role_sees_one_tenant_even_by_direct_sql(mesh: Mesh, table: str) -> None:
    """In a transaction of tenant B no row of tenant A exists, whatever the statement says."""
    one, other = await budgeted(mesh), mesh.new_tenant()
    await mesh.begin_epoch(one)
    await mesh.settle(bill((await mesh.opened(one, epoch=1)).ref))
    await mesh.opened(one, epoch=1)
    await mesh.record(mesh.use(one, epoch=1))
    await bill_whole(mesh, one)
    await load_versions(mesh)
    await rerated(mesh, one, order(end=datetime.now(UTC) - timedelta(days=1)))
    await events.register(mesh)
    await events.register(mesh, "seats.open", unit="seats", aggregation=AGGREGATION_MAX)
    await events.record(mesh, one, [events.event(), events.event(type="seats.open")])
    await mesh.refuse(mesh.refusals(one))
    await plant_exports(mesh, one)
    await plant_sums(mesh, one)
    # Folded into sums, and one more not yet.
    await fold(mesh)
    await mesh.record(mesh.use(one, epoch=1))
    # The relay may have emptied the outbox by now, the fold the log of use, and the keeper the marks.
    assert (
        table in ("outbox", "usage_pending", "budget_marks")
        or await mesh.admin.fetchval(f"SELECT count(*) FROM metering.{table} WHERE tenant_id = $1", one.id) > 0
    )
    async with mesh.app.database.transaction(TenantId(other.id)) as connection:
        assert await connection.fetchval(f"SELECT count(*) FROM metering.{table}") == 0
        assert await connection.fetchval(f"SELECT count(*) FROM metering.{table} WHERE tenant_id = $1", one.id) == 0


@pytest.mark.parametrize("table", TENANT_TABLES)
async def test_without_a_tenant_the_service_role_sees_nothing_at_all(ledger_dsn: str, mesh: Mesh, table: str) -> None:
    """A statement outside of a tenant's transaction fails instead of returning everything or nothing."""
    tenant = await budgeted(mesh)
    async with mesh.admin.acquire() as holding, holding.transaction():
        # Whoever folds or looks waits: policies are asked for rows alone, and the log of use and the marks would have none.
        await holding.execute("SELECT pg_advisory_xact_lock(7405, 0), pg_advisory_xact_lock(7405, 1)")
        await mesh.record(mesh.use(mesh.new_tenant()))
        await use(mesh, tenant, 1)
        await plant_exports(mesh, tenant)
        await plant_sums(mesh, tenant)
        while not await holding.fetch("SELECT FROM metering.outbox FOR UPDATE SKIP LOCKED"):
            # The relay was quicker.
            await mesh.record(mesh.use(mesh.new_tenant()))
        connection = await asyncpg.connect(dsn_of(ledger_dsn, "metering_service"))
        try:
            with pytest.raises(asyncpg.PostgresError):
                await connection.fetch(f"SELECT tenant_id FROM metering.{table}")
        finally:
            await connection.close()


@pytest.mark.parametrize(
    "insert",
    ["INSERT INTO metering.tenant_epochs (tenant_id, epoch) VALUES ($1, 9)", PLANT_CUSTOMER, PLANT_EXPORT],
    ids=lambda sql: sql.split()[2],
)
async def test_service_role_cannot_write_into_another_tenant(mesh: Mesh, insert: str) -> None:
    """The policy checks what is written, too."""
    one, other = mesh.new_tenant(), mesh.new_tenant()
    with pytest.raises(asyncpg.InsufficientPrivilegeError):
        async with mesh.app.database.transaction(TenantId(other.id)) as connection:
            await connection.execute(insert, one.id)


async def test_jobs_role_cannot_prolong_or_settle(mesh: Mesh) -> None:
    """The sweep's role may end calls as unresolved; it may neither keep them alive nor bill them."""
    call = await mesh.opened(mesh.new_tenant())
    tenant_id, reservation_id = UUID(bytes=call.ref.tenant_id), UUID(bytes=call.ref.reservation_id)
    with pytest.raises(asyncpg.InsufficientPrivilegeError):
        await mesh.app.jobs.call(
            "UPDATE metering.call_leases SET lease_until = now() WHERE tenant_id = $1 AND reservation_id = $2", tenant_id, reservation_id
        )
    with pytest.raises(asyncpg.InsufficientPrivilegeError):
        await mesh.app.jobs.call(
            "UPDATE metering.calls SET state = 2, settled_epoch = 0, entry_id = $3, cost_nano_usd = 0, end_time = now(), input_tokens = 0, "
            "output_tokens = 0, cache_read_tokens = 0, cache_write_5m_tokens = 0, cache_write_1h_tokens = 0 "
            "WHERE tenant_id = $1 AND reservation_id = $2",
            tenant_id,
            reservation_id,
            new_uuid7(),
        )


@pytest.mark.parametrize(
    "change",
    [
        "state = 2",
        "state = 3",
        "live = false",
        "bound_nano_usd = -1",
        "model = NULL",
        "end_time = now()",
        "cost_nano_usd = 5",
        "input_tokens = 1",
        "unresolved_time = now()",
        "attempt = 0",
    ],
)
async def test_no_statement_can_bring_an_open_call_into_an_impossible_shape(mesh: Mesh, change: str) -> None:
    """Constraints hold whatever code runs: states, ends, bills and bounds fit together in every row."""
    call = await mesh.opened(mesh.new_tenant())
    with pytest.raises(asyncpg.CheckViolationError):
        await mesh.admin.execute(
            f"UPDATE metering.calls SET {change} WHERE tenant_id = $1 AND reservation_id = $2",
            UUID(bytes=call.ref.tenant_id),
            UUID(bytes=call.ref.reservation_id),
        )


async def test_key_refuses_a_second_bill_of_one_attempt(mesh: Mesh) -> None:
    """Entry number one exists once for each attempt, whoever inserts."""
    tenant = mesh.new_tenant()
    await mesh.settle(bill((await mesh.opened(tenant)).ref))
    with pytest.raises(asyncpg.UniqueViolationError):
        async with mesh.app.database.transaction(TenantId(tenant.id)) as connection:
            await connection.execute(
                "INSERT INTO metering.entries SELECT * FROM metering.entries WHERE tenant_id = $1",
                tenant.id,
            )


@pytest.mark.parametrize("change", ["UPDATE metering.budget_alerts SET used = 1", "DELETE FROM metering.budget_alerts"])
async def test_what_fired_cannot_be_changed_by_anybody(mesh: Mesh, change: str) -> None:
    """An alert stays as it was: the service has no right to more than blanking names, and the trigger stops an administrator."""
    tenant = await budgeted(mesh)
    with pytest.raises(asyncpg.PostgresError, match="append-only"):
        await mesh.admin.execute(f"{change} WHERE tenant_id = $1", tenant.id)
    with pytest.raises(asyncpg.InsufficientPrivilegeError):
        async with mesh.app.database.transaction(TenantId(tenant.id)) as connection:
            await connection.execute(change)
