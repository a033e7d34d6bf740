-- Beginning an epoch with the sums the limits ask for: any unit, over any period, of the tenant, its users, its features. See 0003 and 0005.
--
-- begin_epoch stays beside it for as long as replicas of the release before call it.

-- By the time of reservation. No column of these changes after its row was written, so settling stays a heap-only update; the names change
-- once, when a tenant is erased.
CREATE INDEX calls_by_reserve_time ON calls (tenant_id, reserve_time) WHERE reserve_time IS NOT NULL AND product_unit IS NULL;
CREATE INDEX units_by_reserve_time ON calls (tenant_id, reserve_time) INCLUDE (product_unit, quantity, user_name, feature)
    WHERE product_unit IS NOT NULL;

-- Cuts overlapping periods into the spans between their bounds, and leaves out what is in no period: whoever adds up span by span reads every
-- row once, however many periods it belongs to.
CREATE FUNCTION spans(p_starts timestamptz[], p_ends timestamptz[]) RETURNS TABLE (start_time timestamptz, end_time timestamptz)
LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
    SELECT c.start_time, c.end_time
    FROM (SELECT b.bound AS start_time, lead(b.bound) OVER (ORDER BY b.bound) AS end_time
          FROM (SELECT unnest(p_starts) AS bound UNION SELECT unnest(p_ends)) b) c
    WHERE EXISTS (SELECT FROM unnest(p_starts, p_ends) AS p (start_time, end_time)
                  WHERE p.start_time <= c.start_time AND c.end_time <= p.end_time)
$$;

-- What calls reserved in each period used, by the contract's LimitUnit (1 requests, 2 tokens, 3 nano-USD, 5 retries) and LimitScope (1 tenant,
-- 2 user, 3 feature, 4 user and feature). Open and unresolved calls are not in it: they are told one by one. Void ones used nothing and remain
-- requests. Tombstones were never calls.
CREATE FUNCTION sums_of_calls(p_tenant uuid, p_units smallint[], p_scopes smallint[], p_start_us bigint[], p_end_us bigint[])
RETURNS TABLE (period integer, user_name text, feature text, amount bigint)
LANGUAGE plpgsql STABLE SECURITY INVOKER
SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off
AS $$
#variable_conflict use_column
BEGIN
    -- The tenant's tokens and money are in the entries, whose index answers alone.
    RETURN QUERY
    WITH wanted AS MATERIALIZED (
        SELECT w.n::integer - 1 AS period, w.unit, metering.micros(w.start_us) AS start_time, metering.micros(w.end_us) AS end_time
        FROM unnest(p_units, p_scopes, p_start_us, p_end_us) WITH ORDINALITY AS w (unit, scope, start_us, end_us, n)
        WHERE w.unit IN (2, 3) AND w.scope = 1
    ), parts AS MATERIALIZED (
        SELECT s.start_time, e.tokens, e.nano_usd
        FROM metering.spans(ARRAY(SELECT w.start_time FROM wanted w), ARRAY(SELECT w.end_time FROM wanted w)) s
        CROSS JOIN LATERAL (
            SELECT sum(n.total_tokens) AS tokens, sum(n.cost_nano_usd) AS nano_usd FROM metering.entries n
            WHERE n.tenant_id = p_tenant AND n.reserve_time >= s.start_time AND n.reserve_time < s.end_time) e
    )
    SELECT w.period, ''::text, ''::text, sum(CASE w.unit WHEN 2 THEN p.tokens ELSE p.nano_usd END)::bigint AS total
    FROM wanted w JOIN parts p ON p.start_time >= w.start_time AND p.start_time < w.end_time
    GROUP BY w.period HAVING sum(CASE w.unit WHEN 2 THEN p.tokens ELSE p.nano_usd END) > 0;

    RETURN QUERY
    WITH wanted AS MATERIALIZED (
        SELECT w.n::integer - 1 AS period, w.unit, w.scope IN (2, 4) AS by_user, w.scope IN (3, 4) AS by_feature,
               metering.micros(w.start_us) AS start_time, metering.micros(w.end_us) AS end_time
        FROM unnest(p_units, p_scopes, p_start_us, p_end_us) WITH ORDINALITY AS w (unit, scope, start_us, end_us, n)
        WHERE w.unit IN (1, 5) OR (w.unit IN (2, 3) AND w.scope > 1)
    ), parts AS MATERIALIZED (
        SELECT s.start_time, c.user_name, c.feature, c.requests, c.retries, c.tokens, c.nano_usd
        FROM metering.spans(ARRAY(SELECT w.start_time FROM wanted w), ARRAY(SELECT w.end_time FROM wanted w)) s
        CROSS JOIN LATERAL (
            SELECT k.user_name, k.feature, count(*) FILTER (WHERE k.attempt = 1) AS requests, count(*) FILTER (WHERE k.attempt > 1) AS retries,
                   sum(k.input_tokens + k.output_tokens + k.cache_read_tokens + k.cache_write_5m_tokens + k.cache_write_1h_tokens) AS tokens,
                   sum(k.cost_nano_usd) AS nano_usd
            FROM metering.calls k
            WHERE k.tenant_id = p_tenant AND k.reserve_time >= s.start_time AND k.reserve_time < s.end_time
              AND k.product_unit IS NULL AND k.state IN (2, 3, 5)
            GROUP BY k.user_name, k.feature) c
    ), amounts AS (
        SELECT w.period, CASE WHEN w.by_user THEN p.user_name ELSE '' END AS user_name, CASE WHEN w.by_feature THEN p.feature ELSE '' END AS feature,
               CASE w.unit WHEN 1 THEN p.requests WHEN 2 THEN p.tokens WHEN 3 THEN p.nano_usd ELSE p.retries END AS amount
        FROM wanted w JOIN parts p ON p.start_time >= w.start_time AND p.start_time < w.end_time
        WHERE (NOT w.by_user OR p.user_name <> '') AND (NOT w.by_feature OR p.feature <> '')
    )
    SELECT a.period, a.user_name, a.feature, sum(a.amount)::bigint FROM amounts a
    GROUP BY a.period, a.user_name, a.feature HAVING sum(a.amount) > 0;
