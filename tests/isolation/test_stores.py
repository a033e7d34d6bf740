"""The database as the second wall: whatever a service's own role asks with another tenant set, it gets no row and changes none."""

from collections.abc import AsyncIterator
from uuid import UUID

import asyncpg
import pytest

from devstack.environment import DATABASE, KEY_DATABASE, KEY_ROLE
from services.kernel import catalog
from services.metering.tenant_records import BILLING_TABLES, RERATING_TABLES
from services.tenant.change_hub import ChangeKind
from tests.isolation.fingerprint import SCHEMAS, superuser, tenant_tables
from tests.isolation.places import TRANSIENT, transient_rows
from tests.isolation.postgres_attacks import (
    DIRECTORIES,
    DIRECTORY_COLUMNS,
    REFUSED,
    SET_SESSION,
    Attacked,
    around_the_policies,
    as_role,
    attacked_rows,
    cross_tenant,
    read_directly,
    tries,
    without_tenant,
)
from tests.isolation.rounds import PLAIN, over
from tests.isolation.target import Target
from tests.support.mesh import Mesh

# The database is attacked directly, by its roles: no transport is in the way. Through PgBouncer: test_pooled_connections.
pytestmark = over(PLAIN)

APPEND_ONLY = (
    "metering.entries",
    "metering.unit_entries",
    *(f"metering.{name}" for name in (*BILLING_TABLES, *RERATING_TABLES)),
    "metering.billing_plan_versions",
    "tenant.audit",
    "tenant.audit_documents",
    "metering.prices",
    "metering.price_versions",
    "metering.event_types",
)
SHARED_TABLES = {
    "metering": (
        "prices",
        "price_versions",
        "event_types",
        "billing_plan_versions",
        "reconciliations",
        "reconciliation_lines",
        "export_sinks",
        "stripe_meters",
        "dropped_event_months",
    ),
    "tenant": (
        "plan_catalogs",
        "plans",
        "plan_versions",
        "plan_features",
        "flags",
        "flag_changes",
        "change_turn",
        *(name.partition(".")[2] for name in DIRECTORIES),
    ),
}
# What the jobs roles may do, by table and command; everything else must be refused or find nothing.
JOBS_MAY = {
    "inference.audit_outbox": {"SELECT", "DELETE"},
    "inference.audit_set_aside": {"SELECT", "INSERT"},
    "tenant.tenants": {"SELECT"},
    "tenant.sagas": {"SELECT"},
    "tenant.events": {"SELECT", "UPDATE"},
    "tenant.purges": {"SELECT"},
    "tenant.unrecorded_keys": {"SELECT"},
    "metering.tenant_epochs": {"SELECT"},
    "metering.calls": {"SELECT", "UPDATE"},
    "metering.call_leases": {"SELECT", "DELETE"},
    "metering.entries": {"SELECT", "INSERT"},
    "metering.unit_entries": {"SELECT"},
    "metering.erased_tenants": {"SELECT"},
    "metering.subscriptions": {"SELECT"},
    "metering.credits": {"SELECT"},
    "metering.credit_notes": {"SELECT"},
    "metering.invoice_closings": {"SELECT", "INSERT"},
    "metering.invoices": {"SELECT", "INSERT"},
    "metering.invoice_lines": {"SELECT", "INSERT"},
    "metering.credit_uses": {"SELECT", "INSERT"},
    "metering.events": {"SELECT"},
    "metering.usage_pending": {"SELECT", "INSERT", "DELETE"},
    "metering.usage_rollups": {"SELECT", "INSERT", "UPDATE"},
    "metering.usage_latencies": {"SELECT", "INSERT", "UPDATE"},
    "metering.budgets": {"SELECT"},
    "metering.budget_marks": {"SELECT", "INSERT", "DELETE"},
    "metering.webhook_endpoints": {"SELECT"},
    "metering.webhook_deliveries": {"SELECT", "UPDATE"},
    "metering.usage_levels": {"SELECT", "INSERT", "UPDATE"},
    "metering.refusals": {"SELECT", "INSERT", "UPDATE", "DELETE"},
    "metering.event_sums": {"SELECT", "INSERT"},
    "metering.summed_event_months": {"SELECT", "INSERT", "UPDATE"},
    "metering.reratings": {"SELECT"},
    "metering.rerating_ends": {"SELECT"},
    "metering.outbox": {"SELECT", "INSERT", "UPDATE", "DELETE"},
    "metering.export_outbox": {"SELECT", "INSERT", "UPDATE", "DELETE"},
    "metering.stripe_customers": {"SELECT"},
    "retrieval.documents": {"SELECT"},
    "retrieval.retrieval_placed_tenants": {"SELECT"},
    "retrieval.removed_documents": {"SELECT"},
}


