"""A connection sees one tenant inside its transaction and none outside, and a store that is away is said to be away."""

import asyncio
import gc
import os
import signal
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import asyncpg
import pytest

from services.kernel.errors import Unavailable
from services.kernel.ids import TenantId, new_uuid7
from services.kernel.migrate import migrate
from services.kernel.placement import HOME
from services.kernel.tenant_database import Connection, JobsDatabase, TenantDatabase
from tests.support.stores import PostgresStore, running_postgres

SCHEMA_SQL = """
CREATE TABLE notes (
    tenant_id uuid NOT NULL,
    note_id integer NOT NULL,
    text text NOT NULL,
    PRIMARY KEY (tenant_id, note_id)
);
ALTER TABLE notes ENABLE ROW LEVEL SECURITY;
ALTER TABLE notes FORCE ROW LEVEL SECURITY;
CREATE POLICY own ON notes TO :service
    USING (tenant_id = (SELECT current_setting('app.tenant_id')::uuid))
    WITH CHECK (tenant_id = (SELECT current_setting('app.tenant_id')::uuid));
CREATE POLICY jobs ON notes TO :jobs USING (true);
GRANT SELECT, INSERT, UPDATE, DELETE ON notes TO :service;
GRANT SELECT ON notes TO :jobs;
CREATE FUNCTION add_note(p_tenant uuid, p_id integer, p_text text) RETURNS integer LANGUAGE plpgsql AS $$
BEGIN
    PERFORM set_config('app.tenant_id', p_tenant::text, true);
    INSERT INTO sample.notes (tenant_id, note_id, text) VALUES (p_tenant, p_id, p_text);
    RETURN p_id;
END $$;
"""
INSERT_NOTE = "INSERT INTO sample.notes (tenant_id, note_id, text) VALUES ($1, $2, $3)"
SELECT_ALL = "SELECT tenant_id, text FROM sample.notes"


@dataclass
class Databases:
    """The service's pool of one connection, and the jobs' pool."""

    service: TenantDatabase
    jobs: JobsDatabase


def dsn_for(admin_dsn: str, role: str) -> str:
    """The same database for another role."""
    parts = urlsplit(admin_dsn)
    return f"postgresql://{role}:secret@{parts.hostname}:{parts.port}{parts.path}"


@pytest.fixture
async def databases(postgres: PostgresStore, tmp_path: Path) -> AsyncIterator[Databases]:
    """A migrated database; one connection, so that every call meets what the one before left behind."""
    (tmp_path / "0001_notes.sql").write_text(SCHEMA_SQL)
    admin = await postgres.fresh_database()
    service, jobs = dsn_for(admin, "sample_service"), dsn_for(admin, "sample_jobs")
    await migrate(admin, "sample", tmp_path, {"service": service, "jobs": jobs})
    opened = Databases(
        await TenantDatabase.open(service, min_size=1, max_size=1, statement_timeout_seconds=2.0, application_name="test"),
        await JobsDatabase.open(jobs, min_size=0, max_size=1),
    )
    yield opened
    await opened.service.close()
    await opened.jobs.close()


def tenant() -> TenantId:
    """A new tenant."""
    return TenantId(new_uuid7())


async def test_a_transaction_sees_one_tenant(databases: Databases) -> None:
    """Rows of another tenant are neither seen nor written, with no WHERE at all."""
    mine, theirs = tenant(), tenant()
    async with databases.service.transaction(mine) as connection:
        await connection.execute(INSERT_NOTE, mine, 1, "mine")
    async with databases.service.transaction(theirs) as connection:
        assert await connection.fetch(SELECT_ALL) == []
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await connection.execute(INSERT_NOTE, mine, 2, "forged")
    async with databases.service.transaction(mine) as connection:
        assert [row["text"] for row in await connection.fetch(SELECT_ALL)] == ["mine"]


async def test_the_tenant_does_not_outlive_its_transaction(databases: Databases) -> None:
    """The next user of the pooled connection has no tenant, though the session is never reset."""
    mine = tenant()
    async with databases.service.transaction(mine) as connection:
        await connection.execute(INSERT_NOTE, mine, 1, "mine")
    with pytest.raises((asyncpg.UndefinedObjectError, asyncpg.InvalidTextRepresentationError)):
        await databases.service.call(None, SELECT_ALL)
    assert await databases.service.fetch_value(mine, "SELECT sample.add_note($1, $2, $3)", mine, 2, "by function") == 2
    with pytest.raises((asyncpg.UndefinedObjectError, asyncpg.InvalidTextRepresentationError)):
        await databases.service.call(None, SELECT_ALL)


