-- What a batch costs is to grow with its items alone.
--
-- A plan that was made while few calls were open walked through the whole batch for each of its rows: the planner took the tenant's rows of a table
-- for a handful and put them on the outside of a nested loop. It is not asked any more. Rows are found by their keys, all keys of the batch in one
-- scan, and what is to become of them by a hash; both hold whatever is known of the tables' sizes. Batches are passed, locked and ordered as in 0003.

-- A batch that was opened at once is settled at once: each page is to hold the rows as they were and, somewhat longer, as they become. Where they do
-- not fit, every index has to be told.
ALTER TABLE calls SET (fillfactor = 45);

-- As in 0003.
CREATE OR REPLACE FUNCTION settle_calls(
    p_tenants uuid[], p_first integer[], p_last integer[],
    p_reservations uuid[], p_entries uuid[], p_priced boolean[], p_cost bigint[],
    p_input bigint[], p_output bigint[], p_cache_read bigint[], p_cache_write_5m bigint[], p_cache_write_1h bigint[],
    p_stop_reasons text[], p_request_ids text[], p_first_ms bigint[], p_total_ms bigint[]
) RETURNS TABLE (item integer, outcome smallint, cost_nano_usd bigint, entry_id uuid, told_epoch bigint)
LANGUAGE plpgsql VOLATILE SECURITY INVOKER
SET enable_seqscan = off SET enable_nestloop = off SET enable_mergejoin = off
AS $$
#variable_conflict use_column
DECLARE
    v_tenant uuid;
    v_epoch bigint;
    v_reservations uuid[];
    v_reconciled bigint;
    a integer;
    z integer;