@pytest.fixture
def victim(resident: Target) -> Target:
    """The attacked tenant: these attacks are the same wherever its content lives."""
    return resident


@pytest.fixture
async def admin(mesh: Mesh) -> AsyncIterator[asyncpg.Connection]:
    """A connection past every policy: to plant, to look and to break."""
    connection = await superuser(mesh.stack)
    yield connection
    await connection.close()


@pytest.fixture
async def attacked(admin: asyncpg.Connection, victim: Target, attacker: Target) -> AsyncIterator[list[Attacked]]:
    """Every tenant table, each with a row of the attacked tenant and one of the attacker."""
    async with transient_rows(admin, TRANSIENT, [victim.tenant_id, attacker.tenant_id]):
        yield await attacked_rows(admin, await tenant_tables(admin), victim.tenant_id)


@pytest.mark.parametrize("local", [False, True], ids=["session", "transaction"])
async def test_a_service_role_reaches_only_the_tenant_that_is_set(
    mesh: Mesh, attacked: list[Attacked], victim: Target, attacker: Target, local: bool
) -> None:
    """Reading, inserting, changing, moving and deleting another tenant's rows finds nothing or is refused, in every tenant table."""
    assert await cross_tenant(mesh.stack, attacked, victim.tenant_id, attacker.tenant_id, local=local) == []
    assert len(attacked) >= 15


async def test_without_a_tenant_there_are_errors_and_no_rows(mesh: Mesh, attacked: list[Attacked]) -> None:
    """A statement that forgot its tenant fails; it never sees an empty table, and never everybody's."""
    assert await without_tenant(mesh.stack, attacked) == []


async def test_no_role_gets_around_the_policies(mesh: Mesh, admin: asyncpg.Connection, attacker: Target) -> None:
    """No service or jobs role truncates, alters, grants, drops, becomes another role or reads another service's schema."""
    assert await around_the_policies(mesh.stack, admin, attacker.tenant_id) == []


async def test_no_partition_view_or_statistic_answers_for_its_table(
    mesh: Mesh, admin: asyncpg.Connection, attacked: list[Attacked], victim: Target, attacker: Target
) -> None:
    """Whatever has rows, read by its own name by every role with another tenant set, says nothing of the attacked tenant."""
    assert attacked
    await admin.execute("ANALYZE")
    # No id that an attacker could have written itself.
    words = [str(victim.tenant_id), victim.canary]
    assert await read_directly(mesh.stack, admin, attacker.tenant_id, words) == []


async def test_a_directory_tells_names_and_ids_alone(admin: asyncpg.Connection) -> None:
    """The tables that are read before the tenant is known hold a name or the place and kind of a change, a tenant id, and nothing else."""
    for table, told in DIRECTORY_COLUMNS.items():
        columns = await admin.fetch(
            "SELECT attname FROM pg_attribute WHERE attrelid = $1::regclass AND attnum > 0 AND NOT attisdropped", table
        )
        assert {column["attname"] for column in columns} == told, table
    assert set(await tenant_tables(admin)) >= DIRECTORIES


