"""Appends to a tenant's audit log inside the transaction of the change itself: neither is ever there without the other."""

from services.kernel.ids import TenantId
from services.kernel.tenant_database import Connection
from services.tenant.actor import Actor

INSERT_AUDIT = "INSERT INTO tenant.audit (tenant_id, action, subject, target, reason, peer_address) VALUES ($1, $2, $3, $4, $5, $6)"


async def append_audit(connection: Connection, tenant_id: TenantId, action: str, target: str, actor: Actor) -> None:
    """Appends one record."""
    await connection.execute(INSERT_AUDIT, tenant_id, action, actor.subject, target, actor.reason, actor.peer_address)
