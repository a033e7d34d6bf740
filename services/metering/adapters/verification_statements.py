"""The statements that compare stored figures with the rows behind them: $1 is the tenant, whose transaction is one snapshot.

Each answers one row or more; all rows tell how much was compared and how many figures differ, and the first of those follow, if any.
"""

# Of the day and its hours; and of the week.
_GRAINS = "'{1,2,3,4,5,9}'::smallint[]"
_WEEKS = "'{6,7,8}'::smallint[]"
NEXT_TENANT = """
SELECT least(
    (SELECT c.tenant_id FROM metering.calls c WHERE c.tenant_id > $1 ORDER BY c.tenant_id LIMIT 1),
    (SELECT n.tenant_id FROM metering.entries n WHERE n.tenant_id > $1 ORDER BY n.tenant_id LIMIT 1),
    (SELECT u.tenant_id FROM metering.unit_entries u WHERE u.tenant_id > $1 ORDER BY u.tenant_id LIMIT 1),
    (SELECT r.tenant_id FROM metering.usage_rollups r WHERE r.tenant_id > $1 ORDER BY r.tenant_id LIMIT 1),
    (SELECT e.tenant_id FROM metering.events e WHERE e.tenant_id > $1 ORDER BY e.tenant_id LIMIT 1),
    (SELECT s.tenant_id FROM metering.event_sums s WHERE s.tenant_id > $1 ORDER BY s.tenant_id LIMIT 1),
    (SELECT f.tenant_id FROM metering.refusals f WHERE f.tenant_id > $1 ORDER BY f.tenant_id LIMIT 1),
    (SELECT l.tenant_id FROM metering.usage_levels l WHERE l.tenant_id > $1 ORDER BY l.tenant_id LIMIT 1),
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
# Of the same reservations, each call's entries in the order they were recorded.
SELECT_ENTRIES = """
SELECT reservation_id, entry_id, kind, price_version, provider, model, input_tokens, output_tokens, cache_read_tokens,
       cache_write_5m_tokens, cache_write_1h_tokens, cost_nano_usd
FROM metering.entries WHERE tenant_id = $1 AND reservation_id > $2 AND reservation_id <= $3
ORDER BY reservation_id, record_time, number
"""
# Months of which something used from $2 to before $3 is known by its sums alone.
SELECT_SUMMED_MONTHS = """
SELECT to_char(s.month, 'YYYY-MM') AS month FROM metering.event_sums s
WHERE s.tenant_id = $1 AND s.use_time >= $2 AND s.use_time < $3
  AND EXISTS (SELECT FROM metering.dropped_event_months d WHERE d.month = s.month)
