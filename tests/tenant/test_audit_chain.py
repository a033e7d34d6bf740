"""The chain: nobody changes a record, nobody forks it, and whoever gets past every wall is found out."""

import asyncio
import shutil
from datetime import UTC, datetime
from pathlib import Path
from uuid import UUID, uuid4

import asyncpg
import pytest

from mesh.tenant.v1 import audit_service_pb2 as messages
from services.kernel.ids import TenantId, new_uuid7
from services.kernel.migrate import migrate
from services.kernel.tenant_database import TenantDatabase
from services.tenant.adapters.postgres_audit import PostgresAuditLog
from services.tenant.app import MIGRATIONS
from services.tenant.audit_chain import Link, follow
from tests.support.stores import PostgresStore
from tests.tenant.harness import Harness, as_service, call, with_key

CHANGES = ("UPDATE tenant.audit SET subject = 'nobody'", "DELETE FROM tenant.audit", "TRUNCATE tenant.audit")
TRIGGERS = ("audit_is_chained", "audit_documents_are_found", "audit_is_append_only", "records_come_first")
OLD_INSERT = "INSERT INTO tenant.audit (tenant_id, action, subject) VALUES ($1, $2, $3)"
INSERT = "INSERT INTO tenant.audit (tenant_id, action, subject) VALUES ($1, $2, 'test')"


async def verdict(harness: Harness, api_key: str, earlier: messages.AuditHead | None = None) -> messages.VerifyAuditChainResponse:
    """Asks the service to prove the chain of the key's tenant."""
    return await call(harness.audits.VerifyAuditChain, messages.VerifyAuditChainRequest(earlier_head=earlier), with_key(api_key))


async def head(harness: Harness, api_key: str) -> messages.AuditHead:
    """The signed head of the key's tenant."""
    return (await call(harness.audits.GetAuditHead, messages.GetAuditHeadRequest(), with_key(api_key))).head


async def past_every_wall(harness: Harness, sql: str, *args: object) -> None:
    """Changes records as only a superuser can, with the triggers switched off."""
    async with harness.superuser() as connection, connection.transaction():
        await connection.execute("ALTER TABLE tenant.audit DISABLE TRIGGER ALL")
        await connection.execute(sql, *args)
        for trigger in TRIGGERS:
            await connection.execute(f"ALTER TABLE tenant.audit ENABLE ALWAYS TRIGGER {trigger}")


async def append(harness: Harness, tenant_id: str, count: int) -> None:
    """Appends records as the service's own role does."""
    async with harness.service_role() as connection:
        for number in range(count):
            async with connection.transaction():
                await connection.fetch("SELECT set_config('app.tenant_id', $1, true)", tenant_id)
                await connection.execute(INSERT, UUID(tenant_id), f"TESTED_{'A' * (number + 1)}")


@pytest.mark.parametrize("sql", CHANGES)
async def test_the_service_may_not_change_records(harness: Harness, sql: str) -> None:
    """Update, delete and truncate are not granted to the service's role."""
    created = await harness.create()
    async with harness.service_role() as connection:
        await connection.fetch("SELECT set_config('app.tenant_id', $1, false)", created.tenant.tenant_id)
        with pytest.raises((asyncpg.InsufficientPrivilegeError, asyncpg.RestrictViolationError)):
            await connection.execute(sql)


@pytest.mark.parametrize("table", ["tenant.audit", "tenant.audit_documents"])
@pytest.mark.parametrize("verb", ["UPDATE {} SET tenant_id = tenant_id", "DELETE FROM {}", "TRUNCATE {}"])
async def test_the_owner_may_not_change_records(harness: Harness, table: str, verb: str) -> None:
    """A trigger refuses update, delete and truncate to the owner of the table too, and to a session that calls itself a replica."""
    created = await harness.create()
    async with harness.superuser() as connection:
        await connection.execute("SET session_replication_role = replica")
        for role in ("tenant_owner", None):
            if role is not None:
                await connection.execute(f"SET ROLE {role}")
            await connection.fetch("SELECT set_config('app.tenant_id', $1, false)", created.tenant.tenant_id)
            with pytest.raises(asyncpg.RestrictViolationError):
                await connection.execute(verb.format(table))
            await connection.execute("RESET ROLE")


