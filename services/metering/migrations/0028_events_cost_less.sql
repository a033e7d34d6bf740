-- Recording an event costs less: nothing here changes what is recorded, counted, marked or told. Batches are passed, locked and ordered as in 0003.

-- As in 0010. New names are written at once, without looking for them first, where there are enough of them: all are new in the common case, and one
-- that is not takes back the attempt. Few items are not worth an attempt, and many tenants not one each: Postgres keeps 64 of them in memory.
CREATE OR REPLACE FUNCTION record_events(
    p_tenants uuid[], p_first integer[], p_last integer[], p_sources text[], p_ids text[], p_events uuid[], p_digests bytea[],
    p_products text[], p_types text[], p_quantities bigint[], p_occurred_us bigint[], p_users text[], p_features text[], p_metadata jsonb[]
) RETURNS TABLE (item integer, outcome smallint, event_id uuid, digest bytea)
LANGUAGE plpgsql VOLATILE SECURITY INVOKER
SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off
AS $$
#variable_conflict use_column
DECLARE
    v_tenant uuid;
    v_erased boolean;
    v_time timestamptz;
    v_all_new boolean;
    v_claimed integer;
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
        v_time := clock_timestamp();
        v_all_new := false;
        IF z - a >= 15 THEN
            BEGIN
                INSERT INTO metering.event_claims (tenant_id, source, id, digest, event_id, record_time)
                SELECT v_tenant, c.source, c.id, CASE WHEN v_erased THEN '' ELSE c.digest END, c.event_id, v_time
                FROM unnest(p_sources[a:z], p_ids[a:z], p_digests[a:z], p_events[a:z]) AS c (source, id, digest, event_id);
                v_all_new := true;
            EXCEPTION WHEN unique_violation THEN
                -- One of them is taken: they are claimed one by one below.
                NULL;
            END;
        END IF;
        IF NOT v_all_new THEN
            INSERT INTO metering.event_claims (tenant_id, source, id, digest, event_id, record_time)
            SELECT v_tenant, c.source, c.id, CASE WHEN v_erased THEN '' ELSE c.digest END, c.event_id, v_time
            FROM unnest(p_sources[a:z], p_ids[a:z], p_digests[a:z], p_events[a:z]) AS c (source, id, digest, event_id)
            ON CONFLICT DO NOTHING;
            GET DIAGNOSTICS v_claimed = ROW_COUNT;
            v_all_new := v_claimed > z - a;
        END IF;

        IF v_all_new THEN
            -- A statement of its own: one that may look at claims takes hold of all their partitions.
            INSERT INTO metering.events (
                tenant_id, event_id, product, source, id, event_type, quantity, occurred_at, record_time, user_name, feature, metadata)
            SELECT v_tenant, c.event_id, c.product, c.source, c.id, c.event_type, c.quantity, metering.micros(c.occurred_us), v_time,
                   CASE WHEN v_erased THEN '' ELSE c.user_name END, CASE WHEN v_erased THEN '' ELSE c.feature END,
                   CASE WHEN v_erased THEN NULL ELSE c.metadata END
            FROM unnest(p_sources[a:z], p_ids[a:z], p_events[a:z], p_products[a:z], p_types[a:z], p_quantities[a:z], p_occurred_us[a:z],
                        p_users[a:z], p_features[a:z], p_metadata[a:z])
                 AS c (source, id, event_id, product, event_type, quantity, occurred_us, user_name, feature, metadata);
        ELSE
            INSERT INTO metering.events (
                tenant_id, event_id, product, source, id, event_type, quantity, occurred_at, record_time, user_name, feature, metadata)
            SELECT v_tenant, c.event_id, c.product, c.source, c.id, c.event_type, c.quantity, metering.micros(c.occurred_us), v_time,
                   CASE WHEN v_erased THEN '' ELSE c.user_name END, CASE WHEN v_erased THEN '' ELSE c.feature END,
                   CASE WHEN v_erased THEN NULL ELSE c.metadata END
            FROM unnest(p_sources[a:z], p_ids[a:z], p_events[a:z], p_products[a:z], p_types[a:z], p_quantities[a:z], p_occurred_us[a:z],
                        p_users[a:z], p_features[a:z], p_metadata[a:z])
                 AS c (source, id, event_id, product, event_type, quantity, occurred_us, user_name, feature, metadata)
            WHERE EXISTS (
                SELECT FROM metering.event_claims k
                WHERE k.tenant_id = v_tenant AND k.source = c.source AND k.id = c.id AND k.event_id = c.event_id);
            RETURN QUERY
            SELECT a + c.n::integer - 1, CASE WHEN k.digest IN (c.digest, '') THEN 2 ELSE 3 END::smallint, k.event_id, k.digest
            FROM unnest(p_sources[a:z], p_ids[a:z], p_events[a:z], p_digests[a:z]) WITH ORDINALITY AS c (source, id, event_id, digest, n)
            JOIN metering.event_claims k ON k.tenant_id = v_tenant AND k.source = c.source AND k.id = c.id AND k.event_id <> c.event_id;
        END IF;
    END LOOP;
