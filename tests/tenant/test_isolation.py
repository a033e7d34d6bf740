"""The database's own wall: what the service's role can and cannot do, asked in plain SQL."""

from uuid import UUID, uuid4

import asyncpg
import pytest

from mesh.tenant.v1 import secret_service_pb2
from tests.tenant.harness import Harness, call, put_flag, taken_apart, update, with_key

TENANT_TABLES = (
    "tenants",
    "users",
    "api_keys",
    "tenant_settings",
    "provisioning",
    "audit",
    "audit_documents",
    "audit_chains",
    "issuers",
    "domains",
    "configuration_changes",
    "provider_keys",
    "placements",
    "sagas",
    "saga_steps",
    "events",
    "erasure_receipts",
    "purges",
    "unrecorded_keys",
)
# What is written there stays for ever, so that nobody can deny it.
APPEND_ONLY = ("audit", "audit_documents", "audit_chains", "erasure_receipts")
# Ids and kinds of changes, read whole by every replica.
FEEDS = ("changes",)
# One row that is locked and never changed.
TURNS = ("change_turn",)
DIRECTORIES = ("api_key_directory", "slug_directory", "request_directory", "issuer_directory", "domain_directory", "move_directory")
PLAN_TABLES = ("plan_catalogs", "plans", "plan_versions", "plan_features")
FLAG_TABLES = ("flags", "flag_changes")
ENTER = "SELECT set_config('app.tenant_id', $1, true)"
READ_A_DOCUMENT = "INSERT INTO tenant.audit (tenant_id, action, subject, document_ids) VALUES ($1, 'TESTED', 'nobody', ARRAY[uuidv7()])"


async def furnished(harness: Harness) -> str:
    """A tenant that has a row in every table of the schema."""
    created = await harness.create()
    tenant_id = created.tenant.tenant_id
    await update(harness, with_key(created.api_key), ["ai.assistant_name"], ai={"assistant_name": "Bo"})
    put = secret_service_pb2.PutProviderKeyRequest(api_key="sk-ant-of-its-own")
    await call(harness.secrets.PutProviderKey, put, with_key(created.api_key))
    unique = uuid4().hex
    for sql in (
        "INSERT INTO tenant.domains (tenant_id, domain) VALUES ($1, $2)",
        "INSERT INTO tenant.domain_directory (tenant_id, domain) VALUES ($1, $2)",
        "INSERT INTO tenant.issuer_directory (tenant_id, issuer, audience) VALUES ($1, $2, 'api')",
        "INSERT INTO tenant.issuers (tenant_id, issuer, audience, jwks_uri, algorithms, scopes, clock_skew_seconds) "
        "VALUES ($1, $2, 'api', 'https://login.example/keys', '{ES256}', '{tenant:read}', 0)",
    ):
        await harness.execute(sql, UUID(tenant_id), f"{unique}.example")
    for sql in (
        "INSERT INTO tenant.placements (tenant_id, kind) VALUES ($1, 'pool')",
        "INSERT INTO tenant.move_directory VALUES ($1, now() + interval '1 day')",
        "INSERT INTO tenant.unrecorded_keys VALUES ($1, now() + interval '1 day')",
        "INSERT INTO tenant.purges (tenant_id, next_time) VALUES ($1, now() + interval '1 day') ON CONFLICT DO NOTHING",
        "INSERT INTO tenant.erasure_receipts (tenant_id, request_id, body, signature, key_id) "
        "VALUES ($1, gen_random_uuid(), '{}', decode(repeat('00', 64), 'hex'), 'none')",
    ):
        await harness.execute(sql, UUID(tenant_id))
    return tenant_id


@pytest.mark.parametrize("table", TENANT_TABLES)
async def test_the_service_role_sees_one_tenants_rows_and_without_a_tenant_none(harness: Harness, table: str) -> None:
    """A forgotten filter finds the set tenant's rows only; with no tenant set the statement fails."""
    one, other = await furnished(harness), await furnished(harness)
    async with harness.service_role() as connection:
        for tenant_id in (one, other):
            async with connection.transaction():
                await connection.execute(ENTER, tenant_id)
                await connection.execute(READ_A_DOCUMENT, UUID(tenant_id))
        async with connection.transaction():
            await connection.execute(ENTER, one)
            seen = {str(row[0]) for row in await connection.fetch(f"SELECT tenant_id FROM tenant.{table}")}
            assert seen == {one}
            foreign = UUID(other)
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
        "INSERT INTO tenant.domains (tenant_id, domain) VALUES ($1, 'stolen.example')",
        "INSERT INTO tenant.domain_directory (tenant_id, domain) VALUES ($1, 'stolen.example')",
        "INSERT INTO tenant.issuer_directory (tenant_id, issuer, audience) VALUES ($1, 'https://stolen.example', 'stolen')",
        "INSERT INTO tenant.configuration_changes (tenant_id, version, subject, reason, changed_fields, before, after) "
        "VALUES ($1, 9, 'spy', '', '{plan}', '{}', '{}')",
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


@pytest.mark.parametrize("table", [table for table in (*TENANT_TABLES, *DIRECTORIES) if table not in APPEND_ONLY])
async def test_the_service_role_cannot_remove_another_tenants_rows(harness: Harness, table: str) -> None:
    """Deleting everything removes nothing of anybody else's."""
    one, other = await furnished(harness), await furnished(harness)
    async with harness.service_role() as connection:
        transaction = connection.transaction()
        await transaction.start()
        await connection.execute(ENTER, one)
        status = await connection.execute(f"DELETE FROM tenant.{table} WHERE tenant_id = $1", UUID(other))
        await transaction.rollback()
    assert status == "DELETE 0"


