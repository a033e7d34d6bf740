"""Audit records in Postgres. Whoever inserts one, the database chains it: place and hashes are never this side's to choose."""

from collections.abc import Sequence
from datetime import datetime
from uuid import UUID

import asyncpg

from services.kernel.ids import TenantId
from services.kernel.tenant_database import Connection, TenantDatabase
from services.tenant.actor import Actor
from services.tenant.audit_chain import AuditRecord, KeptRecord, Link
from services.tenant.audit_log import AuditFilter, ProvenRecord

INSERT_AUDIT = """
INSERT INTO tenant.audit (tenant_id, action, subject, target, reason, peer_address, detail, call_id, document_ids)
VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9)
"""
RECORD_AUDIT = """
SELECT tenant.record_audit($1::uuid[],
    $2::uuid[], $3::timestamptz[], $4::text[], $5::text[], $6::text[], $7::text[], $8::text[], $9::text[], $10::text[],
    $11::uuid[], $12::text[], $13::text[])
"""
SELECT_NEWEST = "SELECT sequence, record_hash FROM tenant.audit WHERE tenant_id = $1 ORDER BY sequence DESC LIMIT 1"
SELECT_HASH = "SELECT record_hash FROM tenant.audit WHERE tenant_id = $1 AND sequence = $2"
SELECT_CHAIN = """
SELECT tenant_id, sequence, audit_id, occur_time, record_time, action, subject, target, reason, peer_address, occurrence_count,
       source, user_name, call_id, document_ids, detail, previous_hash, record_hash,
       ARRAY(SELECT d.document_id FROM tenant.audit_documents d WHERE d.tenant_id = a.tenant_id AND d.sequence = a.sequence) AS found_by
FROM tenant.audit a WHERE tenant_id = $1 AND sequence > $2 AND sequence <= $3 ORDER BY sequence LIMIT $4
"""
SELECT_RECORDS = """
SELECT tenant_id, sequence, audit_id, occur_time, record_time, action, subject, target, reason, peer_address, occurrence_count,
       source, user_name, call_id, document_ids, detail, previous_hash, record_hash
FROM tenant.audit WHERE tenant_id = $1
"""
_NEWEST_FIRST = " ORDER BY occur_time DESC, sequence DESC LIMIT "
# Each is added only when it is asked for: a condition that is always there keeps the planner from the index that fits.
_CONDITIONS = {
    "start_time": "occur_time >= {}",
    "end_time": "occur_time < {}",
    "subject": "subject = {}",
    "action": "action = {}",
    "document_id": "sequence IN (SELECT d.sequence FROM tenant.audit_documents d WHERE d.tenant_id = $1 AND d.document_id = {})",
    "call_id": "call_id = {}",
    "user": "user_name <> '' AND user_name = {}",
}


async def append_audit(
    connection: Connection,
    tenant_id: TenantId,
    action: str,
    target: str,
    actor: Actor,
    *,
    detail: str = "",
    call_id: UUID | None = None,
    document_ids: Sequence[UUID] = (),
) -> None:
    """Appends one record inside the transaction of the change itself: neither is ever there without the other.

    `detail` is a JSON object of at most 4,096 bytes. Appending takes the tenant's chain until the commit: append late, announce after it.
    """
    await connection.execute(
        INSERT_AUDIT, tenant_id, action, actor.subject, target, actor.reason, actor.peer_address, detail, call_id, list(document_ids)
    )


class PostgresAuditLog:
    """The audit store on the service's own role."""

    def __init__(self, database: TenantDatabase) -> None:
        self._database = database

    async def newest(self, tenant_id: TenantId) -> Link:
        """Returns the place of the newest record."""
        async with self._database.transaction(tenant_id) as connection:
            row = await connection.fetchrow(SELECT_NEWEST, tenant_id)
        return Link() if row is None else Link(row["sequence"], row["record_hash"])

    async def hash_at(self, tenant_id: TenantId, sequence: int) -> bytes | None:
        """Returns the hash of one record."""
        async with self._database.transaction(tenant_id) as connection:
            found: bytes | None = await connection.fetchval(SELECT_HASH, tenant_id, sequence)
        return found

    async def chain_page(self, tenant_id: TenantId, after: int, until: int, limit: int) -> Sequence[KeptRecord]:
        """Returns records by their place."""
        async with self._database.transaction(tenant_id) as connection:
            rows = await connection.fetch(SELECT_CHAIN, tenant_id, after, until, limit)
        return [KeptRecord(_record(row), frozenset(row["found_by"])) for row in rows]

    async def query(
        self, tenant_id: TenantId, wanted: AuditFilter, before: tuple[datetime, int] | None, limit: int
    ) -> Sequence[AuditRecord]:
        """Returns records older than the position, newest first."""
        sql, arguments = _query(tenant_id, wanted, before, limit)
        async with self._database.transaction(tenant_id) as connection:
            rows = await connection.fetch(sql, *arguments)
        return [_record(row) for row in rows]

    async def record(self, records: Sequence[ProvenRecord]) -> None:
        """Adds records of many tenants in one transaction."""
        seen = [record.witnessed for record in records]
        await self._database.call(
            None,
            RECORD_AUDIT,
            [item.tenant_id for item in seen],
            [item.audit_id for item in seen],
            [item.occur_time for item in seen],
            [item.action for item in seen],
            [record.subject for record in records],
            [item.target for item in seen],
            ["" for _ in seen],
            [item.peer_address for item in seen],
            [record.source for record in records],
            [item.user for item in seen],
            [item.call_id for item in seen],
            ["{" + ",".join(map(str, item.document_ids)) + "}" for item in seen],
            [item.detail for item in seen],
        )


def _query(tenant_id: TenantId, wanted: AuditFilter, before: tuple[datetime, int] | None, limit: int) -> tuple[str, list[object]]:
    sql, arguments = SELECT_RECORDS, list[object]([tenant_id])
    for name, condition in _CONDITIONS.items():
        value = getattr(wanted, name)
        if value not in (None, ""):
            arguments.append(value)
            sql += " AND " + condition.format(f"${len(arguments)}")
    if before is not None:
        arguments += before
        sql += f" AND (occur_time, sequence) < (${len(arguments) - 1}, ${len(arguments)})"
    arguments.append(limit)
    return f"{sql}{_NEWEST_FIRST}${len(arguments)}", arguments


def _record(row: asyncpg.Record) -> AuditRecord:
    return AuditRecord(
        tenant_id=TenantId(row["tenant_id"]),
        sequence=row["sequence"],
        audit_id=row["audit_id"],
        occur_time=row["occur_time"],
        record_time=row["record_time"],
        action=row["action"],
        subject=row["subject"],
        target=row["target"],
        reason=row["reason"],
        peer_address=row["peer_address"],
        occurrence_count=row["occurrence_count"],
        source=row["source"],
        user=row["user_name"],
        call_id=row["call_id"],
        document_ids=tuple(row["document_ids"]),
        detail=row["detail"],
        previous_hash=row["previous_hash"],
        record_hash=row["record_hash"],
    )
