-- Sums of use that are ready when they are asked for: a log, and what it adds up to.
--
-- Whatever changes what a tenant used writes what changed into usage_pending, in its own transaction. A job folds the log into the sums, many rows
-- at once. Readers add up both in one statement, so they see every change as soon as it is committed, folded or not, and each once. Writers insert
-- and nothing else: none waits for a row that another has, in whatever order they come, and one job alone changes the sums.
--
-- What a row of `calls` counts is a function of that row (the view counted_use). A change of the row adds what the new one counts and takes away what
-- the old one did; so the sums are right whatever ended the call, by whichever release, and can be worked out anew at any time.
--
-- Grains: 1 the hour, 2 the day, 3 the day of one user, 4 the day of one user whatever was used, 5 the day of the tenant whatever was used; all of
-- UTC, by the time of use. Hours know no users: they would be nearly as many rows as there are calls. Whoever asks for parts of what a sum holds
-- reads the calls of those parts.

-- Why a call ended without a bill, by the word its end was told with: 1 refused by the provider, 2 the provider is overloaded or limits, 3 it
-- failed or was not reached, 4 cancelled, 5 the deadline passed, 6 whoever made the call was lost, 7 anything else.
CREATE FUNCTION cause_class(p_cause text) RETURNS smallint
LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
    SELECT CASE
        WHEN p_cause IN ('provider_429', 'provider_529') THEN 2
        WHEN p_cause LIKE 'provider\_4%' THEN 1
        WHEN p_cause LIKE 'provider\_%' OR p_cause = 'stream_interrupted' THEN 3
        WHEN p_cause = 'cancelled' THEN 4
        WHEN p_cause LIKE 'deadline%' THEN 5
        WHEN p_cause IN ('lease_lapsed', 'fenced') THEN 6
        ELSE 7
    END::smallint
$$;

-- Bucket b holds (1.1^(b-1), 1.1^b] milliseconds: 2 × 1.1^b ÷ 2.1 is within 5 % of any of them.
CREATE FUNCTION latency_bucket(p_ms bigint) RETURNS smallint
LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$ SELECT ceil(ln(p_ms::double precision) / ln(1.1::double precision))::smallint $$;

-- Stands for seven names: they are long, and an index of them would be longer than the table.
CREATE FUNCTION usage_series(p_provider text, p_model text, p_feature text, p_user text, p_prompt text, p_tier text, p_unit text) RETURNS uuid
LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
    SELECT md5(p_provider || E'\x1f' || p_model || E'\x1f' || p_feature || E'\x1f' || p_user || E'\x1f' || p_prompt || E'\x1f' || p_tier
               || E'\x1f' || p_unit)::uuid
$$;

-- `sign` 1: this counts; -1: it does so no longer. `state` is a call's, 0 of what is none.
CREATE TABLE usage_pending (
    tenant_id uuid NOT NULL,
    pending_id bigint GENERATED ALWAYS AS IDENTITY,
    sign smallint NOT NULL CHECK (sign IN (-1, 1)),
    use_time timestamptz NOT NULL,
    provider text NOT NULL,
    model text NOT NULL,
    feature text NOT NULL,
    user_name text NOT NULL,
    prompt_version text NOT NULL,
    tier text NOT NULL,
    product_unit text NOT NULL,
    state smallint NOT NULL,
    attempt smallint,
    cause smallint,
    input_tokens bigint NOT NULL,
    output_tokens bigint NOT NULL,
    cache_read_tokens bigint NOT NULL,
    cache_write_5m_tokens bigint NOT NULL,
    cache_write_1h_tokens bigint NOT NULL,
    cost_nano_usd bigint NOT NULL,
    quantity bigint NOT NULL,
    first_token_ms bigint NOT NULL,
    total_ms bigint NOT NULL,
    PRIMARY KEY (tenant_id, pending_id)
) WITH (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 10000, autovacuum_vacuum_cost_delay = 0);