BEGIN
    FOR i IN 1 .. cardinality(p_tenants) LOOP
        v_tenant := p_tenants[i];
        a := p_first[i];
        z := p_last[i];
        v_reservations := p_reservations[a:z];
        PERFORM set_config('app.tenant_id', v_tenant::text, true);
        PERFORM pg_advisory_xact_lock_shared(metering.tenant_lock(v_tenant));
        v_epoch := coalesce((SELECT e.epoch FROM metering.tenant_epochs e WHERE e.tenant_id = v_tenant), 0);
        -- Locks first, in order; the statements below then find rows that stand still.
        SELECT count(*) FILTER (WHERE k.state = 5) INTO v_reconciled
        FROM (SELECT state FROM metering.calls WHERE tenant_id = v_tenant AND reservation_id = ANY (v_reservations)
              ORDER BY reservation_id FOR UPDATE) k;

        WITH wanted AS (
            -- The first of two items for one reservation decides; the second is compared with it below.
            SELECT DISTINCT ON (c.reservation_id) c.*
            FROM unnest(v_reservations, p_entries[a:z], p_priced[a:z], p_cost[a:z], p_input[a:z], p_output[a:z], p_cache_read[a:z],
                        p_cache_write_5m[a:z], p_cache_write_1h[a:z], p_stop_reasons[a:z], p_request_ids[a:z], p_first_ms[a:z],
                        p_total_ms[a:z]) WITH ORDINALITY
                 AS c (reservation_id, entry_id, priced, cost, input, output, cache_read, cache_write_5m, cache_write_1h,
                       stop_reason, request_id, first_ms, total_ms, n)
            WHERE c.priced
            ORDER BY c.reservation_id, c.n
        ), settled AS (
            UPDATE metering.calls k
            SET state = 2, unresolved_time = NULL, end_time = clock_timestamp(), settled_epoch = v_epoch, entry_id = w.entry_id,
                input_tokens = w.input, output_tokens = w.output, cache_read_tokens = w.cache_read,
                cache_write_5m_tokens = w.cache_write_5m, cache_write_1h_tokens = w.cache_write_1h, cost_nano_usd = w.cost,
                end_cause = w.stop_reason, provider_request_id = w.request_id, first_token_ms = w.first_ms, total_ms = w.total_ms
            FROM wanted w
            WHERE k.tenant_id = v_tenant AND k.reservation_id = ANY (v_reservations) AND k.reservation_id = w.reservation_id AND k.state IN (1, 4)
            RETURNING k.reservation_id, k.entry_id, k.price_version, k.provider, k.model, k.reserve_time, k.end_time, k.input_tokens,
                      k.output_tokens, k.cache_read_tokens, k.cache_write_5m_tokens, k.cache_write_1h_tokens, k.cost_nano_usd,
                      k.input_tokens + k.output_tokens + k.cache_read_tokens + k.cache_write_5m_tokens + k.cache_write_1h_tokens AS total_tokens
        ), written AS (
            INSERT INTO metering.entries (
                tenant_id, reservation_id, number, entry_id, kind, price_version, provider, model, reserve_time, record_time, epoch,
                input_tokens, output_tokens, cache_read_tokens, cache_write_5m_tokens, cache_write_1h_tokens, total_tokens, cost_nano_usd)
            SELECT v_tenant, s.reservation_id, 1, s.entry_id, 1, s.price_version, s.provider, s.model, s.reserve_time, s.end_time, v_epoch,
                   s.input_tokens, s.output_tokens, s.cache_read_tokens, s.cache_write_5m_tokens, s.cache_write_1h_tokens,
                   s.total_tokens, s.cost_nano_usd
            FROM settled s
        ), ended AS (
            DELETE FROM metering.call_leases l WHERE l.tenant_id = v_tenant AND l.reservation_id = ANY (ARRAY(SELECT s.reservation_id FROM settled s))
        )
        INSERT INTO metering.outbox (tenant_id, reservation_id, kind, epoch, tokens, cost_nano_usd)
        SELECT v_tenant, s.reservation_id, 1, v_epoch, s.total_tokens, s.cost_nano_usd FROM settled s;

        -- The books of a reconciled call are closed: what it was really billed is recorded as the difference, once.
        IF v_reconciled > 0 THEN
            WITH wanted AS (
                SELECT DISTINCT ON (c.reservation_id) c.*
                FROM unnest(v_reservations, p_entries[a:z], p_priced[a:z], p_cost[a:z], p_input[a:z], p_output[a:z], p_cache_read[a:z],
                            p_cache_write_5m[a:z], p_cache_write_1h[a:z]) WITH ORDINALITY
                     AS c (reservation_id, entry_id, priced, cost, input, output, cache_read, cache_write_5m, cache_write_1h, n)
                WHERE c.priced
                ORDER BY c.reservation_id, c.n
            ), adjusted AS (
                INSERT INTO metering.entries (
                    tenant_id, reservation_id, number, entry_id, kind, price_version, provider, model, reserve_time, record_time, epoch,
                    input_tokens, output_tokens, cache_read_tokens, cache_write_5m_tokens, cache_write_1h_tokens, total_tokens, cost_nano_usd)
                SELECT v_tenant, k.reservation_id, 2, w.entry_id, 3, k.price_version, k.provider, k.model, k.reserve_time, clock_timestamp(),
                       v_epoch, w.input - k.input_tokens, w.output - k.output_tokens, w.cache_read - k.cache_read_tokens,
                       w.cache_write_5m - k.cache_write_5m_tokens, w.cache_write_1h - k.cache_write_1h_tokens,
                       w.input + w.output + w.cache_read + w.cache_write_5m + w.cache_write_1h
                       - (k.input_tokens + k.output_tokens + k.cache_read_tokens + k.cache_write_5m_tokens + k.cache_write_1h_tokens),
                       w.cost - k.cost_nano_usd
                FROM wanted w
                JOIN metering.calls k ON k.tenant_id = v_tenant AND k.reservation_id = ANY (v_reservations)
                                     AND k.reservation_id = w.reservation_id AND k.state = 5
                ON CONFLICT (tenant_id, reservation_id, number) DO NOTHING
                RETURNING reservation_id, entry_id
            )
            UPDATE metering.calls k
            SET entry_id = w.entry_id, input_tokens = w.input, output_tokens = w.output, cache_read_tokens = w.cache_read,
                cache_write_5m_tokens = w.cache_write_5m, cache_write_1h_tokens = w.cache_write_1h, cost_nano_usd = w.cost
            FROM adjusted d JOIN wanted w ON w.reservation_id = d.reservation_id
            WHERE k.tenant_id = v_tenant AND k.reservation_id = ANY (v_reservations) AND k.reservation_id = d.reservation_id;
        END IF;

        RETURN QUERY
        SELECT a + c.n::integer - 1,
               CASE
                   WHEN k.state IS NULL OR k.state NOT IN (2, 5) THEN 3
                   WHEN (k.input_tokens, k.output_tokens, k.cache_read_tokens, k.cache_write_5m_tokens, k.cache_write_1h_tokens)
                      = (c.input, c.output, c.cache_read, c.cache_write_5m, c.cache_write_1h) THEN CASE k.state WHEN 2 THEN 1 ELSE 4 END
                   ELSE 2
               END::smallint,
               k.cost_nano_usd, k.entry_id, CASE WHEN k.state = 2 AND k.entry_id = c.entry_id THEN v_epoch END
        FROM unnest(v_reservations, p_entries[a:z], p_input[a:z], p_output[a:z], p_cache_read[a:z], p_cache_write_5m[a:z],
                    p_cache_write_1h[a:z]) WITH ORDINALITY
             AS c (reservation_id, entry_id, input, output, cache_read, cache_write_5m, cache_write_1h, n)
        LEFT JOIN metering.calls k ON k.tenant_id = v_tenant AND k.reservation_id = ANY (v_reservations) AND k.reservation_id = c.reservation_id;
    END LOOP;
