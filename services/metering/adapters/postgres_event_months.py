"""Months of events in Postgres, made and dropped as the table's owner, who sees no event."""

from datetime import date

import asyncpg

from services.kernel.errors import Unavailable
from services.kernel.tenant_database import JobsDatabase

MAKE_MONTH = "SELECT metering.make_event_month($1::date)"
DROP_MONTH = "SELECT metering.drop_event_month($1::date)"
AS_OWNER = "SET LOCAL ROLE metering_owner; SET LOCAL lock_timeout = '500ms'"


class PostgresEventMonths:
    """`owners` logs in as a role that may become the owner, and owns nothing by itself."""

    def __init__(self, owners: JobsDatabase) -> None:
        self._owners = owners

    async def make(self, month: date) -> bool:
        """Makes the month's partition unless it is there; tells whether it did."""
        return bool(await self._as_owner(MAKE_MONTH, month))

    async def drop(self, month: date) -> None:
        """Removes the month's partition with everything in it, if it is there; from then on its sums count."""
        await self._as_owner(DROP_MONTH, month)

    async def _as_owner(self, sql: str, month: date) -> object:
        try:
            async with self._owners.transaction() as connection:
                await connection.execute(AS_OWNER)
                return await connection.fetchval(sql, month)
        except asyncpg.LockNotAvailableError:
            # Whoever writes events must not wait long behind this: it is tried again later.
            raise Unavailable("postgres", "the table of events is in use") from None