CREATE TABLE usage_rollups (
    tenant_id uuid NOT NULL,
    grain smallint NOT NULL CHECK (grain BETWEEN 1 AND 5),
    start_time timestamptz NOT NULL,
    series uuid NOT NULL,
    provider text NOT NULL,
    model text NOT NULL,
    feature text NOT NULL,
    user_name text NOT NULL CHECK (grain IN (3, 4) OR user_name = ''),
    prompt_version text NOT NULL,
    tier text NOT NULL,
    product_unit text NOT NULL,
    settled_calls bigint NOT NULL,
    void_calls bigint NOT NULL,
    unresolved_calls bigint NOT NULL,
    reconciled_calls bigint NOT NULL,
    retries bigint NOT NULL,
    refused_calls bigint NOT NULL,
    overloaded_calls bigint NOT NULL,
    failed_calls bigint NOT NULL,
    cancelled_calls bigint NOT NULL,
    deadline_calls bigint NOT NULL,
    lost_calls bigint NOT NULL,
    other_calls bigint NOT NULL,
    input_tokens bigint NOT NULL,
    output_tokens bigint NOT NULL,
    cache_read_tokens bigint NOT NULL,
    cache_write_5m_tokens bigint NOT NULL,
    cache_write_1h_tokens bigint NOT NULL,
    cost_nano_usd bigint NOT NULL,
    quantity bigint NOT NULL,
    PRIMARY KEY (tenant_id, grain, start_time, series)
) WITH (fillfactor = 80, autovacuum_vacuum_scale_factor = 0.05, autovacuum_vacuum_cost_delay = 0);

-- How long settled calls took, a day: how many fell into each bucket. Kinds: 1 to the first token, 2 to the end. The names are those of the day's
-- row of the same series.
CREATE TABLE usage_latencies (
    tenant_id uuid NOT NULL,
    start_time timestamptz NOT NULL,
    series uuid NOT NULL,
    kind smallint NOT NULL CHECK (kind BETWEEN 1 AND 2),
    bucket smallint NOT NULL CHECK (bucket >= 0),
    calls bigint NOT NULL,
    PRIMARY KEY (tenant_id, start_time, series, kind, bucket)
) WITH (fillfactor = 80, autovacuum_vacuum_scale_factor = 0.05, autovacuum_vacuum_cost_delay = 0);

-- Every change of a call, by whatever statement. Open calls count nothing yet, tombstones never did, and names that are blanked change no amount:
-- who blanks them here blanks them in the sums too.
CREATE FUNCTION count_calls() RETURNS trigger
LANGUAGE plpgsql SECURITY INVOKER SET search_path = metering, pg_temp AS $$
BEGIN
    IF current_setting('metering.forgets_names', true) = 'on' THEN
        RETURN NULL;
    END IF;
    INSERT INTO metering.usage_pending (
        tenant_id, sign, use_time, provider, model, feature, user_name, prompt_version, tier, product_unit, state, attempt, cause,
        input_tokens, output_tokens, cache_read_tokens, cache_write_5m_tokens, cache_write_1h_tokens, cost_nano_usd, quantity,
        first_token_ms, total_ms)
    SELECT r.tenant_id, r.sign, r.reserve_time, r.provider, r.model, r.feature, r.user_name, r.prompt_version, r.tier, '', r.state, r.attempt,
           CASE WHEN r.state IN (3, 4) THEN metering.cause_class(r.end_cause) END,
           CASE WHEN r.state IN (2, 5) THEN r.input_tokens ELSE 0 END, CASE WHEN r.state IN (2, 5) THEN r.output_tokens ELSE 0 END,
           CASE WHEN r.state IN (2, 5) THEN r.cache_read_tokens ELSE 0 END, CASE WHEN r.state IN (2, 5) THEN r.cache_write_5m_tokens ELSE 0 END,
           CASE WHEN r.state IN (2, 5) THEN r.cache_write_1h_tokens ELSE 0 END, coalesce(r.cost_nano_usd, 0), 0, r.first_token_ms, r.total_ms
    FROM (
        SELECT (-1)::smallint AS sign, b.tenant_id, b.reserve_time, b.provider, b.model, b.feature, b.user_name, b.prompt_version, b.tier,
               b.product_unit, b.state, b.attempt, b.end_cause, b.input_tokens, b.output_tokens, b.cache_read_tokens, b.cache_write_5m_tokens,
               b.cache_write_1h_tokens, b.cost_nano_usd, b.first_token_ms, b.total_ms
        FROM rows_before b
        UNION ALL
        SELECT 1::smallint, a.tenant_id, a.reserve_time, a.provider, a.model, a.feature, a.user_name, a.prompt_version, a.tier,
               a.product_unit, a.state, a.attempt, a.end_cause, a.input_tokens, a.output_tokens, a.cache_read_tokens, a.cache_write_5m_tokens,
               a.cache_write_1h_tokens, a.cost_nano_usd, a.first_token_ms, a.total_ms
        FROM rows_after a
    ) r
    WHERE r.state <> 1 AND r.reserve_time IS NOT NULL AND r.product_unit IS NULL;
    RETURN NULL;
