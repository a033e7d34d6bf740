-- Void, renew, fence and sweep. Batches are passed, locked and ordered as in 0003.

-- Open → unresolved, with its PIN in the outbox. The caller holds the tenant's shared lock and the rows' locks.
-- Returns the reservations that changed.
CREATE FUNCTION leave_unresolved(p_tenant uuid, p_reservations uuid[], p_epoch bigint, p_cause text) RETURNS uuid[]
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
        DELETE FROM metering.call_leases l USING changed c WHERE l.tenant_id = p_tenant AND l.reservation_id = c.reservation_id
    ), told AS (
        INSERT INTO metering.outbox (tenant_id, reservation_id, kind, epoch, tokens, cost_nano_usd)
        SELECT p_tenant, c.reservation_id, 3, p_epoch, 0, 0 FROM changed c
    )
    SELECT coalesce(array_agg(c.reservation_id), '{}') INTO v_changed FROM changed c;
    RETURN v_changed;
END
$$;

-- p_kinds are the contract's VoidKind: 1 not billed, 2 unknown. Of 2 the usage received may be NULL.
-- `told_kind` and `told_epoch` are set on items whose end was written now: it is in the outbox.
-- A call that was never opened gets a tombstone only when it was certainly not billed: a tombstone lets its hold go.
CREATE FUNCTION void_calls(
    p_tenants uuid[], p_first integer[], p_last integer[], p_reservations uuid[], p_kinds smallint[], p_causes text[],
    p_input bigint[], p_output bigint[], p_cache_read bigint[], p_cache_write_5m bigint[], p_cache_write_1h bigint[]
) RETURNS TABLE (item integer, state smallint, told_kind smallint, told_epoch bigint)
LANGUAGE plpgsql VOLATILE SECURITY INVOKER
SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off
AS $$
#variable_conflict use_column
DECLARE
    v_tenant uuid;
    v_epoch bigint;
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
        v_pinned := '{}';
        PERFORM set_config('app.tenant_id', v_tenant::text, true);
        PERFORM pg_advisory_xact_lock_shared(metering.tenant_lock(v_tenant));
        v_epoch := coalesce((SELECT e.epoch FROM metering.tenant_epochs e WHERE e.tenant_id = v_tenant), 0);

        WITH buried AS (
            INSERT INTO metering.calls (tenant_id, reservation_id, state, live, end_time, end_cause)
            SELECT v_tenant, c.reservation_id, 3, false, clock_timestamp(), c.cause
            FROM unnest(p_reservations[a:z], p_kinds[a:z], p_causes[a:z]) AS c (reservation_id, kind, cause)
            WHERE c.kind = 1
            ON CONFLICT DO NOTHING
            RETURNING reservation_id
        ), told AS (
            INSERT INTO metering.outbox (tenant_id, reservation_id, kind, epoch, tokens, cost_nano_usd)
            SELECT v_tenant, b.reservation_id, 2, v_epoch, 0, 0 FROM buried b
        )
        SELECT coalesce(array_agg(b.reservation_id), '{}') INTO v_buried FROM buried b;

        PERFORM 1 FROM metering.calls WHERE tenant_id = v_tenant AND reservation_id = ANY (p_reservations[a:z]) ORDER BY reservation_id FOR UPDATE;

        FOR r IN
            SELECT c.cause, array_agg(c.reservation_id) AS reservations
            FROM unnest(p_reservations[a:z], p_kinds[a:z], p_causes[a:z]) AS c (reservation_id, kind, cause)
            WHERE c.kind = 2 GROUP BY c.cause
        LOOP
            v_pinned := v_pinned || metering.leave_unresolved(v_tenant, r.reservations, v_epoch, r.cause);
        END LOOP;
        -- The first report of what was received stays, also when the sweep came before it.
        UPDATE metering.calls k
        SET input_tokens = c.input, output_tokens = c.output, cache_read_tokens = c.cache_read,
            cache_write_5m_tokens = c.cache_write_5m, cache_write_1h_tokens = c.cache_write_1h
        FROM unnest(p_reservations[a:z], p_kinds[a:z], p_input[a:z], p_output[a:z], p_cache_read[a:z], p_cache_write_5m[a:z],
                    p_cache_write_1h[a:z]) AS c (reservation_id, kind, input, output, cache_read, cache_write_5m, cache_write_1h)
        WHERE k.tenant_id = v_tenant AND k.reservation_id = c.reservation_id AND c.kind = 2 AND c.input IS NOT NULL
          AND k.state = 4 AND k.input_tokens IS NULL;

        WITH voided AS (
            UPDATE metering.calls k
            SET state = 3, live = false, unresolved_time = NULL, end_time = clock_timestamp(), end_cause = c.cause, input_tokens = NULL,
                output_tokens = NULL, cache_read_tokens = NULL, cache_write_5m_tokens = NULL, cache_write_1h_tokens = NULL
            FROM unnest(p_reservations[a:z], p_kinds[a:z], p_causes[a:z]) AS c (reservation_id, kind, cause)
            WHERE k.tenant_id = v_tenant AND k.reservation_id = c.reservation_id AND c.kind = 1 AND k.state IN (1, 4)
            RETURNING k.reservation_id
        ), ended AS (
            DELETE FROM metering.call_leases l USING voided v WHERE l.tenant_id = v_tenant AND l.reservation_id = v.reservation_id
        ), told AS (
            INSERT INTO metering.outbox (tenant_id, reservation_id, kind, epoch, tokens, cost_nano_usd)
            SELECT v_tenant, v.reservation_id, 2, v_epoch, 0, 0 FROM voided v
        )
        SELECT coalesce(array_agg(v.reservation_id), '{}') || v_buried INTO v_voided FROM voided v;

        RETURN QUERY
        SELECT a + c.n::integer - 1, coalesce(k.state, 0::smallint), t.kind, CASE WHEN t.kind IS NOT NULL THEN v_epoch END
        FROM unnest(p_reservations[a:z], p_kinds[a:z]) WITH ORDINALITY AS c (reservation_id, kind, n)
        LEFT JOIN metering.calls k ON k.tenant_id = v_tenant AND k.reservation_id = c.reservation_id
        CROSS JOIN LATERAL (SELECT CASE WHEN c.kind = 1 AND c.reservation_id = ANY (v_voided) THEN 2::smallint
                                        WHEN c.kind = 2 AND c.reservation_id = ANY (v_pinned) THEN 3::smallint END AS kind) t;
    END LOOP;
