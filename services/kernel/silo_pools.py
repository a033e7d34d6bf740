"""Connection pools of tenants with a database of their own: bounded in number, small, and closed when others need the room."""

import asyncio
from collections import OrderedDict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import structlog
from pydantic import SecretStr

from services.kernel.errors import Unavailable
from services.kernel.request_context import remaining_seconds
from services.kernel.tenant_database import Database

log = structlog.get_logger(__name__)

DEFAULT_POOLS = 50
POOL_SIZE = 4
_WAIT_SECONDS = 2.0


@dataclass(slots=True)
class _Lent:
    database: Database
    users: int = 0


class SiloPools:
    """At most `limit` pools, one a DSN. The one unused for longest makes room; one in use never does."""

    def __init__(self, limit: int = DEFAULT_POOLS, *, pool_size: int = POOL_SIZE, application_name: str = "tenantry-silo") -> None:
        self._limit = limit
        self._pool_size = pool_size
        self._application_name = application_name
        self._pools: OrderedDict[str, _Lent] = OrderedDict()
        self._freed = asyncio.Condition()

    def __len__(self) -> int:
        return len(self._pools)

    @asynccontextmanager
    async def lend(self, dsn: SecretStr) -> AsyncIterator[Database]:
        """Yields the pool of a DSN, opening it when need be. Raises: Unavailable when every pool stays in use."""
        lent = await self._take(dsn.get_secret_value())
        try:
            yield lent.database
        finally:
            lent.users -= 1
            if lent.users == 0:
                async with self._freed:
                    self._freed.notify_all()

    async def close(self) -> None:
        """Closes every pool."""
        while self._pools:
            _, lent = self._pools.popitem()
            await lent.database.close()

    async def _take(self, dsn: str) -> _Lent:
        async with self._freed:
            if dsn not in self._pools:
                await self._make_room()
                # It connects with the first statement: opening one here only allocates.
                pool = await Database.open(dsn, min_size=0, max_size=self._pool_size, application_name=self._application_name)
                self._pools[dsn] = _Lent(pool)
            self._pools.move_to_end(dsn)
            self._pools[dsn].users += 1
            return self._pools[dsn]

    async def _make_room(self) -> None:
        try:
            async with asyncio.timeout(min(_WAIT_SECONDS, remaining_seconds(_WAIT_SECONDS))):
                await self._freed.wait_for(lambda: len(self._pools) < self._limit or self._idle() is not None)
        except TimeoutError:
            raise Unavailable("postgres", "every dedicated database of this process is in use; try again shortly") from None
        if len(self._pools) >= self._limit and (idle := self._idle()) is not None:
            await self._pools.pop(idle).database.close()

    def _idle(self) -> str | None:
        return next((dsn for dsn, lent in self._pools.items() if lent.users == 0), None)
