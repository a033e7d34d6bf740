"""A ledger of many entries, filled in SQL with indexes and triggers put aside: calls, their entries, and the sums of both."""

from datetime import datetime, timedelta
from uuid import UUID

import asyncpg

DAYS = 60
# Every tenth entry is the large tenant's; a feature has its model and two versions of its prompt, as in a product.
CALLS = """
INSERT INTO metering.calls (
    tenant_id, reservation_id, state, live, call_id, attempt, open_epoch, reserve_time, open_time, dispatch_deadline, bound_tokens,
    bound_nano_usd, price_version, provider, model, feature, user_name, prompt_version, end_time, settled_epoch, entry_id, input_tokens,
    output_tokens, cache_read_tokens, cache_write_5m_tokens, cache_write_1h_tokens, cost_nano_usd, end_cause, first_token_ms,
    total_ms, tier)
SELECT c.tenant_id, c.id, CASE WHEN c.settled THEN 2 ELSE 3 END, c.settled, c.id, 1 + (h % 40 = 0)::integer, 0, c.time, c.time,
       c.time + interval '1 minute', 6000, 90000000, '2026-01', 'anthropic', c.model, c.feature, 'user-' || h % c.users, c.prompt, c.time,
       CASE WHEN c.settled THEN 0 END, CASE WHEN c.settled THEN c.id END, CASE WHEN c.settled THEN 100 + h % 3000 END,
       CASE WHEN c.settled THEN 10 + h % 700 END, CASE WHEN c.settled THEN h % 900 END, CASE WHEN c.settled THEN 0 END,
       CASE WHEN c.settled THEN 0 END, CASE WHEN c.settled THEN (100 + h % 3000) * 1000 + (10 + h % 700) * 5000 + h % 900 * 100 END,
       CASE WHEN c.settled THEN 'end_turn' ELSE 'provider_529' END, CASE WHEN c.settled THEN 200 + h % 900 ELSE 0 END,
       CASE WHEN c.settled THEN 900 + h % 9000 ELSE 0 END, c.tier
FROM (
    SELECT $2::timestamptz + (n - $3) * $5::interval / ($4 - $3 + 1) AS time, gen_random_uuid() AS id, h, n % 51 <> 0 AS settled,
           ($1::uuid[])[t] AS tenant_id, CASE t WHEN 1 THEN $6::integer ELSE 20 END AS users,
           (ARRAY['chat', 'search', 'summary', 'mail'])[f] AS feature,
           (ARRAY['claude-haiku-4-5', 'claude-haiku-4-5', 'claude-opus-4-6', 'claude-sonnet-4-5'])[f] AS model,
           (ARRAY['chat', 'search', 'summary', 'mail'])[f] || '@' || 1 + h / 4 % 2 AS prompt,
           (ARRAY['enterprise', 'free', 'starter', 'professional'])[1 + t % 4] AS tier
    FROM generate_series($3::bigint, $4::bigint) n
    CROSS JOIN LATERAL (SELECT abs(hashint8(n)::bigint) AS h) a
    CROSS JOIN LATERAL (SELECT CASE WHEN n % 10 = 0 THEN 1 ELSE 2 + h % (cardinality($1::uuid[]) - 1) END::integer AS t,
                               1 + (h % 4)::integer AS f) b
) c
"""
ENTRIES = """
INSERT INTO metering.entries (
    tenant_id, reservation_id, number, entry_id, kind, price_version, provider, model, reserve_time, record_time, epoch, input_tokens,
    output_tokens, cache_read_tokens, cache_write_5m_tokens, cache_write_1h_tokens, total_tokens, cost_nano_usd)
SELECT tenant_id, reservation_id, 1, entry_id, 1, price_version, provider, model, reserve_time, end_time, 0, input_tokens, output_tokens,
       cache_read_tokens, 0, 0, input_tokens + output_tokens + cache_read_tokens, cost_nano_usd
FROM metering.calls WHERE tenant_id IS NOT NULL AND state = 2
"""
# A day of everybody's, as metering.fold_usage adds it up; weeks, and hours of tenants, are made of it.
SUMS = """
INSERT INTO metering.usage_rollups (
    tenant_id, grain, start_time, series, provider, model, feature, user_name, prompt_version, tier, product_unit, settled_calls,
    void_calls, unresolved_calls, reconciled_calls, retries, refused_calls, overloaded_calls, failed_calls, cancelled_calls, deadline_calls,
    lost_calls, other_calls, input_tokens, output_tokens, cache_read_tokens, cache_write_5m_tokens, cache_write_1h_tokens, cost_nano_usd,
    quantity)
SELECT c.tenant_id, g.grain, g.start_time, metering.usage_series(g.provider, g.model, g.feature, g.user_name, g.prompt_version, g.tier, ''),
       g.provider, g.model, g.feature, g.user_name, g.prompt_version, g.tier, '', count(*) FILTER (WHERE c.state = 2),
       count(*) FILTER (WHERE c.state = 3), 0, 0, count(*) FILTER (WHERE c.attempt > 1), 0, count(*) FILTER (WHERE c.cause = 2),
       0, 0, 0, 0, 0,
       sum(c.input_tokens), sum(c.output_tokens), sum(c.cache_read_tokens), 0, 0, sum(c.cost_nano_usd), 0
FROM metering.counted_use c
CROSS JOIN LATERAL (VALUES
    (1::smallint, date_trunc('hour', c.use_time, 'UTC'), c.provider, c.model, c.feature, '', c.prompt_version, c.tier),
    (2::smallint, $1::timestamptz, c.provider, c.model, c.feature, '', c.prompt_version, c.tier),
    (3::smallint, $1::timestamptz, c.provider, c.model, c.feature, c.user_name, c.prompt_version, c.tier),
    (4::smallint, $1::timestamptz, '', '', '', c.user_name, '', ''),
    (5::smallint, $1::timestamptz, '', '', '', '', '', '')
) AS g (grain, start_time, provider, model, feature, user_name, prompt_version, tier)
WHERE c.tenant_id = ANY ($2::uuid[]) AND c.use_time >= $1 AND c.use_time < $1 + interval '24 hours' AND c.product_unit = ''
GROUP BY 1, 2, 3, 4, 5, 6, 7, 8, 9, 10
"""
COARSER = """
INSERT INTO metering.usage_rollups
SELECT u.tenant_id, g.grain, g.start_time,
       metering.usage_series(g.provider, g.model, g.feature, u.user_name, g.prompt_version, g.tier, ''), g.provider, g.model, g.feature,
       u.user_name, g.prompt_version, g.tier, '', sum(settled_calls), sum(void_calls), 0, 0, sum(retries), 0, sum(overloaded_calls), 0, 0,
       0, 0, 0, sum(input_tokens), sum(output_tokens), sum(cache_read_tokens), 0, 0, sum(cost_nano_usd), 0
FROM metering.usage_rollups u
CROSS JOIN LATERAL (SELECT date_trunc('week', u.start_time, 'UTC') AS week) w
CROSS JOIN LATERAL (VALUES
    (2, 6::smallint, w.week, u.provider, u.model, u.feature, u.prompt_version, u.tier),
    (4, 7::smallint, w.week, '', '', '', '', ''),
    (5, 8::smallint, w.week, '', '', '', '', ''),
    (1, 9::smallint, u.start_time, '', '', '', '', '')
) AS g (made_of, grain, start_time, provider, model, feature, prompt_version, tier)
WHERE u.tenant_id = ANY ($1::uuid[]) AND u.grain = g.made_of
GROUP BY 1, 2, 3, 4, 5, 6, 7, 8, 9, 10
"""
LATENCIES = """
INSERT INTO metering.usage_latencies (tenant_id, start_time, series, kind, bucket, calls)
SELECT c.tenant_id, $1::timestamptz, metering.usage_series(c.provider, c.model, c.feature, '', c.prompt_version, c.tier, ''), m.kind,
       metering.latency_bucket(m.ms), count(*)
FROM metering.counted_use c CROSS JOIN LATERAL (VALUES (1::smallint, c.first_token_ms), (2::smallint, c.total_ms)) AS m (kind, ms)
WHERE c.tenant_id = ANY ($2::uuid[]) AND c.use_time >= $1 AND c.use_time < $1 + interval '24 hours' AND c.state = 2 AND m.ms > 0
GROUP BY 1, 2, 3, 4, 5
"""
LIST_INDEXES = """
SELECT i.relname AS name, pg_get_indexdef(i.oid) AS definition, c.conname IS NOT NULL AS is_key, t.relname AS table_name
FROM pg_index x JOIN pg_class i ON i.oid = x.indexrelid JOIN pg_class t ON t.oid = x.indrelid
LEFT JOIN pg_constraint c ON c.conindid = i.oid
WHERE x.indrelid = ANY (ARRAY['metering.calls', 'metering.entries']::regclass[])
"""
SIZES = """
SELECT (SELECT count(*) FROM metering.entries WHERE tenant_id IS NOT NULL) AS entries,
       (SELECT count(*) FROM metering.usage_rollups WHERE tenant_id IS NOT NULL) AS rollup_rows,
       (SELECT count(*) FROM metering.usage_latencies WHERE tenant_id IS NOT NULL) AS latency_rows
"""
SUM_OF_ENTRIES = "SELECT sum(cost_nano_usd)::text FROM metering.entries WHERE tenant_id IS NOT NULL"
SUMS_OF_SUMS = "SELECT DISTINCT sum(cost_nano_usd)::text AS cost FROM metering.usage_rollups WHERE tenant_id IS NOT NULL GROUP BY grain"