END
$$;

-- As in 0019. Types are few and looked for once each, not once an event.
CREATE OR REPLACE FUNCTION count_recorded_events() RETURNS trigger
LANGUAGE plpgsql SECURITY INVOKER SET search_path = metering, pg_temp SET enable_hashjoin = on SET enable_nestloop = off AS $$
BEGIN
    WITH types AS MATERIALIZED (
        SELECT d.product, d.event_type, t.unit, t.aggregation
        FROM (SELECT DISTINCT e.product, e.event_type FROM rows_added e) d
        CROSS JOIN LATERAL (
            SELECT k.unit, k.aggregation FROM metering.event_types k WHERE k.product = d.product AND k.event_type = d.event_type OFFSET 0) t
    )
    INSERT INTO metering.usage_pending (
        tenant_id, sign, use_time, provider, model, feature, user_name, prompt_version, tier, product_unit, event_type, state, input_tokens,
        output_tokens, cache_read_tokens, cache_write_5m_tokens, cache_write_1h_tokens, cost_nano_usd, level, quantity, first_token_ms, total_ms)
    SELECT e.tenant_id, 1, k.use_hour, '', '', e.feature, e.user_name, '', '', t.unit, e.product || '/' || e.event_type, 0, 0, 0, 0, 0, 0, 0,
           k.level, sum(CASE WHEN t.aggregation = 1 THEN e.quantity WHEN e.reverses IS NULL THEN 1 ELSE -1 END), 0, 0
    FROM rows_added e JOIN types t ON t.product = e.product AND t.event_type = e.event_type
    CROSS JOIN LATERAL (SELECT date_bin('1 hour', e.occurred_at, timestamptz 'epoch') AS use_hour,
                               CASE WHEN t.aggregation = 3 THEN abs(e.quantity) END AS level) k
    GROUP BY e.tenant_id, k.use_hour, e.feature, e.user_name, t.unit, e.product, e.event_type, k.level;
    RETURN NULL;
END
$$;

-- As in 0024, and whoever has no budget is not looked through. Who sees one tenant alone sees its budgets, and writes its rows alone.
CREATE OR REPLACE FUNCTION mark_budgets() RETURNS trigger
LANGUAGE plpgsql SECURITY INVOKER SET search_path = metering, pg_temp AS $$
BEGIN
    IF NOT EXISTS (SELECT FROM metering.budgets) THEN
        RETURN NULL;
    END IF;
    INSERT INTO metering.budget_marks (tenant_id, use_quarter, product_unit, user_name, feature)
    SELECT DISTINCT u.tenant_id, u.use_quarter, u.product_unit, CASE WHEN w.each_user THEN u.user_name ELSE '' END,
           CASE WHEN w.each_feature THEN u.feature ELSE '' END
    FROM (SELECT DISTINCT r.tenant_id, date_bin('15 minutes', r.use_time, timestamptz 'epoch') AS use_quarter, r.product_unit, r.user_name, r.feature
          FROM rows_added r WHERE r.event_type = '' AND r.refusal_reason = '') u
    CROSS JOIN LATERAL (SELECT bool_or(b.each_user) AS each_user, bool_or(b.each_feature) AS each_feature
                        FROM metering.budgets b WHERE b.tenant_id = u.tenant_id AND b.product_unit = u.product_unit) w
    WHERE w.each_user IS NOT NULL;
    RETURN NULL;
END
$$;

