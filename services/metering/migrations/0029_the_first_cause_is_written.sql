-- As in 0027; of two items that leave one call unresolved the first one's cause is written too: causes were gone through in no order.
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
            FROM (SELECT DISTINCT ON (u.reservation_id) u.reservation_id, u.cause
                  FROM unnest(v_reservations, p_kinds[a:z], p_causes[a:z]) WITH ORDINALITY AS u (reservation_id, kind, cause, n)
                  WHERE u.kind = 2
                  ORDER BY u.reservation_id, u.n) c
            GROUP BY c.cause
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