async def test_place_and_hashes_are_the_databases_to_choose(harness: Harness) -> None:
    """Whatever a writer says about sequence, hashes and time of recording is written over."""
    created = await harness.create()
    tenant_id = created.tenant.tenant_id
    async with harness.service_role() as connection, connection.transaction():
        await connection.fetch("SELECT set_config('app.tenant_id', $1, true)", tenant_id)
        row = await connection.fetchrow(
            "INSERT INTO tenant.audit (tenant_id, action, subject, sequence, record_time, previous_hash, record_hash) "
            "VALUES ($1, 'FORGED', 'x', 999, '2001-01-01', $2, $2) RETURNING sequence, record_time, previous_hash",
            UUID(tenant_id),
            bytes(32),
        )
    assert row is not None
    assert row["sequence"] < 999
    assert row["record_time"] > datetime(2020, 1, 1, tzinfo=UTC)
    assert row["previous_hash"] != bytes(32)
    assert (await verdict(harness, created.api_key)).first_broken_sequence == 0


async def test_a_whole_chain_holds_and_its_head_is_signed(harness: Harness) -> None:
    """Every record from 1 on is counted, and the head is the newest one's."""
    created = await harness.create()
    await append(harness, created.tenant.tenant_id, 5)
    found = await verdict(harness, created.api_key, await head(harness, created.api_key))
    rows = await harness.value("SELECT count(*) FROM tenant.audit WHERE tenant_id = $1", UUID(created.tenant.tenant_id))
    assert (found.record_count, found.first_broken_sequence, found.head.sequence) == (rows, 0, rows)
    assert found.earlier_head == messages.EARLIER_HEAD_IN_CHAIN


@pytest.mark.parametrize(
    "column",
    ["action", "subject", "target", "reason", "peer_address", "source", "user_name"],
)
async def test_an_altered_text_is_found_where_it_stands(harness: Harness, column: str) -> None:
    """Each text of a record is covered by its hash."""
    created = await harness.create()
    await append(harness, created.tenant.tenant_id, 4)
    sql = f"UPDATE tenant.audit SET {column} = {column} || 'x' WHERE tenant_id = $1 AND sequence = 3"
    await past_every_wall(harness, sql, UUID(created.tenant.tenant_id))
    assert (await verdict(harness, created.api_key)).first_broken_sequence == 3


@pytest.mark.parametrize(
    "change",
    [
        "occur_time = occur_time - interval '1 microsecond'",
        "record_time = record_time + interval '1 microsecond'",
        "occurrence_count = occurrence_count + 1",
        "call_id = uuidv7()",
        "document_ids = ARRAY[uuidv7()]",
        """detail = '{"a": 1}'""",
        "audit_id = uuidv7()",
        "previous_hash = sha256('x')",
        "record_hash = sha256('x')",
        "sequence = 1000",
    ],
)
async def test_an_altered_value_is_found_where_it_stands(harness: Harness, change: str) -> None:
    """Each time, number and id of a record is covered by its hash."""
    created = await harness.create()
    await append(harness, created.tenant.tenant_id, 4)
    await past_every_wall(
        harness, f"UPDATE tenant.audit SET {change} WHERE tenant_id = $1 AND sequence = 2", UUID(created.tenant.tenant_id)
    )
    assert (await verdict(harness, created.api_key)).first_broken_sequence == 2


async def test_a_record_altered_with_its_hash_is_found_at_the_next(harness: Harness) -> None:
    """Computing a changed record's hash anew breaks the record after it."""
    created = await harness.create()
    await append(harness, created.tenant.tenant_id, 4)
    tenant_id = UUID(created.tenant.tenant_id)
    await past_every_wall(harness, "UPDATE tenant.audit SET subject = 'nobody' WHERE tenant_id = $1 AND sequence = 3", tenant_id)
    await past_every_wall(
        harness, "UPDATE tenant.audit a SET record_hash = tenant.audit_hash(a) WHERE tenant_id = $1 AND sequence = 3", tenant_id
    )
    assert (await verdict(harness, created.api_key)).first_broken_sequence == 4


async def test_a_record_taken_out_of_the_middle_is_found(harness: Harness) -> None:
    """The place of a record that is gone is the first that does not hold."""
    created = await harness.create()
    await append(harness, created.tenant.tenant_id, 4)
    await past_every_wall(harness, "DELETE FROM tenant.audit WHERE tenant_id = $1 AND sequence = 3", UUID(created.tenant.tenant_id))
    assert (await verdict(harness, created.api_key)).first_broken_sequence == 3


async def test_a_removed_tail_is_found_against_an_earlier_head(harness: Harness) -> None:
    """What is left of a chain without its end holds in itself; the head kept before proves that something is missing."""
    created = await harness.create()
    await append(harness, created.tenant.tenant_id, 4)
    kept = await head(harness, created.api_key)
    sql = "DELETE FROM tenant.audit WHERE tenant_id = $1 AND sequence > $2"
    await past_every_wall(harness, sql, UUID(created.tenant.tenant_id), kept.sequence - 2)
    assert (await verdict(harness, created.api_key)).first_broken_sequence == 0
    assert (await verdict(harness, created.api_key, kept)).earlier_head == messages.EARLIER_HEAD_MISSING
    await append(harness, created.tenant.tenant_id, 4)
    assert (await verdict(harness, created.api_key, kept)).earlier_head == messages.EARLIER_HEAD_MISSING


