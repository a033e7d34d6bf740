"""The statements that compare stored figures with the rows behind them: $1 is the tenant, whose transaction is one snapshot.

Each answers one row or more; all rows tell how much was compared and how many figures differ, and the first of those follow, if any.
"""

_GRAINS = "'{1,2,3,4,5}'::smallint[]"
NEXT_TENANT = """
SELECT least(
    (SELECT c.tenant_id FROM metering.calls c WHERE c.tenant_id > $1 ORDER BY c.tenant_id LIMIT 1),
    (SELECT n.tenant_id FROM metering.entries n WHERE n.tenant_id > $1 ORDER BY n.tenant_id LIMIT 1),
    (SELECT u.tenant_id FROM metering.unit_entries u WHERE u.tenant_id > $1 ORDER BY u.tenant_id LIMIT 1),
    (SELECT r.tenant_id FROM metering.usage_rollups r WHERE r.tenant_id > $1 ORDER BY r.tenant_id LIMIT 1),
    (SELECT i.tenant_id FROM metering.invoice_closings i WHERE i.tenant_id > $1 ORDER BY i.tenant_id LIMIT 1)) AS tenant_id
"""
# How many calls the part has, and its last reservation.
SELECT_CALLS = """
SELECT count(*) AS calls, (array_agg(p.reservation_id ORDER BY p.reservation_id DESC))[1] AS last
FROM (SELECT reservation_id FROM metering.calls WHERE tenant_id = $1 AND reservation_id > $2 ORDER BY reservation_id LIMIT $3) p
"""
# Reservations from after $2 to $3. What a call was billed stands in it as the sum of its entries, adjustments and all.
COMPARE_CALLS = """
WITH said AS (
    SELECT reservation_id, input_tokens, output_tokens, cache_read_tokens, cache_write_5m_tokens, cache_write_1h_tokens, cost_nano_usd,
           quantity
    FROM metering.calls WHERE tenant_id = $1 AND reservation_id > $2 AND reservation_id <= $3 AND state IN (2, 5)
), billed AS (
    SELECT reservation_id, sum(input_tokens)::bigint AS input_tokens, sum(output_tokens)::bigint AS output_tokens,
           sum(cache_read_tokens)::bigint AS cache_read_tokens, sum(cache_write_5m_tokens)::bigint AS cache_write_5m_tokens,
           sum(cache_write_1h_tokens)::bigint AS cache_write_1h_tokens, sum(cost_nano_usd)::bigint AS cost_nano_usd,
           NULL::bigint AS quantity
    FROM metering.entries WHERE tenant_id = $1 AND reservation_id > $2 AND reservation_id <= $3 GROUP BY reservation_id
    UNION ALL
    SELECT reservation_id, 0, 0, 0, 0, 0, 0, quantity
    FROM metering.unit_entries WHERE tenant_id = $1 AND reservation_id > $2 AND reservation_id <= $3
), differing AS MATERIALIZED (
    SELECT reservation_id::text AS subject, f.figure, f.stored, f.recomputed
    FROM said s FULL JOIN billed b USING (reservation_id)
    CROSS JOIN LATERAL (VALUES
        ('input_tokens', s.input_tokens, b.input_tokens), ('output_tokens', s.output_tokens, b.output_tokens),
        ('cache_read_tokens', s.cache_read_tokens, b.cache_read_tokens),
        ('cache_write_5m_tokens', s.cache_write_5m_tokens, b.cache_write_5m_tokens),
        ('cache_write_1h_tokens', s.cache_write_1h_tokens, b.cache_write_1h_tokens),
        ('cost_nano_usd', s.cost_nano_usd, b.cost_nano_usd), ('quantity', s.quantity, b.quantity)) AS f (figure, stored, recomputed)
    WHERE f.stored IS DISTINCT FROM f.recomputed
)
SELECT 0::bigint AS compared, t.found, d.subject, d.figure, d.stored, d.recomputed
FROM (SELECT count(*) AS found FROM differing) t
LEFT JOIN (SELECT * FROM differing ORDER BY subject, figure LIMIT $4) d ON true ORDER BY d.subject, d.figure
"""
# The first day, in UTC, at or after $2 on which there is anything to compare.
NEXT_DAY = f"""
SELECT date_trunc('day', least(
    (SELECT min(reserve_time) FROM metering.calls WHERE tenant_id = $1 AND reserve_time >= $2 AND product_unit IS NULL),
    (SELECT min(reserve_time) FROM metering.calls WHERE tenant_id = $1 AND reserve_time >= $2 AND product_unit IS NOT NULL),
    (SELECT min(reserve_time) FROM metering.entries WHERE tenant_id = $1 AND reserve_time >= $2),
    (SELECT min(reserve_time) FROM metering.unit_entries WHERE tenant_id = $1 AND reserve_time >= $2),
    (SELECT min(use_time) FROM metering.usage_pending WHERE tenant_id = $1 AND use_time >= $2),
    (SELECT min(start_time) FROM metering.usage_latencies WHERE tenant_id = $1 AND start_time >= $2),
    (SELECT min(r.start_time) FROM unnest({_GRAINS}) AS g (grain) CROSS JOIN LATERAL (
        SELECT start_time FROM metering.usage_rollups
        WHERE tenant_id = $1 AND grain = g.grain AND start_time >= $2 ORDER BY start_time LIMIT 1) r)), 'UTC') AS day
"""  # noqa: S608 - made of the fragments here alone
_NAMES = "provider, model, feature, user_name, prompt_version, tier, product_unit, event_type"
_COLUMNS = (
    f"sign, use_time, {_NAMES}, state, attempt, cause, input_tokens, output_tokens, cache_read_tokens, cache_write_5m_tokens, "
    "cache_write_1h_tokens, cost_nano_usd, quantity, first_token_ms, total_ms"
)
# Events of the day that are added up; levels are in none of these sums. The time of record of what is near its use is bounded: it
# tells the months to look into.
_EVENTS = """metering.counted_events
    WHERE tenant_id = $1 AND use_time >= $2 AND use_time < $3 AND level IS NULL
      AND (NOT is_near OR record_time BETWEEN $2::timestamptz - interval '1 day' AND $3::timestamptz + interval '1 day')
"""
# What there is of a day, from $2 to before $3: as calls and events have it, and, stored, as the log of use has it that is not folded yet.
_DETAILED = f"""
    SELECT false AS is_stored, {_COLUMNS} FROM metering.counted_use WHERE tenant_id = $1 AND use_time >= $2 AND use_time < $3
    UNION ALL
    SELECT false, {_COLUMNS} FROM {_EVENTS}
    UNION ALL
    SELECT true, {_COLUMNS} FROM metering.usage_pending WHERE tenant_id = $1 AND use_time >= $2 AND use_time < $3 AND level IS NULL
"""  # noqa: S608 - as above
_FIGURES = {
    "settled_calls": "d.sign * (d.state = 2)::integer",
    "void_calls": "d.sign * (d.state = 3)::integer",
    "unresolved_calls": "d.sign * (d.state = 4)::integer",
    "reconciled_calls": "d.sign * (d.state = 5)::integer",
    "retries": "d.sign * coalesce(d.attempt > 1, false)::integer",
    "refused_calls": "d.sign * coalesce(d.cause = 1, false)::integer",
    "overloaded_calls": "d.sign * coalesce(d.cause = 2, false)::integer",
    "failed_calls": "d.sign * coalesce(d.cause = 3, false)::integer",
    "cancelled_calls": "d.sign * coalesce(d.cause = 4, false)::integer",
    "deadline_calls": "d.sign * coalesce(d.cause = 5, false)::integer",
    "lost_calls": "d.sign * coalesce(d.cause = 6, false)::integer",
    "other_calls": "d.sign * coalesce(d.cause = 7, false)::integer",
    "input_tokens": "d.sign * d.input_tokens",
    "output_tokens": "d.sign * d.output_tokens",
    "cache_read_tokens": "d.sign * d.cache_read_tokens",
    "cache_write_5m_tokens": "d.sign * d.cache_write_5m_tokens",
    "cache_write_1h_tokens": "d.sign * d.cache_write_1h_tokens",
    "cost_nano_usd": "d.sign * d.cost_nano_usd",
    "quantity": "d.sign * d.quantity",
}
_STORED = ", ".join(f"coalesce(sum({name}) FILTER (WHERE is_stored), 0)" for name in _FIGURES)
_RECOMPUTED = ", ".join(f"coalesce(sum({name}) FILTER (WHERE NOT is_stored), 0)" for name in _FIGURES)
_TOLD = """
, differing AS MATERIALIZED (
    SELECT c.subject, f.figure, f.stored::bigint AS stored, f.recomputed::bigint AS recomputed
    FROM compared c CROSS JOIN LATERAL unnest(c.figures, c.stored, c.recomputed) AS f (figure, stored, recomputed)
    WHERE f.stored <> f.recomputed
)
SELECT t.compared, t.found, d.subject, d.figure, d.stored, d.recomputed
FROM (SELECT (SELECT count(*) FROM compared) AS compared, (SELECT count(*) FROM differing) AS found) t
LEFT JOIN (SELECT * FROM differing ORDER BY subject, figure LIMIT $4) d ON true ORDER BY d.subject, d.figure
"""
# A subject names no user: operators act for a tenant before they see one. A blanked row has a series of its own, so sums go by names.
COMPARE_SUMS = f"""
WITH detailed AS ({_DETAILED}
), summed AS (
    SELECT d.is_stored, g.grain, g.start_time, {", ".join(f"g.{name}" for name in _NAMES.split(", "))},
           {", ".join(f"{value} AS {name}" for name, value in _FIGURES.items())}
    FROM detailed d CROSS JOIN LATERAL (VALUES
        (1::smallint, date_trunc('hour', d.use_time, 'UTC'), d.provider, d.model, d.feature, '', d.prompt_version, d.tier, d.product_unit,
         d.event_type),
        (2::smallint, $2::timestamptz, d.provider, d.model, d.feature, '', d.prompt_version, d.tier, d.product_unit,
         d.event_type),
        (3::smallint, $2::timestamptz, d.provider, d.model, d.feature, d.user_name, d.prompt_version, d.tier, d.product_unit,
         d.event_type),
        (4::smallint, $2::timestamptz, '', '', '', d.user_name, '', '', '', ''),
        (5::smallint, $2::timestamptz, '', '', '', '', '', '', '', '')) AS g (grain, start_time, {_NAMES})
    UNION ALL
    SELECT true, grain, start_time, {_NAMES}, {", ".join(_FIGURES)}
    FROM metering.usage_rollups WHERE tenant_id = $1 AND grain = ANY ({_GRAINS}) AND start_time >= $2 AND start_time < $3
), compared AS MATERIALIZED (
    SELECT concat_ws(' ', (ARRAY['hour', 'day', 'day of a user by names', 'day of a user', 'day of the tenant'])[grain],
                     to_char(start_time AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24"Z"'), nullif(provider, ''), nullif(model, ''),
                     nullif(feature, ''), nullif(prompt_version, ''), nullif(tier, ''), nullif(product_unit, ''),
                     nullif(event_type, '')) AS subject,
           ARRAY[{", ".join(f"'{name}'" for name in _FIGURES)}] AS figures, ARRAY[{_STORED}] AS stored, ARRAY[{_RECOMPUTED}] AS recomputed
    FROM summed GROUP BY grain, start_time, {_NAMES}
)
{_TOLD}"""  # noqa: S608 - as above
# The series of an erased tenant's latencies are nobody's: what remains comparable is how many calls each bucket of the day has.
COMPARE_LATENCIES = f"""
WITH detailed AS ({_DETAILED}
), summed AS (
    SELECT d.is_stored, m.kind, metering.latency_bucket(m.ms) AS bucket, d.sign::bigint AS calls
    FROM detailed d CROSS JOIN LATERAL (VALUES (1::smallint, d.first_token_ms), (2::smallint, d.total_ms)) AS m (kind, ms)
    WHERE d.state = 2 AND m.ms > 0
    UNION ALL
    SELECT true, kind, bucket, calls FROM metering.usage_latencies WHERE tenant_id = $1 AND start_time >= $2 AND start_time < $3
), compared AS MATERIALIZED (
    SELECT concat_ws(' ', to_char($2 AT TIME ZONE 'UTC', 'YYYY-MM-DD'), CASE kind WHEN 1 THEN 'first token' ELSE 'total' END,
                     bucket) AS subject,
           ARRAY['calls'] AS figures, ARRAY[coalesce(sum(calls) FILTER (WHERE is_stored), 0)] AS stored,
           ARRAY[coalesce(sum(calls) FILTER (WHERE NOT is_stored), 0)] AS recomputed
    FROM summed GROUP BY kind, bucket
)
{_TOLD}"""  # noqa: S608 - as above
# A balance adds up days by the product's unit, which is empty of calls; the entries and events are what was billed.
_BALANCED = ("settled_calls", "input_tokens", "output_tokens", "cache_read_tokens", "cache_write_5m_tokens", "cache_write_1h_tokens",
             "cost_nano_usd", "quantity")  # fmt: skip
