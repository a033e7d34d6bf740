"""The feed of changes in Postgres: read by id, announced in the transaction of the change itself, and a listener that only saves time."""

import asyncio
import random
from collections.abc import Callable, Sequence
from datetime import timedelta

import asyncpg
import structlog

from services.kernel.errors import Unavailable
from services.kernel.ids import TenantId
from services.kernel.tenant_database import Connection, TenantDatabase, listening
from services.tenant.change_hub import Change, ChangeKind

log = structlog.get_logger(__name__)

# Last in its transaction: the lock it takes is everybody's, and is held until the commit.
ANNOUNCE = "SELECT tenant.announce($1, $2)"
READ_NEWEST = "SELECT change_id, tenant_id, kind FROM tenant.changes ORDER BY change_id DESC LIMIT $1"
READ_AFTER = "SELECT change_id, tenant_id, kind FROM tenant.changes WHERE change_id > $1 ORDER BY change_id LIMIT $2"
TRIM = "SELECT tenant.trim_changes($1)"
CHANNEL = "tenant_changes"
KEPT = timedelta(hours=1)
_LISTEN_AGAIN_SECONDS = 2.0


async def announce(connection: Connection, tenant_id: TenantId, kind: ChangeKind) -> None:
    """Makes the change that this transaction commits known to every replica. The last statement of its transaction."""
    await connection.execute(ANNOUNCE, tenant_id, kind.value)


class PostgresChanges:
    """The change store, on a pool of its own: a full pool must not make every replica blind."""

    def __init__(self, database: TenantDatabase) -> None:
        self._database = database

    async def read_newest(self, limit: int) -> Sequence[Change]:
        """Returns the newest changes, oldest first."""
        return [_change(row) for row in reversed(await self._database.call(None, READ_NEWEST, limit))]

    async def read_after(self, change_id: int, limit: int) -> Sequence[Change]:
        """Returns the oldest changes after one, oldest first."""
        return [_change(row) for row in await self._database.call(None, READ_AFTER, change_id, limit)]

    async def trim(self) -> None:
        """Removes what is older than an hour."""
        await self._database.call(None, TRIM, KEPT)


class ChangeListener:
    """Wakes the reader when Postgres says so. Through a pooler that gives sessions away it hears nothing, and nothing is lost by that."""

    def __init__(self, dsn: str, wake: Callable[[], None]) -> None:
        self._dsn = dsn
        self._wake = wake

    async def run(self) -> None:
        """Listens until cancelled."""
        while True:
            try:
                async with listening(self._dsn, CHANNEL, self._wake, application_name="tenantry-tenant-listen") as ended:
                    await ended.wait()
            except Unavailable:
                log.debug("change_listener_away")
            await asyncio.sleep(_LISTEN_AGAIN_SECONDS * random.uniform(0.5, 1.0))  # noqa: S311 - jitter


def _change(row: asyncpg.Record) -> Change:
    return Change(row["change_id"], TenantId(row["tenant_id"]), row["kind"])