END
$$;

-- As sums_of_calls, of units of the product; p_product_units[i] is NULL for a period that counts something else.
CREATE FUNCTION sums_of_units(p_tenant uuid, p_product_units text[], p_scopes smallint[], p_start_us bigint[], p_end_us bigint[])
RETURNS TABLE (period integer, user_name text, feature text, amount bigint)
LANGUAGE plpgsql STABLE SECURITY INVOKER
SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off
AS $$
#variable_conflict use_column
BEGIN
    RETURN QUERY
    WITH wanted AS MATERIALIZED (
        SELECT w.n::integer - 1 AS period, w.unit, w.scope IN (2, 4) AS by_user, w.scope IN (3, 4) AS by_feature,
               metering.micros(w.start_us) AS start_time, metering.micros(w.end_us) AS end_time
        FROM unnest(p_product_units, p_scopes, p_start_us, p_end_us) WITH ORDINALITY AS w (unit, scope, start_us, end_us, n)
        WHERE w.unit IS NOT NULL
    ), parts AS MATERIALIZED (
        SELECT s.start_time, u.product_unit, u.user_name, u.feature, u.quantity
        FROM metering.spans(ARRAY(SELECT w.start_time FROM wanted w), ARRAY(SELECT w.end_time FROM wanted w)) s
        CROSS JOIN LATERAL (
            SELECT k.product_unit, k.user_name, k.feature, sum(k.quantity) AS quantity
            FROM metering.calls k
            WHERE k.tenant_id = p_tenant AND k.reserve_time >= s.start_time AND k.reserve_time < s.end_time AND k.product_unit IS NOT NULL
              AND k.product_unit = ANY (p_product_units)
            GROUP BY k.product_unit, k.user_name, k.feature) u
    ), amounts AS (
        SELECT w.period, CASE WHEN w.by_user THEN p.user_name ELSE '' END AS user_name, CASE WHEN w.by_feature THEN p.feature ELSE '' END AS feature,
               p.quantity
        FROM wanted w JOIN parts p ON p.start_time >= w.start_time AND p.start_time < w.end_time AND p.product_unit = w.unit
        WHERE (NOT w.by_user OR p.user_name <> '') AND (NOT w.by_feature OR p.feature <> '')
    )
    SELECT a.period, a.user_name, a.feature, sum(a.quantity)::bigint FROM amounts a GROUP BY a.period, a.user_name, a.feature;
END
$$;

