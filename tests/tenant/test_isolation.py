"""The database's own wall: what the service's role can and cannot do, asked in plain SQL."""

from uuid import UUID, uuid4

import asyncpg
import pytest

from tests.tenant.harness import Harness, taken_apart

TENANT_TABLES = ("tenants", "users", "api_keys", "tenant_settings", "provisioning", "audit")
# Empty for tenants of the pool.
PLACED_TABLES = ("placements",)
# Ids and kinds of changes, read whole by every replica.
FEEDS = ("changes", "move_directory")
DIRECTORIES = ("api_key_directory", "slug_directory", "request_directory")
PLAN_TABLES = ("plan_catalogs", "plans", "plan_versions")
ENTER = "SELECT set_config('app.tenant_id', $1, true)"


@pytest.mark.parametrize("table", TENANT_TABLES)
async def test_the_service_role_sees_one_tenants_rows_and_without_a_tenant_none(harness: Harness, table: str) -> None:
    """A forgotten filter finds the set tenant's rows only; with no tenant set the statement fails."""
    one, other = await harness.create(), await harness.create()
    async with harness.service_role() as connection:
        async with connection.transaction():
            await connection.execute(ENTER, one.tenant.tenant_id)
            seen = {str(row[0]) for row in await connection.fetch(f"SELECT tenant_id FROM tenant.{table}")}
            assert seen == {one.tenant.tenant_id}
            foreign = UUID(other.tenant.tenant_id)
            assert await connection.fetchval(f"SELECT count(*) FROM tenant.{table} WHERE tenant_id = $1", foreign) == 0
        with pytest.raises(asyncpg.DataError):
            # The setting is empty once a transaction that set it is over.
            await connection.fetch(f"SELECT tenant_id FROM tenant.{table}")
    async with harness.service_role() as connection:
        with pytest.raises(asyncpg.UndefinedObjectError):
            await connection.fetch(f"SELECT tenant_id FROM tenant.{table}")


@pytest.mark.parametrize(
    "sql",
    [
        "INSERT INTO tenant.users (tenant_id, email, role) VALUES ($1, 'spy@example.com', 'OWNER')",
        "INSERT INTO tenant.audit (tenant_id, action, subject) VALUES ($1, 'FORGED', 'nobody')",
        "INSERT INTO tenant.api_key_directory (tenant_id, key_id) VALUES ($1, 'stolenstolenstol')",
        "INSERT INTO tenant.slug_directory (tenant_id, slug) VALUES ($1, 'stolen')",
    ],
)
async def test_the_service_role_cannot_write_into_another_tenant(harness: Harness, sql: str) -> None:
    """Rows for a tenant other than the set one are refused by the database, directories included."""
    one, other = await harness.create(), await harness.create()
    async with harness.service_role() as connection:
        with pytest.raises(asyncpg.InsufficientPrivilegeError, match="row-level security"):
            async with connection.transaction():
                await connection.execute(ENTER, one.tenant.tenant_id)
                await connection.execute(sql, UUID(other.tenant.tenant_id))


@pytest.mark.parametrize("table", [*TENANT_TABLES[:5], "api_key_directory", "slug_directory", "request_directory"])
async def test_the_service_role_cannot_remove_another_tenants_rows(harness: Harness, table: str) -> None:
    """Deleting everything removes nothing of anybody else's."""
    one, other = await harness.create(), await harness.create()
    async with harness.service_role() as connection:
        transaction = connection.transaction()
        await transaction.start()
        await connection.execute(ENTER, one.tenant.tenant_id)
        status = await connection.execute(f"DELETE FROM tenant.{table} WHERE tenant_id = $1", UUID(other.tenant.tenant_id))
        await transaction.rollback()
    assert status == "DELETE 0"


@pytest.mark.parametrize(
    "sql",
    [
        "UPDATE tenant.audit SET action = 'NOTHING' WHERE tenant_id = $1",
        "DELETE FROM tenant.audit WHERE tenant_id = $1",
        "UPDATE tenant.api_key_directory SET tenant_id = $1",
        "UPDATE tenant.slug_directory SET tenant_id = $1",
        "UPDATE tenant.plan_versions SET weight = 9 WHERE $1::uuid IS NOT NULL",
        "DELETE FROM tenant.plans WHERE $1::uuid IS NOT NULL",
    ],
)
async def test_audit_directories_and_plans_cannot_be_rewritten_by_the_service(harness: Harness, sql: str) -> None:
    """The audit log only grows, directory entries never change hands, plans are not the service's to change."""
    created = await harness.create()
    async with harness.service_role() as connection:
        with pytest.raises(asyncpg.InsufficientPrivilegeError, match="permission denied"):
            async with connection.transaction():
                await connection.execute(ENTER, created.tenant.tenant_id)
                await connection.execute(sql, UUID(created.tenant.tenant_id))