END
$$;

-- As in 0003.
CREATE OR REPLACE FUNCTION call_prices(p_tenants uuid[], p_first integer[], p_last integer[], p_reservations uuid[])
RETURNS TABLE (item integer, price_version text, provider text, model text)
LANGUAGE plpgsql STABLE SECURITY INVOKER
SET enable_seqscan = off SET enable_nestloop = off SET enable_mergejoin = off
AS $$
#variable_conflict use_column
BEGIN
    FOR i IN 1 .. cardinality(p_tenants) LOOP
        PERFORM set_config('app.tenant_id', p_tenants[i]::text, true);
        RETURN QUERY
        SELECT p_first[i] + c.n::integer - 1, k.price_version, k.provider, k.model
        FROM unnest(p_reservations[p_first[i]:p_last[i]]) WITH ORDINALITY AS c (reservation_id, n)
        JOIN metering.calls k ON k.tenant_id = p_tenants[i] AND k.reservation_id = ANY (p_reservations[p_first[i]:p_last[i]])
                             AND k.reservation_id = c.reservation_id
        WHERE k.price_version IS NOT NULL;
    END LOOP;
END
$$;

-- As in 0004.
CREATE OR REPLACE FUNCTION leave_unresolved(p_tenant uuid, p_reservations uuid[], p_epoch bigint, p_cause text) RETURNS uuid[]
LANGUAGE plpgsql VOLATILE SECURITY INVOKER
SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off
AS $$
#variable_conflict use_column
DECLARE
    v_changed uuid[];
BEGIN
    WITH changed AS (
        UPDATE metering.calls k
        SET state = 4, unresolved_time = clock_timestamp(), end_time = clock_timestamp(), end_cause = p_cause
        WHERE k.tenant_id = p_tenant AND k.reservation_id = ANY (p_reservations) AND k.state = 1
        RETURNING k.reservation_id
    ), ended AS (
        DELETE FROM metering.call_leases l WHERE l.tenant_id = p_tenant AND l.reservation_id = ANY (ARRAY(SELECT c.reservation_id FROM changed c))
    ), told AS (
        INSERT INTO metering.outbox (tenant_id, reservation_id, kind, epoch, tokens, cost_nano_usd)
        SELECT p_tenant, c.reservation_id, 3, p_epoch, 0, 0 FROM changed c
    )
    SELECT coalesce(array_agg(c.reservation_id), '{}') INTO v_changed FROM changed c;
    RETURN v_changed;
END
$$;

-- As in 0004; of two items for one call the first is written.
CREATE OR REPLACE FUNCTION void_calls(
    p_tenants uuid[], p_first integer[], p_last integer[], p_reservations uuid[], p_kinds smallint[], p_causes text[],
    p_input bigint[], p_output bigint[], p_cache_read bigint[], p_cache_write_5m bigint[], p_cache_write_1h bigint[]
) RETURNS TABLE (item integer, state smallint, told_kind smallint, told_epoch bigint)
LANGUAGE plpgsql VOLATILE SECURITY INVOKER
SET enable_seqscan = off SET enable_nestloop = off SET enable_mergejoin = off
AS $$
#variable_conflict use_column
DECLARE
    v_tenant uuid;
    v_epoch bigint;
    v_reservations uuid[];
    v_voided uuid[];
    v_buried uuid[];
    v_pinned uuid[];
    r record;
    a integer;
    z integer;
