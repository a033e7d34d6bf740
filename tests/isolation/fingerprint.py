"""Everything the stores keep of one tenant, as digests that change when anything of it does; read past every wall, as superuser."""

from collections.abc import Sequence
from typing import Any, cast

import asyncpg
import grpc
from qdrant_client import grpc as q
from redis.asyncio import Redis

from devstack.environment import DATABASE
from devstack.stack import Stack
from services.kernel.ids import TenantId
from tests.support.waiting import eventually

SCHEMAS = ("inference", "metering", "retrieval", "tenant")
TENANT_TABLES = """
SELECT format('%I.%I', n.nspname, c.relname) AS name FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE n.nspname = ANY($1) AND c.relkind IN ('r', 'p') AND NOT c.relispartition
  AND EXISTS (SELECT FROM pg_attribute a WHERE a.attrelid = c.oid AND a.attname = 'tenant_id' AND NOT a.attisdropped)
ORDER BY 1
"""
# A key's last use changes by looking; it is nothing an attacker could want to change.
TABLE_DIGEST = """
SELECT count(*) || ' rows ' || coalesce(md5(string_agg(r, '|' ORDER BY r)), '')
FROM (SELECT (to_jsonb(t) - 'last_use_time')::text AS r FROM {table} t WHERE tenant_id = $1) rows
"""
# Refusals of a tenant's own keys are recorded there: attacks that fail leave their trace in it.
AUDIT = frozenset({"tenant.audit", "tenant.audit_documents", "tenant.audit_chains"})
UNSENT = """
SELECT (SELECT count(*) FROM metering.outbox WHERE tenant_id = $1) + (SELECT count(*) FROM inference.audit_outbox WHERE tenant_id = $1)
       + (SELECT count(*) FROM metering.usage_pending WHERE tenant_id = $1)
       + (SELECT count(*) FROM metering.budget_marks WHERE tenant_id = $1)
"""
REST_SECONDS = 30.0
COUNTERS = ("epoch", "outstanding")


async def superuser(stack: Stack) -> asyncpg.Connection:
    """A connection that no policy holds."""
    return await asyncpg.connect(stack.postgres.dsn(DATABASE))


def redis_of(stack: Stack) -> Redis:
    """A client with the password of the mesh."""
    return Redis(port=stack.ports.redis, password=stack.state.secrets.redis_password)


async def tenant_tables(connection: asyncpg.Connection, schemas: Sequence[str] = SCHEMAS) -> list[str]:
    """Every table that has a tenant_id, from the catalog."""
    return [row["name"] for row in await connection.fetch(TENANT_TABLES, list(schemas))]


async def own_place(stack: Stack, tenant_id: TenantId) -> tuple[str, tuple[str, ...]]:
    """The database and schemas that hold one tenant's content alone; no schema for a tenant of the pool."""
    name = f"t_{tenant_id.hex}"
    connection = await superuser(stack)
    try:
        if await connection.fetchval("SELECT true FROM pg_database WHERE datname = $1", name):
            return name, ("inference", "retrieval")
        has_schema = await connection.fetchval("SELECT true FROM pg_namespace WHERE nspname = $1", name)
        return DATABASE, (name,) if has_schema else ()
    finally:
        await connection.close()


async def _own_content(stack: Stack, tenant_id: TenantId) -> dict[str, str]:
    database, schemas = await own_place(stack, tenant_id)
    connection = await asyncpg.connect(stack.postgres.dsn(database))
    try:
        tables = await tenant_tables(connection, schemas)
        return {f"own {table}": str(await connection.fetchval(TABLE_DIGEST.format(table=table), tenant_id)) for table in tables}
    finally:
        await connection.close()


async def fingerprint(stack: Stack, tenant_id: TenantId, *, in_mid_call: bool = False) -> dict[str, str]:
    """Digests by store and table, of a tenant at rest unless it is known to be in mid-call."""
    if not in_mid_call:
        # What an earlier test left open ends with its lease, and would change the digests in the middle of an attack.
        await eventually(lambda: _is_at_rest(stack, tenant_id), within_seconds=REST_SECONDS)
    connection = await superuser(stack)
    try:
        while await connection.fetchval(UNSENT, tenant_id):
            continue
        found = {
            table: str(await connection.fetchval(TABLE_DIGEST.format(table=table), tenant_id))
            for table in await tenant_tables(connection)
            if table not in AUDIT
        }
    finally:
        await connection.close()
    found |= await _own_content(stack, tenant_id)
    return found | await _counters(stack, tenant_id) | await _points(stack, tenant_id)


async def _is_at_rest(stack: Stack, tenant_id: TenantId) -> bool:
    async with redis_of(stack) as redis:
        outstanding = cast("bytes | None", await redis.hget(f"{{{tenant_id}}}:meta", "outstanding"))
    return not int(outstanding or 0)


async def _counters(stack: Stack, tenant_id: TenantId) -> dict[str, str]:
    async with redis_of(stack) as redis:
        kept = cast("dict[bytes, bytes]", await redis.hgetall(f"{{{tenant_id}}}:meta"))
        counted = cast("dict[bytes, bytes]", await redis.hgetall(f"{{{tenant_id}}}:counters"))
    # Those of days and months; windows that slide change by the passing of time.
    found = {f"redis {name.decode()}": value.decode() for name, value in kept.items() if name.decode().startswith(COUNTERS)}
    return found | {f"redis {name.decode()}": value.decode() for name, value in counted.items() if b"@" in name}


async def _points(stack: Stack, tenant_id: TenantId) -> dict[str, str]:
    points = await scroll(stack, f"t_{tenant_id.hex}")
    return {"qdrant": repr(sorted((point.id.uuid, repr(sorted(payload_of(point).items()))) for point in points))}


async def scroll(stack: Stack, collection: str) -> list[Any]:
    """Every point of a collection, with the key that has every right."""
    async with qdrant(stack) as channel:
        stub = q.PointsStub(channel)  # type: ignore[no-untyped-call] # generated
        request = q.ScrollPoints(collection_name=collection, limit=10_000, with_payload=q.WithPayloadSelector(enable=True))
        answer = await stub.Scroll(request, metadata=(("api-key", stack.state.secrets.qdrant_api_key),), timeout=10)
    return list(answer.result)


def payload_of(point: Any) -> dict[str, str]:
    """A point's payload as text."""
    return {name: value.string_value for name, value in point.payload.items()}


def qdrant(stack: Stack) -> Any:
    """A channel to the vector store."""
    return grpc.aio.insecure_channel(stack.ports.address("qdrant"))
