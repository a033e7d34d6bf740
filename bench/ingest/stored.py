"""Events that are there already, made in SQL as the service would have written them: rows and claims, in order of time."""

import time

from bench.ingest.world import PRODUCT, TYPE, World

CHUNK = 500_000
FILL_SECONDS = 600.0
# Ids rise with time, as UUIDv7 does; their time is long before any that the service mints.
FILL = """
WITH made AS MATERIALIZED (
    SELECT lpad(to_hex(n), 12, '0') AS digits, $4::timestamptz + n * interval '1 microsecond' AS record_time, n
    FROM generate_series($2::bigint, $3::bigint) n
), ids AS MATERIALIZED (
    SELECT (substr(digits, 1, 8) || '-' || substr(digits, 9) || '-7000-8000-' || digits)::uuid AS event_id, record_time, n FROM made
), claimed AS (
    INSERT INTO metering.event_claims (tenant_id, source, id, digest, event_id, record_time)
    SELECT $1, '/interviews', event_id::text, sha256(event_id::text::bytea), event_id, record_time FROM ids
)
INSERT INTO metering.events (tenant_id, event_id, product, source, id, event_type, quantity, occurred_at, record_time, user_name, feature)
SELECT $1, event_id, $5, '/interviews', event_id::text, $6, 1, record_time, record_time, 'user-' || n % 100, '' FROM ids
"""
SIZE = """
SELECT (SELECT sum(pg_total_relation_size(relid)) FROM pg_partition_tree('metering.events'))::bigint AS row_bytes,
       (SELECT count(*) FROM metering.events WHERE tenant_id IS NOT NULL) AS rows,
       (SELECT sum(pg_total_relation_size(relid)) FROM pg_partition_tree('metering.event_claims'))::bigint AS claim_bytes,
       (SELECT count(*) FROM metering.event_claims WHERE tenant_id IS NOT NULL) AS claims
"""
COUNT = "SELECT count(*) FROM metering.events WHERE tenant_id = $1"


async def bytes_an_event(world: World) -> dict[str, float]:
    """What a stored event takes, with its indexes: its row, and the claim that stays for ever."""
    sizes = await world.admin.fetchrow(SIZE, timeout=FILL_SECONDS)
    return {"row_bytes": round(sizes["row_bytes"] / sizes["rows"]), "claim_bytes": round(sizes["claim_bytes"] / sizes["claims"])}


async def fill_up_to(world: World, count: int) -> float:
    """Stores as many events of the tenant as are missing; returns the seconds it took."""
    began = time.monotonic()
    there = int(await world.admin.fetchval(COUNT, world.tenant_id, timeout=FILL_SECONDS))
    start = await world.admin.fetchval("SELECT date_trunc('month', now(), 'UTC')")
    for first in range(there + 1, count + 1, CHUNK):
        last = min(first + CHUNK - 1, count)
        await world.admin.execute(FILL, world.tenant_id, first, last, start, PRODUCT, TYPE, timeout=FILL_SECONDS)
    # What is left to be written of the filling must not be paid by what is measured next.
    await world.admin.execute("CHECKPOINT", timeout=FILL_SECONDS)
    return time.monotonic() - began