BEGIN
    FOR i IN 1 .. cardinality(p_tenants) LOOP
        v_tenant := p_tenants[i];
        a := p_first[i];
        z := p_last[i];
        v_reservations := p_reservations[a:z];
        v_pinned := '{}';
        PERFORM set_config('app.tenant_id', v_tenant::text, true);
        PERFORM pg_advisory_xact_lock_shared(metering.tenant_lock(v_tenant));
        v_epoch := coalesce((SELECT e.epoch FROM metering.tenant_epochs e WHERE e.tenant_id = v_tenant), 0);

        WITH buried AS (
            INSERT INTO metering.calls (tenant_id, reservation_id, state, live, end_time, end_cause)
            SELECT v_tenant, c.reservation_id, 3, false, clock_timestamp(), c.cause
            FROM unnest(v_reservations, p_kinds[a:z], p_causes[a:z]) AS c (reservation_id, kind, cause)
            WHERE c.kind = 1
            ON CONFLICT DO NOTHING
            RETURNING reservation_id
        ), told AS (
            INSERT INTO metering.outbox (tenant_id, reservation_id, kind, epoch, tokens, cost_nano_usd)
            SELECT v_tenant, b.reservation_id, 2, v_epoch, 0, 0 FROM buried b
        )
        SELECT coalesce(array_agg(b.reservation_id), '{}') INTO v_buried FROM buried b;

        PERFORM 1 FROM metering.calls WHERE tenant_id = v_tenant AND reservation_id = ANY (v_reservations) ORDER BY reservation_id FOR UPDATE;

        FOR r IN
            SELECT c.cause, array_agg(c.reservation_id) AS reservations
            FROM unnest(v_reservations, p_kinds[a:z], p_causes[a:z]) AS c (reservation_id, kind, cause)
            WHERE c.kind = 2 GROUP BY c.cause
        LOOP
            v_pinned := v_pinned || metering.leave_unresolved(v_tenant, r.reservations, v_epoch, r.cause);
        END LOOP;
        -- The first report of what was received stays, also when the sweep came before it.
        UPDATE metering.calls k
        SET input_tokens = c.input, output_tokens = c.output, cache_read_tokens = c.cache_read,
            cache_write_5m_tokens = c.cache_write_5m, cache_write_1h_tokens = c.cache_write_1h
        FROM (SELECT DISTINCT ON (u.reservation_id) u.*
              FROM unnest(v_reservations, p_kinds[a:z], p_input[a:z], p_output[a:z], p_cache_read[a:z], p_cache_write_5m[a:z],
                          p_cache_write_1h[a:z]) WITH ORDINALITY
                   AS u (reservation_id, kind, input, output, cache_read, cache_write_5m, cache_write_1h, n)
              WHERE u.kind = 2 AND u.input IS NOT NULL
              ORDER BY u.reservation_id, u.n) c
        WHERE k.tenant_id = v_tenant AND k.reservation_id = ANY (v_reservations) AND k.reservation_id = c.reservation_id
          AND k.state = 4 AND k.input_tokens IS NULL;

        WITH voided AS (
            UPDATE metering.calls k
            SET state = 3, live = false, unresolved_time = NULL, end_time = clock_timestamp(), end_cause = c.cause, input_tokens = NULL,
                output_tokens = NULL, cache_read_tokens = NULL, cache_write_5m_tokens = NULL, cache_write_1h_tokens = NULL
            FROM (SELECT DISTINCT ON (u.reservation_id) u.reservation_id, u.cause
                  FROM unnest(v_reservations, p_kinds[a:z], p_causes[a:z]) WITH ORDINALITY AS u (reservation_id, kind, cause, n)
                  WHERE u.kind = 1
                  ORDER BY u.reservation_id, u.n) c
            WHERE k.tenant_id = v_tenant AND k.reservation_id = ANY (v_reservations) AND k.reservation_id = c.reservation_id
              AND k.state IN (1, 4)
            RETURNING k.reservation_id
        ), ended AS (
            DELETE FROM metering.call_leases l WHERE l.tenant_id = v_tenant AND l.reservation_id = ANY (ARRAY(SELECT v.reservation_id FROM voided v))
        ), told AS (
            INSERT INTO metering.outbox (tenant_id, reservation_id, kind, epoch, tokens, cost_nano_usd)
            SELECT v_tenant, v.reservation_id, 2, v_epoch, 0, 0 FROM voided v
        )
        SELECT coalesce(array_agg(v.reservation_id), '{}') || v_buried INTO v_voided FROM voided v;

        RETURN QUERY
        SELECT a + c.n::integer - 1, coalesce(k.state, 0::smallint), t.kind, CASE WHEN t.kind IS NOT NULL THEN v_epoch END
        FROM unnest(v_reservations, p_kinds[a:z]) WITH ORDINALITY AS c (reservation_id, kind, n)
        LEFT JOIN metering.calls k ON k.tenant_id = v_tenant AND k.reservation_id = ANY (v_reservations) AND k.reservation_id = c.reservation_id
        CROSS JOIN LATERAL (SELECT CASE WHEN c.kind = 1 AND c.reservation_id = ANY (v_voided) THEN 2::smallint
                                        WHEN c.kind = 2 AND c.reservation_id = ANY (v_pinned) THEN 3::smallint END AS kind) t;
    END LOOP;