UNION
SELECT to_char(minute AT TIME ZONE 'UTC', 'YYYY-MM') FROM metering.refusals
WHERE tenant_id = $1 AND minute >= $2 AND minute < $3 AND replica = 'ffffffff-ffff-ffff-ffff-ffffffffffff'
ORDER BY 1
"""
# The first day, in UTC, at or after $2 on which there is anything to compare; the Monday of a week that has sums and no such day. Of events
# recorded near their use the first one by the key bounds where earlier ones are; the others have an index of their own.
NEXT_DAY = f"""
WITH near AS (
    SELECT record_time FROM metering.events
    WHERE tenant_id = $1 AND record_time >= $2::timestamptz - interval '1 day' AND occurred_at >= $2
      AND record_time - occurred_at <= interval '1 day' AND record_time - occurred_at >= interval '-1 day'
    ORDER BY record_time LIMIT 1
), found AS (
    SELECT date_trunc('day', least(
        (SELECT min(reserve_time) FROM metering.calls WHERE tenant_id = $1 AND reserve_time >= $2 AND product_unit IS NULL),
        (SELECT min(reserve_time) FROM metering.calls WHERE tenant_id = $1 AND reserve_time >= $2 AND product_unit IS NOT NULL),
        (SELECT min(reserve_time) FROM metering.entries WHERE tenant_id = $1 AND reserve_time >= $2),
        (SELECT min(reserve_time) FROM metering.unit_entries WHERE tenant_id = $1 AND reserve_time >= $2),
        (SELECT min(e.occurred_at) FROM near n JOIN metering.events e ON e.tenant_id = $1 AND e.occurred_at >= $2
             AND e.record_time >= n.record_time AND e.record_time <= n.record_time + interval '2 days'),
        (SELECT min(occurred_at) FROM metering.events WHERE tenant_id = $1 AND occurred_at >= $2
             AND (record_time - occurred_at > interval '1 day' OR record_time - occurred_at < interval '-1 day')),
        (SELECT min(use_time) FROM metering.event_sums s WHERE tenant_id = $1 AND use_time >= $2
             AND EXISTS (SELECT FROM metering.dropped_event_months d WHERE d.month = s.month)),
        (SELECT min(minute) FROM metering.refusals WHERE tenant_id = $1 AND minute >= $2),
        (SELECT min(use_time) FROM metering.usage_pending WHERE tenant_id = $1 AND use_time >= $2),
        (SELECT min(start_time) FROM metering.usage_latencies WHERE tenant_id = $1 AND start_time >= $2),
        (SELECT min(l.start_time) FROM unnest('{{1,2,3}}'::smallint[]) AS g (grain) CROSS JOIN LATERAL (
            SELECT start_time FROM metering.usage_levels
            WHERE tenant_id = $1 AND grain = g.grain AND start_time >= $2 ORDER BY start_time LIMIT 1) l),
        (SELECT min(r.start_time) FROM unnest({_GRAINS}) AS g (grain) CROSS JOIN LATERAL (
            SELECT start_time FROM metering.usage_rollups
            WHERE tenant_id = $1 AND grain = g.grain AND start_time >= $2 ORDER BY start_time LIMIT 1) r)), 'UTC') AS day,
        (SELECT min(r.start_time) FROM unnest({_WEEKS}) AS g (grain) CROSS JOIN LATERAL (
            SELECT start_time FROM metering.usage_rollups
            WHERE tenant_id = $1 AND grain = g.grain AND start_time >= $2 ORDER BY start_time LIMIT 1) r) AS week
)
SELECT CASE WHEN day < week + interval '7 days' THEN day ELSE coalesce(week, day) END AS day FROM found
"""  # noqa: S608 - made of the fragments here alone
_NAMES = "provider, model, feature, user_name, prompt_version, tier, product_unit, event_type, refusal_reason, refusal_rule"
_USED = (
    "sign, use_time, provider, model, feature, user_name, prompt_version, tier, product_unit, event_type, state, attempt, cause, "
    "input_tokens, output_tokens, cache_read_tokens, cache_write_5m_tokens, cache_write_1h_tokens, cost_nano_usd, quantity, level, "
    "first_token_ms, total_ms"
)
# What there is of a day, from $2 to before $3: as calls, events and counts of refusals have it, and, stored, as the log of use has it
# that is not folded yet.
_DETAILED = f"""
    SELECT false AS is_stored, {_USED}, '' AS refusal_reason, '' AS refusal_rule, 0::bigint AS refusals
    FROM metering.counted_use WHERE tenant_id = $1 AND use_time >= $2 AND use_time < $3
    UNION ALL
    SELECT false, {_USED}, '', '', 0 FROM metering.counted_events
    WHERE tenant_id = $1 AND use_time >= $2 AND use_time < $3
      AND (NOT is_near OR record_time >= $2::timestamptz - interval '1 day' AND record_time < $3::timestamptz + interval '1 day')
    UNION ALL
    SELECT false, 1, minute, '', model, feature, user_name, '', tier, '', '', 0, NULL, NULL, 0, 0, 0, 0, 0, 0, 0, NULL,
           0, 0, reason, rule, refusals
    FROM metering.refusals WHERE tenant_id = $1 AND minute >= $2 AND minute < $3
    UNION ALL
    SELECT true, {_USED}, refusal_reason, refusal_rule, refusals
    FROM metering.usage_pending WHERE tenant_id = $1 AND use_time >= $2 AND use_time < $3
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
    "refusals": "d.sign * d.refusals",
}
_STORED = ", ".join(f"coalesce(sum({name}) FILTER (WHERE is_stored), 0)" for name in _FIGURES)
_RECOMPUTED = ", ".join(f"coalesce(sum({name}) FILTER (WHERE NOT is_stored), 0)" for name in _FIGURES)
_TOLD = """
, differing AS MATERIALIZED (
    SELECT c.subject, f.figure, f.stored::text AS stored, f.recomputed::text AS recomputed
    FROM compared c CROSS JOIN LATERAL unnest(c.figures, c.stored, c.recomputed) AS f (figure, stored, recomputed)
    WHERE f.stored <> f.recomputed
)
SELECT t.compared, t.found, d.subject, d.figure, d.stored, d.recomputed
FROM (SELECT (SELECT count(*) FROM compared) AS compared, (SELECT count(*) FROM differing) AS found) t
LEFT JOIN (SELECT * FROM differing ORDER BY subject, figure LIMIT $4) d ON true ORDER BY d.subject, d.figure
"""
# A subject names no user: operators act for a tenant before they see one. A blanked row has a series of its own, so sums go by names.
_SUBJECT = ", ".join(f"nullif({name}, '')" for name in _NAMES.split(", ") if name != "user_name")
_COMPARED = f"""
    SELECT concat_ws(' ', (ARRAY['hour', 'day', 'day of a user by names', 'day of a user', 'day of the tenant', 'week', 'week of a user',
                                 'week of the tenant', 'hour of the tenant'])[grain],
                     to_char(start_time AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24"Z"'), {_SUBJECT}) AS subject,
           ARRAY[{", ".join(f"'{name}'" for name in _FIGURES)}] AS figures, ARRAY[{_STORED}]::numeric[] AS stored,
           ARRAY[{_RECOMPUTED}]::numeric[] AS recomputed
    FROM summed GROUP BY grain, start_time, {_NAMES}
"""  # noqa: S608 - as above
_OF_D = ", ".join(f"d.{name}" for name in _NAMES.split(", "))
_OF_D_BUT_USER = _OF_D.replace("d.user_name", "''")
# What has a level is no amount: it has sums of its own.
COMPARE_SUMS = f"""
WITH detailed AS ({_DETAILED}
), summed AS (
    SELECT d.is_stored, g.grain, g.start_time, {", ".join(f"g.{name}" for name in _NAMES.split(", "))},
           {", ".join(f"{value} AS {name}" for name, value in _FIGURES.items())}
    FROM detailed d CROSS JOIN LATERAL (VALUES
        (1::smallint, date_trunc('hour', d.use_time, 'UTC'), {_OF_D_BUT_USER}),
        (2::smallint, $2::timestamptz, {_OF_D_BUT_USER}),
        (3::smallint, $2::timestamptz, {_OF_D}),
        (4::smallint, $2::timestamptz, '', '', '', d.user_name, '', '', '', '', '', ''),
        (5::smallint, $2::timestamptz, '', '', '', '', '', '', '', '', '', ''),
        (9::smallint, date_trunc('hour', d.use_time, 'UTC'), '', '', '', '', '', '', '', '', '', '')) AS g (grain, start_time, {_NAMES})
    WHERE d.level IS NULL
    UNION ALL
    SELECT true, grain, start_time, {_NAMES}, {", ".join(_FIGURES)}
    FROM metering.usage_rollups WHERE tenant_id = $1 AND grain = ANY ({_GRAINS}) AND start_time >= $2 AND start_time < $3
), compared AS MATERIALIZED ({_COMPARED})
{_TOLD}"""  # noqa: S608 - as above
# From $2, a Monday, to before $3: anew from what is behind the days, so that a wrong day is not told as a wrong week.
COMPARE_WEEKS = f"""
WITH detailed AS ({_DETAILED}
), summed AS (
    SELECT d.is_stored, g.grain, $2::timestamptz AS start_time, {", ".join(f"g.{name}" for name in _NAMES.split(", "))},
           {", ".join(f"{value} AS {name}" for name, value in _FIGURES.items())}
    FROM detailed d CROSS JOIN LATERAL (VALUES
        (6::smallint, {_OF_D_BUT_USER}),
        (7::smallint, '', '', '', d.user_name, '', '', '', '', '', ''),
        (8::smallint, '', '', '', '', '', '', '', '', '', '')) AS g (grain, {_NAMES})
    WHERE d.level IS NULL
    UNION ALL
    SELECT true, grain, start_time, {_NAMES}, {", ".join(_FIGURES)}
    FROM metering.usage_rollups WHERE tenant_id = $1 AND grain = ANY ({_WEEKS}) AND start_time >= $2 AND start_time < $3
), compared AS MATERIALIZED ({_COMPARED})
{_TOLD}"""  # noqa: S608 - as above
# How many events of each level stand.
COMPARE_LEVELS = f"""
WITH detailed AS ({_DETAILED}
), summed AS (
    SELECT d.is_stored, g.grain, g.start_time, d.feature, g.user_name, d.product_unit, d.event_type, d.level, d.sign * d.quantity AS events
    FROM detailed d CROSS JOIN LATERAL (VALUES
        (1::smallint, date_trunc('hour', d.use_time, 'UTC'), ''), (2::smallint, $2::timestamptz, ''),
        (3::smallint, $2::timestamptz, d.user_name)) AS g (grain, start_time, user_name)
    WHERE d.level IS NOT NULL
    UNION ALL
    SELECT true, grain, start_time, feature, user_name, product_unit, event_type, level, events
    FROM metering.usage_levels WHERE tenant_id = $1 AND grain = ANY ('{{1,2,3}}'::smallint[]) AND start_time >= $2 AND start_time < $3
), compared AS MATERIALIZED (
    SELECT concat_ws(' ', (ARRAY['hour', 'day', 'day of a user by names'])[grain],
                     to_char(start_time AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24"Z"'), nullif(feature, ''), product_unit,
                     event_type, 'level', level) AS subject,
           ARRAY['events'] AS figures, ARRAY[coalesce(sum(events) FILTER (WHERE is_stored), 0)] AS stored,
           ARRAY[coalesce(sum(events) FILTER (WHERE NOT is_stored), 0)] AS recomputed
    FROM summed GROUP BY grain, start_time, feature, user_name, product_unit, event_type, level
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
# A balance adds up days by the product's unit, which is empty of calls; the entries are what was billed, beside the events
# that are added up; levels are not.
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
    SELECT false, product_unit, 0, 0, 0, 0, 0, 0, 0, quantity
    FROM metering.counted_events WHERE tenant_id = $1 AND use_time >= $2 AND use_time < $3 AND level IS NULL
      AND (NOT is_near OR record_time >= $2::timestamptz - interval '1 day' AND record_time < $3::timestamptz + interval '1 day')
), compared AS MATERIALIZED (
    SELECT concat_ws(' ', to_char($2 AT TIME ZONE 'UTC', 'YYYY-MM-DD'), nullif(product_unit, '')) AS subject,
           ARRAY[{", ".join(f"'{name}'" for name in _BALANCED)}] AS figures,
           ARRAY[{", ".join(f"coalesce(sum({name}) FILTER (WHERE is_stored), 0)" for name in _BALANCED)}] AS stored,
           ARRAY[{", ".join(f"coalesce(sum({name}) FILTER (WHERE NOT is_stored), 0)" for name in _BALANCED)}] AS recomputed
    FROM summed GROUP BY product_unit
)
{_TOLD}"""  # noqa: S608 - as above
