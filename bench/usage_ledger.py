"""A ledger of many entries, filled in SQL with indexes and triggers put aside: calls, their entries, and the sums of both.

Each day is one statement that makes its calls once, and from them everything else; days are shared by two sessions.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from contextlib import asynccontextmanager
from datetime import datetime, timedelta
from uuid import UUID

import asyncpg

from bench.crowd import process_cpu_seconds

DAYS = 60
SESSIONS = 2
_DAY = timedelta(days=1)
_STATEMENT_SECONDS = 1_800
# Every tenth entry is the large tenant's; a feature has its model and two versions of its prompt, as in a product. What is 1, 2 or 9 below
# is the hour, the day and the tenant's hour of services.metering.usage_plan.Grain, as metering.fold_usage adds them up. Prices are those of
# version 2026-01: 1, 5 and 3 times the smallest model's.
_FILL_DAY = """
WITH series AS MATERIALIZED (
    SELECT t, f, p, 'anthropic' AS provider, n.model, n.feature, n.feature || '@' || p AS prompt_version, n.tier,
           metering.usage_series('anthropic', n.model, n.feature, '', n.feature || '@' || p, n.tier, '') AS series
    FROM generate_series(1, cardinality($1::uuid[])) t CROSS JOIN generate_series(1, 4) f CROSS JOIN generate_series(1, 2) p
    CROSS JOIN LATERAL (SELECT
        (ARRAY['claude-haiku-4-5-20251001', 'claude-haiku-4-5-20251001', 'claude-opus-4-6', 'claude-sonnet-4-6'])[f] AS model,
        (ARRAY['chat', 'search', 'summary', 'mail'])[f] AS feature,
        (ARRAY['enterprise', 'free', 'starter', 'professional'])[1 + t % 4] AS tier) n
), made AS MATERIALIZED (
    SELECT t, 1 + (h % 4)::integer AS f, 1 + (h / 4 % 2)::integer AS p, (h % CASE t WHEN 1 THEN $5::integer ELSE 20 END)::integer AS u,
           uuidv7(m.time - now()) AS id, m.time, (us / 3600000000)::integer AS hour, n % 51 <> 0 AS settled,
           h % 40 = 0 AS is_retry, 100 + h % 3000 AS input, 10 + h % 700 AS output, h % 900 AS cached,
           ((100 + h % 3000) * 1000 + (10 + h % 700) * 5000 + h % 900 * 100) * (ARRAY[1, 1, 5, 3])[1 + h % 4] AS cost,
           200 + h % 900 AS first_ms, 900 + h % 9000 AS total_ms
    FROM generate_series($3::bigint, $4::bigint) n
    CROSS JOIN LATERAL (SELECT abs(hashint8(n)::bigint) AS h, (n - $3) * 86400000000 / ($4 - $3 + 1) AS us) i
    CROSS JOIN LATERAL (SELECT $2::timestamptz + us * interval '1 microsecond' AS time) m
    CROSS JOIN LATERAL (SELECT CASE WHEN n % 10 = 0 THEN 1 ELSE 2 + h % (cardinality($1::uuid[]) - 1) END::integer AS t) w
), called AS (
    INSERT INTO metering.calls (
        tenant_id, reservation_id, state, live, call_id, attempt, open_epoch, reserve_time, open_time, dispatch_deadline, bound_tokens,
        bound_nano_usd, price_version, provider, model, feature, user_name, prompt_version, end_time, settled_epoch, entry_id, input_tokens,
        output_tokens, cache_read_tokens, cache_write_5m_tokens, cache_write_1h_tokens, cost_nano_usd, end_cause, first_token_ms,
        total_ms, tier)
    SELECT ($1::uuid[])[t], id, CASE WHEN settled THEN 2 ELSE 3 END, settled, id, CASE WHEN is_retry THEN 2 ELSE 1 END, 0, time, time,
           time + interval '1 minute', 6000, 90000000, '2026-01', s.provider, s.model, s.feature, 'user-' || u, s.prompt_version, time,
           CASE WHEN settled THEN 0 END, CASE WHEN settled THEN id END, CASE WHEN settled THEN input END,
           CASE WHEN settled THEN output END, CASE WHEN settled THEN cached END, CASE WHEN settled THEN 0 END,
           CASE WHEN settled THEN 0 END, CASE WHEN settled THEN cost END, CASE WHEN settled THEN 'end_turn' ELSE 'provider_529' END,
           CASE WHEN settled THEN first_ms ELSE 0 END, CASE WHEN settled THEN total_ms ELSE 0 END, s.tier
    FROM made JOIN series s USING (t, f, p)
), billed AS (
    INSERT INTO metering.entries (
        tenant_id, reservation_id, number, entry_id, kind, price_version, provider, model, reserve_time, record_time, epoch, input_tokens,
        output_tokens, cache_read_tokens, cache_write_5m_tokens, cache_write_1h_tokens, total_tokens, cost_nano_usd)
    SELECT ($1::uuid[])[t], id, 1, id, 1, '2026-01', s.provider, s.model, time, time, 0, input, output, cached, 0, 0,
           input + output + cached, cost
    FROM made JOIN series s USING (t, f, p) WHERE settled
), timed AS (
    INSERT INTO metering.usage_latencies (tenant_id, start_time, series, kind, bucket, calls)
    SELECT ($1::uuid[])[t], $2::timestamptz, s.series, k.kind, k.bucket, k.calls
    FROM (SELECT t, f, p, m.kind, metering.latency_bucket(m.ms) AS bucket, count(*) AS calls
          FROM made CROSS JOIN LATERAL (VALUES (1, first_ms), (2, total_ms)) AS m (kind, ms) WHERE settled GROUP BY 1, 2, 3, 4, 5) k
    JOIN series s USING (t, f, p)
), hours AS MATERIALIZED (
    SELECT t, f, p, hour, {counted} FROM made GROUP BY 1, 2, 3, 4
), users AS MATERIALIZED (
    SELECT t, f, p, 'user-' || u AS user_name, {counted} FROM made GROUP BY t, f, p, u
), summed AS (
    SELECT 1 AS grain, $2::timestamptz + hour * interval '1 hour' AS start_time, t, f, p, '' AS user_name, {amounts} FROM hours
    UNION ALL SELECT 2, $2, t, f, p, '', {added} FROM hours GROUP BY t, f, p
    UNION ALL SELECT 3, $2, t, f, p, user_name, {amounts} FROM users
    UNION ALL SELECT 4, $2, t, NULL, NULL, user_name, {added} FROM users GROUP BY t, user_name
    UNION ALL SELECT 5, $2, t, NULL, NULL, '', {added} FROM hours GROUP BY t
    UNION ALL SELECT 9, $2 + hour * interval '1 hour', t, NULL, NULL, '', {added} FROM hours GROUP BY t, hour
)
INSERT INTO metering.usage_rollups (
    tenant_id, grain, start_time, series, provider, model, feature, user_name, prompt_version, tier, product_unit, settled_calls,
    void_calls, unresolved_calls, reconciled_calls, retries, refused_calls, overloaded_calls, failed_calls, cancelled_calls, deadline_calls,
    lost_calls, other_calls, input_tokens, output_tokens, cache_read_tokens, cache_write_5m_tokens, cache_write_1h_tokens, cost_nano_usd,
    quantity)
