"""Whose turn it is to record and to announce: a row of the tenant service's own, which nobody else in the database can hold."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from uuid import UUID, uuid4

import asyncpg
import pytest

from mesh.tenant.v1 import api_key_service_pb2, audit_service_pb2
from services.kernel.ids import new_uuid7
from tests.tenant.harness import Harness, as_service, call, put_flag, taken_apart, with_key

TURNS = ("tenant.change_turn", "tenant.audit_chains")
HOLD = "SELECT pg_advisory_lock(hashtextextended($1, 0))"
ENTER = "SELECT set_config('app.tenant_id', $1, true)"
RECORD = "INSERT INTO tenant.audit (tenant_id, action, subject) VALUES ($1, 'TESTED', 'test')"
# The role of another service has no more here than this: it may connect.
MAKE_STRANGER = "CREATE ROLE {} LOGIN"


@asynccontextmanager
async def another_service(harness: Harness) -> AsyncIterator[asyncpg.Connection]:
    """A session of a role that is no role of the tenant service's."""
    name = f"stranger_{uuid4().hex[:8]}"
    async with harness.superuser() as connection:
        await connection.execute(MAKE_STRANGER.format(name))
        await connection.execute(f"SET SESSION AUTHORIZATION {name}")
        try:
            yield connection
        finally:
            await connection.execute("RESET SESSION AUTHORIZATION")
            await connection.execute(f"DROP ROLE {name}")


async def test_another_services_role_holds_up_neither_revocations_nor_records(harness: Harness) -> None:
    """Whatever advisory locks another role holds, a key is revoked and announced, and an audit record is in the log, at once."""
    created = await harness.create()
    tenant_id, key_id = created.tenant.tenant_id, taken_apart(created.api_key).key_id
    token = (await harness.authenticate(created.api_key)).context_token
    item = audit_service_pb2.AuditItem(
        tenant_id=UUID(tenant_id).bytes, audit_id=new_uuid7().bytes, context_token=token, action="CALL_ENDED", detail_json="{}"
    )
    item.occur_time.GetCurrentTime()
    async with another_service(harness) as stranger:
        for name in ("tenant.changes", f"tenant.audit:{tenant_id}", f"tenant.audit:{UUID(int=0)}"):
            await stranger.execute(HOLD, name)
        answer = await call(harness.audits.RecordAudit, audit_service_pb2.RecordAuditRequest(items=[item]), as_service("inference"), 3.0)
        assert list(answer.outcomes) == [audit_service_pb2.AUDIT_OUTCOME_RECORDED]
        revoke = api_key_service_pb2.RevokeApiKeyRequest(key_id=key_id)
        await call(harness.keys.RevokeApiKey, revoke, with_key(created.api_key), 3.0)
    assert len(await harness.audit(tenant_id, "KEY_REVOKED")) == 1


@pytest.mark.parametrize("table", TURNS)
@pytest.mark.parametrize("sql", ["SELECT FROM {} FOR KEY SHARE", "LOCK TABLE {} IN ACCESS SHARE MODE", "SELECT FROM {}"])
async def test_no_other_role_locks_a_turn(harness: Harness, table: str, sql: str) -> None:
    """Neither another service's role nor the tenant service's own jobs role can lock or read the rows that give turns."""
    async with another_service(harness) as stranger:
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            async with stranger.transaction():
                await stranger.execute(sql.format(table))
        await stranger.execute("RESET SESSION AUTHORIZATION")
        await stranger.execute("SET SESSION AUTHORIZATION tenant_jobs")
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            async with stranger.transaction():
                await stranger.execute(sql.format(table))


async def test_the_turn_of_changes_is_locked_and_never_changed(harness: Harness) -> None:
    """The service's role can neither change, remove nor double the one row."""
    async with harness.service_role() as connection:
        for sql in (
            "UPDATE tenant.change_turn SET is_the_row = true",
            "DELETE FROM tenant.change_turn",
            "INSERT INTO tenant.change_turn DEFAULT VALUES",
        ):
            with pytest.raises(asyncpg.InsufficientPrivilegeError):
                await connection.execute(sql)
    assert await harness.value("SELECT count(*) FROM tenant.change_turn") == 1


async def test_two_who_begin_a_chain_at_once_do_not_fork_it(harness: Harness) -> None:
    """A tenant's first records, written over many connections at once, follow each other."""
    for _ in range(5):
        tenant_id = uuid4()
        async with asyncio.TaskGroup() as writers:
            for _ in range(6):
                writers.create_task(_record(harness, tenant_id))
        rows = "SELECT array_agg(sequence ORDER BY sequence) FROM tenant.audit WHERE tenant_id = $1"
        assert await harness.value(rows, tenant_id) == [1, 2, 3, 4, 5, 6]


async def test_whoever_inserts_a_change_waits_for_its_turn(harness: Harness) -> None:
    """A change written past the function that announces gets its place after those under way, not before them."""
    insert = "INSERT INTO tenant.changes (tenant_id, kind) VALUES ($1, 'KEY') RETURNING change_id"
    async with harness.service_role() as first, harness.service_role() as second:
        held = first.transaction()
        await held.start()
        await first.execute(ENTER, str(one := uuid4()))
        await first.execute("SELECT FROM tenant.change_turn FOR UPDATE")

        async def overtake() -> int:
            async with second.transaction():
                await second.execute(ENTER, str(other := uuid4()))
                return int(await second.fetchval(insert, other))

        async with asyncio.TaskGroup() as group:
            late = group.create_task(overtake())
            waiting = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
            async with asyncio.timeout(10.0):
                while not await harness.value(waiting):  # noqa: ASYNC110 - no event tells that a session waits
                    await asyncio.sleep(0.01)
            earlier = int(await first.fetchval(insert, one))
            await held.commit()
        assert earlier < late.result()


async def test_records_come_before_announcements(harness: Harness) -> None:
    """A transaction that announces has written its records: the two turns are taken in one order, which every test here is watched for."""
    with pytest.raises(asyncpg.AssertError, match="after an announcement"):
        async with harness.service_role() as connection, connection.transaction():
            await connection.execute(ENTER, str(tenant_id := uuid4()))
            await connection.execute("SELECT tenant.announce($1, 'KEY')", tenant_id)
            await connection.execute(RECORD, tenant_id)
    await put_flag(harness, "in_one_order")
    await put_flag(harness, "in_one_order", description="changed")
    assert len(await harness.audit(str(UUID(int=0)), "FLAG_CHANGED")) >= 2


async def _record(harness: Harness, tenant_id: UUID) -> None:
    async with harness.service_role() as connection, connection.transaction():
        await connection.execute(ENTER, str(tenant_id))
        await connection.execute(RECORD, tenant_id)