CREATE OR REPLACE FUNCTION mark_budgets_of_events() RETURNS trigger
LANGUAGE plpgsql SECURITY INVOKER SET search_path = metering, pg_temp AS $$
BEGIN
    IF NOT EXISTS (SELECT FROM metering.budgets) THEN
        RETURN NULL;
    END IF;
    INSERT INTO metering.budget_marks (tenant_id, use_quarter, product_unit, user_name, feature)
    SELECT DISTINCT u.tenant_id, u.use_quarter, u.unit, CASE WHEN w.each_user THEN u.user_name ELSE '' END,
           CASE WHEN w.each_feature THEN u.feature ELSE '' END
    FROM (SELECT DISTINCT r.tenant_id, date_bin('15 minutes', r.occurred_at, timestamptz 'epoch') AS use_quarter, t.unit, r.user_name, r.feature
          FROM rows_added r JOIN metering.event_types t ON t.product = r.product AND t.event_type = r.event_type) u
    CROSS JOIN LATERAL (SELECT bool_or(b.each_user) AS each_user, bool_or(b.each_feature) AS each_feature
                        FROM metering.budgets b WHERE b.tenant_id = u.tenant_id AND b.product_unit = u.unit) w
    WHERE w.each_user IS NOT NULL;
    RETURN NULL;
END
$$;

-- As in 0017, and where nobody is told nothing is looked through.
CREATE OR REPLACE FUNCTION queue_events() RETURNS trigger
LANGUAGE plpgsql SECURITY INVOKER SET search_path = metering, pg_temp AS $$
BEGIN
    IF NOT EXISTS (SELECT FROM metering.stripe_customers) AND NOT EXISTS (SELECT FROM metering.export_sinks k WHERE k.sink = 2 AND k.is_on) THEN
        RETURN NULL;
    END IF;
    INSERT INTO metering.export_outbox (tenant_id, sink, usage_id, meter, event_name, source, quantity, use_time, record_time)
    SELECT e.tenant_id, 1, e.event_id, s.meter, s.event_name, 3,
           CASE WHEN t.aggregation <> 2 THEN e.quantity WHEN e.reverses IS NULL THEN 1::bigint ELSE (-1)::bigint END, e.occurred_at, e.record_time
    FROM rows_added e
    JOIN metering.stripe_customers c ON c.tenant_id = e.tenant_id
    JOIN metering.event_types t ON t.product = e.product AND t.event_type = e.event_type
    JOIN metering.stripe_meters s ON s.meter = t.unit
    WHERE t.aggregation <> 3 OR e.reverses IS NULL
    UNION ALL
    SELECT e.tenant_id, 2, e.event_id, '', '', 3, 0, e.occurred_at, e.record_time
    FROM rows_added e WHERE EXISTS (SELECT FROM metering.export_sinks k WHERE k.sink = 2 AND k.is_on);
    RETURN NULL;
END
$$;

CREATE OR REPLACE FUNCTION queue_entries() RETURNS trigger
LANGUAGE plpgsql SECURITY INVOKER SET search_path = metering, pg_temp AS $$
BEGIN
    IF NOT EXISTS (SELECT FROM metering.stripe_customers) AND NOT EXISTS (SELECT FROM metering.export_sinks k WHERE k.sink = 2 AND k.is_on) THEN
        RETURN NULL;
    END IF;
    INSERT INTO metering.export_outbox (tenant_id, sink, usage_id, meter, event_name, source, quantity, use_time, record_time, reservation_id)
    SELECT n.tenant_id, 1, n.entry_id, s.meter, s.event_name, 1, m.quantity, n.reserve_time, n.record_time, n.reservation_id
    FROM rows_added n
    JOIN metering.stripe_customers c ON c.tenant_id = n.tenant_id
    CROSS JOIN LATERAL (VALUES
        ('calls.count'::text, CASE WHEN n.number = 1 THEN 1::bigint ELSE 0::bigint END),
        ('calls.cost_nano_usd', n.cost_nano_usd),
        ('calls.tokens', n.total_tokens),
        ('calls.input_tokens', n.input_tokens),
        ('calls.output_tokens', n.output_tokens),
        ('calls.cache_read_tokens', n.cache_read_tokens),
        ('calls.cache_write_tokens', n.cache_write_5m_tokens + n.cache_write_1h_tokens)) AS m (meter, quantity)
    JOIN metering.stripe_meters s ON s.meter = m.meter
    WHERE m.quantity <> 0
    UNION ALL
    SELECT n.tenant_id, 2, n.entry_id, '', '', 1, 0, n.reserve_time, n.record_time, n.reservation_id
    FROM rows_added n WHERE EXISTS (SELECT FROM metering.export_sinks k WHERE k.sink = 2 AND k.is_on);
    RETURN NULL;
END
$$;