COMPARE_BALANCES = f"""
WITH summed AS (
    SELECT true AS is_stored, product_unit, settled_calls + reconciled_calls AS settled_calls, {", ".join(_BALANCED[1:])}
    FROM metering.usage_rollups WHERE tenant_id = $1 AND grain = 2 AND start_time >= $2 AND start_time < $3
    UNION ALL
    SELECT true, product_unit, sign * (state IN (2, 5))::integer, {", ".join(f"sign * {name}" for name in _BALANCED[1:])}
    FROM metering.usage_pending WHERE tenant_id = $1 AND use_time >= $2 AND use_time < $3 AND level IS NULL
    UNION ALL
    SELECT false, '', (number = 1)::integer, {", ".join(_BALANCED[1:-1])}, 0
    FROM metering.entries WHERE tenant_id = $1 AND reserve_time >= $2 AND reserve_time < $3
    UNION ALL
    SELECT false, product_unit, 0, 0, 0, 0, 0, 0, 0, quantity
    FROM metering.unit_entries WHERE tenant_id = $1 AND reserve_time >= $2 AND reserve_time < $3
    UNION ALL
    SELECT false, product_unit, 0, 0, 0, 0, 0, 0, 0, quantity FROM {_EVENTS}
), compared AS MATERIALIZED (
    SELECT concat_ws(' ', to_char($2 AT TIME ZONE 'UTC', 'YYYY-MM-DD'), nullif(product_unit, '')) AS subject,
           ARRAY[{", ".join(f"'{name}'" for name in _BALANCED)}] AS figures,
           ARRAY[{", ".join(f"coalesce(sum({name}) FILTER (WHERE is_stored), 0)" for name in _BALANCED)}] AS stored,
           ARRAY[{", ".join(f"coalesce(sum({name}) FILTER (WHERE NOT is_stored), 0)" for name in _BALANCED)}] AS recomputed
    FROM summed GROUP BY product_unit
)
{_TOLD}"""  # noqa: S608 - as above
