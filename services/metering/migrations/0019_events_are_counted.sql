-- Events of the product are counted too: what is added up, in the sums that there are, by a type's unit and by the type; levels, of which the highest
-- counts, in sums of their own.

-- Nobody folds meanwhile, and nobody records events: those that are there are logged below, and those that come by the trigger.
SELECT pg_advisory_xact_lock(7405, 0);
LOCK TABLE events IN SHARE ROW EXCLUSIVE MODE;

-- Quantities are what products say they are, up to 10^12 each: their sums may be beyond a bigint. `event_type` is "product/type", and empty of what
-- is no event. `level` is that of an event whose type counts the highest; `quantity` is then how many events.
ALTER TABLE usage_pending ALTER COLUMN quantity TYPE numeric, ADD COLUMN event_type text NOT NULL DEFAULT '', ADD COLUMN level bigint;
ALTER TABLE usage_rollups ALTER COLUMN quantity TYPE numeric, ADD COLUMN event_type text NOT NULL DEFAULT '';

-- Without an event it is what it was: sums that are there keep their keys.
CREATE FUNCTION usage_series(
    p_provider text, p_model text, p_feature text, p_user text, p_prompt text, p_tier text, p_unit text, p_event_type text
) RETURNS uuid
LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
    SELECT metering.usage_series(
        p_provider, p_model, p_feature, p_user, p_prompt, p_tier, p_unit || CASE p_event_type WHEN '' THEN '' ELSE E'\x1f' || p_event_type END)
$$;

-- How many events of a level stand: recorded less taken back. A level counts where any does. Grains as in usage_rollups: 1, 2 and 3.
CREATE TABLE usage_levels (
    tenant_id uuid NOT NULL,
    grain smallint NOT NULL CHECK (grain BETWEEN 1 AND 3),
    start_time timestamptz NOT NULL,
    series uuid NOT NULL,
    level bigint NOT NULL,
    feature text NOT NULL,
    user_name text NOT NULL CHECK (grain = 3 OR user_name = ''),
    product_unit text NOT NULL,
    event_type text NOT NULL,
    events numeric NOT NULL,
    PRIMARY KEY (tenant_id, grain, start_time, series, level)
) WITH (fillfactor = 80, autovacuum_vacuum_scale_factor = 0.05, autovacuum_vacuum_cost_delay = 0);

-- Events and reversals with what they count, in the columns of the log. Whoever looks for a time of use bounds the time of record of what
-- `is_near`, as in billable_usage.
CREATE VIEW counted_events WITH (security_invoker = true) AS
SELECT c.tenant_id, 1::smallint AS sign, c.use_time, ''::text AS provider, ''::text AS model, c.feature, c.user_name, ''::text AS prompt_version,
       ''::text AS tier, t.unit AS product_unit, c.product || '/' || c.event_type AS event_type, 0::smallint AS state, NULL::smallint AS attempt,
       NULL::smallint AS cause, 0::bigint AS input_tokens, 0::bigint AS output_tokens, 0::bigint AS cache_read_tokens,
       0::bigint AS cache_write_5m_tokens, 0::bigint AS cache_write_1h_tokens, 0::bigint AS cost_nano_usd,
       CASE WHEN t.aggregation = 1 THEN c.quantity WHEN c.is_reversal THEN -1 ELSE 1 END::numeric AS quantity,
       CASE WHEN t.aggregation = 3 THEN abs(c.quantity) END AS level, 0::bigint AS first_token_ms, 0::bigint AS total_ms, c.record_time, c.is_near
FROM (
    SELECT e.tenant_id, e.occurred_at AS use_time, e.record_time, e.product, e.event_type, e.feature, e.user_name, e.quantity,
           e.reverses IS NOT NULL AS is_reversal, true AS is_near
    FROM events e WHERE e.record_time - e.occurred_at <= interval '1 day' AND e.record_time - e.occurred_at >= interval '-1 day'
    UNION ALL
    SELECT e.tenant_id, e.occurred_at, e.record_time, e.product, e.event_type, e.feature, e.user_name, e.quantity, e.reverses IS NOT NULL, false
    FROM events e WHERE e.record_time - e.occurred_at > interval '1 day' OR e.record_time - e.occurred_at < interval '-1 day'
) c JOIN event_types t ON t.product = c.product AND t.event_type = c.event_type;