END
$$;

-- As in 0004.
CREATE OR REPLACE FUNCTION renew_calls(p_tenants uuid[], p_first integer[], p_last integer[], p_reservations uuid[], p_lease interval)
RETURNS TABLE (item integer)
LANGUAGE plpgsql VOLATILE SECURITY INVOKER
SET enable_seqscan = off SET enable_nestloop = off SET enable_mergejoin = off
AS $$
#variable_conflict use_column
DECLARE
    v_renewed uuid[];
BEGIN
    FOR i IN 1 .. cardinality(p_tenants) LOOP
        PERFORM set_config('app.tenant_id', p_tenants[i]::text, true);
        WITH standing AS MATERIALIZED (
            SELECT reservation_id FROM metering.call_leases
            WHERE tenant_id = p_tenants[i] AND reservation_id = ANY (p_reservations[p_first[i]:p_last[i]])
            ORDER BY reservation_id FOR UPDATE
        ), renewed AS (
            UPDATE metering.call_leases l SET lease_until = clock_timestamp() + p_lease
            WHERE l.tenant_id = p_tenants[i] AND l.reservation_id = ANY (ARRAY(SELECT s.reservation_id FROM standing s))
            RETURNING l.reservation_id
        )
        SELECT coalesce(array_agg(d.reservation_id), '{}') INTO v_renewed FROM renewed d;
        RETURN QUERY
        SELECT p_first[i] + c.n::integer - 1
        FROM unnest(p_reservations[p_first[i]:p_last[i]]) WITH ORDINALITY AS c (reservation_id, n)
        WHERE NOT EXISTS (SELECT FROM unnest(v_renewed) AS d (reservation_id) WHERE d.reservation_id = c.reservation_id);
    END LOOP;
END
$$;

-- As in 0004.
CREATE OR REPLACE FUNCTION fence_calls(p_tenants uuid[], p_first integer[], p_last integer[], p_reservations uuid[], p_epochs bigint[])
RETURNS TABLE (item integer, outcome smallint, told_epoch bigint)
LANGUAGE plpgsql VOLATILE SECURITY INVOKER
SET enable_seqscan = off SET enable_nestloop = off SET enable_mergejoin = off
AS $$
#variable_conflict use_column
DECLARE
    v_tenant uuid;
    v_epoch bigint;
    v_reservations uuid[];
    v_pinned uuid[];
    a integer;
    z integer;