async def test_a_head_that_was_not_signed_here_proves_nothing(harness: Harness) -> None:
    """An altered head, one of another tenant and one of an unknown key are told apart from one that was signed."""
    created, other = await harness.create(), await harness.create()
    kept = await head(harness, created.api_key)
    altered, unknown = messages.AuditHead(), messages.AuditHead()
    altered.CopyFrom(kept)
    altered.sequence += 1
    unknown.CopyFrom(kept)
    unknown.key_id = "nobody"
    for claimed in (altered, unknown, await head(harness, other.api_key)):
        assert (await verdict(harness, created.api_key, claimed)).earlier_head == messages.EARLIER_HEAD_NOT_SIGNED_HERE


async def test_twenty_writers_at_once_do_not_fork_a_chain(harness: Harness) -> None:
    """Writers of one tenant take turns; batches over many tenants in any order do not wait for each other for ever."""
    created = [await harness.create() for _ in range(4)]
    ids = [UUID(answer.tenant.tenant_id) for answer in created]
    token = {answer.tenant.tenant_id: (await harness.authenticate(answer.api_key)).context_token for answer in created}

    async def write(turn: int) -> None:
        order = ids[turn % 4 :] + ids[: turn % 4]
        items = [
            messages.AuditItem(tenant_id=own.bytes, audit_id=new_uuid7().bytes, context_token=token[str(own)], action="CALL_ENDED")
            for own in order
        ]
        for item in items:
            item.occur_time.GetCurrentTime()
        answer = await call(harness.audits.RecordAudit, messages.RecordAuditRequest(items=items), as_service("inference"), 30.0)
        assert set(answer.outcomes) == {messages.AUDIT_OUTCOME_RECORDED}

    async with asyncio.TaskGroup() as writers:
        for turn in range(20):
            writers.create_task(write(turn))
    for answer in created:
        found = await verdict(harness, answer.api_key)
        assert found.first_broken_sequence == 0
        assert found.record_count >= 20


async def test_the_document_index_is_proven_with_the_chain(harness: Harness) -> None:
    """A record hidden from questions about its document is found, although the record itself was not touched."""
    created = await harness.create()
    document_id, tenant_id = uuid4(), UUID(created.tenant.tenant_id)
    async with harness.service_role() as connection, connection.transaction():
        await connection.fetch("SELECT set_config('app.tenant_id', $1, true)", str(tenant_id))
        await connection.execute(
            "INSERT INTO tenant.audit (tenant_id, action, subject, document_ids) VALUES ($1, 'READ', 'x', $2)", tenant_id, [document_id]
        )
    place = (await verdict(harness, created.api_key)).record_count
    async with harness.superuser() as connection, connection.transaction():
        await connection.execute("ALTER TABLE tenant.audit_documents DISABLE TRIGGER ALL")
        await connection.execute("DELETE FROM tenant.audit_documents WHERE document_id = $1", document_id)
        await connection.execute("ALTER TABLE tenant.audit_documents ENABLE ALWAYS TRIGGER audit_documents_are_append_only")
    assert (await verdict(harness, created.api_key)).first_broken_sequence == place


async def test_records_from_before_the_chain_are_chained_by_the_migration(postgres: PostgresStore, tmp_path: Path) -> None:
    """What was recorded before there was a chain is part of it afterwards, tenant by tenant, in the order it was written."""
    admin_dsn, ids = await postgres.fresh_database(), [TenantId(new_uuid7()) for _ in range(3)]
    files = sorted(MIGRATIONS.glob("*.sql"))
    for file in files:
        if file.name < "0009":
            shutil.copy(file, tmp_path / file.name)
    await migrate(admin_dsn, "tenant", tmp_path)
    connection = await asyncpg.connect(admin_dsn)
    try:
        for number in range(30):
            await connection.execute(OLD_INSERT, ids[number % 3], f"DONE_{number}", "é" * number)
        await migrate(admin_dsn, "tenant", MIGRATIONS)
        await connection.execute(OLD_INSERT, ids[0], "AFTERWARDS", "")
    finally:
        await connection.close()
    database = await TenantDatabase.open(admin_dsn, max_size=1)
    try:
        for tenant_id in ids:
            page = await PostgresAuditLog(database).chain_page(tenant_id, 0, 1_000, 1_000)
            assert [kept.record.action for kept in page][:10] == [f"DONE_{n}" for n in range(30) if ids[n % 3] == tenant_id]
            assert follow(Link(), page)[1] == 0
            assert len(page) == (11 if tenant_id == ids[0] else 10)
    finally:
        await database.close()
