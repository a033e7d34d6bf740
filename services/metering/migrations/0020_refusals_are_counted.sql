-- What the limits refused, which never was a call: counted by the minute, told by whoever asked the limits, and added up as all other use is.

ALTER TABLE usage_pending ADD COLUMN refusal_reason text NOT NULL DEFAULT '', ADD COLUMN refusal_rule text NOT NULL DEFAULT '',
    ADD COLUMN refusals bigint NOT NULL DEFAULT 0;
ALTER TABLE usage_rollups ADD COLUMN refusal_reason text NOT NULL DEFAULT '', ADD COLUMN refusal_rule text NOT NULL DEFAULT '',
    ADD COLUMN refusals bigint NOT NULL DEFAULT 0;

-- Without a refusal it is what it was.
CREATE FUNCTION usage_series(
    p_provider text, p_model text, p_feature text, p_user text, p_prompt text, p_tier text, p_unit text, p_event_type text, p_reason text, p_rule text
) RETURNS uuid
LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
    SELECT metering.usage_series(
        p_provider, p_model, p_feature, p_user, p_prompt, p_tier, p_unit,
        p_event_type || CASE p_reason WHEN '' THEN '' ELSE E'\x1f' || p_reason || E'\x1f' || p_rule END)
$$;

-- How many calls of these names one replica has seen refused in a minute, so far. A replica tells the count again, never the difference: told
-- twice, late or out of order, the highest stands.
CREATE TABLE refusals (
    tenant_id uuid NOT NULL,
    minute timestamptz NOT NULL,
    replica uuid NOT NULL,
    series uuid NOT NULL,
    reason text NOT NULL,
    rule text NOT NULL,
    model text NOT NULL,
    feature text NOT NULL,
    user_name text NOT NULL,
    tier text NOT NULL,
    refusals bigint NOT NULL CHECK (refusals > 0),
    PRIMARY KEY (tenant_id, minute, replica, series)
);
ALTER TABLE refusals ENABLE ROW LEVEL SECURITY;
ALTER TABLE refusals FORCE ROW LEVEL SECURITY;
CREATE POLICY own_tenant ON refusals TO :service
    USING (tenant_id = (SELECT current_setting('app.tenant_id')::uuid)) WITH CHECK (tenant_id = (SELECT current_setting('app.tenant_id')::uuid));
CREATE POLICY every_tenant_read ON refusals FOR SELECT TO :jobs USING (true);
GRANT SELECT, INSERT, UPDATE ON refusals TO :service;
GRANT SELECT ON refusals TO :jobs;

-- Batches are passed, locked and ordered as in 0003. What is more than was known is logged.
CREATE FUNCTION record_refusals(
    p_tenants uuid[], p_first integer[], p_last integer[], p_replica uuid, p_minutes_us bigint[], p_reasons text[], p_rules text[], p_models text[],
    p_features text[], p_users text[], p_tiers text[], p_counts bigint[]
) RETURNS void
LANGUAGE plpgsql VOLATILE SECURITY INVOKER
SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off
AS $$
DECLARE
    v_tenant uuid;
    v_erased boolean;
    a integer;
    z integer;
