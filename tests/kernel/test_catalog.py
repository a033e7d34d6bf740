"""The catalog check finds each way a schema can let tenants meet."""

from pathlib import Path

import asyncpg
import pytest

from services.kernel.catalog import violations
from services.kernel.migrate import migrate
from tests.kernel.test_tenant_database import SCHEMA_SQL
from tests.support.stores import PostgresStore

CONFINED = "tenant_id = (SELECT current_setting('app.tenant_id')::uuid)"
BREAKS = {
    "not enabled": "ALTER TABLE sample.notes DISABLE ROW LEVEL SECURITY",
    "not forced": "ALTER TABLE sample.notes NO FORCE ROW LEVEL SECURITY",
    "has no policy": "DROP POLICY own ON sample.notes; DROP POLICY jobs ON sample.notes",
    "qual is true": "CREATE POLICY wide ON sample.notes TO sample_service USING (true)",
    "qual is (tenant_id": "CREATE POLICY soft ON sample.notes USING (tenant_id = current_setting('app.tenant_id', true)::uuid)",
    "qual is ((tenant_id": f"CREATE POLICY either ON sample.notes USING ({CONFINED} OR note_id = 1)",
    "does not lead with tenant_id": "CREATE INDEX by_text ON sample.notes (text)",
    "set security_invoker": "CREATE VIEW sample.all_notes AS SELECT * FROM sample.notes; ALTER VIEW sample.all_notes OWNER TO sample_owner",
    "materialized view": "CREATE MATERIALIZED VIEW sample.copy AS SELECT 1 AS x; ALTER MATERIALIZED VIEW sample.copy OWNER TO sample_owner",
    "has no tenant_id": "CREATE TABLE sample.anyone (x int); ALTER TABLE sample.anyone OWNER TO sample_owner",
    "is owned by sample_service": "ALTER TABLE sample.notes OWNER TO sample_service",
    "granted to PUBLIC": "GRANT SELECT ON sample.notes TO PUBLIC",
    "SECURITY DEFINER": "ALTER FUNCTION sample.add_note SECURITY DEFINER",
    "bypasses row-level security": "ALTER ROLE sample_service BYPASSRLS",
    "can log in": "ALTER ROLE sample_owner LOGIN",
    "is a member of sample_owner": "GRANT sample_owner TO sample_service",
    "is a partition with grants": (
        "CREATE TABLE sample.parts (tenant_id uuid, PRIMARY KEY (tenant_id)) PARTITION BY HASH (tenant_id);"
        "CREATE TABLE sample.part0 PARTITION OF sample.parts FOR VALUES WITH (MODULUS 1, REMAINDER 0);"
        "GRANT SELECT ON sample.part0 TO sample_service"
    ),
}


@pytest.fixture
async def schema(postgres: PostgresStore, tmp_path: Path) -> str:
    """A schema that keeps every rule."""
    (tmp_path / "0001_notes.sql").write_text(SCHEMA_SQL)
    dsn = await postgres.fresh_database()
    await migrate(dsn, "sample", tmp_path)
    return dsn


async def test_a_schema_that_keeps_the_rules_passes(schema: str) -> None:
    """Nothing is reported, and listed exceptions are not reported either."""
    connection = await asyncpg.connect(schema)
    assert await violations(connection, "sample") == []
    await connection.execute(
        "CREATE TABLE sample.prices (model text PRIMARY KEY); ALTER TABLE sample.prices OWNER TO sample_owner;"
        "CREATE INDEX for_sweeps ON sample.notes (note_id);"
        f"CREATE POLICY narrow ON sample.notes TO sample_service USING ({CONFINED} AND note_id > 0)"
    )
    assert await violations(connection, "sample", shared_tables=["prices"], exempt_indexes=["for_sweeps"]) == []
    await connection.close()


@pytest.mark.parametrize("problem", BREAKS)
async def test_each_broken_rule_is_named(schema: str, problem: str) -> None:
    """Breaking one rule is reported as that rule."""
    connection = await asyncpg.connect(schema)
    transaction = connection.transaction()
    # Rolled back, because roles are shared by all databases of the server.
    await transaction.start()
    await connection.execute(BREAKS[problem])
    found = await violations(connection, "sample")
    await transaction.rollback()
    await connection.close()
    assert any(problem in violation.problem for violation in found), found
