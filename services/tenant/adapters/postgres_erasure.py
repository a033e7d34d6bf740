"""The tenant service's own part of an erasure, and the receipts."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Protocol
from uuid import UUID

from services.kernel.ids import TenantId
from services.kernel.tenant_database import JobsDatabase, TenantDatabase
from services.kernel.tenant_scan import ScannedStore, scan_schema
from services.tenant.actor import Actor
from services.tenant.adapters.postgres_audit import append_audit
from services.tenant.adapters.postgres_events import append_events
from services.tenant.adapters.postgres_remains import remove_records, revoke_keys
from services.tenant.adapters.saga_steps import end_saga, mark_done, require_lease
from services.tenant.erasure import EraseStep, ErasureWish, slug_refused
from services.tenant.receipt import ErasureReceipt
from services.tenant.tenant_record import TenantState

LOCK_TENANT = "SELECT slug, state FROM tenant.tenants WHERE tenant_id = $1 FOR UPDATE"
CLOSE = "UPDATE tenant.tenants SET state = 'ERASING' WHERE tenant_id = $1 AND state IN ('ACTIVE', 'SUSPENDED', 'FAILED')"
INSERT_SAGA = """
INSERT INTO tenant.sagas (tenant_id, kind, request_id, content_digest, content, subject, reason, due_time)
VALUES ($1, 'ERASE', $2, $3, $4::text::jsonb, $5, $6, clock_timestamp() + interval '2 seconds') ON CONFLICT DO NOTHING
"""
ANNOUNCE_STATE = "SELECT tenant.announce($1, 'STATE')"
ANNOUNCE_KEY = "SELECT tenant.announce($1, 'KEY')"
# What waits to be told of an erased tenant names it by its id alone: for want of a receiver it may wait for ever. What was told goes.
DELETE_EVENTS = "DELETE FROM tenant.events WHERE tenant_id = $1 AND (state <> 'PENDING' OR sink = 'mail')"
FORGET_IN_EVENTS = "UPDATE tenant.events SET data = data - 'slug' WHERE tenant_id = $1"
INSERT_RECEIPT = """
INSERT INTO tenant.erasure_receipts (tenant_id, request_id, body, signature, key_id) VALUES ($1, $2, $3, $4, $5) ON CONFLICT DO NOTHING
"""
GET_RECEIPT = "SELECT body, signature, key_id FROM tenant.erasure_receipts WHERE tenant_id = $1"
# Kept of an erased tenant, and of it the id alone: the log and its index, the spent request id, the feed, the erasure's own books, and
# what flags once said, which is the operator's history.
KEPT = frozenset(
    {
        "audit",
        "audit_documents",
        "audit_chains",
        "request_directory",
        "changes",
        "sagas",
        "saga_steps",
        "events",
        "erasure_receipts",
        "flag_changes",
    }
)
# A schema or a database named for the tenant is a store of its own, whoever can read in it.
COUNT_NAMED = {
    "postgres:pg_namespace": "SELECT count(*) FROM pg_namespace WHERE nspname = $1",
    "postgres:pg_database": "SELECT count(*) FROM pg_database WHERE datname = $1",
}
_KIND = "ERASE"


class SiloServer(Protocol):
    """The server that tenants' own databases are made on."""

    async def scan(self, tenant_id: TenantId) -> Sequence[ScannedStore]:
        """Counts what is named for the tenant there. Raises: Unavailable."""
        ...