BEGIN
    FOR i IN 1 .. cardinality(p_tenants) LOOP
        v_tenant := p_tenants[i];
        a := p_first[i];
        z := p_last[i];
        PERFORM set_config('app.tenant_id', v_tenant::text, true);
        PERFORM pg_advisory_xact_lock_shared(metering.tenant_lock(v_tenant));
        v_erased := EXISTS (SELECT FROM metering.erased_tenants e WHERE e.tenant_id = v_tenant);
        WITH told AS (
            SELECT date_trunc('minute', metering.micros(c.minute_us), 'UTC') AS minute, c.reason, n.rule, c.model, n.feature, n.user_name, c.tier,
                   sum(c.count) AS count
            FROM unnest(p_minutes_us[a:z], p_reasons[a:z], p_rules[a:z], p_models[a:z], p_features[a:z], p_users[a:z], p_tiers[a:z], p_counts[a:z])
                 AS c (minute_us, reason, rule, model, feature, user_name, tier, count)
            CROSS JOIN LATERAL (SELECT CASE WHEN v_erased THEN '' ELSE c.rule END AS rule, CASE WHEN v_erased THEN '' ELSE c.feature END AS feature,
                                       CASE WHEN v_erased THEN '' ELSE c.user_name END AS user_name) n
            GROUP BY 1, 2, 3, 4, 5, 6, 7
        ), kept AS (
            INSERT INTO metering.refusals AS r (tenant_id, minute, replica, series, reason, rule, model, feature, user_name, tier, refusals)
            SELECT v_tenant, t.minute, p_replica,
                   metering.usage_series('', t.model, t.feature, t.user_name, '', t.tier, '', '', t.reason, t.rule), t.reason, t.rule, t.model,
                   t.feature, t.user_name, t.tier, t.count
            FROM told t
            ORDER BY 2, 4
            ON CONFLICT (tenant_id, minute, replica, series) DO UPDATE SET refusals = greatest(r.refusals, EXCLUDED.refusals)
            RETURNING new.*, new.refusals - coalesce(old.refusals, 0) AS more
        )
        INSERT INTO metering.usage_pending (
            tenant_id, sign, use_time, provider, model, feature, user_name, prompt_version, tier, product_unit, refusal_reason, refusal_rule, state,
            input_tokens, output_tokens, cache_read_tokens, cache_write_5m_tokens, cache_write_1h_tokens, cost_nano_usd, quantity, refusals,
            first_token_ms, total_ms)
        SELECT k.tenant_id, 1, k.minute, '', k.model, k.feature, k.user_name, '', k.tier, '', k.reason, k.rule, 0, 0, 0, 0, 0, 0, 0, 0, k.more, 0, 0
        FROM kept k WHERE k.more > 0;
    END LOOP;