-- Sections: 0 the epoch (in `tokens`) and the snapshot's time, 1 recent calls and uses of units, 2 outstanding calls, 3 sums (in `tokens`) by
-- period. The exclusive lock is a statement of its own before any read, for the reason told in 0005.
CREATE FUNCTION begin_counted_epoch(
    p_tenant uuid, p_recent interval, p_units smallint[], p_product_units text[], p_scopes smallint[], p_start_us bigint[], p_end_us bigint[]
) RETURNS TABLE (section smallint, reservation_id uuid, state smallint, at_time timestamptz, tokens bigint, cost_nano_usd bigint, user_name text,
                 feature text, attempt smallint, product_unit text, quantity bigint, period integer)
LANGUAGE plpgsql VOLATILE SECURITY INVOKER
SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off
AS $$
#variable_conflict use_column
DECLARE
    v_epoch bigint;
    v_now timestamptz;
    v_since timestamptz;
BEGIN
    PERFORM set_config('app.tenant_id', p_tenant::text, true);
    PERFORM pg_advisory_xact_lock(metering.tenant_lock(p_tenant));
    v_now := clock_timestamp();
    -- The limits look back by their own clock: half a minute is allowed for the two to differ. What their window has left, they drop.
    v_since := v_now - p_recent - interval '30 seconds';
    INSERT INTO metering.tenant_epochs AS e (tenant_id, epoch, begin_time) VALUES (p_tenant, 1, v_now)
    ON CONFLICT (tenant_id) DO UPDATE SET epoch = e.epoch + 1, begin_time = v_now
    RETURNING e.epoch INTO v_epoch;
    RETURN QUERY SELECT 0::smallint, NULL::uuid, NULL::smallint, v_now, v_epoch, NULL::bigint, NULL::text, NULL::text, NULL::smallint,
                        NULL::text, NULL::bigint, NULL::integer;

    RETURN QUERY
    SELECT 1::smallint, k.reservation_id, k.state, k.reserve_time,
           coalesce(k.input_tokens + k.output_tokens + k.cache_read_tokens + k.cache_write_5m_tokens + k.cache_write_1h_tokens, 0),
           coalesce(k.cost_nano_usd, 0), k.user_name, k.feature, k.attempt, NULL::text, NULL::bigint, NULL::integer
    FROM metering.calls k
    WHERE k.tenant_id = p_tenant AND k.reserve_time > v_since AND k.product_unit IS NULL AND k.state IN (2, 3, 5)
    UNION ALL
    SELECT 1::smallint, k.reservation_id, k.state, k.reserve_time, 0, 0, k.user_name, k.feature, NULL::smallint, k.product_unit, k.quantity,
           NULL::integer
    FROM metering.calls k
    WHERE k.tenant_id = p_tenant AND k.reserve_time > v_since AND k.product_unit IS NOT NULL;

    RETURN QUERY
    SELECT 2::smallint, k.reservation_id, k.state, k.reserve_time, k.bound_tokens, k.bound_nano_usd, k.user_name, k.feature, k.attempt,
           NULL::text, NULL::bigint, NULL::integer
    FROM metering.call_leases l
    JOIN metering.calls k ON k.tenant_id = p_tenant AND k.reservation_id = l.reservation_id AND k.state = 1
    WHERE l.tenant_id = p_tenant
    UNION ALL
    SELECT 2::smallint, k.reservation_id, k.state, k.reserve_time, k.bound_tokens, k.bound_nano_usd, k.user_name, k.feature, k.attempt,
           NULL::text, NULL::bigint, NULL::integer
    FROM metering.calls k
    WHERE k.tenant_id = p_tenant AND k.unresolved_time IS NOT NULL;

    RETURN QUERY
    SELECT 3::smallint, NULL::uuid, NULL::smallint, NULL::timestamptz, s.amount, NULL::bigint, s.user_name, s.feature, NULL::smallint, NULL::text,
           NULL::bigint, s.period
    FROM metering.sums_of_calls(p_tenant, p_units, p_scopes, p_start_us, p_end_us) s
    UNION ALL
    SELECT 3::smallint, NULL::uuid, NULL::smallint, NULL::timestamptz, u.amount, NULL::bigint, u.user_name, u.feature, NULL::smallint, NULL::text,
           NULL::bigint, u.period
    FROM metering.sums_of_units(p_tenant, p_product_units, p_scopes, p_start_us, p_end_us) u;
END
$$;

REVOKE ALL ON FUNCTION spans, sums_of_calls, sums_of_units, begin_counted_epoch FROM PUBLIC;
GRANT EXECUTE ON FUNCTION spans, sums_of_calls, sums_of_units, begin_counted_epoch TO :service;
