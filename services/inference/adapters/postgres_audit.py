"""The audit outbox in inference's own Postgres: written as each call's tenant, relayed over all tenants by the jobs role."""

from collections.abc import Awaitable, Callable, Sequence

import asyncpg

from services.kernel.audit_client import AuditEntry
from services.kernel.ids import TenantId
from services.kernel.tenant_database import JobsDatabase, TenantDatabase

ADD_AUDIT = """
SELECT inference.add_audit($1::uuid[],
    $2::uuid[], $3::text[], $4::uuid[], $5::timestamptz[], $6::text[], $7::text[], $8::text[], $9::text[], $10::text[])
"""
SELECT_DUE = """
SELECT tenant_id, audit_id, action, call_id, occur_time, user_name, document_ids, detail, peer_address, context_token
FROM inference.audit_outbox WHERE tenant_id IS NOT NULL AND due_time <= clock_timestamp()
ORDER BY due_time LIMIT $1::integer FOR UPDATE SKIP LOCKED
"""
DELETE_DONE = """
DELETE FROM inference.audit_outbox o USING unnest($1::uuid[], $2::uuid[]) AS d (tenant_id, audit_id)
WHERE o.tenant_id = d.tenant_id AND o.audit_id = d.audit_id
"""
# Twice as long each time, at most an hour: what the log does not believe now it may believe when a key is published again.
PUT_OFF = """
UPDATE inference.audit_outbox o
SET send_count = o.send_count + 1,
    due_time = clock_timestamp() + least(interval '1 hour', interval '1 second' * 2 ^ least(o.send_count, 12))
FROM unnest($1::uuid[], $2::uuid[]) AS d (tenant_id, audit_id)
WHERE o.tenant_id = d.tenant_id AND o.audit_id = d.audit_id
"""


class PostgresAuditOutbox:
    """The way in, on the service's own role."""

    def __init__(self, database: TenantDatabase) -> None:
        self._database = database

    async def add(self, entries: Sequence[AuditEntry]) -> None:
        """Writes entries durably; the batch names its tenants item by item."""
        await self._database.call(
            None,
            ADD_AUDIT,
            [entry.tenant_id for entry in entries],
            [entry.audit_id for entry in entries],
            [entry.action for entry in entries],
            [entry.call_id for entry in entries],
            [entry.occur_time for entry in entries],
            [entry.user for entry in entries],
            ["{" + ",".join(map(str, entry.document_ids)) + "}" for entry in entries],
            [entry.detail for entry in entries],
            [entry.peer_address for entry in entries],
            [entry.context_token for entry in entries],
        )


class PostgresAuditRelay:
    """The way out, on the jobs role."""

    def __init__(self, database: JobsDatabase) -> None:
        self._database = database

    async def relay_due(self, most: int, send: Callable[[Sequence[AuditEntry]], Awaitable[Sequence[bool]]]) -> tuple[int, int]:
        """Sends due rows under their locks, so that no other relay sends them, deletes those done and puts off the others."""
        async with self._database.transaction() as connection:
            entries = [_entry(row) for row in await connection.fetch(SELECT_DUE, most)]
            if not entries:
                return 0, 0
            answers = await send(entries)
            done = [entry for entry, is_done in zip(entries, answers, strict=True) if is_done]
            rest = [entry for entry, is_done in zip(entries, answers, strict=True) if not is_done]
            if done:
                await connection.execute(DELETE_DONE, *_keys(done))
            if rest:
                await connection.execute(PUT_OFF, *_keys(rest))
            return len(entries), len(done)


def _entry(row: asyncpg.Record) -> AuditEntry:
    return AuditEntry(
        tenant_id=TenantId(row["tenant_id"]),
        audit_id=row["audit_id"],
        action=row["action"],
        occur_time=row["occur_time"],
        context_token=row["context_token"],
        user=row["user_name"],
        call_id=row["call_id"],
        document_ids=tuple(row["document_ids"]),
        detail=row["detail"],
        peer_address=row["peer_address"],
    )


def _keys(entries: Sequence[AuditEntry]) -> tuple[list[object], list[object]]:
    return [entry.tenant_id for entry in entries], [entry.audit_id for entry in entries]