END
$$;

-- Returns the items that have no lease any more: their calls are not open. Touches the leases alone, so it needs no tenant lock.
CREATE FUNCTION renew_calls(p_tenants uuid[], p_first integer[], p_last integer[], p_reservations uuid[], p_lease interval)
RETURNS TABLE (item integer)
LANGUAGE plpgsql VOLATILE SECURITY INVOKER
SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off
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
            FROM standing s WHERE l.tenant_id = p_tenants[i] AND l.reservation_id = s.reservation_id
            RETURNING l.reservation_id
        )
        SELECT coalesce(array_agg(d.reservation_id), '{}') INTO v_renewed FROM renewed d;
        RETURN QUERY
        SELECT p_first[i] + c.n::integer - 1
        FROM unnest(p_reservations[p_first[i]:p_last[i]]) WITH ORDINALITY AS c (reservation_id, n)
        WHERE c.reservation_id <> ALL (v_renewed);
    END LOOP;
END
$$;

-- Outcomes are the contract's FenceOutcome. Tombstones of fences need no outbox row: the answer itself lets the hold go.
CREATE FUNCTION fence_calls(p_tenants uuid[], p_first integer[], p_last integer[], p_reservations uuid[], p_epochs bigint[])
RETURNS TABLE (item integer, outcome smallint, told_epoch bigint)
LANGUAGE plpgsql VOLATILE SECURITY INVOKER
SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off
AS $$
#variable_conflict use_column
DECLARE
    v_tenant uuid;
    v_epoch bigint;
    v_pinned uuid[];
    a integer;
    z integer;