-- The same columns, of calls and uses of units.
CREATE OR REPLACE VIEW counted_use WITH (security_invoker = true) AS
SELECT tenant_id, 1::smallint AS sign, reserve_time AS use_time, provider, model, feature, user_name, prompt_version, tier, '' AS product_unit,
       state, attempt, CASE WHEN state IN (3, 4) THEN metering.cause_class(end_cause) END AS cause,
       CASE WHEN state IN (2, 5) THEN input_tokens ELSE 0 END AS input_tokens,
       CASE WHEN state IN (2, 5) THEN output_tokens ELSE 0 END AS output_tokens,
       CASE WHEN state IN (2, 5) THEN cache_read_tokens ELSE 0 END AS cache_read_tokens,
       CASE WHEN state IN (2, 5) THEN cache_write_5m_tokens ELSE 0 END AS cache_write_5m_tokens,
       CASE WHEN state IN (2, 5) THEN cache_write_1h_tokens ELSE 0 END AS cache_write_1h_tokens,
       coalesce(cost_nano_usd, 0) AS cost_nano_usd, 0::bigint AS quantity, first_token_ms, total_ms, ''::text AS event_type,
       NULL::bigint AS level
FROM calls WHERE reserve_time IS NOT NULL AND product_unit IS NULL AND state <> 1
UNION ALL
SELECT tenant_id, 1::smallint, reserve_time, '', '', feature, user_name, '', tier, product_unit, 0::smallint, NULL::smallint, NULL::smallint,
       0, 0, 0, 0, 0, 0, quantity, 0, 0, '', NULL
FROM calls WHERE product_unit IS NOT NULL;

-- Events are logged by the hour, not each by itself: nothing that a sum answers for is cut finer.
CREATE FUNCTION count_recorded_events() RETURNS trigger
LANGUAGE plpgsql SECURITY INVOKER SET search_path = metering, pg_temp AS $$
BEGIN
    INSERT INTO metering.usage_pending (
        tenant_id, sign, use_time, provider, model, feature, user_name, prompt_version, tier, product_unit, event_type, state, input_tokens,
        output_tokens, cache_read_tokens, cache_write_5m_tokens, cache_write_1h_tokens, cost_nano_usd, level, quantity, first_token_ms, total_ms)
    SELECT e.tenant_id, 1, k.use_hour, '', '', e.feature, e.user_name, '', '', t.unit, e.product || '/' || e.event_type, 0, 0, 0, 0, 0, 0, 0,
           k.level, sum(CASE WHEN t.aggregation = 1 THEN e.quantity WHEN e.reverses IS NULL THEN 1 ELSE -1 END), 0, 0
    FROM rows_added e JOIN metering.event_types t ON t.product = e.product AND t.event_type = e.event_type
    CROSS JOIN LATERAL (SELECT date_trunc('hour', e.occurred_at, 'UTC') AS use_hour, CASE WHEN t.aggregation = 3 THEN abs(e.quantity) END AS level) k
    GROUP BY e.tenant_id, k.use_hour, e.feature, e.user_name, t.unit, e.product, e.event_type, k.level;
    RETURN NULL;