END
$$;
CREATE TRIGGER calls_are_counted AFTER UPDATE ON calls REFERENCING OLD TABLE AS rows_before NEW TABLE AS rows_after
    FOR EACH STATEMENT EXECUTE FUNCTION count_calls();

-- For who records units: counts them by their time of use, as parallel arrays, in the transaction that records them and under the tenant's shared
-- lock. A quantity that is taken back is below 0.
CREATE FUNCTION count_events(
    p_tenant uuid, p_times timestamptz[], p_units text[], p_quantities bigint[], p_users text[], p_features text[], p_tiers text[]
) RETURNS void
LANGUAGE sql VOLATILE SECURITY INVOKER AS $$
    INSERT INTO metering.usage_pending (
        tenant_id, sign, use_time, provider, model, feature, user_name, prompt_version, tier, product_unit, state, attempt, cause,
        input_tokens, output_tokens, cache_read_tokens, cache_write_5m_tokens, cache_write_1h_tokens, cost_nano_usd, quantity,
        first_token_ms, total_ms)
    SELECT p_tenant, 1, e.use_time, '', '', e.feature, e.user_name, '', e.tier, e.unit, 0, NULL, NULL, 0, 0, 0, 0, 0, 0, e.quantity, 0, 0
    FROM unnest(p_times, p_units, p_quantities, p_users, p_features, p_tiers) AS e (use_time, unit, quantity, user_name, feature, tier)
$$;

-- The names of units stand in `calls`, which is written by the same statement.
CREATE FUNCTION count_units() RETURNS trigger
LANGUAGE plpgsql SECURITY INVOKER SET search_path = metering, pg_temp AS $$
BEGIN
    PERFORM metering.count_events(u.tenant_id, array_agg(u.reserve_time), array_agg(u.product_unit), array_agg(u.quantity),
                                  array_agg(k.user_name), array_agg(k.feature), array_agg(k.tier))
    FROM rows_added u JOIN metering.calls k ON k.tenant_id = u.tenant_id AND k.reservation_id = u.reservation_id
    GROUP BY u.tenant_id;
    RETURN NULL;
END
$$;
CREATE TRIGGER unit_entries_are_counted AFTER INSERT ON unit_entries REFERENCING NEW TABLE AS rows_added
    FOR EACH STATEMENT EXECUTE FUNCTION count_units();

-- Every counted row with what it counts, in the columns of the log. Another source of use is one more branch.
CREATE VIEW counted_use WITH (security_invoker = true) AS
SELECT tenant_id, 1::smallint AS sign, reserve_time AS use_time, provider, model, feature, user_name, prompt_version, tier, '' AS product_unit,
       state, attempt, CASE WHEN state IN (3, 4) THEN metering.cause_class(end_cause) END AS cause,
       CASE WHEN state IN (2, 5) THEN input_tokens ELSE 0 END AS input_tokens,
       CASE WHEN state IN (2, 5) THEN output_tokens ELSE 0 END AS output_tokens,
       CASE WHEN state IN (2, 5) THEN cache_read_tokens ELSE 0 END AS cache_read_tokens,
       CASE WHEN state IN (2, 5) THEN cache_write_5m_tokens ELSE 0 END AS cache_write_5m_tokens,
       CASE WHEN state IN (2, 5) THEN cache_write_1h_tokens ELSE 0 END AS cache_write_1h_tokens,
       coalesce(cost_nano_usd, 0) AS cost_nano_usd, 0::bigint AS quantity, first_token_ms, total_ms
