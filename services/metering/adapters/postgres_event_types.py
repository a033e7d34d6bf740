"""Types of events in Postgres: read as the service role, registered as the jobs role, because they are nobody's and everybody's."""

from collections.abc import Collection, Sequence

import asyncpg

from services.kernel.tenant_database import JobsDatabase, TenantDatabase
from services.metering.event_types import Aggregation, EventType, TypeName

INSERT_TYPE = """
INSERT INTO metering.event_types (product, event_type, unit, aggregation) VALUES ($1, $2, $3, $4) ON CONFLICT DO NOTHING
"""
SELECT_TYPE = "SELECT product, event_type, unit, aggregation FROM metering.event_types WHERE product = $1 AND event_type = $2"
SELECT_KNOWN = """
SELECT t.product, t.event_type FROM unnest($1::text[], $2::text[]) AS w (product, event_type)
JOIN metering.event_types t ON t.product = w.product AND t.event_type = w.event_type
"""
SELECT_TYPES = """
SELECT product, event_type, unit, aggregation FROM metering.event_types WHERE (product, event_type) > ($1, $2)
ORDER BY product, event_type LIMIT $3
"""


class PostgresEventTypes:
    """Reads and adds; nothing changes a type."""

    def __init__(self, database: TenantDatabase, jobs: JobsDatabase) -> None:
        self._database = database
        self._jobs = jobs

    async def register(self, event_type: EventType) -> EventType:
        """Stores the type unless its name is there; returns what is stored under the name."""
        async with self._jobs.transaction() as connection:
            await connection.execute(INSERT_TYPE, *event_type.name, event_type.unit, int(event_type.aggregation))
            return _type(await connection.fetchrow(SELECT_TYPE, *event_type.name))

    async def known(self, names: Collection[TypeName]) -> Sequence[TypeName]:
        """Returns those of the names that are stored."""
        products, types = zip(*names, strict=True)
        return [TypeName(*row) for row in await self._database.call(None, SELECT_KNOWN, products, types)]

    async def page(self, after: TypeName, size: int) -> Sequence[EventType]:
        """Returns up to `size` types, by name, after that one."""
        return [_type(row) for row in await self._database.call(None, SELECT_TYPES, *after, size)]


def _type(row: asyncpg.Record) -> EventType:
    return EventType(TypeName(row["product"], row["event_type"]), row["unit"], Aggregation(row["aggregation"]))