class PostgresErasure:
    """The erasure store on the service's own role; the jobs role looks where a tenant's policy hides others."""

    def __init__(self, database: TenantDatabase, jobs: JobsDatabase, silos: SiloServer) -> None:
        self._database = database
        self._jobs = jobs
        self._silos = silos

    async def begin(self, wish: ErasureWish, actor: Actor) -> TenantState | None:
        """Makes the tenant ERASING with its saga; returns the state it found."""
        async with self._database.transaction(wish.tenant_id) as connection:
            row = await connection.fetchrow(LOCK_TENANT, wish.tenant_id)
            if row is None:
                return None
            if row["slug"] != wish.confirm_slug:
                raise slug_refused()
            state = TenantState(row["state"])
            if await connection.execute(CLOSE, wish.tenant_id) == "UPDATE 1":
                content = json.dumps({"canaries": json.dumps(wish.canaries)})
                await connection.execute(INSERT_SAGA, wish.tenant_id, wish.request_id, wish.digest(), content, actor.subject, actor.reason)
                await append_audit(connection, wish.tenant_id, "TENANT_CLOSED", f"tenant:{wish.tenant_id}", actor)
                await mark_done(connection, wish.tenant_id, _KIND, EraseStep.CLOSED)
                await connection.execute(ANNOUNCE_STATE, wish.tenant_id)
            return state

    async def finish_step(self, tenant_id: TenantId, step: EraseStep, detail: str, lease: UUID) -> None:
        """Notes that the step is done, and what it found."""
        async with self._database.transaction(tenant_id) as connection:
            await require_lease(connection, tenant_id, _KIND, lease)
            await mark_done(connection, tenant_id, _KIND, step, detail)

    async def revoke_keys(self, tenant_id: TenantId, step: EraseStep, actor: Actor, lease: UUID) -> None:
        """Revokes every key, durably."""
        async with self._database.transaction(tenant_id) as connection:
            await require_lease(connection, tenant_id, _KIND, lease)
            await revoke_keys(connection, tenant_id, actor)
            await connection.execute(ANNOUNCE_KEY, tenant_id)
            await mark_done(connection, tenant_id, _KIND, step)

    async def remove_own(self, tenant_id: TenantId, step: EraseStep, actor: Actor, lease: UUID) -> None:
        """Removes the records, and notes how many, in one transaction: a repeated step finds the first one's count."""
        async with self._database.transaction(tenant_id) as connection:
            await require_lease(connection, tenant_id, _KIND, lease)
            removed = await remove_records(connection, tenant_id, actor)
            await connection.execute(DELETE_EVENTS, tenant_id)
            await connection.execute(FORGET_IN_EVENTS, tenant_id)
            await mark_done(connection, tenant_id, _KIND, step, json.dumps([asdict(records) for records in removed]))

    async def keep_receipt(self, tenant_id: TenantId, request_id: UUID, receipt: ErasureReceipt, step: EraseStep, lease: UUID) -> None:
        """Stores the receipt, tells of the erasure and ends the saga."""
        async with self._database.transaction(tenant_id) as connection:
            await require_lease(connection, tenant_id, _KIND, lease)
            await connection.execute(INSERT_RECEIPT, tenant_id, request_id, receipt.body, receipt.signature, receipt.key_id)
            await mark_done(connection, tenant_id, _KIND, step)
            if await end_saga(connection, tenant_id, _KIND, "DONE"):
                await append_events(connection, tenant_id, "tenant.erased", {"verified": receipt.verified})

    async def receipt(self, tenant_id: TenantId) -> ErasureReceipt | None:
        """Returns the receipt."""
        async with self._database.transaction(tenant_id) as connection:
            row = await connection.fetchrow(GET_RECEIPT, tenant_id)
        return None if row is None else ErasureReceipt(row["body"], row["signature"], row["key_id"])

    async def scan(self, tenant_id: TenantId, canaries: Sequence[str]) -> Sequence[ScannedStore]:
        """Looks through this service's own tables, and for a schema or database that bears the tenant's name.

        The saga's own wish holds the canaries and is emptied with its end.
        """
        found = await scan_schema(self._database, self._jobs, "tenant", tenant_id, canaries, kept=KEPT)
        async with self._database.transaction(tenant_id) as connection:
            named = {store: await connection.fetchval(sql, f"t_{tenant_id.hex}") for store, sql in COUNT_NAMED.items()}
        places = [ScannedStore(store, count, 0, False, "all") for store, count in named.items()]
        return [*map(_without_own_wish, found), *places, *await self._silos.scan(tenant_id)]


def _without_own_wish(item: ScannedStore) -> ScannedStore:
    if item.store != "postgres:tenant.sagas" or item.sight != "tenant":
        return item
    return ScannedStore(item.store, item.found, 0, item.kept, item.sight)