SELECT ($1::uuid[])[u.t], u.grain, u.start_time,
       CASE WHEN u.grain < 3 THEN s.series ELSE
           metering.usage_series(coalesce(s.provider, ''), coalesce(s.model, ''), coalesce(s.feature, ''), u.user_name,
                                 coalesce(s.prompt_version, ''), coalesce(s.tier, ''), '') END,
       coalesce(s.provider, ''), coalesce(s.model, ''), coalesce(s.feature, ''), u.user_name, coalesce(s.prompt_version, ''),
       coalesce(s.tier, ''), '', settled, void, 0, 0, retries, 0, void, 0, 0, 0, 0, 0, input, output, cached, 0, 0, cost, 0
FROM summed u LEFT JOIN series s USING (t, f, p)
"""
_AMOUNTS = {
    "settled": "count(*) FILTER (WHERE settled)",
    "void": "count(*) FILTER (WHERE NOT settled)",
    "retries": "count(*) FILTER (WHERE is_retry)",
    "input": "coalesce(sum(input) FILTER (WHERE settled), 0)",
    "output": "coalesce(sum(output) FILTER (WHERE settled), 0)",
    "cached": "coalesce(sum(cached) FILTER (WHERE settled), 0)",
    "cost": "coalesce(sum(cost) FILTER (WHERE settled), 0)",
}
FILL_DAY = _FILL_DAY.format(
    amounts=", ".join(_AMOUNTS),
    counted=", ".join(f"{sql}::bigint AS {name}" for name, sql in _AMOUNTS.items()),
    added=", ".join(f"sum({name})::bigint" for name in _AMOUNTS),
)
WEEKS = """
INSERT INTO metering.usage_rollups (
    tenant_id, grain, start_time, series, provider, model, feature, user_name, prompt_version, tier, product_unit, settled_calls,
    void_calls, unresolved_calls, reconciled_calls, retries, refused_calls, overloaded_calls, failed_calls, cancelled_calls, deadline_calls,
    lost_calls, other_calls, input_tokens, output_tokens, cache_read_tokens, cache_write_5m_tokens, cache_write_1h_tokens, cost_nano_usd,
    quantity)