FROM calls WHERE reserve_time IS NOT NULL AND product_unit IS NULL AND state <> 1
UNION ALL
SELECT tenant_id, 1::smallint, reserve_time, '', '', feature, user_name, '', tier, product_unit, 0::smallint, NULL::smallint, NULL::smallint,
       0, 0, 0, 0, 0, 0, quantity, 0, 0
FROM calls WHERE product_unit IS NOT NULL;

-- Folds rows of the log into the sums, at most so many; returns how many, 0 also when another folds already. Whoever changes the sums in another way
-- takes the same lock.
CREATE FUNCTION fold_usage(p_most integer) RETURNS integer
LANGUAGE plpgsql VOLATILE SECURITY INVOKER AS $$
DECLARE
    v_count integer;
BEGIN
    IF NOT pg_try_advisory_xact_lock(7405, 0) THEN
        RETURN 0;
    END IF;
    WITH chosen AS MATERIALIZED (
        SELECT tenant_id, pending_id FROM metering.usage_pending ORDER BY tenant_id, pending_id LIMIT p_most
    ), taken AS MATERIALIZED (
        DELETE FROM metering.usage_pending p USING chosen c WHERE p.tenant_id = c.tenant_id AND p.pending_id = c.pending_id
        RETURNING p.*, date_trunc('hour', p.use_time, 'UTC') AS use_hour, date_trunc('day', p.use_time, 'UTC') AS use_day
    ), summed AS (
        SELECT t.tenant_id, g.grain, g.start_time, g.provider, g.model, g.feature, g.user_name, g.prompt_version, g.tier, g.product_unit,
               coalesce(sum(t.sign) FILTER (WHERE t.state = 2), 0) AS settled, coalesce(sum(t.sign) FILTER (WHERE t.state = 3), 0) AS void,
               coalesce(sum(t.sign) FILTER (WHERE t.state = 4), 0) AS unresolved, coalesce(sum(t.sign) FILTER (WHERE t.state = 5), 0) AS reconciled,
               coalesce(sum(t.sign) FILTER (WHERE t.attempt > 1), 0) AS retries,
               coalesce(sum(t.sign) FILTER (WHERE t.cause = 1), 0) AS refused, coalesce(sum(t.sign) FILTER (WHERE t.cause = 2), 0) AS overloaded,
               coalesce(sum(t.sign) FILTER (WHERE t.cause = 3), 0) AS failed, coalesce(sum(t.sign) FILTER (WHERE t.cause = 4), 0) AS cancelled,
               coalesce(sum(t.sign) FILTER (WHERE t.cause = 5), 0) AS deadline, coalesce(sum(t.sign) FILTER (WHERE t.cause = 6), 0) AS lost,
               coalesce(sum(t.sign) FILTER (WHERE t.cause = 7), 0) AS other,
               sum(t.sign * t.input_tokens) AS input, sum(t.sign * t.output_tokens) AS output, sum(t.sign * t.cache_read_tokens) AS cache_read,
               sum(t.sign * t.cache_write_5m_tokens) AS cache_write_5m, sum(t.sign * t.cache_write_1h_tokens) AS cache_write_1h,
               sum(t.sign * t.cost_nano_usd) AS cost, sum(t.sign * t.quantity) AS quantity
        FROM taken t
        CROSS JOIN LATERAL (VALUES
            (1::smallint, t.use_hour, t.provider, t.model, t.feature, '', t.prompt_version, t.tier, t.product_unit),
            (2::smallint, t.use_day, t.provider, t.model, t.feature, '', t.prompt_version, t.tier, t.product_unit),
            (3::smallint, t.use_day, t.provider, t.model, t.feature, t.user_name, t.prompt_version, t.tier, t.product_unit),
            (4::smallint, t.use_day, '', '', '', t.user_name, '', '', ''),
            (5::smallint, t.use_day, '', '', '', '', '', '', '')
        ) AS g (grain, start_time, provider, model, feature, user_name, prompt_version, tier, product_unit)
        GROUP BY 1, 2, 3, 4, 5, 6, 7, 8, 9, 10
    ), rolled AS (
        INSERT INTO metering.usage_rollups AS u (
            tenant_id, grain, start_time, series, provider, model, feature, user_name, prompt_version, tier, product_unit, settled_calls, void_calls,
            unresolved_calls, reconciled_calls, retries, refused_calls, overloaded_calls, failed_calls, cancelled_calls, deadline_calls, lost_calls,
            other_calls, input_tokens, output_tokens, cache_read_tokens, cache_write_5m_tokens, cache_write_1h_tokens, cost_nano_usd, quantity)
        SELECT s.tenant_id, s.grain, s.start_time,
               metering.usage_series(s.provider, s.model, s.feature, s.user_name, s.prompt_version, s.tier, s.product_unit), s.provider, s.model,
               s.feature, s.user_name, s.prompt_version, s.tier, s.product_unit, s.settled, s.void, s.unresolved, s.reconciled, s.retries, s.refused,
               s.overloaded, s.failed, s.cancelled, s.deadline, s.lost, s.other, s.input, s.output, s.cache_read, s.cache_write_5m,
               s.cache_write_1h, s.cost, s.quantity
        FROM summed s
        ON CONFLICT (tenant_id, grain, start_time, series) DO UPDATE SET
            settled_calls = u.settled_calls + EXCLUDED.settled_calls, void_calls = u.void_calls + EXCLUDED.void_calls,
            unresolved_calls = u.unresolved_calls + EXCLUDED.unresolved_calls, reconciled_calls = u.reconciled_calls + EXCLUDED.reconciled_calls,
            retries = u.retries + EXCLUDED.retries, refused_calls = u.refused_calls + EXCLUDED.refused_calls,
            overloaded_calls = u.overloaded_calls + EXCLUDED.overloaded_calls, failed_calls = u.failed_calls + EXCLUDED.failed_calls,
            cancelled_calls = u.cancelled_calls + EXCLUDED.cancelled_calls, deadline_calls = u.deadline_calls + EXCLUDED.deadline_calls,
            lost_calls = u.lost_calls + EXCLUDED.lost_calls, other_calls = u.other_calls + EXCLUDED.other_calls,
            input_tokens = u.input_tokens + EXCLUDED.input_tokens, output_tokens = u.output_tokens + EXCLUDED.output_tokens,
            cache_read_tokens = u.cache_read_tokens + EXCLUDED.cache_read_tokens,
            cache_write_5m_tokens = u.cache_write_5m_tokens + EXCLUDED.cache_write_5m_tokens,
            cache_write_1h_tokens = u.cache_write_1h_tokens + EXCLUDED.cache_write_1h_tokens,
            cost_nano_usd = u.cost_nano_usd + EXCLUDED.cost_nano_usd, quantity = u.quantity + EXCLUDED.quantity
    ), timed AS (
        INSERT INTO metering.usage_latencies AS l (tenant_id, start_time, series, kind, bucket, calls)
        SELECT t.tenant_id, t.use_day, metering.usage_series(t.provider, t.model, t.feature, '', t.prompt_version, t.tier, t.product_unit), m.kind,
               metering.latency_bucket(m.ms), sum(t.sign)
        FROM taken t CROSS JOIN LATERAL (VALUES (1::smallint, t.first_token_ms), (2::smallint, t.total_ms)) AS m (kind, ms)
        WHERE t.state = 2 AND m.ms > 0
        GROUP BY 1, 2, 3, 4, 5
        ON CONFLICT (tenant_id, start_time, series, kind, bucket) DO UPDATE SET calls = l.calls + EXCLUDED.calls
    )
    SELECT count(*) INTO v_count FROM taken;
    RETURN v_count;