END
$$;
CREATE TRIGGER events_are_counted AFTER INSERT ON events REFERENCING NEW TABLE AS rows_added
    FOR EACH STATEMENT EXECUTE FUNCTION count_recorded_events();

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
               g.event_type,
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
            (1::smallint, t.use_hour, t.provider, t.model, t.feature, '', t.prompt_version, t.tier, t.product_unit, t.event_type),
            (3::smallint, t.use_day, t.provider, t.model, t.feature, t.user_name, t.prompt_version, t.tier, t.product_unit, t.event_type)
        ) AS g (grain, start_time, provider, model, feature, user_name, prompt_version, tier, product_unit, event_type)
        WHERE t.level IS NULL
        GROUP BY 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11
    ), coarse AS (
        -- Hours and days of users are few by now: the rest is made of them.
        SELECT f.tenant_id, g.grain, g.start_time, g.provider, g.model, g.feature, g.user_name, g.prompt_version, g.tier, g.product_unit,
               g.event_type,
               sum(f.settled) AS settled, sum(f.void) AS void, sum(f.unresolved) AS unresolved, sum(f.reconciled) AS reconciled,
               sum(f.retries) AS retries, sum(f.refused) AS refused, sum(f.overloaded) AS overloaded, sum(f.failed) AS failed,
               sum(f.cancelled) AS cancelled, sum(f.deadline) AS deadline, sum(f.lost) AS lost, sum(f.other) AS other, sum(f.input) AS input,
               sum(f.output) AS output, sum(f.cache_read) AS cache_read, sum(f.cache_write_5m) AS cache_write_5m,
               sum(f.cache_write_1h) AS cache_write_1h, sum(f.cost) AS cost, sum(f.quantity) AS quantity
        FROM fine f
        CROSS JOIN LATERAL (SELECT date_trunc('day', f.start_time, 'UTC') AS day, date_trunc('week', f.start_time, 'UTC') AS week) d
        CROSS JOIN LATERAL (VALUES
            (1, 2::smallint, d.day, f.provider, f.model, f.feature, '', f.prompt_version, f.tier, f.product_unit, f.event_type),
            (1, 6::smallint, d.week, f.provider, f.model, f.feature, '', f.prompt_version, f.tier, f.product_unit, f.event_type),
            (3, 4::smallint, d.day, '', '', '', f.user_name, '', '', '', ''),
            (3, 7::smallint, d.week, '', '', '', f.user_name, '', '', '', ''),
            (1, 5::smallint, d.day, '', '', '', '', '', '', '', ''),
            (1, 8::smallint, d.week, '', '', '', '', '', '', '', ''),
            (1, 9::smallint, f.start_time, '', '', '', '', '', '', '', '')
        ) AS g (made_of, grain, start_time, provider, model, feature, user_name, prompt_version, tier, product_unit, event_type)
        WHERE f.grain = g.made_of
        GROUP BY 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11
    ), summed AS (
        SELECT * FROM fine UNION ALL SELECT * FROM coarse
    ), rolled AS (
        INSERT INTO metering.usage_rollups AS u (
            tenant_id, grain, start_time, series, provider, model, feature, user_name, prompt_version, tier, product_unit, event_type,
            settled_calls, void_calls,
            unresolved_calls, reconciled_calls, retries, refused_calls, overloaded_calls, failed_calls, cancelled_calls, deadline_calls, lost_calls,
            other_calls, input_tokens, output_tokens, cache_read_tokens, cache_write_5m_tokens, cache_write_1h_tokens, cost_nano_usd, quantity)
        SELECT s.tenant_id, s.grain, s.start_time,
               metering.usage_series(s.provider, s.model, s.feature, s.user_name, s.prompt_version, s.tier, s.product_unit, s.event_type),
               s.provider, s.model,
               s.feature, s.user_name, s.prompt_version, s.tier, s.product_unit, s.event_type, s.settled, s.void, s.unresolved, s.reconciled,
               s.retries, s.refused,
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

-- What is there already.
ALTER TABLE usage_pending NO FORCE ROW LEVEL SECURITY;
ALTER TABLE events NO FORCE ROW LEVEL SECURITY;
INSERT INTO metering.usage_pending (
    tenant_id, sign, use_time, provider, model, feature, user_name, prompt_version, tier, product_unit, event_type, state, input_tokens,
    output_tokens, cache_read_tokens, cache_write_5m_tokens, cache_write_1h_tokens, cost_nano_usd, level, quantity, first_token_ms, total_ms)
SELECT c.tenant_id, 1, k.use_hour, '', '', c.feature, c.user_name, '', '', c.product_unit, c.event_type, 0, 0, 0, 0, 0, 0, 0, c.level,
       sum(c.quantity), 0, 0
FROM metering.counted_events c CROSS JOIN LATERAL (SELECT date_trunc('hour', c.use_time, 'UTC') AS use_hour) k
GROUP BY c.tenant_id, k.use_hour, c.feature, c.user_name, c.product_unit, c.event_type, c.level;
ALTER TABLE usage_pending FORCE ROW LEVEL SECURITY;
ALTER TABLE events FORCE ROW LEVEL SECURITY;

ALTER TABLE usage_levels ENABLE ROW LEVEL SECURITY;
ALTER TABLE usage_levels FORCE ROW LEVEL SECURITY;
CREATE POLICY own_tenant ON usage_levels TO :service
    USING (tenant_id = (SELECT current_setting('app.tenant_id')::uuid)) WITH CHECK (tenant_id = (SELECT current_setting('app.tenant_id')::uuid));
CREATE POLICY every_tenant_read ON usage_levels FOR SELECT TO :jobs USING (true);
CREATE POLICY every_tenant_fold ON usage_levels FOR INSERT TO :jobs WITH CHECK (true);
CREATE POLICY every_tenant_fold_more ON usage_levels FOR UPDATE TO :jobs USING (true) WITH CHECK (true);
-- The service's own updates are those of an erasure, which blanks names.
GRANT SELECT, UPDATE ON usage_levels TO :service;
GRANT SELECT, INSERT, UPDATE ON usage_levels TO :jobs;
GRANT SELECT ON counted_events TO :service, :jobs;
REVOKE ALL ON FUNCTION usage_series(text, text, text, text, text, text, text, text), count_recorded_events FROM PUBLIC;
GRANT EXECUTE ON FUNCTION usage_series(text, text, text, text, text, text, text, text) TO :service, :jobs;
GRANT EXECUTE ON FUNCTION count_recorded_events TO :service;
