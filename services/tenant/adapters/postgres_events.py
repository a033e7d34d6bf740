"""The outbox of events: written in the transaction of the change, read over all tenants by the jobs role."""

import json
from collections.abc import Mapping, Sequence
from uuid import UUID

import asyncpg

from services.kernel.ids import TenantId
from services.kernel.tenant_database import Connection, JobsDatabase
from services.tenant.events import Event, EventState, Sink

INSERT_EVENT = "INSERT INTO tenant.events (tenant_id, sink, event_type, data) VALUES ($1, $2, $3, $4::text::jsonb)"
# Only the head of each tenant's line: an event that waits holds up those behind it, one that was given up does not.
TAKE_DUE = """
WITH heads AS (
    SELECT DISTINCT ON (tenant_id, sink) tenant_id, event_id, due_time, lease_until FROM tenant.events
    WHERE state = 'PENDING' AND sink = ANY ($1::text[]) ORDER BY tenant_id, sink, position
), due AS (
    SELECT e.tenant_id, e.event_id FROM tenant.events e JOIN heads h ON h.tenant_id = e.tenant_id AND h.event_id = e.event_id
    WHERE h.due_time <= clock_timestamp() AND (h.lease_until IS NULL OR h.lease_until <= clock_timestamp())
    ORDER BY h.due_time LIMIT $2 FOR UPDATE OF e SKIP LOCKED
)
UPDATE tenant.events e SET attempts = e.attempts + 1, lease_until = clock_timestamp() + interval '30 seconds'
FROM due d WHERE e.tenant_id = d.tenant_id AND e.event_id = d.event_id AND e.state = 'PENDING'
  AND (e.lease_until IS NULL OR e.lease_until <= clock_timestamp())
RETURNING e.tenant_id, e.event_id, e.position, e.sink, e.event_type, e.data::text AS data,
    e.state, e.attempts, e.last_error, e.create_time, e.end_time
"""
DELIVERED = """
UPDATE tenant.events SET state = 'DELIVERED', end_time = clock_timestamp(), lease_until = NULL, last_error = ''
WHERE tenant_id = $1 AND event_id = $2 AND state = 'PENDING'
"""
PUT_OFF = """
UPDATE tenant.events SET last_error = $3, lease_until = NULL, due_time = clock_timestamp() + $4 * interval '1 second'
WHERE tenant_id = $1 AND event_id = $2 AND state = 'PENDING'
"""
GIVE_UP = """
UPDATE tenant.events SET state = 'DEAD', last_error = $3, lease_until = NULL, end_time = clock_timestamp()
WHERE tenant_id = $1 AND event_id = $2 AND state = 'PENDING'
"""
LIST_EVENTS = """
SELECT tenant_id, event_id, position, sink, event_type, data::text AS data, state, attempts, last_error, create_time, end_time
FROM tenant.events WHERE ($1::text IS NULL OR state = $1) AND ($2::bigint IS NULL OR position < $2)
ORDER BY position DESC LIMIT $3
"""
REPLAY = """
UPDATE tenant.events SET state = 'PENDING', attempts = 0, due_time = clock_timestamp(), lease_until = NULL, end_time = NULL, last_error = ''
WHERE tenant_id = $1 AND event_id = $2
RETURNING tenant_id, event_id, position, sink, event_type, data::text AS data, state, attempts, last_error, create_time, end_time
"""


async def append_events(
    connection: Connection, tenant_id: TenantId, event_type: str, data: Mapping[str, object], sinks: Sequence[str] = ("webhook",)
) -> None:
    """Appends the event for each sink, inside the transaction of the change."""
    for sink in sinks:
        await connection.execute(INSERT_EVENT, tenant_id, sink, event_type, json.dumps(dict(data), default=str))


class PostgresOutbox:
    """The outbox as the jobs role."""

    def __init__(self, database: JobsDatabase) -> None:
        self._database = database

    async def take_due(self, sinks: Sequence[Sink], limit: int) -> Sequence[Event]:
        """Takes the heads that are due, each under a lease of 30 s."""
        return [_event(row) for row in await self._database.call(TAKE_DUE, list(sinks), limit)]

    async def delivered(self, event: Event) -> None:
        """Notes that the receiver took it."""
        await self._database.call(DELIVERED, event.tenant_id, event.event_id)

    async def failed(self, event: Event, error: str, pause_seconds: float | None) -> None:
        """Notes why not, and when to try again; None gives it up."""
        if pause_seconds is None:
            await self._database.call(GIVE_UP, event.tenant_id, event.event_id, error)
        else:
            await self._database.call(PUT_OFF, event.tenant_id, event.event_id, error, pause_seconds)

    async def list_page(self, state: EventState | None, before: int | None, limit: int) -> Sequence[Event]:
        """Returns events before a position, newest first."""
        return [_event(row) for row in await self._database.call(LIST_EVENTS, state, before, limit)]

    async def replay(self, tenant_id: TenantId, event_id: UUID) -> Event | None:
        """Makes the event wait again."""
        row = await self._database.fetch_row(REPLAY, tenant_id, event_id)
        return None if row is None else _event(row)


def _event(row: asyncpg.Record) -> Event:
    return Event(
        tenant_id=TenantId(row["tenant_id"]),
        event_id=row["event_id"],
        position=row["position"],
        sink=Sink(row["sink"]),
        event_type=row["event_type"],
        data=row["data"],
        state=EventState(row["state"]),
        attempts=row["attempts"],
        last_error=row["last_error"],
        create_time=row["create_time"],
        end_time=row["end_time"],
    )