async def test_a_failed_transaction_leaves_nothing(databases: Databases) -> None:
    """An exception or a cancellation inside rolls back at once, and the connection serves the next tenant."""
    mine = tenant()
    reported: list[object] = []
    # The driver reports a connection that comes back with an open transaction: the pool is the second wall, not the first.
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: reported.append(context["message"]))
    with pytest.raises(RuntimeError, match="stop"):
        async with databases.service.transaction(mine) as connection:
            await connection.execute(INSERT_NOTE, mine, 1, "lost")
            raise RuntimeError("stop")
    inserted = asyncio.Event()

    async def cancelled_work() -> None:
        async with databases.service.transaction(mine) as connection:
            await connection.execute(INSERT_NOTE, mine, 2, "lost")
            inserted.set()
            await connection.execute("SELECT pg_sleep(30)")

    async with asyncio.TaskGroup() as group:
        task = group.create_task(cancelled_work())
        await inserted.wait()
        task.cancel()
    async with databases.service.transaction(mine) as connection:
        assert await connection.fetch(SELECT_ALL) == []
    asyncio.get_running_loop().set_exception_handler(None)
    assert reported == []


async def test_a_statement_that_does_not_name_its_tenant_is_refused(databases: Databases) -> None:
    """One-statement calls for a tenant carry it among their arguments; a transaction needs a real UUID."""
    for sql in ("SELECT 1", SELECT_ALL):
        with pytest.raises(ValueError, match="name its tenant"):
            await databases.service.call(tenant(), sql)
    with pytest.raises(TypeError):
        async with databases.service.transaction("'; DROP TABLE sample.notes; --"):  # type: ignore[arg-type]
            pass


async def test_beginning_and_naming_the_tenant_is_one_round_trip(databases: Databases) -> None:
    """BEGIN and set_config go out together: one statement line in the session's own log of queries."""
    queries: list[str] = []
    async with databases.service._acquire() as connection:
        connection.add_query_logger(lambda record: queries.append(record.query))
    async with databases.service.transaction(tenant()):
        pass
    begun = [query for query in queries if "app.tenant_id" in query]
    assert len(begun) == 1
    assert begun[0].startswith("BEGIN; SELECT set_config")
    assert queries[-1] == "COMMIT"


async def test_jobs_see_every_tenant_and_write_none(databases: Databases) -> None:
    """The jobs role reads across tenants by a policy of its own and has only the grants it was given."""
    for number in range(2):
        owner = tenant()
        await databases.service.fetch_row(owner, "SELECT sample.add_note($1, $2, $3)", owner, number, "x")
    assert await databases.jobs.fetch_value("SELECT count(*) FROM sample.notes") == 2
    async with databases.jobs.transaction() as connection:
        assert len(await connection.fetch(SELECT_ALL)) == 2
    with pytest.raises(asyncpg.InsufficientPrivilegeError):
        await databases.jobs.fetch_row(INSERT_NOTE, tenant(), 1, "x")
    assert len(await databases.jobs.call(SELECT_ALL)) == 2


async def test_a_slow_statement_is_cut_and_said_to_be_unavailable(databases: Databases) -> None:
    """The statement timeout bounds every wait on the store."""
    with pytest.raises(Unavailable) as refused:
        await databases.service.call(None, "SELECT pg_sleep(30)")
    assert refused.value.metadata == {"dependency": "postgres"}


async def test_a_service_starts_without_postgres_and_recovers_with_it() -> None:
    """The pool opens while the server is away, calls answer UNAVAILABLE, and work once it is there, gone and back."""
    async with running_postgres() as store:
        dsn = store.server.dsn()
        await store.server.stop()
        database = await TenantDatabase.open(dsn, min_size=1, max_size=2)
        with pytest.raises(Unavailable):
            await database.call(None, "SELECT 1")
        with pytest.raises(Unavailable):
            async with database.transaction(tenant()):
                pass
        await store.server.start()
        assert await database.fetch_value(None, "SELECT 1") == 1
        await store.server.stop()
        with pytest.raises(Unavailable):
            await database.call(None, "SELECT 1")
        await store.server.start()
        assert await database.fetch_value(None, "SELECT 2") == 2
        await database.close()


