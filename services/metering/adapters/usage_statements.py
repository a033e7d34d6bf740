"""The statements behind questions about use. $1 are the tenants; in the service role's transaction policies let one of them be seen.

$2–$5 are the segments: start, end, bucket, grain; $6 the dimensions that tell apart; $7–$13 the filters, NULL where everything counts; $14
and $15 the order; $16 how many rows; $17 whether $18–$27 are a position to go on after; $28–$31 the segments of latencies.
"""

# Tenants that used anything, one look into the index for each: how much they used does not matter.
SELECT_TENANTS = """
WITH RECURSIVE folded AS (
    (SELECT tenant_id FROM metering.usage_rollups ORDER BY tenant_id LIMIT 1)
    UNION ALL
    SELECT (SELECT u.tenant_id FROM metering.usage_rollups u WHERE u.tenant_id > f.tenant_id ORDER BY u.tenant_id LIMIT 1)
    FROM folded f WHERE f.tenant_id IS NOT NULL
)
SELECT tenant_id FROM folded WHERE tenant_id IS NOT NULL
UNION SELECT tenant_id FROM metering.usage_pending
"""
SELECT_OUTSTANDING = """
SELECT clock_timestamp() AS read_time, count(*) AS call_count, coalesce(sum(o.bound_nano_usd), 0)::bigint AS bound_nano_usd
FROM (
    SELECT k.bound_nano_usd
    FROM metering.call_leases l JOIN metering.calls k ON k.tenant_id = $1 AND k.reservation_id = l.reservation_id AND k.state = 1
    WHERE l.tenant_id = $1
    UNION ALL
    SELECT k.bound_nano_usd FROM metering.calls k WHERE k.tenant_id = $1 AND k.unresolved_time IS NOT NULL
) o
"""
# Planned for its very arguments a statement drops what was not asked for. Groups are few: hashed, they need no sort.
PLAN_AS_ASKED = "SET LOCAL plan_cache_mode = force_custom_plan; SET LOCAL enable_sort = off; SET LOCAL jit = off"
_FILTERS = """
    ($7::text[] IS NULL OR {0}.user_name = ANY ($7)) AND ($8::text[] IS NULL OR {0}.feature = ANY ($8))
    AND ($9::text[] IS NULL OR {0}.model = ANY ($9)) AND ($10::text[] IS NULL OR {0}.prompt_version = ANY ($10))
    AND ($11::text[] IS NULL OR {0}.provider = ANY ($11)) AND ($12::text[] IS NULL OR {0}.tier = ANY ($12))
    AND ($13::text[] IS NULL OR {0}.product_unit = ANY ($13))
"""
_NAMES = "tenant_id, user_name, feature, model, prompt_version, provider, tier, product_unit"
_ASKED_NAMES = """
    CASE WHEN 1 = ANY ($6::smallint[]) THEN {0}.tenant_id ELSE '00000000-0000-0000-0000-000000000000'::uuid END AS tenant_id,
    CASE WHEN 2 = ANY ($6::smallint[]) THEN {0}.user_name ELSE '' END AS user_name,
    CASE WHEN 3 = ANY ($6::smallint[]) THEN {0}.feature ELSE '' END AS feature,
    CASE WHEN 4 = ANY ($6::smallint[]) THEN {0}.model ELSE '' END AS model,
    CASE WHEN 5 = ANY ($6::smallint[]) THEN {0}.prompt_version ELSE '' END AS prompt_version,
    CASE WHEN 6 = ANY ($6::smallint[]) THEN {0}.provider ELSE '' END AS provider,
    CASE WHEN 7 = ANY ($6::smallint[]) THEN {0}.tier ELSE '' END AS tier,
    CASE WHEN 8 = ANY ($6::smallint[]) THEN {0}.product_unit ELSE '' END AS product_unit
"""
_MEASURES = (
    "settled, void, unresolved, reconciled, retries, refused, overloaded, failed, cancelled, deadline, lost, other, "
    "input, output, cache_read, cache_write_5m, cache_write_1h, cost, quantity"
)
# What one row of the log, or one call, counts.
_COUNTED = """
    {0}.sign * ({0}.state = 2)::integer, {0}.sign * ({0}.state = 3)::integer,
    {0}.sign * ({0}.state = 4)::integer, {0}.sign * ({0}.state = 5)::integer,
    {0}.sign * ({0}.attempt IS NOT NULL AND {0}.attempt > 1)::integer,
    {0}.sign * coalesce({0}.cause = 1, false)::integer, {0}.sign * coalesce({0}.cause = 2, false)::integer,
    {0}.sign * coalesce({0}.cause = 3, false)::integer, {0}.sign * coalesce({0}.cause = 4, false)::integer,
    {0}.sign * coalesce({0}.cause = 5, false)::integer, {0}.sign * coalesce({0}.cause = 6, false)::integer,
    {0}.sign * coalesce({0}.cause = 7, false)::integer,
    {0}.sign * {0}.input_tokens, {0}.sign * {0}.output_tokens, {0}.sign * {0}.cache_read_tokens, {0}.sign * {0}.cache_write_5m_tokens,
    {0}.sign * {0}.cache_write_1h_tokens, {0}.sign * {0}.cost_nano_usd, {0}.sign * {0}.quantity
"""
# The segments follow each other without a gap: the log's rows find theirs among the starts.
_PENDING = """
    (SELECT p.*, s.bucket FROM asked a JOIN metering.usage_pending p ON p.tenant_id = a.tenant_id
     CROSS JOIN LATERAL (SELECT width_bucket(p.use_time, {starts}::timestamptz[]) AS number) w
     CROSS JOIN LATERAL (SELECT ({buckets}::integer[])[w.number] AS bucket, ({grains}::smallint[])[w.number] AS grain) s
     WHERE w.number > 0 AND p.use_time < ({ends}::timestamptz[])[cardinality({ends}::timestamptz[])] AND s.grain > 0)
"""
_CALLS = """
    (SELECT c.*, s.bucket FROM {segments} s CROSS JOIN asked a
     CROSS JOIN LATERAL (SELECT * FROM metering.counted_use u
                         WHERE u.tenant_id = a.tenant_id AND u.use_time >= s.start_time AND u.use_time < s.end_time OFFSET 0) c
     WHERE s.grain = 0)
"""
# OFFSET 0 keeps each look a look into the index, one for each tenant and segment: in another order all of a tenant's rows are read.
_SUMS = """
    (SELECT u.*, s.bucket FROM {segments} s CROSS JOIN asked a
     CROSS JOIN LATERAL (SELECT * FROM metering.usage_rollups u
                         WHERE u.tenant_id = a.tenant_id AND u.grain = s.grain
                           AND u.start_time >= s.start_time AND u.start_time < s.end_time OFFSET 0) u
     WHERE s.grain > 0)
"""
_GROUPED = f"""
WITH asked AS MATERIALIZED (
    SELECT a.tenant_id FROM unnest($1::uuid[]) AS a (tenant_id)
), segments AS MATERIALIZED (
    SELECT * FROM unnest($2::timestamptz[], $3::timestamptz[], $4::integer[], $5::smallint[]) AS s (start_time, end_time, bucket, grain)
), grouped AS (
    SELECT f.bucket, {_NAMES}, {", ".join(f"sum({name})::bigint AS {name}" for name in _MEASURES.split(", "))}
    FROM (
        SELECT u.bucket, {_ASKED_NAMES.format("u")},
               sum(u.settled_calls) AS settled, sum(u.void_calls) AS void, sum(u.unresolved_calls) AS unresolved,
               sum(u.reconciled_calls) AS reconciled, sum(u.retries) AS retries, sum(u.refused_calls) AS refused,
               sum(u.overloaded_calls) AS overloaded, sum(u.failed_calls) AS failed, sum(u.cancelled_calls) AS cancelled,
               sum(u.deadline_calls) AS deadline, sum(u.lost_calls) AS lost, sum(u.other_calls) AS other,
               sum(u.input_tokens) AS input, sum(u.output_tokens) AS output, sum(u.cache_read_tokens) AS cache_read,
               sum(u.cache_write_5m_tokens) AS cache_write_5m, sum(u.cache_write_1h_tokens) AS cache_write_1h,
               sum(u.cost_nano_usd) AS cost, sum(u.quantity) AS quantity
        FROM {_SUMS.format(segments="segments")} u
        WHERE {_FILTERS.format("u")}
        GROUP BY 1, 2, 3, 4, 5, 6, 7, 8, 9
        UNION ALL
        SELECT p.bucket, {_ASKED_NAMES.format("p")}, {_COUNTED.format("p")}
        FROM {_PENDING.format(starts="$2", ends="$3", buckets="$4", grains="$5")} p
        WHERE {_FILTERS.format("p")}
        UNION ALL
        SELECT c.bucket, {_ASKED_NAMES.format("c")}, {_COUNTED.format("c")}
        FROM {_CALLS.format(segments="segments")} c
        WHERE {_FILTERS.format("c")}
    ) f
    GROUP BY f.bucket, {_NAMES}
    HAVING (sum(settled), sum(void), sum(unresolved), sum(reconciled), sum(quantity)) <> (0, 0, 0, 0, 0)
)
"""  # noqa: S608 - made of the fragments above alone
# A rank rises along the rows; names and buckets decide between rows of one rank. Shares are ranked by millionths.
_RANKED = """
SELECT * FROM (
    SELECT *, CASE WHEN $15::boolean OR $14::integer = 0 THEN 1 ELSE -1 END * coalesce(CASE $14::integer
        WHEN 0 THEN 0
        WHEN 1 THEN cost
        WHEN 2 THEN settled
        WHEN 3 THEN void + unresolved + reconciled
        WHEN 4 THEN 1000000 * (void + unresolved + reconciled) / nullif(settled + void + unresolved + reconciled, 0)
        WHEN 5 THEN retries
        WHEN 6 THEN 1000000 * retries / nullif(settled + void + unresolved + reconciled, 0)
        WHEN 7 THEN input + output + cache_read + cache_write_5m + cache_write_1h
        WHEN 8 THEN 1000000 * cache_read / nullif(input + cache_read + cache_write_5m + cache_write_1h, 0)
        WHEN 9 THEN quantity
        WHEN 10 THEN (1000 * first_token_p95)::bigint
        ELSE (1000 * total_p95)::bigint
    END, -1) AS rank
    FROM {source}
) r
WHERE NOT $17::boolean OR (rank, bucket, tenant_id, user_name, feature, model, prompt_version, provider, tier, product_unit)
                          > ($18::bigint, $19::integer, $20::uuid, $21::text, $22::text, $23::text, $24::text, $25::text, $26::text,
                             $27::text)
ORDER BY rank, bucket, tenant_id, user_name, feature, model, prompt_version, provider, tier, product_unit LIMIT $16::integer
"""
_NO_LATENCIES = """(
    SELECT g.*, 0::bigint AS first_token_count, NULL::float8 AS first_token_p50, NULL::float8 AS first_token_p95,
           NULL::float8 AS first_token_p99,
           0::bigint AS total_count, NULL::float8 AS total_p50, NULL::float8 AS total_p95, NULL::float8 AS total_p99
    FROM grouped g
) q"""
_KINDS = "(VALUES (1::smallint, {0}.first_token_ms), (2::smallint, {0}.total_ms)) AS m (kind, ms)"
_TIMED = f"""
, latency_segments AS MATERIALIZED (
    SELECT * FROM unnest($28::timestamptz[], $29::timestamptz[], $30::integer[], $31::smallint[]) AS s (start_time, end_time, bucket, grain)
), timed AS (
    SELECT bucket, {_NAMES}, kind, scale, sum(calls) AS calls
    FROM (
        SELECT u.bucket, {_ASKED_NAMES.format("u")}, l.kind, l.scale, l.calls
        FROM {_SUMS.format(segments="latency_segments")} u
        CROSS JOIN LATERAL (SELECT l.kind, l.bucket AS scale, l.calls FROM metering.usage_latencies l
                            WHERE l.tenant_id = u.tenant_id AND l.start_time = u.start_time AND l.series = u.series OFFSET 0) l
        WHERE {_FILTERS.format("u")}
        UNION ALL
        SELECT p.bucket, {_ASKED_NAMES.format("p")}, m.kind, metering.latency_bucket(m.ms), p.sign
        FROM {_PENDING.format(starts="$28", ends="$29", buckets="$30", grains="$31")} p CROSS JOIN LATERAL {_KINDS.format("p")}
        WHERE p.state = 2 AND m.ms > 0 AND {_FILTERS.format("p")}
        UNION ALL
        SELECT c.bucket, {_ASKED_NAMES.format("c")}, m.kind, metering.latency_bucket(m.ms), c.sign
        FROM {_CALLS.format(segments="latency_segments")} c CROSS JOIN LATERAL {_KINDS.format("c")}
        WHERE c.state = 2 AND m.ms > 0 AND {_FILTERS.format("c")}
    ) t
    GROUP BY bucket, {_NAMES}, kind, scale HAVING sum(calls) > 0
), climbed AS (
    SELECT *, sum(calls) OVER (PARTITION BY bucket, {_NAMES}, kind ORDER BY scale) AS so_far,
           sum(calls) OVER (PARTITION BY bucket, {_NAMES}, kind) AS whole
    FROM timed
), placed AS (
    SELECT bucket, {_NAMES}, kind, max(whole)::bigint AS whole, min(scale) FILTER (WHERE so_far >= 0.5 * whole) AS p50,
           min(scale) FILTER (WHERE so_far >= 0.95 * whole) AS p95, min(scale) FILTER (WHERE so_far >= 0.99 * whole) AS p99
    FROM climbed GROUP BY bucket, {_NAMES}, kind
)
"""  # noqa: S608 - as above
# The middle of a bucket of the scale: see metering.latency_bucket.
_MIDDLE = "power(1.1::float8, {0}) * 2 / 2.1"
_WITH_LATENCIES = f"""(
    SELECT g.*, coalesce(f.whole, 0) AS first_token_count, {_MIDDLE.format("f.p50")} AS first_token_p50,
           {_MIDDLE.format("f.p95")} AS first_token_p95, {_MIDDLE.format("f.p99")} AS first_token_p99,
           coalesce(e.whole, 0) AS total_count, {_MIDDLE.format("e.p50")} AS total_p50, {_MIDDLE.format("e.p95")} AS total_p95,
           {_MIDDLE.format("e.p99")} AS total_p99
    FROM grouped g
    LEFT JOIN (SELECT * FROM placed WHERE kind = 1) f USING (bucket, {_NAMES})
    LEFT JOIN (SELECT * FROM placed WHERE kind = 2) e USING (bucket, {_NAMES})
) q"""  # noqa: S608 - as above
QUERY = _GROUPED + _RANKED.format(source=_NO_LATENCIES)
QUERY_WITH_LATENCIES = _GROUPED + _TIMED + _RANKED.format(source=_WITH_LATENCIES)
