"""What operators set of exports, in Postgres; and what waits there."""

from collections.abc import Sequence
from uuid import UUID

import asyncpg

from services.kernel.ids import TenantId
from services.kernel.tenant_database import JobsDatabase, TenantDatabase
from services.metering.adapters.postgres_export_outbox import outgoing_key
from services.metering.exports.outgoing import OutgoingKey, Sink, Source, Waiting
from services.metering.exports.stripe_windows import KNOWN_AGAIN

_BEFORE_ALL = (UUID(int=0), 0, UUID(int=0), "")
UPSERT_CUSTOMER = """
INSERT INTO metering.stripe_customers (tenant_id, customer_id) VALUES ($1, $2)
ON CONFLICT (tenant_id) DO UPDATE SET customer_id = EXCLUDED.customer_id, change_time = clock_timestamp()
"""
DELETE_CUSTOMER = "DELETE FROM metering.stripe_customers WHERE tenant_id = $1"
SELECT_CUSTOMER = "SELECT customer_id FROM metering.stripe_customers WHERE tenant_id = $1"
UPSERT_METER = """
INSERT INTO metering.stripe_meters (meter, event_name) VALUES ($1, $2) ON CONFLICT (meter) DO UPDATE SET event_name = EXCLUDED.event_name
"""
DELETE_METER = "DELETE FROM metering.stripe_meters WHERE meter = $1"
SELECT_METERS = "SELECT meter, event_name FROM metering.stripe_meters ORDER BY meter"
UPDATE_SINK = "UPDATE metering.export_sinks SET is_on = $1 WHERE sink = 2"
SELECT_SINK = "SELECT is_on FROM metering.export_sinks WHERE sink = 2"
SELECT_WAITING = """
SELECT tenant_id, sink, usage_id, meter, source, quantity, use_time, attempts, last_error,
       CASE WHEN NOT is_dead THEN due_time END AS due_time
FROM metering.export_outbox
WHERE (tenant_id, sink, usage_id, meter) > ($1, $2::smallint, $3, $4) AND ($5::uuid IS NULL OR tenant_id = $5)
  AND ($6::smallint IS NULL OR sink = $6) AND (is_dead OR NOT $7)
ORDER BY tenant_id, sink, usage_id, meter LIMIT $8
"""
REPLAY = """
WITH replayed AS (
    UPDATE metering.export_outbox
    SET is_dead = false, attempts = 0, due_time = clock_timestamp(), lease_until = NULL, last_error = '',
        send_time = CASE WHEN $3 THEN NULL ELSE send_time END
    WHERE is_dead AND sink = $2 AND ($1::uuid IS NULL OR tenant_id = $1)
      AND ($3 OR sink <> 1 OR send_time IS NULL OR send_time > clock_timestamp() - $4::interval)
    RETURNING tenant_id
)
SELECT count(*) FROM replayed
"""


class PostgresExportSettings:
    """A tenant's customer as the service role; what is everybody's as the jobs role."""

    def __init__(self, database: TenantDatabase, jobs: JobsDatabase) -> None:
        self._database = database
        self._jobs = jobs

    async def set_customer(self, tenant_id: TenantId, customer_id: str) -> None:
        """Sets whom Stripe bills for a tenant; empty: nobody."""
        async with self._database.transaction(tenant_id) as connection:
            if customer_id:
                await connection.execute(UPSERT_CUSTOMER, tenant_id, customer_id)
            else:
                await connection.execute(DELETE_CUSTOMER, tenant_id)

    async def customer(self, tenant_id: TenantId) -> str:
        """Returns whom; empty: nobody."""
        async with self._database.transaction(tenant_id) as connection:
            return await connection.fetchval(SELECT_CUSTOMER, tenant_id) or ""

    async def set_meter(self, meter: str, event_name: str) -> None:
        """Sets which meter of Stripe's is told; empty: none."""
        if event_name:
            await self._jobs.call(UPSERT_METER, meter, event_name)
        else:
            await self._jobs.call(DELETE_METER, meter)

    async def meters(self) -> Sequence[tuple[str, str]]:
        """Returns meters and Stripe's event names, by name."""
        return [(row["meter"], row["event_name"]) for row in await self._jobs.call(SELECT_METERS)]

    async def turn_endpoint(self, *, on: bool) -> None:
        """Begins or ends telling the endpoint."""
        await self._jobs.call(UPDATE_SINK, on)

    async def is_endpoint_on(self) -> bool:
        """Tells whether the endpoint is told."""
        return bool(await self._jobs.fetch_value(SELECT_SINK))

    async def waiting(
        self, tenant_id: TenantId | None, sink: Sink | None, after: OutgoingKey | None, size: int, *, dead_only: bool
    ) -> Sequence[Waiting]:
        """Returns up to `size` things that are not delivered, after a position."""
        position = _BEFORE_ALL if after is None else (after.tenant_id, int(after.sink), after.usage_id, after.meter)
        wanted = None if sink is None else int(sink)
        return [_waiting(row) for row in await self._jobs.call(SELECT_WAITING, *position, tenant_id, wanted, dead_only, size)]

    async def replay(self, tenant_id: TenantId | None, sink: Sink, *, accept_repeats: bool) -> int:
        """Makes what was given up wait again; returns how much."""
        replayed: int = await self._jobs.fetch_value(REPLAY, tenant_id, int(sink), accept_repeats, KNOWN_AGAIN)
        return replayed


def _waiting(row: asyncpg.Record) -> Waiting:
    return Waiting(
        outgoing_key(row), Source(row["source"]), row["quantity"], row["use_time"], row["attempts"], row["last_error"], row["due_time"]
    )
