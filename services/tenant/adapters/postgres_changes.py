"""Tells every replica of a change, inside the transaction of the change itself: neither is ever there without the other."""

from services.kernel.ids import TenantId
from services.kernel.tenant_database import Connection

ANNOUNCE = "SELECT tenant.announce($1, $2)"


async def announce(connection: Connection, tenant_id: TenantId, kind: str) -> None:
    """Announces a change of one kind. Call it last: other announcements wait until the transaction ends."""
    await connection.execute(ANNOUNCE, tenant_id, kind)
