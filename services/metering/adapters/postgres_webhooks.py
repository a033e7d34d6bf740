"""Receivers and deliveries of one tenant in Postgres, as the service role."""

from collections.abc import Collection, Sequence
from uuid import UUID

import asyncpg

from mesh.common.v1 import error_reason_pb2
from services.kernel.errors import LimitExceeded, NotFound
from services.kernel.ids import TenantId
from services.kernel.tenant_database import TenantDatabase
from services.metering.webhooks.endpoint import MAX_ENDPOINTS, Delivery, DeliveryPosition, DeliveryState, Endpoint

# Exclusive: no alert is between its receivers and its deliveries, and nobody else makes a receiver.
LOCK_TENANT = "SELECT pg_advisory_xact_lock(metering.tenant_lock($1))"
SELECT_ERASED = "SELECT 1 FROM metering.erased_tenants WHERE tenant_id = $1"
COUNT_ENDPOINTS = "SELECT count(*) FROM metering.webhook_endpoints WHERE tenant_id = $1"
INSERT_ENDPOINT = """
INSERT INTO metering.webhook_endpoints (tenant_id, endpoint_id, url, secret, create_time) VALUES ($1, $2, $3, $4, clock_timestamp())
RETURNING endpoint_id, url, create_time, previous_end_time
"""
SELECT_ENDPOINTS = """
SELECT endpoint_id, url, create_time, CASE WHEN previous_end_time > clock_timestamp() THEN previous_end_time END AS previous_end_time
FROM metering.webhook_endpoints WHERE tenant_id = $1 ORDER BY create_time, endpoint_id
"""
ROTATE = """
UPDATE metering.webhook_endpoints
SET secret = $3, previous_secret = CASE WHEN $4::float8 > 0 THEN secret END,
    previous_end_time = CASE WHEN $4::float8 > 0 THEN clock_timestamp() + $4::float8 * interval '1 second' END
WHERE tenant_id = $1 AND endpoint_id = $2
RETURNING endpoint_id, url, create_time, previous_end_time
"""
DELETE_ENDPOINT = "DELETE FROM metering.webhook_endpoints WHERE tenant_id = $1 AND endpoint_id = $2"
_DELIVERY = """
SELECT tenant_id, delivery_id, endpoint_id, event_id, event_type, data::text AS data, state, attempts, last_error, create_time,
       due_time, end_time
FROM metering.webhook_deliveries
WHERE tenant_id = $1 AND ($2::smallint IS NULL OR state = $2) AND ($3::uuid IS NULL OR endpoint_id = $3)
"""
SELECT_FIRST_DELIVERIES = _DELIVERY + "ORDER BY create_time DESC, delivery_id DESC LIMIT $4"
SELECT_NEXT_DELIVERIES = _DELIVERY + "AND (create_time, delivery_id) < ($5, $6) ORDER BY create_time DESC, delivery_id DESC LIMIT $4"
REPLAY = """
UPDATE metering.webhook_deliveries
SET state = 1, attempts = 0, due_time = clock_timestamp(), lease_end_time = NULL, end_time = NULL, last_error = ''
WHERE tenant_id = $1 AND (delivery_id = ANY ($2::uuid[]) OR (endpoint_id = $3 AND state = 3))
RETURNING delivery_id
"""


class PostgresWebhooks:
    """Implements EndpointStore."""

    def __init__(self, database: TenantDatabase) -> None:
        self._database = database

    async def create(self, tenant_id: TenantId, endpoint_id: UUID, url: str, sealed_secret: bytes) -> Endpoint:
        """Keeps a receiver. Raises: LimitExceeded for one too many, NotFound once erased."""
        async with self._database.transaction(tenant_id) as connection:
            await connection.execute(LOCK_TENANT, tenant_id)
            if await connection.fetchval(SELECT_ERASED, tenant_id):
                raise NotFound("tenant")
            if await connection.fetchval(COUNT_ENDPOINTS, tenant_id) >= MAX_ENDPOINTS:
                raise _too_many()
            return _endpoint(await connection.fetchrow(INSERT_ENDPOINT, tenant_id, endpoint_id, url, sealed_secret))

    async def list_all(self, tenant_id: TenantId) -> Sequence[Endpoint]:
        """Returns receivers, oldest first."""
        async with self._database.transaction(tenant_id) as connection:
            return [_endpoint(row) for row in await connection.fetch(SELECT_ENDPOINTS, tenant_id)]

    async def rotate(self, tenant_id: TenantId, endpoint_id: UUID, sealed_secret: bytes, overlap_seconds: float) -> Endpoint | None:
        """Puts a new secret in the place of the one in use, which signs too until the overlap ends; None for no such receiver."""
        async with self._database.transaction(tenant_id) as connection:
            row = await connection.fetchrow(ROTATE, tenant_id, endpoint_id, sealed_secret, overlap_seconds)
        return None if row is None else _endpoint(row)

    async def delete(self, tenant_id: TenantId, endpoint_id: UUID) -> None:
        """Removes a receiver with its deliveries, if it is there."""
        async with self._database.transaction(tenant_id) as connection:
            await connection.execute(LOCK_TENANT, tenant_id)
            await connection.execute(DELETE_ENDPOINT, tenant_id, endpoint_id)

    async def deliveries(
        self, tenant_id: TenantId, state: DeliveryState | None, endpoint_id: UUID | None, after: DeliveryPosition | None, size: int
    ) -> Sequence[Delivery]:
        """Returns up to `size` deliveries, newest first, after the position."""
        arguments = (tenant_id, None if state is None else int(state), endpoint_id, size)
        async with self._database.transaction(tenant_id) as connection:
            if after is None:
                rows = await connection.fetch(SELECT_FIRST_DELIVERIES, *arguments)
            else:
                rows = await connection.fetch(SELECT_NEXT_DELIVERIES, *arguments, after.create_time, after.delivery_id)
        return [delivery_of(row) for row in rows]

    async def replay(self, tenant_id: TenantId, delivery_ids: Collection[UUID], dead_of: UUID | None) -> int:
        """Makes the named deliveries wait again, or all dead ones of a receiver; returns how many."""
        async with self._database.transaction(tenant_id) as connection:
            return len(await connection.fetch(REPLAY, tenant_id, list(delivery_ids), dead_of))


def delivery_of(row: asyncpg.Record) -> Delivery:
    """Builds a delivery from the columns of its table."""
    return Delivery(
        tenant_id=TenantId(UUID(int=row["tenant_id"].int)),
        delivery_id=UUID(int=row["delivery_id"].int),
        endpoint_id=UUID(int=row["endpoint_id"].int),
        event_id=UUID(int=row["event_id"].int),
        event_type=row["event_type"],
        data=row["data"],
        state=DeliveryState(row["state"]),
        attempts=row["attempts"],
        last_error=row["last_error"],
        create_time=row["create_time"],
        due_time=row["due_time"],
        end_time=row["end_time"],
    )


def _endpoint(row: asyncpg.Record) -> Endpoint:
    return Endpoint(UUID(int=row["endpoint_id"].int), row["url"], row["create_time"], row["previous_end_time"])


def _too_many() -> LimitExceeded:
    return LimitExceeded(
        error_reason_pb2.ERROR_REASON_PLAN_LIMIT,
        f"a tenant has at most {MAX_ENDPOINTS} receivers; delete one first",
        rule="webhook_endpoints",
        limit=str(MAX_ENDPOINTS),
        used=str(MAX_ENDPOINTS),
        remaining="0",
    )