SELECT u.tenant_id, w.grain, w.week, u.series, u.provider, u.model, u.feature, u.user_name, u.prompt_version, u.tier, '',
       sum(settled_calls), sum(void_calls), 0, 0, sum(retries), 0, sum(overloaded_calls), 0, 0, 0, 0, 0, sum(input_tokens),
       sum(output_tokens), sum(cache_read_tokens), 0, 0, sum(cost_nano_usd), 0
FROM metering.usage_rollups u
CROSS JOIN LATERAL (SELECT date_trunc('week', u.start_time, 'UTC') AS week, CASE u.grain WHEN 2 THEN 6 WHEN 4 THEN 7 ELSE 8 END AS grain) w
WHERE u.tenant_id = ANY ($1::uuid[]) AND u.grain IN (2, 4, 5)
GROUP BY 1, 2, 3, 4, 5, 6, 7, 8, 9, 10
"""
TABLES = ("calls", "entries", "usage_rollups", "usage_latencies")
LIST_INDEXES = """
SELECT i.relname AS name, pg_get_indexdef(i.oid) AS definition, c.conname IS NOT NULL AS is_key, t.relname AS table_name
FROM pg_index x JOIN pg_class i ON i.oid = x.indexrelid JOIN pg_class t ON t.oid = x.indrelid
LEFT JOIN pg_constraint c ON c.conindid = i.oid
WHERE t.relnamespace = 'metering'::regnamespace AND t.relname = ANY ($1::text[])
ORDER BY t.relname, c.conname IS NULL, i.relname
"""
# Nothing of a load has to outlive a crash. Days are grouped by hashes, not sorted.
SESSION = """
SET session_replication_role = replica; SET synchronous_commit = off; SET jit = off; SET enable_sort = off; SET work_mem = '256MB';
SET maintenance_work_mem = '1GB'; SET max_parallel_maintenance_workers = 0; SET max_parallel_workers_per_gather = 0
"""
HURRIED = {"fsync": "off", "full_page_writes": "off", "autovacuum": "off", "max_wal_size": "32GB", "checkpoint_timeout": "1h"}
SIZES = """
SELECT (SELECT count(*) FROM metering.entries WHERE tenant_id IS NOT NULL) AS entries,
       (SELECT count(*) FROM metering.usage_rollups WHERE tenant_id IS NOT NULL) AS rollup_rows,
       (SELECT count(*) FROM metering.usage_latencies WHERE tenant_id IS NOT NULL) AS latency_rows