async def fill(admin: asyncpg.Connection, large: UUID, now: datetime, *, entries: int, tenants: int, users: int) -> None:
    """Fills the ledger of a migrated database with sixty days that end today; the large tenant is one that the mesh knows."""
    ids = [large, *[row["id"] for row in await admin.fetch("SELECT gen_random_uuid() AS id FROM generate_series(2, $1::integer)", tenants)]]
    first = now.replace(hour=0, minute=0, second=0, microsecond=0) - timedelta(days=DAYS - 1)
    await admin.execute("SET session_replication_role = replica; SET synchronous_commit = off; SET maintenance_work_mem = '512MB'")
    indexes = await admin.fetch(LIST_INDEXES)
    await _drop(admin, indexes)
    # One void call for fifty that are settled.
    daily = entries * 51 // 50 // DAYS
    for day in range(DAYS):
        begin = first + timedelta(days=day)
        await admin.execute(CALLS, ids, begin, day * daily + 1, (day + 1) * daily, timedelta(days=1), users, timeout=600)
    await admin.execute(ENTRIES, timeout=1_800)
    for index in indexes:
        await admin.execute(index["definition"], timeout=1_800)
        if index["is_key"]:
            await admin.execute(f"ALTER TABLE metering.{index['table_name']} ADD PRIMARY KEY USING INDEX {index['name']}")
    await admin.execute("VACUUM (ANALYZE) metering.calls, metering.entries", timeout=1_800)
    for day in range(DAYS):
        for sql in (SUMS, LATENCIES):
            await admin.execute(sql, first + timedelta(days=day), ids, timeout=600)
    await admin.execute(COARSER, ids, timeout=1_800)
    await admin.execute("VACUUM (ANALYZE) metering.usage_rollups, metering.usage_latencies", timeout=600)
    await admin.execute("CHECKPOINT", timeout=600)
    await admin.execute("SET session_replication_role = origin")


async def verify(admin: asyncpg.Connection) -> tuple[dict[str, int], bool]:
    """Returns how many rows there are, and whether the sums of every grain are those of the entries."""
    sizes = await admin.fetchrow(SIZES, timeout=600)
    costs = [row["cost"] for row in await admin.fetch(SUMS_OF_SUMS, timeout=600)]
    return dict(sizes), costs == [await admin.fetchval(SUM_OF_ENTRIES, timeout=600)]


async def _drop(admin: asyncpg.Connection, indexes: list[asyncpg.Record]) -> None:
    for index in indexes:
        if index["is_key"]:
            await admin.execute(f"ALTER TABLE metering.{index['table_name']} DROP CONSTRAINT {index['name']}")
        else:
            await admin.execute(f"DROP INDEX metering.{index['name']}")