BEGIN
    FOR i IN 1 .. cardinality(p_tenants) LOOP
        v_tenant := p_tenants[i];
        a := p_first[i];
        z := p_last[i];
        PERFORM set_config('app.tenant_id', v_tenant::text, true);
        PERFORM pg_advisory_xact_lock_shared(metering.tenant_lock(v_tenant));
        v_epoch := coalesce((SELECT e.epoch FROM metering.tenant_epochs e WHERE e.tenant_id = v_tenant), 0);
        INSERT INTO metering.calls (tenant_id, reservation_id, state, live, end_time, end_cause)
        SELECT v_tenant, c.reservation_id, 3, false, clock_timestamp(), 'fenced' FROM unnest(p_reservations[a:z]) AS c (reservation_id)
        ON CONFLICT DO NOTHING;
        PERFORM 1 FROM metering.calls WHERE tenant_id = v_tenant AND reservation_id = ANY (p_reservations[a:z]) ORDER BY reservation_id FOR UPDATE;
        v_pinned := metering.leave_unresolved(v_tenant, p_reservations[a:z], v_epoch, 'fenced');
        RETURN QUERY
        SELECT a + c.n::integer - 1,
               CASE WHEN k.state = 3 THEN 1 WHEN k.state = 4 THEN 2 WHEN k.settled_epoch < c.epoch THEN 4 ELSE 3 END::smallint,
               CASE WHEN c.reservation_id = ANY (v_pinned) THEN v_epoch END
        FROM unnest(p_reservations[a:z], p_epochs[a:z]) WITH ORDINALITY AS c (reservation_id, epoch, n)
        JOIN metering.calls k ON k.tenant_id = v_tenant AND k.reservation_id = c.reservation_id;
    END LOOP;
END
$$;

-- Open calls whose lease lapsed become unresolved. Runs as the jobs role, beside everything else, and waits for nobody's rows: a call that
-- someone is settling, or whose lease someone is renewing, is skipped until the next sweep.
CREATE FUNCTION sweep_leases(p_most integer) RETURNS TABLE (tenant_id uuid, reservation_id uuid, epoch bigint)
LANGUAGE plpgsql VOLATILE SECURITY INVOKER
AS $$
#variable_conflict use_column
DECLARE
    v_lapsed record;
    v_epoch bigint;
    v_ids uuid[];
BEGIN
    FOR v_lapsed IN
        SELECT l.tenant_id, array_agg(l.reservation_id) AS reservations
        FROM (SELECT l.tenant_id, l.reservation_id FROM metering.call_leases l WHERE l.lease_until < clock_timestamp()
              ORDER BY l.tenant_id, l.reservation_id LIMIT p_most) l
        GROUP BY l.tenant_id ORDER BY l.tenant_id
    LOOP
        PERFORM pg_advisory_xact_lock_shared(metering.tenant_lock(v_lapsed.tenant_id));
        v_epoch := coalesce((SELECT e.epoch FROM metering.tenant_epochs e WHERE e.tenant_id = v_lapsed.tenant_id), 0);
        -- The call before its lease, as everybody does who ends a call.
        v_ids := ARRAY(SELECT k.reservation_id FROM metering.calls k
                       WHERE k.tenant_id = v_lapsed.tenant_id AND k.reservation_id = ANY (v_lapsed.reservations) AND k.state = 1
                       ORDER BY k.reservation_id FOR UPDATE SKIP LOCKED);
        v_ids := ARRAY(SELECT l.reservation_id FROM metering.call_leases l
                       WHERE l.tenant_id = v_lapsed.tenant_id AND l.reservation_id = ANY (v_ids) AND l.lease_until < clock_timestamp()
                       ORDER BY l.reservation_id FOR UPDATE SKIP LOCKED);
        v_ids := metering.leave_unresolved(v_lapsed.tenant_id, v_ids, v_epoch, 'lease_lapsed');
        RETURN QUERY SELECT v_lapsed.tenant_id, u.id, v_epoch FROM unnest(v_ids) AS u (id);
    END LOOP;
END
$$;

REVOKE ALL ON FUNCTION leave_unresolved, void_calls, renew_calls, fence_calls, sweep_leases FROM PUBLIC;
GRANT EXECUTE ON FUNCTION leave_unresolved TO :service, :jobs;
GRANT EXECUTE ON FUNCTION void_calls, renew_calls, fence_calls TO :service;
GRANT EXECUTE ON FUNCTION sweep_leases TO :jobs;