END
$$;

-- What is there already, a tenant's day at a time. Writers wait until it is done.
ALTER TABLE calls NO FORCE ROW LEVEL SECURITY;
DO $$
DECLARE
    v_day record;
BEGIN
    FOR v_day IN
        SELECT k.tenant_id, date_trunc('day', k.reserve_time, 'UTC') AS day FROM metering.calls k
        WHERE k.reserve_time IS NOT NULL AND k.state <> 1 GROUP BY 1, 2 ORDER BY 1, 2
    LOOP
        INSERT INTO metering.usage_pending (
            tenant_id, sign, use_time, provider, model, feature, user_name, prompt_version, tier, product_unit, state, attempt, cause,
            input_tokens, output_tokens, cache_read_tokens, cache_write_5m_tokens, cache_write_1h_tokens, cost_nano_usd, quantity,
            first_token_ms, total_ms)
        SELECT * FROM metering.counted_use c
        WHERE c.tenant_id = v_day.tenant_id AND c.use_time >= v_day.day AND c.use_time < v_day.day + interval '24 hours';
        PERFORM metering.fold_usage(2000000000);
    END LOOP;
END
$$;
ALTER TABLE calls FORCE ROW LEVEL SECURITY;

ALTER TABLE usage_pending ENABLE ROW LEVEL SECURITY;
ALTER TABLE usage_pending FORCE ROW LEVEL SECURITY;
ALTER TABLE usage_rollups ENABLE ROW LEVEL SECURITY;
ALTER TABLE usage_rollups FORCE ROW LEVEL SECURITY;
ALTER TABLE usage_latencies ENABLE ROW LEVEL SECURITY;
ALTER TABLE usage_latencies FORCE ROW LEVEL SECURITY;
CREATE POLICY own_tenant ON usage_pending TO :service
    USING (tenant_id = (SELECT current_setting('app.tenant_id')::uuid)) WITH CHECK (tenant_id = (SELECT current_setting('app.tenant_id')::uuid));