BEGIN
    FOR i IN 1 .. cardinality(p_tenants) LOOP
        v_tenant := p_tenants[i];
        a := p_first[i];
        z := p_last[i];
        v_reservations := p_reservations[a:z];
        PERFORM set_config('app.tenant_id', v_tenant::text, true);
        PERFORM pg_advisory_xact_lock_shared(metering.tenant_lock(v_tenant));
        v_epoch := coalesce((SELECT e.epoch FROM metering.tenant_epochs e WHERE e.tenant_id = v_tenant), 0);
        INSERT INTO metering.calls (tenant_id, reservation_id, state, live, end_time, end_cause)
        SELECT v_tenant, c.reservation_id, 3, false, clock_timestamp(), 'fenced' FROM unnest(v_reservations) AS c (reservation_id)
        ON CONFLICT DO NOTHING;
        PERFORM 1 FROM metering.calls WHERE tenant_id = v_tenant AND reservation_id = ANY (v_reservations) ORDER BY reservation_id FOR UPDATE;
        v_pinned := metering.leave_unresolved(v_tenant, v_reservations, v_epoch, 'fenced');
        RETURN QUERY
        SELECT a + c.n::integer - 1,
               CASE WHEN k.state = 3 THEN 1 WHEN k.state = 4 THEN 2 WHEN k.settled_epoch < c.epoch THEN 4 ELSE 3 END::smallint,
               CASE WHEN c.reservation_id = ANY (v_pinned) THEN v_epoch END
        FROM unnest(v_reservations, p_epochs[a:z]) WITH ORDINALITY AS c (reservation_id, epoch, n)
        JOIN metering.calls k ON k.tenant_id = v_tenant AND k.reservation_id = ANY (v_reservations) AND k.reservation_id = c.reservation_id;
    END LOOP;
END
$$;

-- As in 0007.
CREATE OR REPLACE FUNCTION extend_calls(
    p_tenants uuid[], p_first integer[], p_last integer[], p_reservations uuid[], p_bound_tokens bigint[], p_bound_nano_usd bigint[]
) RETURNS TABLE (item integer)
LANGUAGE plpgsql VOLATILE SECURITY INVOKER
SET enable_seqscan = off SET enable_nestloop = off SET enable_mergejoin = off
AS $$
#variable_conflict use_column
DECLARE
    v_tenant uuid;
    v_epoch bigint;
    v_reservations uuid[];
    a integer;
    z integer;
BEGIN
    FOR i IN 1 .. cardinality(p_tenants) LOOP
        v_tenant := p_tenants[i];
        a := p_first[i];
        z := p_last[i];
        v_reservations := p_reservations[a:z];
        PERFORM set_config('app.tenant_id', v_tenant::text, true);
        PERFORM pg_advisory_xact_lock_shared(metering.tenant_lock(v_tenant));
        v_epoch := coalesce((SELECT e.epoch FROM metering.tenant_epochs e WHERE e.tenant_id = v_tenant), 0);
        PERFORM 1 FROM metering.calls WHERE tenant_id = v_tenant AND reservation_id = ANY (v_reservations) ORDER BY reservation_id FOR UPDATE;
        UPDATE metering.calls k
        SET bound_tokens = greatest(k.bound_tokens, w.tokens), bound_nano_usd = greatest(k.bound_nano_usd, w.nano_usd)
        FROM (SELECT c.reservation_id, max(c.tokens) AS tokens, max(c.nano_usd) AS nano_usd
              FROM unnest(v_reservations, p_bound_tokens[a:z], p_bound_nano_usd[a:z]) AS c (reservation_id, tokens, nano_usd)
              GROUP BY c.reservation_id) w
        WHERE k.tenant_id = v_tenant AND k.reservation_id = ANY (v_reservations) AND k.reservation_id = w.reservation_id AND k.state = 1
          AND k.open_epoch = v_epoch AND (k.bound_tokens < w.tokens OR k.bound_nano_usd < w.nano_usd);
        RETURN QUERY
        SELECT a + c.n::integer - 1
        FROM unnest(v_reservations, p_bound_tokens[a:z], p_bound_nano_usd[a:z]) WITH ORDINALITY AS c (reservation_id, tokens, nano_usd, n)
        JOIN metering.calls k ON k.tenant_id = v_tenant AND k.reservation_id = ANY (v_reservations) AND k.reservation_id = c.reservation_id
        WHERE k.state = 1 AND k.bound_tokens >= c.tokens AND k.bound_nano_usd >= c.nano_usd;
    END LOOP;
END
$$;
