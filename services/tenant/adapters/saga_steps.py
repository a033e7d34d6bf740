"""Marks the steps of sagas inside the transactions of what the steps do, each of which begins with the saga's lease."""

from uuid import UUID

from services.kernel.ids import TenantId
from services.kernel.tenant_database import Connection
from services.tenant.saga import LeaseLost

# Locked until the transaction ends: whoever takes the saga over waits for what is recorded here, or is waited for and then seen.
LOCK_LEASE = """
SELECT lease_holder = $3 AND state IN ('RUNNING', 'COMPENSATING') FROM tenant.sagas WHERE tenant_id = $1 AND kind = $2 FOR UPDATE
"""
MARK_DONE = """
INSERT INTO tenant.saga_steps (tenant_id, kind, step, state, end_time, detail)
SELECT s.tenant_id, s.kind, $3, 'DONE', clock_timestamp(), $4::text::jsonb FROM tenant.sagas s WHERE s.tenant_id = $1 AND s.kind = $2
ON CONFLICT (tenant_id, kind, step) DO UPDATE
SET state = 'DONE', end_time = excluded.end_time, detail = excluded.detail WHERE saga_steps.state = 'BEGUN'
"""
MARK_UNDONE = """
UPDATE tenant.saga_steps SET state = 'UNDONE', end_time = clock_timestamp() WHERE tenant_id = $1 AND kind = $2 AND step = $3
"""
END_SAGA = """
UPDATE tenant.sagas SET state = $3, content = '{}', end_time = clock_timestamp(), lease_holder = NULL, lease_until = NULL
WHERE tenant_id = $1 AND kind = $2 AND state IN ('RUNNING', 'COMPENSATING')
"""


async def require_lease(connection: Connection, tenant_id: TenantId, kind: str, lease: UUID) -> None:
    """Keeps the saga from being taken over until the transaction ends. Raises: LeaseLost when it has been, or has ended."""
    if not await connection.fetchval(LOCK_LEASE, tenant_id, kind, lease):
        raise LeaseLost


async def mark_done(connection: Connection, tenant_id: TenantId, kind: str, step: int, detail: str = "[]") -> None:
    """Notes that the step is done; a step that was done stays as it was, and an ended saga's steps are not there to mark twice."""
    await connection.execute(MARK_DONE, tenant_id, kind, int(step), detail)


async def mark_undone(connection: Connection, tenant_id: TenantId, kind: str, step: int) -> None:
    """Notes that the step is undone."""
    await connection.execute(MARK_UNDONE, tenant_id, kind, int(step))


async def end_saga(connection: Connection, tenant_id: TenantId, kind: str, state: str) -> bool:
    """Ends the saga and forgets what was asked for; False when it had ended."""
    return str(await connection.execute(END_SAGA, tenant_id, kind, state)) == "UPDATE 1"
