"""Behind a pooler in transaction mode, where a session belongs to nobody: answers, limits and tenants stay each caller's own."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import asyncpg
import pytest

from services.kernel.errors import Unavailable
from services.kernel.migrate import migrate
from services.kernel.tenant_database import TenantDatabase
from tests.kernel.test_tenant_database import INSERT_NOTE, SCHEMA_SQL, SELECT_ALL, dsn_for, tenant
from tests.support.pooler import leave_behind, require_pgbouncer, running_pgbouncer
from tests.support.stores import PostgresStore

CALLS = 2_000
CALLERS = 16


@pytest.fixture
async def pooled_dsn(postgres: PostgresStore, tmp_path: Path) -> AsyncIterator[str]:
    """A migrated database, reached by the service's role over two server connections that change hands."""
    require_pgbouncer()
    (tmp_path / "0001_notes.sql").write_text(SCHEMA_SQL)
    admin = await postgres.fresh_database()
    service = dsn_for(admin, "sample_service")
    await migrate(admin, "sample", tmp_path, {"service": service})
    async with running_pgbouncer([service]) as (through_it,):
        yield through_it


@pytest.fixture
async def database(pooled_dsn: str) -> AsyncIterator[TenantDatabase]:
    """The service's pool, told that it is behind a pooler."""
    opened = await TenantDatabase.open(
        pooled_dsn, max_size=CALLERS, statement_timeout_seconds=2.0, application_name="test", transaction_pooling=True
    )
    yield opened
    await opened.close()


async def test_every_answer_is_the_askers_own(database: TenantDatabase) -> None:
    """Sixteen callers with different statements on two server connections: nobody gets what another has parsed."""
    wrong: list[str] = []

    async def caller(number: int) -> None:
        for turn in range(CALLS // CALLERS):
            found = await database.fetch_value(None, f"SELECT $1::int + {number}", turn)
            wrong.extend([f"{number} asked {turn}: {found}"] if found != turn + number else [])

    async with asyncio.TaskGroup() as group:
        for number in range(CALLERS):
            group.create_task(caller(number))
    assert not wrong, "\n".join(wrong)


async def test_limits_are_in_force(database: TenantDatabase) -> None:
    """A pooler takes no limits when a client connects; each transaction and each single statement has them all the same."""
    for name, wanted in (("statement_timeout", "2s"), ("idle_in_transaction_session_timeout", "15s")):
        assert await database.fetch_value(None, "SELECT current_setting($1)", name) == wanted
        async with database.transaction(tenant()) as connection:
            assert await connection.fetchval("SELECT current_setting($1)", name) == wanted
    with pytest.raises(Unavailable):
        await database.call(None, "SELECT pg_sleep(4)")


async def test_what_a_faulty_client_left_behind_does_not_matter(pooled_dsn: str, database: TenantDatabase) -> None:
    """A session's limits, path, mode and tenant SET by somebody else are overruled in every transaction."""
    mine, theirs = tenant(), tenant()
    await leave_behind(
        pooled_dsn,
        {
            "app.tenant_id": str(theirs),
            "statement_timeout": "100ms",
            "search_path": "pg_temp",
            "default_transaction_read_only": "on",
            "default_transaction_isolation": "serializable",
            "row_security": "off",
        },
    )
    for number in range(4):
        async with database.transaction(mine) as connection:
            await connection.execute(INSERT_NOTE, mine, number, "mine")
            assert await connection.fetchval("SELECT current_setting('transaction_isolation')") == "read committed"
            assert await connection.fetchval("SELECT current_setting('search_path')") == "sample, pg_temp"
            await connection.execute("SELECT pg_sleep(0.2)")
            assert {row["tenant_id"] for row in await connection.fetch(SELECT_ALL)} == {mine}
        assert await database.fetch_value(mine, "SELECT sample.add_note($1, $2, 'by function')", mine, 100 + number) == 100 + number


async def test_a_statement_that_forgot_its_tenant_is_lent_nobodys(pooled_dsn: str, database: TenantDatabase) -> None:
    """With another tenant left on every session it fails, as it does on a session of its own; it never answers with that tenant's rows."""
    theirs = tenant()
    async with database.transaction(theirs) as connection:
        await connection.execute(INSERT_NOTE, theirs, 1, "theirs")
    await leave_behind(pooled_dsn, {"app.tenant_id": str(theirs)})
    for _ in range(4):
        with pytest.raises(asyncpg.InvalidTextRepresentationError):
            await database.call(None, SELECT_ALL)
    await database.close()
    careless = await asyncpg.connect(pooled_dsn, statement_cache_size=0)
    try:
        assert len(await careless.fetch(SELECT_ALL)) == 1, "the sessions were clean: the test proved nothing"
    finally:
        await careless.close()


async def test_a_caller_who_leaves_takes_nothing_along(database: TenantDatabase) -> None:
    """Cancelled at any point of a call, the next caller on the same server connections is served, and sees its own tenant alone."""
    mine = tenant()
    for number in range(100):
        task = asyncio.ensure_future(database.fetch_value(mine, "SELECT sample.add_note($1, $2, 'left')", mine, number))
        for _ in range(number % 7):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
    for _ in range(4):
        with pytest.raises(asyncpg.InvalidTextRepresentationError):
            await database.call(None, SELECT_ALL)
        async with database.transaction(tenant()) as connection:
            assert await connection.fetch(SELECT_ALL) == []
