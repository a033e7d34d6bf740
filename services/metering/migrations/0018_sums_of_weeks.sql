-- More sums of use, so that questions about months read fewer rows: grains 6 the week, 7 the week of one user whatever was used, 8 the week of
-- the tenant whatever was used, 9 the hour of the tenant whatever was used. Weeks begin on Monday, UTC.

-- Nobody folds meanwhile. Writers wait for nothing: they touch none of these tables.
SELECT pg_advisory_xact_lock(7405, 0);

ALTER TABLE usage_rollups DROP CONSTRAINT usage_rollups_grain_check;
ALTER TABLE usage_rollups ADD CONSTRAINT usage_rollups_grain_check CHECK (grain BETWEEN 1 AND 9);
ALTER TABLE usage_rollups DROP CONSTRAINT usage_rollups_check;
ALTER TABLE usage_rollups ADD CONSTRAINT users_have_grains_of_their_own CHECK (grain IN (3, 4, 7) OR user_name = '');

-- Folds rows of the log into the sums, at most so many; returns how many, 0 also when another folds already. Whoever changes the sums in another way
-- takes the same lock.
CREATE OR REPLACE FUNCTION fold_usage(p_most integer) RETURNS integer
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
    ), fine AS (
        SELECT t.tenant_id, g.grain, g.start_time, g.provider, g.model, g.feature, g.user_name, g.prompt_version, g.tier, g.product_unit,
               coalesce(sum(t.sign) FILTER (WHERE t.state = 2), 0) AS settled, coalesce(sum(t.sign) FILTER (WHERE t.state = 3), 0) AS void,
               coalesce(sum(t.sign) FILTER (WHERE t.state = 4), 0) AS unresolved, coalesce(sum(t.sign) FILTER (WHERE t.state = 5), 0) AS reconciled,
               coalesce(sum(t.sign) FILTER (WHERE t.attempt > 1), 0) AS retries,
               coalesce(sum(t.sign) FILTER (WHERE t.cause = 1), 0) AS refused, coalesce(sum(t.sign) FILTER (WHERE t.cause = 2), 0) AS overloaded,
               coalesce(sum(t.sign) FILTER (WHERE t.cause = 3), 0) AS failed, coalesce(sum(t.sign) FILTER (WHERE t.cause = 4), 0) AS cancelled,
               coalesce(sum(t.sign) FILTER (WHERE t.cause = 5), 0) AS deadline, coalesce(sum(t.sign) FILTER (WHERE t.cause = 6), 0) AS lost,
               coalesce(sum(t.sign) FILTER (WHERE t.cause = 7), 0) AS other,
               sum(t.sign * t.input_tokens)::bigint AS input, sum(t.sign * t.output_tokens)::bigint AS output,
               sum(t.sign * t.cache_read_tokens)::bigint AS cache_read,
               sum(t.sign * t.cache_write_5m_tokens)::bigint AS cache_write_5m, sum(t.sign * t.cache_write_1h_tokens)::bigint AS cache_write_1h,
               sum(t.sign * t.cost_nano_usd)::bigint AS cost, sum(t.sign * t.quantity) AS quantity
        FROM taken t
        CROSS JOIN LATERAL (VALUES
            (1::smallint, t.use_hour, t.provider, t.model, t.feature, '', t.prompt_version, t.tier, t.product_unit),
            (3::smallint, t.use_day, t.provider, t.model, t.feature, t.user_name, t.prompt_version, t.tier, t.product_unit)
        ) AS g (grain, start_time, provider, model, feature, user_name, prompt_version, tier, product_unit)
        GROUP BY 1, 2, 3, 4, 5, 6, 7, 8, 9, 10
    ), coarse AS (
        -- Hours and days of users are few by now: the rest is made of them.
        SELECT f.tenant_id, g.grain, g.start_time, g.provider, g.model, g.feature, g.user_name, g.prompt_version, g.tier, g.product_unit,
               sum(f.settled) AS settled, sum(f.void) AS void, sum(f.unresolved) AS unresolved, sum(f.reconciled) AS reconciled,
               sum(f.retries) AS retries, sum(f.refused) AS refused, sum(f.overloaded) AS overloaded, sum(f.failed) AS failed,
               sum(f.cancelled) AS cancelled, sum(f.deadline) AS deadline, sum(f.lost) AS lost, sum(f.other) AS other, sum(f.input) AS input,
               sum(f.output) AS output, sum(f.cache_read) AS cache_read, sum(f.cache_write_5m) AS cache_write_5m,
               sum(f.cache_write_1h) AS cache_write_1h, sum(f.cost) AS cost, sum(f.quantity) AS quantity
        FROM fine f
        CROSS JOIN LATERAL (SELECT date_trunc('day', f.start_time, 'UTC') AS day, date_trunc('week', f.start_time, 'UTC') AS week) d
        CROSS JOIN LATERAL (VALUES
            (1, 2::smallint, d.day, f.provider, f.model, f.feature, '', f.prompt_version, f.tier, f.product_unit),
            (1, 6::smallint, d.week, f.provider, f.model, f.feature, '', f.prompt_version, f.tier, f.product_unit),
            (3, 4::smallint, d.day, '', '', '', f.user_name, '', '', ''),
            (3, 7::smallint, d.week, '', '', '', f.user_name, '', '', ''),
            (1, 5::smallint, d.day, '', '', '', '', '', '', ''),
            (1, 8::smallint, d.week, '', '', '', '', '', '', ''),
            (1, 9::smallint, f.start_time, '', '', '', '', '', '', '')
        ) AS g (made_of, grain, start_time, provider, model, feature, user_name, prompt_version, tier, product_unit)
        WHERE f.grain = g.made_of
        GROUP BY 1, 2, 3, 4, 5, 6, 7, 8, 9, 10
    ), summed AS (
        SELECT * FROM fine UNION ALL SELECT * FROM coarse
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

-- What is there already.
ALTER TABLE usage_rollups NO FORCE ROW LEVEL SECURITY;
INSERT INTO metering.usage_rollups (
    tenant_id, grain, start_time, series, provider, model, feature, user_name, prompt_version, tier, product_unit,
    settled_calls, void_calls, unresolved_calls, reconciled_calls, retries, refused_calls, overloaded_calls, failed_calls, cancelled_calls,
    deadline_calls, lost_calls, other_calls, input_tokens, output_tokens, cache_read_tokens, cache_write_5m_tokens, cache_write_1h_tokens,
    cost_nano_usd, quantity)
SELECT u.tenant_id, g.grain, g.start_time, u.series, u.provider, u.model, u.feature, u.user_name, u.prompt_version, u.tier, u.product_unit,
       sum(u.settled_calls), sum(u.void_calls), sum(u.unresolved_calls), sum(u.reconciled_calls), sum(u.retries), sum(u.refused_calls),
       sum(u.overloaded_calls), sum(u.failed_calls), sum(u.cancelled_calls), sum(u.deadline_calls), sum(u.lost_calls), sum(u.other_calls),
       sum(u.input_tokens), sum(u.output_tokens), sum(u.cache_read_tokens), sum(u.cache_write_5m_tokens), sum(u.cache_write_1h_tokens),
       sum(u.cost_nano_usd), sum(u.quantity)
FROM metering.usage_rollups u
CROSS JOIN LATERAL (VALUES (2, 6::smallint), (4, 7::smallint), (5, 8::smallint)) AS w (made_of, grain)
CROSS JOIN LATERAL (SELECT w.grain, date_trunc('week', u.start_time, 'UTC') AS start_time) g
WHERE u.grain = w.made_of
GROUP BY 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11;
INSERT INTO metering.usage_rollups (
    tenant_id, grain, start_time, series, provider, model, feature, user_name, prompt_version, tier, product_unit,
    settled_calls, void_calls, unresolved_calls, reconciled_calls, retries, refused_calls, overloaded_calls, failed_calls, cancelled_calls,
    deadline_calls, lost_calls, other_calls, input_tokens, output_tokens, cache_read_tokens, cache_write_5m_tokens, cache_write_1h_tokens,
    cost_nano_usd, quantity)
SELECT u.tenant_id, 9, u.start_time, metering.usage_series('', '', '', '', '', '', ''), '', '', '', '', '', '', '',
       sum(u.settled_calls), sum(u.void_calls), sum(u.unresolved_calls), sum(u.reconciled_calls), sum(u.retries), sum(u.refused_calls),
       sum(u.overloaded_calls), sum(u.failed_calls), sum(u.cancelled_calls), sum(u.deadline_calls), sum(u.lost_calls), sum(u.other_calls),
       sum(u.input_tokens), sum(u.output_tokens), sum(u.cache_read_tokens), sum(u.cache_write_5m_tokens), sum(u.cache_write_1h_tokens),
       sum(u.cost_nano_usd), sum(u.quantity)
FROM metering.usage_rollups u WHERE u.grain = 1
GROUP BY 1, 3;
ALTER TABLE usage_rollups FORCE ROW LEVEL SECURITY;
