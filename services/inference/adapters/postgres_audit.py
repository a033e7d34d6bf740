"""The audit outbox in inference's own Postgres: written as each call's tenant, relayed over all tenants by the jobs role."""

from collections.abc import Sequence

import asyncpg

from services.inference.audit_relay import Delivery, Send
from services.inference.set_aside import MAX_CAUSE_LENGTH, EntryRefused, SetAside, as_json
from services.kernel.audit_client import AuditEntry
from services.kernel.ids import TenantId
from services.kernel.placement import HOME
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
SET_ASIDE = """
INSERT INTO inference.audit_set_aside (tenant_id, audit_id, cause, entry)
SELECT * FROM unnest($1::uuid[], $2::uuid[], $3::text[], $4::bytea[]) ON CONFLICT DO NOTHING
"""
# What an entry says: the same at any time. An absent function or right is not: there all entries fail alike, and wait.
_REFUSALS = (asyncpg.DataError, asyncpg.IntegrityConstraintViolationError)


class PostgresAuditOutbox:
    """The way in, on the service's own role."""

    def __init__(self, database: TenantDatabase) -> None:
        self._database = database

    async def add(self, entries: Sequence[AuditEntry]) -> None:
        """Writes entries durably; the batch names its tenants item by item. Raises: Unavailable, EntryRefused."""
        columns: tuple[list[object], ...] = (
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
        try:
            await self._database.call(None, ADD_AUDIT, *columns)
        except _REFUSALS as error:
            raise EntryRefused(_rule(error)) from None

    async def set_aside(self, item: SetAside) -> None:
        """Keeps one refused entry apart durably, as its own tenant."""
        # At home, wherever the tenant lives: as the outbox is.
        async with self._database.transaction_at(HOME, item.entry.tenant_id, walled=False) as connection:
            await connection.execute(SET_ASIDE, *_aside([item]))


class PostgresAuditRelay:
    """The way out, on the jobs role."""

    def __init__(self, database: JobsDatabase) -> None:
        self._database = database

    async def relay_due(self, most: int, send: Send) -> tuple[int, int]:
        """Sends due rows under their locks, so that no other relay sends them; then each is deleted, set aside or put off."""
        async with self._database.transaction() as connection:
            entries = [_entry(row) for row in await connection.fetch(SELECT_DUE, most)]
            if not entries:
                return 0, 0
            answers = list(zip(entries, await send(entries), strict=True))
            done = [entry for entry, answer in answers if answer is Delivery.RECORDED]
            rest = [entry for entry, answer in answers if answer is Delivery.PUT_OFF]
            refused = [answer for _, answer in answers if isinstance(answer, SetAside)]
            if refused:
                await connection.execute(SET_ASIDE, *_aside(refused))
            if gone := [*done, *(item.entry for item in refused)]:
                await connection.execute(DELETE_DONE, *_keys(gone))
            if rest:
                await connection.execute(PUT_OFF, *_keys(rest))
            return len(entries), len(gone)


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


def _aside(items: Sequence[SetAside]) -> tuple[list[object], ...]:
    causes: list[object] = [item.cause[:MAX_CAUSE_LENGTH].replace("\0", "") for item in items]
    entries: list[object] = [as_json(item.entry) for item in items]
    return *_keys([item.entry for item in items]), causes, entries


def _rule(error: Exception) -> str:
    # Postgres' own words would repeat the entry's texts: the rule's name says enough.
    named = getattr(error, "constraint_name", None) or getattr(error, "column_name", None)
    return f"{type(error).__name__}: {named}" if named else type(error).__name__


def _keys(entries: Sequence[AuditEntry]) -> tuple[list[object], list[object]]:
    return [entry.tenant_id for entry in entries], [entry.audit_id for entry in entries]