@pytest.mark.parametrize(
    "sql",
    [
        "UPDATE tenant.audit SET action = 'NOTHING' WHERE tenant_id = $1",
        "DELETE FROM tenant.audit WHERE tenant_id = $1",
        "UPDATE tenant.audit_documents SET sequence = 1 WHERE tenant_id = $1",
        "DELETE FROM tenant.audit_documents WHERE tenant_id = $1",
        "UPDATE tenant.erasure_receipts SET body = '' WHERE tenant_id = $1",
        "DELETE FROM tenant.erasure_receipts WHERE tenant_id = $1",
        "UPDATE tenant.api_key_directory SET tenant_id = $1",
        "UPDATE tenant.slug_directory SET tenant_id = $1",
        "UPDATE tenant.issuer_directory SET tenant_id = $1",
        "UPDATE tenant.domain_directory SET tenant_id = $1",
        "UPDATE tenant.domains SET tenant_id = $1",
        "UPDATE tenant.plan_versions SET weight = 9 WHERE $1::uuid IS NOT NULL",
        "DELETE FROM tenant.plans WHERE $1::uuid IS NOT NULL",
        "UPDATE tenant.plan_features SET usage_limit = 0 WHERE $1::uuid IS NOT NULL",
        "UPDATE tenant.configuration_changes SET subject = 'nobody' WHERE tenant_id = $1",
        "UPDATE tenant.flag_changes SET subject = 'nobody' WHERE $1::uuid IS NOT NULL",
        "DELETE FROM tenant.flag_changes WHERE $1::uuid IS NOT NULL",
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


async def test_a_tenants_own_transaction_switches_no_flag(harness: Harness) -> None:
    """Flags are written in the name of no tenant: with one set, making, changing and removing a flag finds nothing or is refused."""
    created = await harness.create()
    await put_flag(harness, "wall_of_flags")
    async with harness.service_role() as connection:
        for sql in ("UPDATE tenant.flags SET default_value = true", "DELETE FROM tenant.flags"):
            async with connection.transaction():
                await connection.execute(ENTER, created.tenant.tenant_id)
                assert (await connection.execute(sql)).endswith(" 0")
        for sql in (
            "INSERT INTO tenant.flags VALUES ('stolen_flag', '', true, '{}', '{}', '{}', '{}', 0, 1)",
            "INSERT INTO tenant.flag_changes (version, name, subject, reason) VALUES (999999999, 'stolen_flag', 'spy', '')",
        ):
            with pytest.raises(asyncpg.InsufficientPrivilegeError, match="row-level security"):
                async with connection.transaction():
                    await connection.execute(ENTER, created.tenant.tenant_id)
                    await connection.execute(sql)


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
    """What can be read without a tenant discloses no secret: the name, which an issuer shares with its audience, and the id."""
    async with harness.superuser() as connection:
        rows = await connection.fetch(
            "SELECT table_name, array_agg(column_name::text ORDER BY ordinal_position) AS columns FROM information_schema.columns "
            "WHERE table_schema = 'tenant' AND table_name LIKE '%_directory' GROUP BY table_name"
        )
    assert {row["table_name"]: row["columns"] for row in rows} == {
        "api_key_directory": ["key_id", "tenant_id"],
        "slug_directory": ["slug", "tenant_id"],
        "request_directory": ["request_id", "tenant_id"],
        "issuer_directory": ["issuer", "audience", "tenant_id"],
        "domain_directory": ["domain", "tenant_id"],
        "move_directory": ["tenant_id", "due_time"],
    }


async def test_every_table_forces_row_level_security_and_belongs_to_the_owner(harness: Harness) -> None:
    """ENABLE and FORCE on every table, owned by a role nobody logs in as, and the exact policy on all tenant data."""
    async with harness.superuser() as connection:
        tables = await connection.fetch(
            "SELECT relname, relrowsecurity, relforcerowsecurity, pg_get_userbyid(relowner) AS owner FROM pg_class "
            "WHERE relnamespace = 'tenant'::regnamespace AND relkind IN ('r', 'p') AND relname <> 'schema_migrations'"
        )
        assert {row["relname"] for row in tables} == {*TENANT_TABLES, *DIRECTORIES, *FEEDS, *TURNS, *PLAN_TABLES, *FLAG_TABLES}
        for row in tables:
            assert (row["relrowsecurity"], row["relforcerowsecurity"], row["owner"]) == (True, True, "tenant_owner"), row["relname"]
        policies = await connection.fetch(
            "SELECT tablename, roles::text[] AS roles, cmd, qual, with_check FROM pg_policies WHERE schemaname = 'tenant'"
        )
        rule = "(tenant_id = ( SELECT (current_setting('app.tenant_id'::text))::uuid AS current_setting))"
        isolated = TENANT_TABLES
        # The jobs role has policies of its own, and its sweeps read what is granted to it column by column.
        ours = [row for row in policies if row["tablename"] in isolated and row["roles"] != ["tenant_jobs"]]
        assert len(ours) == len(isolated)
        found = {row["tablename"]: (row["cmd"], row["qual"], row["with_check"]) for row in ours}
        assert found == dict.fromkeys(isolated, ("ALL", rule, rule))
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