async def test_the_feed_of_changes_carries_no_text_of_anybodys(admin: asyncpg.Connection, victim: Target) -> None:
    """What every replica reads of a change is an id and one of the code's own words: the table takes nothing else."""
    kinds = {row["kind"] for row in await admin.fetch("SELECT DISTINCT kind FROM tenant.changes")}
    assert "KEY" in kinds
    assert kinds <= set(ChangeKind)
    with pytest.raises(asyncpg.CheckViolationError):
        await admin.execute("INSERT INTO tenant.changes (tenant_id, kind) VALUES ($1, $2)", victim.tenant_id, victim.canary)


async def test_the_feed_loses_nothing_younger_than_an_hour(mesh: Mesh, admin: asyncpg.Connection, attacker: Target) -> None:
    """The service removes what is an hour old and cannot remove what is younger, whoever asks it to; the newest row always stays."""
    async with as_role(mesh.stack, "tenant") as connection:
        await connection.fetch(SET_SESSION, str(attacker.tenant_id))
        assert await tries(connection, "DELETE FROM tenant.changes RETURNING tenant_id") == []
        await admin.execute(
            "INSERT INTO tenant.changes (tenant_id, kind, change_time) VALUES ($1, 'TRIMMED', now() - interval '61 minutes')",
            attacker.tenant_id,
        )
        await admin.execute("INSERT INTO tenant.changes (tenant_id, kind) VALUES ($1, 'KEY')", attacker.tenant_id)
        await connection.execute("SELECT tenant.trim_changes('1 second')")
    assert await admin.fetchval("SELECT count(*) FROM tenant.changes WHERE kind = 'TRIMMED'") == 0
    assert await admin.fetchval("SELECT count(*) FROM tenant.changes WHERE tenant_id = $1", attacker.tenant_id) >= 2


@pytest.mark.parametrize("table", APPEND_ONLY)
async def test_what_was_recorded_cannot_be_changed(mesh: Mesh, table: str, attacker: Target) -> None:
    """Entries, invoices, audit, prices and billing plans refuse UPDATE and DELETE to their own service, for the tenant's own rows too."""
    schema, _, name = table.partition(".")
    first = {"prices": "version", "price_versions": "version", "billing_plan_versions": "version", "event_types": "product"}
    column = first.get(name, "tenant_id")
    for role in ("service", "jobs"):
        async with as_role(mesh.stack, schema, role) as connection:
            await connection.fetch(SET_SESSION, str(attacker.tenant_id))
            for sql in (f"UPDATE {table} SET {column} = {column}", f"DELETE FROM {table}"):
                with pytest.raises(REFUSED):
                    await connection.execute(sql)


@pytest.mark.parametrize("table", ["metering.reconciliations", "metering.reconciliation_lines"])
async def test_what_is_compared_over_all_tenants_is_closed_to_the_service(mesh: Mesh, admin: asyncpg.Connection, table: str) -> None:
    """Reports hold sums of every tenant: the role that acts for one has no right to them."""
    rights = ("SELECT", "INSERT", "UPDATE", "DELETE", "TRUNCATE")
    held = [right for right in rights if await admin.fetchval("SELECT has_table_privilege('metering_service', $1, $2)", table, right)]
    assert held == []


async def test_the_jobs_role_does_its_jobs_and_nothing_else(mesh: Mesh, attacked: list[Attacked], victim: Target) -> None:
    """Across tenants a jobs role reads and changes only the tables of its sweeps, and of them only what its policies name."""
    through: list[str] = []
    for item in attacked:
        async with as_role(mesh.stack, item.schema, "jobs") as connection:
            for command, sql, arguments in _commands(item, victim.tenant_id):
                if command not in JOBS_MAY.get(item.table, set()):
                    through += await tries(connection, sql, *arguments)
    assert not through, "\n".join(through)