END
$$;

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
               g.event_type, g.refusal_reason, g.refusal_rule,
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
               sum(t.sign * t.cost_nano_usd)::bigint AS cost, sum(t.sign * t.quantity) AS quantity, sum(t.sign * t.refusals) AS refusals
        FROM taken t
        CROSS JOIN LATERAL (VALUES
            (1::smallint, t.use_hour, t.provider, t.model, t.feature, '', t.prompt_version, t.tier, t.product_unit, t.event_type, t.refusal_reason,
            t.refusal_rule),
            (3::smallint, t.use_day, t.provider, t.model, t.feature, t.user_name, t.prompt_version, t.tier, t.product_unit, t.event_type,
            t.refusal_reason, t.refusal_rule)
        ) AS g (grain, start_time, provider, model, feature, user_name, prompt_version, tier, product_unit, event_type, refusal_reason, refusal_rule)
        WHERE t.level IS NULL
        GROUP BY 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13
    ), coarse AS (
        -- Hours and days of users are few by now: the rest is made of them.
        SELECT f.tenant_id, g.grain, g.start_time, g.provider, g.model, g.feature, g.user_name, g.prompt_version, g.tier, g.product_unit,
               g.event_type, g.refusal_reason, g.refusal_rule,
               sum(f.settled) AS settled, sum(f.void) AS void, sum(f.unresolved) AS unresolved, sum(f.reconciled) AS reconciled,
               sum(f.retries) AS retries, sum(f.refused) AS refused, sum(f.overloaded) AS overloaded, sum(f.failed) AS failed,
               sum(f.cancelled) AS cancelled, sum(f.deadline) AS deadline, sum(f.lost) AS lost, sum(f.other) AS other, sum(f.input) AS input,
               sum(f.output) AS output, sum(f.cache_read) AS cache_read, sum(f.cache_write_5m) AS cache_write_5m,
               sum(f.cache_write_1h) AS cache_write_1h, sum(f.cost) AS cost, sum(f.quantity) AS quantity, sum(f.refusals) AS refusals
        FROM fine f
        CROSS JOIN LATERAL (SELECT date_trunc('day', f.start_time, 'UTC') AS day, date_trunc('week', f.start_time, 'UTC') AS week) d
        CROSS JOIN LATERAL (VALUES
            (1, 2::smallint, d.day, f.provider, f.model, f.feature, '', f.prompt_version, f.tier, f.product_unit, f.event_type, f.refusal_reason,
            f.refusal_rule),
            (1, 6::smallint, d.week, f.provider, f.model, f.feature, '', f.prompt_version, f.tier, f.product_unit, f.event_type, f.refusal_reason,
            f.refusal_rule),
            (3, 4::smallint, d.day, '', '', '', f.user_name, '', '', '', '', '', ''),
            (3, 7::smallint, d.week, '', '', '', f.user_name, '', '', '', '', '', ''),
            (1, 5::smallint, d.day, '', '', '', '', '', '', '', '', '', ''),
            (1, 8::smallint, d.week, '', '', '', '', '', '', '', '', '', ''),
            (1, 9::smallint, f.start_time, '', '', '', '', '', '', '', '', '', '')
        ) AS g (made_of, grain, start_time, provider, model, feature, user_name, prompt_version, tier, product_unit, event_type, refusal_reason,
        refusal_rule)
        WHERE f.grain = g.made_of
        GROUP BY 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13
    ), summed AS (
        SELECT * FROM fine UNION ALL SELECT * FROM coarse
    ), rolled AS (
        INSERT INTO metering.usage_rollups AS u (
            tenant_id, grain, start_time, series, provider, model, feature, user_name, prompt_version, tier, product_unit, event_type,
            refusal_reason, refusal_rule,
            settled_calls, void_calls,
            unresolved_calls, reconciled_calls, retries, refused_calls, overloaded_calls, failed_calls, cancelled_calls, deadline_calls, lost_calls,
            other_calls, input_tokens, output_tokens, cache_read_tokens, cache_write_5m_tokens, cache_write_1h_tokens, cost_nano_usd, quantity,
            refusals)
        SELECT s.tenant_id, s.grain, s.start_time,
               metering.usage_series(s.provider, s.model, s.feature, s.user_name, s.prompt_version, s.tier, s.product_unit, s.event_type,
               s.refusal_reason, s.refusal_rule),
               s.provider, s.model,
               s.feature, s.user_name, s.prompt_version, s.tier, s.product_unit, s.event_type, s.refusal_reason, s.refusal_rule, s.settled, s.void,
               s.unresolved, s.reconciled,
               s.retries, s.refused,
               s.overloaded, s.failed, s.cancelled, s.deadline, s.lost, s.other, s.input, s.output, s.cache_read, s.cache_write_5m,
               s.cache_write_1h, s.cost, s.quantity, s.refusals
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
            cost_nano_usd = u.cost_nano_usd + EXCLUDED.cost_nano_usd, quantity = u.quantity + EXCLUDED.quantity,
            refusals = u.refusals + EXCLUDED.refusals
    ), timed AS (
        INSERT INTO metering.usage_latencies AS l (tenant_id, start_time, series, kind, bucket, calls)
        SELECT t.tenant_id, t.use_day, metering.usage_series(t.provider, t.model, t.feature, '', t.prompt_version, t.tier, t.product_unit), m.kind,
               metering.latency_bucket(m.ms), sum(t.sign)
        FROM taken t CROSS JOIN LATERAL (VALUES (1::smallint, t.first_token_ms), (2::smallint, t.total_ms)) AS m (kind, ms)
        WHERE t.state = 2 AND m.ms > 0
        GROUP BY 1, 2, 3, 4, 5
        ON CONFLICT (tenant_id, start_time, series, kind, bucket) DO UPDATE SET calls = l.calls + EXCLUDED.calls
    ), leveled AS (
        INSERT INTO metering.usage_levels AS l (
            tenant_id, grain, start_time, series, level, feature, user_name, product_unit, event_type, events)
        SELECT t.tenant_id, g.grain, g.start_time, metering.usage_series('', '', t.feature, g.user_name, '', '', t.product_unit, t.event_type),
               t.level, t.feature, g.user_name, t.product_unit, t.event_type, sum(t.sign * t.quantity)
        FROM taken t
        CROSS JOIN LATERAL (VALUES (1::smallint, t.use_hour, ''), (2::smallint, t.use_day, ''), (3::smallint, t.use_day, t.user_name))
                   AS g (grain, start_time, user_name)
        WHERE t.level IS NOT NULL
        GROUP BY 1, 2, 3, 4, 5, 6, 7, 8, 9
        ON CONFLICT (tenant_id, grain, start_time, series, level) DO UPDATE SET events = l.events + EXCLUDED.events
    )
    SELECT count(*) INTO v_count FROM taken;
    RETURN v_count;
END
$$;

REVOKE ALL ON FUNCTION usage_series(text, text, text, text, text, text, text, text, text, text), record_refusals FROM PUBLIC;
GRANT EXECUTE ON FUNCTION usage_series(text, text, text, text, text, text, text, text, text, text) TO :service, :jobs;
GRANT EXECUTE ON FUNCTION record_refusals TO :service;