async def test_an_exhausted_pool_answers_within_its_limit(databases: Databases, monkeypatch: pytest.MonkeyPatch) -> None:
    """Waiting for a connection is bounded like any other wait."""
    monkeypatch.setattr("services.kernel.tenant_database._ACQUIRE_SECONDS", 0.05)
    async with databases.service.transaction(tenant()):
        with pytest.raises(Unavailable):
            await databases.service.call(None, "SELECT 1")


@pytest.mark.parametrize("again", ["SELECT 1", ""], ids=("and is used", "and is only left"))
async def test_a_connection_that_the_pool_took_back_is_said_to_be_unavailable(databases: Databases, again: str) -> None:
    """The driver's pool takes a connection back at the moment it is cut; whoever still has it hears UNAVAILABLE, and the next one works."""
    with pytest.raises(Unavailable):
        async with databases.service.transaction(tenant()) as connection:
            os.kill(await connection.fetchval("SELECT pg_backend_pid()"), signal.SIGTERM)
            await _taken_back(connection)
            if again:
                await connection.fetchval(again)
    assert await databases.service.fetch_value(None, "SELECT 2") == 2


async def _taken_back(connection: Connection) -> None:
    async with asyncio.timeout(10):
        with pytest.raises(asyncpg.InterfaceError, match="released back to the pool"):
            while connection.is_closed() is not None:  # noqa: ASYNC110 - the pool has no event for it
                await asyncio.sleep(0.01)


async def test_nobody_hears_of_a_connection_that_cannot_be_put_right(databases: Databases) -> None:
    """A caller that will not wait leaves a statement under way at a server that hangs: the pool cuts it, and the next one works."""
    loop, told = asyncio.get_running_loop(), list[dict[str, Any]]()
    backend: asyncio.Future[int] = loop.create_future()

    async def ask() -> None:
        async with databases.service.transaction(tenant()) as connection:
            backend.set_result(await connection.fetchval("SELECT pg_backend_pid()"))
            await connection.execute("SELECT pg_sleep(60)")

    before, asking = asyncio.all_tasks(), asyncio.create_task(ask())
    os.kill(await backend, signal.SIGSTOP)
    loop.set_exception_handler(lambda _, context: told.append(context))
    try:
        # Of the statement, of its rollback, of the way back to the pool.
        for _ in range(3):
            asking.cancel()
            await asyncio.sleep(0.05)
        with pytest.raises(asyncio.CancelledError):
            await asking
        while left := asyncio.all_tasks() - before:
            _, slow = await asyncio.wait(left, timeout=30)
            assert not slow
        gc.collect()
    finally:
        loop.set_exception_handler(None)
        os.kill(backend.result(), signal.SIGCONT)
    assert told == []
    assert await databases.service.fetch_value(None, "SELECT 2") == 2


@pytest.mark.parametrize("pooling", [False, True])
async def test_a_snapshot_is_one_moment_and_writes_nothing(postgres: PostgresStore, tmp_path: Path, pooling: bool) -> None:
    """What is committed while it lasts is not in it, and a statement that writes is refused; behind a pooler, too."""
    (tmp_path / "0001_notes.sql").write_text(SCHEMA_SQL)
    admin, one = await postgres.fresh_database(), tenant()
    service = dsn_for(admin, "sample_service")
    await migrate(admin, "sample", tmp_path, {"service": service})
    database = await TenantDatabase.open(service, max_size=2, transaction_pooling=pooling)
    try:
        async with database.transaction_at(HOME, one, snapshot=True) as reading:
            assert await reading.fetch(SELECT_ALL) == []
            async with database.transaction(one) as writing:
                await writing.execute(INSERT_NOTE, one, 1, "later")
            assert await reading.fetch(SELECT_ALL) == []
            with pytest.raises(asyncpg.ReadOnlySQLTransactionError):
                await reading.execute(INSERT_NOTE, one, 2, "here")
            await reading.execute("ROLLBACK; BEGIN")
    finally:
        await database.close()