async def test_the_key_lookup_reads_one_key_and_enters_only_its_tenant(harness: Harness) -> None:
    """The function that crosses tenants answers the one key asked for and leaves the connection in no tenant."""
    created = await harness.create()
    key_id = taken_apart(created.api_key).key_id
    async with harness.service_role() as connection:
        rows = await connection.fetch("SELECT tenant_id FROM tenant.find_api_key($1)", key_id)
        assert [str(row["tenant_id"]) for row in rows] == [created.tenant.tenant_id]
        assert await connection.fetch("SELECT tenant_id FROM tenant.find_api_key($1)", "nosuchkeynosuchk") == []
        assert await connection.fetchval("SELECT current_setting('app.tenant_id', true)") in (None, "")


async def test_directories_hold_names_and_tenant_ids_and_nothing_else(harness: Harness) -> None:
    """What can be read without a tenant discloses no secret: two columns each, the name and the id."""
    async with harness.superuser() as connection:
        rows = await connection.fetch(
            "SELECT table_name, array_agg(column_name::text ORDER BY ordinal_position) AS columns FROM information_schema.columns "
            "WHERE table_schema = 'tenant' AND table_name LIKE '%_directory' GROUP BY table_name"
        )
    assert {row["table_name"]: row["columns"] for row in rows} == {
        "api_key_directory": ["key_id", "tenant_id"],
        "slug_directory": ["slug", "tenant_id"],
        "request_directory": ["request_id", "tenant_id"],
        "move_directory": ["tenant_id", "due_time"],
    }


async def test_every_table_forces_row_level_security_and_belongs_to_the_owner(harness: Harness) -> None:
    """ENABLE and FORCE on every table, owned by a role nobody logs in as, and the exact policy on all tenant data."""
    async with harness.superuser() as connection:
        tables = await connection.fetch(
            "SELECT relname, relrowsecurity, relforcerowsecurity, pg_get_userbyid(relowner) AS owner FROM pg_class "
            "WHERE relnamespace = 'tenant'::regnamespace AND relkind IN ('r', 'p') AND relname <> 'schema_migrations'"
        )
        assert {row["relname"] for row in tables} == {*TENANT_TABLES, *PLACED_TABLES, *DIRECTORIES, *FEEDS, *PLAN_TABLES}
        for row in tables:
            assert (row["relrowsecurity"], row["relforcerowsecurity"], row["owner"]) == (True, True, "tenant_owner"), row["relname"]
        policies = await connection.fetch("SELECT tablename, cmd, qual, with_check FROM pg_policies WHERE schemaname = 'tenant'")
        rule = "(tenant_id = ( SELECT (current_setting('app.tenant_id'::text))::uuid AS current_setting))"
        confined = (*TENANT_TABLES, *PLACED_TABLES)
        found = {row["tablename"]: (row["cmd"], row["qual"], row["with_check"]) for row in policies if row["tablename"] in confined}
        assert found == dict.fromkeys(confined, ("ALL", rule, rule))
        roles = await connection.fetch(
            "SELECT rolname, rolcanlogin, rolsuper, rolbypassrls FROM pg_roles WHERE rolname IN ('tenant_owner', 'tenant_service')"
        )
        assert {tuple(row) for row in roles} == {("tenant_owner", False, False, False), ("tenant_service", True, False, False)}


async def test_every_index_of_tenant_data_leads_with_the_tenant(harness: Harness) -> None:
    """Keys and indexes begin with tenant_id, so no plan ever walks over tenants."""
    async with harness.superuser() as connection:
        rows = await connection.fetch(
            "SELECT c.relname AS index, a.attname AS leading FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid "
            "JOIN pg_class t ON t.oid = i.indrelid JOIN pg_attribute a ON a.attrelid = t.oid AND a.attnum = i.indkey[0] "
            "WHERE t.relnamespace = 'tenant'::regnamespace AND t.relname = ANY ($1)",
            list(TENANT_TABLES),
        )
    assert len(rows) >= len(TENANT_TABLES)
    assert {row["leading"] for row in rows} == {"tenant_id"}


async def test_functions_run_with_the_callers_rights_and_are_nobody_elses(harness: Harness) -> None:
    """No function is SECURITY DEFINER, and the public may call none."""
    async with harness.superuser() as connection:
        rows = await connection.fetch(
            "SELECT proname, prosecdef, has_function_privilege('public', oid, 'EXECUTE') AS public FROM pg_proc "
            "WHERE pronamespace = 'tenant'::regnamespace"
        )
    assert rows
    assert {(row["prosecdef"], row["public"]) for row in rows} == {(False, False)}


async def test_a_made_up_tenant_sees_nothing(harness: Harness) -> None:
    """Setting a tenant that does not exist shows an empty schema."""
    await harness.create()
    async with harness.service_role() as connection, connection.transaction():
        await connection.execute(ENTER, str(uuid4()))
        for table in TENANT_TABLES:
            assert await connection.fetchval(f"SELECT count(*) FROM tenant.{table}") == 0