def _commands(item: Attacked, victim: UUID) -> list[tuple[str, str, tuple[object, ...]]]:
    table, columns = item.table, item.columns
    rows = f"SELECT {columns} FROM jsonb_populate_record(NULL::{table}, $1::text::jsonb)"
    return [
        ("SELECT", f"SELECT tenant_id FROM {table} LIMIT 1", ()),
        ("INSERT", f"INSERT INTO {table} ({columns}) {rows}", (item.row,)),
        ("UPDATE", f"UPDATE {table} SET tenant_id = tenant_id WHERE tenant_id = $1 RETURNING tenant_id", (victim,)),
        ("DELETE", f"DELETE FROM {table} WHERE tenant_id = $1 RETURNING tenant_id", (victim,)),
    ]


async def test_the_jobs_role_cannot_rewrite_the_books(mesh: Mesh, attacked: list[Attacked], victim: Target) -> None:
    """A settled call cannot be reopened, voided or moved, a settlement cannot be written, and a lease cannot be prolonged by a sweep."""
    entry = next(item for item in attacked if item.table == "metering.entries")
    attempts: list[tuple[str, tuple[object, ...]]] = [
        ("UPDATE metering.calls SET state = state WHERE tenant_id = $1 AND state = 2 RETURNING state", (victim.tenant_id,)),
        ("UPDATE metering.calls SET cost_nano_usd = 0 WHERE tenant_id = $1 AND state = 2 RETURNING state", (victim.tenant_id,)),
        ("UPDATE metering.call_leases SET lease_until = now() WHERE tenant_id = $1 RETURNING tenant_id", (victim.tenant_id,)),
        (
            f"INSERT INTO metering.entries SELECT {entry.columns} FROM jsonb_populate_record(NULL::metering.entries, $1::text::jsonb)",
            (entry.row,),
        ),
    ]
    async with as_role(mesh.stack, "metering", "jobs") as connection:
        assert [found for sql, arguments in attempts for found in await tries(connection, sql, *arguments)] == []


async def test_the_repairing_job_reads_no_contents(mesh: Mesh, attacked: list[Attacked]) -> None:
    """The job that looks over all tenants' documents may read their ids and digests, and neither text, title nor name."""
    assert any(item.table == "retrieval.documents" for item in attacked)
    async with as_role(mesh.stack, "retrieval", "jobs") as connection:
        assert await connection.fetchval("SELECT count(document_id) FROM retrieval.documents") > 0
        for column in ("content", "title", "document_key", "*"):
            assert await tries(connection, f"SELECT {column} FROM retrieval.documents LIMIT 1") == []


@pytest.mark.parametrize("schema", SCHEMAS)
async def test_every_schema_keeps_the_isolation_rules(admin: asyncpg.Connection, schema: str) -> None:
    """The catalog shows no table without forced row-level security, no foreign policy, no index without its tenant."""
    assert await catalog.violations(admin, schema, shared_tables=SHARED_TABLES.get(schema, ())) == []


async def test_the_key_store_keeps_the_isolation_rules(mesh: Mesh) -> None:
    """The database of data keys is another one than the data's, its catalog keeps the same rules, and no other role gets in."""
    assert KEY_DATABASE != DATABASE
    connection = await asyncpg.connect(mesh.stack.postgres.dsn(KEY_DATABASE))
    try:
        assert await catalog.violations(connection, KEY_ROLE, shared_tables=("tenant_directory",)) == []
        named = "SELECT attname FROM pg_attribute WHERE attrelid = 'tenant_keys.tenant_directory'::regclass AND attnum > 0"
        assert [column["attname"] for column in await connection.fetch(named)] == ["tenant_id"]
        for schema in SCHEMAS:
            await connection.execute(f"SET SESSION AUTHORIZATION {schema}_service")
            with pytest.raises(asyncpg.InsufficientPrivilegeError):
                await connection.fetch("SELECT 1 FROM tenant_keys.data_keys")
            await connection.execute("RESET SESSION AUTHORIZATION")
    finally:
        await connection.close()