"""
SUM_OF_ENTRIES = "SELECT sum(cost_nano_usd)::text FROM metering.entries WHERE tenant_id IS NOT NULL"
SUMS_OF_SUMS = "SELECT DISTINCT sum(cost_nano_usd)::text AS cost FROM metering.usage_rollups WHERE tenant_id IS NOT NULL GROUP BY grain"

Progress = Callable[[str], None]
Work = Callable[[asyncpg.Connection], Coroutine[object, object, None]]


async def fill(
    dsn: str, large: UUID, now: datetime, *, entries: int, tenants: int, users: int, progress: Progress = lambda _: None
) -> float:
    """Fills the ledger of a migrated database, empty so far, with sixty days that end today; the large tenant is one that the mesh knows.

    Returns the CPU seconds that Postgres spent on it.
    """
    first = now.replace(hour=0, minute=0, second=0, microsecond=0) - (DAYS - 1) * _DAY
    # One void call for fifty that are settled.
    daily = entries * 51 // 50 // DAYS
    async with _sessions(dsn) as sessions:
        admin = sessions[0]
        found = await admin.fetch("SELECT gen_random_uuid() AS id FROM generate_series(2, $1::integer)", tenants)
        ids = [large, *[row["id"] for row in found]]
        indexes = await admin.fetch(LIST_INDEXES, TABLES)
        for index in indexes:
            await admin.execute(_dropped(index))
        progress("calls, entries and sums of days")
        await _shared(sessions, [_filling(ids, first + day * _DAY, day * daily + 1, daily, users) for day in range(DAYS)])
        progress("sums of weeks")
        await admin.execute(WEEKS, ids, timeout=_STATEMENT_SECONDS)
        progress("indexes")
        await _shared(sessions, [_doing(index["definition"]) for index in indexes])
        for index in indexes:
            if index["is_key"]:
                await admin.execute(f"ALTER TABLE metering.{index['table_name']} ADD PRIMARY KEY USING INDEX {index['name']}")
        progress("statistics")
        await _shared(sessions, [_doing(f"VACUUM (ANALYZE) metering.{table}") for table in TABLES])
        await admin.execute("CHECKPOINT", timeout=_STATEMENT_SECONDS)
        return sum(process_cpu_seconds(session.get_server_pid()) for session in sessions)


@asynccontextmanager
async def hurried(admin: asyncpg.Connection) -> AsyncIterator[None]:
    """Lets a whole server load as fast as it can, at the price of its data if the machine dies meanwhile."""
    for name, value in HURRIED.items():
        await admin.execute(f"ALTER SYSTEM SET {name} = '{value}'")
    await admin.execute("SELECT pg_reload_conf()")
    try:
        yield
    finally:
        for name in HURRIED:
            await admin.execute(f"ALTER SYSTEM RESET {name}")
        await admin.execute("SELECT pg_reload_conf()")


async def verify(admin: asyncpg.Connection) -> tuple[dict[str, int], bool]:
    """Returns how many rows there are, and whether the sums of every grain are those of the entries."""
    sizes = await admin.fetchrow(SIZES, timeout=600)
    costs = [row["cost"] for row in await admin.fetch(SUMS_OF_SUMS, timeout=600)]
    return dict(sizes), costs == [await admin.fetchval(SUM_OF_ENTRIES, timeout=600)]


@asynccontextmanager
async def _sessions(dsn: str) -> AsyncIterator[list[asyncpg.Connection]]:
    sessions = [await asyncpg.connect(dsn) for _ in range(SESSIONS)]
    try:
        for session in sessions:
            await session.execute(SESSION)
        yield sessions
    finally:
        for session in sessions:
            await session.close()


async def _shared(sessions: Iterable[asyncpg.Connection], work: list[Work]) -> None:
    left = iter(work)

    async def some(session: asyncpg.Connection) -> None:
        for each in left:
            await each(session)

    async with asyncio.TaskGroup() as group:
        for session in sessions:
            group.create_task(some(session))


def _filling(ids: list[UUID], begin: datetime, first: int, count: int, users: int) -> Work:
    async def work(session: asyncpg.Connection) -> None:
        await session.execute(FILL_DAY, ids, begin, first, first + count - 1, users, timeout=_STATEMENT_SECONDS)

    return work


def _doing(statement: str) -> Work:
    async def work(session: asyncpg.Connection) -> None:
        await session.execute(statement, timeout=_STATEMENT_SECONDS)

    return work


def _dropped(index: asyncpg.Record) -> str:
    if index["is_key"]:
        return f"ALTER TABLE metering.{index['table_name']} DROP CONSTRAINT {index['name']}"
    return f"DROP INDEX metering.{index['name']}"
