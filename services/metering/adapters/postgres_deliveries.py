"""Deliveries of all tenants in Postgres, as the jobs role."""

from collections.abc import Sequence

import asyncpg

from services.kernel.tenant_database import JobsDatabase
from services.metering.adapters.postgres_webhooks import delivery_of
from services.metering.webhooks.endpoint import Delivery, DueDelivery

# The head of each receiver's line alone, which stays the head while somebody sends it: who hangs holds up itself and nobody else.
TAKE_DUE = """
WITH heads AS (
    SELECT DISTINCT ON (tenant_id, endpoint_id) tenant_id, delivery_id, due_time, lease_end_time FROM metering.webhook_deliveries
    WHERE state = 1 ORDER BY tenant_id, endpoint_id, due_time, delivery_id
), chosen AS (
    SELECT d.tenant_id, d.delivery_id
    FROM heads h JOIN metering.webhook_deliveries d ON d.tenant_id = h.tenant_id AND d.delivery_id = h.delivery_id
    WHERE h.due_time <= clock_timestamp() AND (h.lease_end_time IS NULL OR h.lease_end_time <= clock_timestamp())
    ORDER BY h.due_time LIMIT $1 FOR UPDATE OF d SKIP LOCKED
), taken AS (
    UPDATE metering.webhook_deliveries d SET attempts = d.attempts + 1, lease_end_time = clock_timestamp() + interval '30 seconds'
    FROM chosen c
    WHERE d.tenant_id = c.tenant_id AND d.delivery_id = c.delivery_id AND d.state = 1
      AND (d.lease_end_time IS NULL OR d.lease_end_time <= clock_timestamp())
    RETURNING d.*
)
SELECT t.tenant_id, t.delivery_id, t.endpoint_id, t.event_id, t.event_type, t.data::text AS data, t.state, t.attempts, t.last_error,
       t.create_time, t.due_time, t.end_time, e.url, e.secret,
       CASE WHEN e.previous_end_time > clock_timestamp() THEN e.previous_secret END AS previous_secret
FROM taken t JOIN metering.webhook_endpoints e ON e.tenant_id = t.tenant_id AND e.endpoint_id = t.endpoint_id
"""
DELIVERED = """
UPDATE metering.webhook_deliveries SET state = 2, end_time = clock_timestamp(), lease_end_time = NULL, last_error = ''
WHERE tenant_id = $1 AND delivery_id = $2 AND state = 1
"""
PUT_OFF = """
UPDATE metering.webhook_deliveries
SET last_error = $3, lease_end_time = NULL, due_time = clock_timestamp() + $4::float8 * interval '1 second'
WHERE tenant_id = $1 AND delivery_id = $2 AND state = 1
"""
GIVE_UP = """
UPDATE metering.webhook_deliveries SET state = 3, last_error = $3, lease_end_time = NULL, end_time = clock_timestamp()
WHERE tenant_id = $1 AND delivery_id = $2 AND state = 1
"""
FORGET_ENDED = """
WITH gone AS (
    DELETE FROM metering.webhook_deliveries
    WHERE tenant_id IS NOT NULL AND state <> 1 AND end_time < clock_timestamp() - $1::integer * interval '24 hours'
    RETURNING 1
)
SELECT count(*) FROM gone
"""


class PostgresDeliveries:
    """Implements DeliveryOutbox."""

    def __init__(self, database: JobsDatabase) -> None:
        self._database = database

    async def take_due(self, most: int) -> Sequence[DueDelivery]:
        """Takes what is due and in nobody's hands, one a receiver, each under a lease of 30 s."""
        return [_due(row) for row in await self._database.call(TAKE_DUE, most)]

    async def delivered(self, delivery: Delivery) -> None:
        """Notes that the receiver took it."""
        await self._database.call(DELIVERED, delivery.tenant_id, delivery.delivery_id)

    async def failed(self, delivery: Delivery, error: str, pause_seconds: float | None) -> None:
        """Notes why not, and when to try again; None gives it up."""
        if pause_seconds is None:
            await self._database.call(GIVE_UP, delivery.tenant_id, delivery.delivery_id, error)
        else:
            await self._database.call(PUT_OFF, delivery.tenant_id, delivery.delivery_id, error, pause_seconds)

    async def forget_ended(self, days: int) -> int:
        """Removes deliveries that ended so long ago; returns how many."""
        count: int = await self._database.fetch_value(FORGET_ENDED, days)
        return count


def _due(row: asyncpg.Record) -> DueDelivery:
    sealed = [row["secret"], row["previous_secret"]]
    return DueDelivery(delivery_of(row), row["url"], [each for each in sealed if each is not None])