CREATE POLICY own_tenant ON usage_rollups TO :service
    USING (tenant_id = (SELECT current_setting('app.tenant_id')::uuid)) WITH CHECK (tenant_id = (SELECT current_setting('app.tenant_id')::uuid));
CREATE POLICY own_tenant ON usage_latencies TO :service
    USING (tenant_id = (SELECT current_setting('app.tenant_id')::uuid)) WITH CHECK (tenant_id = (SELECT current_setting('app.tenant_id')::uuid));
-- The jobs role counts the calls it sweeps and reconciles, folds for all tenants, and reads for operators, who ask over all of them.
CREATE POLICY every_tenant_read ON usage_pending FOR SELECT TO :jobs USING (true);
CREATE POLICY every_tenant_count ON usage_pending FOR INSERT TO :jobs WITH CHECK (true);
CREATE POLICY every_tenant_fold ON usage_pending FOR DELETE TO :jobs USING (true);
CREATE POLICY every_tenant_read ON usage_rollups FOR SELECT TO :jobs USING (true);
CREATE POLICY every_tenant_fold ON usage_rollups FOR INSERT TO :jobs WITH CHECK (true);
CREATE POLICY every_tenant_fold_more ON usage_rollups FOR UPDATE TO :jobs USING (true) WITH CHECK (true);
CREATE POLICY every_tenant_read ON usage_latencies FOR SELECT TO :jobs USING (true);
CREATE POLICY every_tenant_fold ON usage_latencies FOR INSERT TO :jobs WITH CHECK (true);
CREATE POLICY every_tenant_fold_more ON usage_latencies FOR UPDATE TO :jobs USING (true) WITH CHECK (true);
-- The service's own updates are those of an erasure, which blanks names.
GRANT SELECT, INSERT, UPDATE ON usage_pending TO :service;
GRANT SELECT, UPDATE ON usage_rollups, usage_latencies TO :service;
GRANT SELECT, INSERT, DELETE ON usage_pending TO :jobs;
GRANT SELECT, INSERT, UPDATE ON usage_rollups, usage_latencies TO :jobs;
GRANT SELECT ON counted_use TO :service, :jobs;

REVOKE ALL ON FUNCTION cause_class, latency_bucket, usage_series, count_calls, count_units, count_events, fold_usage FROM PUBLIC;
GRANT EXECUTE ON FUNCTION cause_class, latency_bucket, usage_series, count_calls TO :service, :jobs;
GRANT EXECUTE ON FUNCTION count_units, count_events TO :service;
GRANT EXECUTE ON FUNCTION fold_usage TO :jobs;
