"""Sagas in Postgres: state, steps and leases as the service's own role, and the jobs role's look over all tenants."""

import json
from collections.abc import Sequence
from dataclasses import replace
from uuid import UUID

import asyncpg

from services.kernel.ids import TenantId
from services.kernel.tenant_database import JobsDatabase, TenantDatabase
from services.tenant.actor import Actor
from services.tenant.adapters.saga_steps import require_lease
from services.tenant.saga import Saga, SagaKind, SagaState, StepRecord, StepState

GET_SAGA = """
SELECT tenant_id, kind, request_id, content_digest, state, content::text AS content, subject, reason, cause, attempts, create_time
FROM tenant.sagas WHERE tenant_id = $1 AND kind = $2
"""
LIST_STEPS = """
SELECT step, state, begin_time, end_time, detail::text AS detail FROM tenant.saga_steps WHERE tenant_id = $1 AND kind = $2
"""
TAKE_LEASE = """
UPDATE tenant.sagas SET lease_holder = $3, lease_until = clock_timestamp() + $4 * interval '1 second'
WHERE tenant_id = $1 AND kind = $2 AND state IN ('RUNNING', 'COMPENSATING')
  AND (lease_until IS NULL OR lease_until <= clock_timestamp())
RETURNING tenant_id, kind, request_id, content_digest, state, content::text AS content, subject, reason, cause, attempts, create_time
"""
RENEW_LEASE = """
UPDATE tenant.sagas SET lease_until = clock_timestamp() + $4 * interval '1 second'
WHERE tenant_id = $1 AND kind = $2 AND lease_holder = $3 AND state IN ('RUNNING', 'COMPENSATING')
"""
RELEASE_LEASE = """
UPDATE tenant.sagas SET lease_holder = NULL, lease_until = NULL WHERE tenant_id = $1 AND kind = $2 AND lease_holder = $3
"""
BEGIN_STEP = "INSERT INTO tenant.saga_steps (tenant_id, kind, step, state) VALUES ($1, $2, $3, 'BEGUN') ON CONFLICT DO NOTHING"
PUT_OFF = """
UPDATE tenant.sagas SET cause = $3, attempts = attempts + 1, due_time = clock_timestamp() + $4 * interval '1 second'
WHERE tenant_id = $1 AND kind = $2 AND state IN ('RUNNING', 'COMPENSATING') AND lease_holder = $5
"""
TURN_BACK = """
UPDATE tenant.sagas SET state = 'COMPENSATING', cause = $3, attempts = attempts + 1
WHERE tenant_id = $1 AND kind = $2 AND state = 'RUNNING'
"""
LIST_DUE = """
SELECT tenant_id, kind FROM tenant.sagas
WHERE state IN ('RUNNING', 'COMPENSATING') AND due_time <= clock_timestamp() AND (lease_until IS NULL OR lease_until <= clock_timestamp())
ORDER BY due_time LIMIT $1
"""


class PostgresSagas:
    """The saga store on the service's own role."""

    def __init__(self, database: TenantDatabase) -> None:
        self._database = database

    async def load(self, tenant_id: TenantId, kind: SagaKind) -> Saga | None:
        """Returns the saga with its steps."""
        async with self._database.transaction(tenant_id) as connection:
            row = await connection.fetchrow(GET_SAGA, tenant_id, kind)
            return None if row is None else _saga(row, await connection.fetch(LIST_STEPS, tenant_id, kind))

    async def take(self, tenant_id: TenantId, kind: SagaKind, lease: UUID, lease_seconds: float) -> Saga | None:
        """Takes the lease of a saga that has not ended; None when it has, or another holds it."""
        async with self._database.transaction(tenant_id) as connection:
            row = await connection.fetchrow(TAKE_LEASE, tenant_id, kind, lease, lease_seconds)
            return None if row is None else replace(_saga(row, await connection.fetch(LIST_STEPS, tenant_id, kind)), lease=lease)

    async def renew(self, tenant_id: TenantId, kind: SagaKind, lease: UUID, lease_seconds: float) -> bool:
        """Prolongs the lease; False when it is another's by now."""
        async with self._database.transaction(tenant_id) as connection:
            return str(await connection.execute(RENEW_LEASE, tenant_id, kind, lease, lease_seconds)) == "UPDATE 1"

    async def release(self, tenant_id: TenantId, kind: SagaKind, lease: UUID) -> None:
        """Gives the lease back, if it is still this one."""
        async with self._database.transaction(tenant_id) as connection:
            await connection.execute(RELEASE_LEASE, tenant_id, kind, lease)

    async def begin_step(self, tenant_id: TenantId, kind: SagaKind, step: int, lease: UUID) -> None:
        """Notes that the step begins. Raises: LeaseLost."""
        async with self._database.transaction(tenant_id) as connection:
            await require_lease(connection, tenant_id, kind, lease)
            await connection.execute(BEGIN_STEP, tenant_id, kind, int(step))

    async def put_off(self, tenant_id: TenantId, kind: SagaKind, cause: str, pause_seconds: float, lease: UUID) -> None:
        """Notes why an attempt stopped and when the next is due, unless it is another's by now."""
        async with self._database.transaction(tenant_id) as connection:
            await connection.execute(PUT_OFF, tenant_id, kind, cause, pause_seconds, lease)

    async def turn_back(self, tenant_id: TenantId, kind: SagaKind, cause: str, lease: UUID) -> None:
        """Makes a running saga COMPENSATING. Raises: LeaseLost."""
        async with self._database.transaction(tenant_id) as connection:
            await require_lease(connection, tenant_id, kind, lease)
            await connection.execute(TURN_BACK, tenant_id, kind, cause)


class PostgresDueSagas:
    """Sagas of all tenants, as the jobs role sees them."""

    def __init__(self, database: JobsDatabase) -> None:
        self._database = database

    async def due(self, limit: int) -> Sequence[tuple[TenantId, SagaKind]]:
        """Returns sagas that have not ended, are due and that nobody holds."""
        return [(TenantId(row["tenant_id"]), SagaKind(row["kind"])) for row in await self._database.call(LIST_DUE, limit)]


def _saga(row: asyncpg.Record, steps: Sequence[asyncpg.Record]) -> Saga:
    return Saga(
        tenant_id=TenantId(row["tenant_id"]),
        kind=SagaKind(row["kind"]),
        request_id=row["request_id"],
        content_digest=row["content_digest"],
        state=SagaState(row["state"]),
        content=json.loads(row["content"]),
        actor=Actor(row["subject"], row["reason"], ""),
        cause=row["cause"],
        attempts=row["attempts"],
        create_time=row["create_time"],
        steps={
            step["step"]: StepRecord(step["step"], StepState(step["state"]), step["begin_time"], step["end_time"], step["detail"])
            for step in steps
        },
    )
