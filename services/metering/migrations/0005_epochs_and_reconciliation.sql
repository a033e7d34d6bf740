-- Beginning an epoch, and closing an unresolved call by hand.

-- Sections: 0 the epoch (in `tokens`) and the snapshot's time, 1 recent calls, 2 outstanding calls, 3 tokens by day, 4 nano-USD by month.
--
-- The exclusive lock is a statement of its own before any read: once it is held, every change of this tenant is either committed and visible
-- to the reads below, or waits and will see the raised epoch. See 0003.
CREATE FUNCTION begin_epoch(p_tenant uuid)
RETURNS TABLE (section smallint, reservation_id uuid, state smallint, at_time timestamptz, label text, tokens bigint, cost_nano_usd bigint)
LANGUAGE plpgsql VOLATILE SECURITY INVOKER
SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off
AS $$
#variable_conflict use_column
DECLARE
    v_epoch bigint;
    v_now timestamptz;
    v_day timestamptz;
    v_month timestamptz;
BEGIN
    PERFORM set_config('app.tenant_id', p_tenant::text, true);
    PERFORM pg_advisory_xact_lock(metering.tenant_lock(p_tenant));
    v_now := clock_timestamp();
    v_day := date_trunc('day', v_now, 'UTC');
    v_month := date_trunc('month', v_now, 'UTC');
    INSERT INTO metering.tenant_epochs AS e (tenant_id, epoch, begin_time) VALUES (p_tenant, 1, v_now)
    ON CONFLICT (tenant_id) DO UPDATE SET epoch = e.epoch + 1, begin_time = v_now
    RETURNING e.epoch INTO v_epoch;
    RETURN QUERY SELECT 0::smallint, NULL::uuid, NULL::smallint, v_now, NULL::text, v_epoch, NULL::bigint;

    -- A call is opened after it was reserved; half a minute is allowed for the two clocks to differ, and lets the index of open times serve.
    RETURN QUERY
    SELECT 1::smallint, k.reservation_id, k.state, k.reserve_time, NULL::text,
           coalesce(k.input_tokens + k.output_tokens + k.cache_read_tokens + k.cache_write_5m_tokens + k.cache_write_1h_tokens, 0),
           coalesce(k.cost_nano_usd, 0)
    FROM metering.calls k
    WHERE k.tenant_id = p_tenant AND k.open_time > v_now - interval '90 seconds' AND k.reserve_time > v_now - interval '60 seconds'
      AND k.state IN (2, 3, 5);

    RETURN QUERY
    SELECT 2::smallint, k.reservation_id, k.state, k.reserve_time, NULL::text, k.bound_tokens, k.bound_nano_usd
    FROM metering.call_leases l
    JOIN metering.calls k ON k.tenant_id = p_tenant AND k.reservation_id = l.reservation_id AND k.state = 1
    WHERE l.tenant_id = p_tenant
    UNION ALL
    SELECT 2::smallint, k.reservation_id, k.state, k.reserve_time, NULL::text, k.bound_tokens, k.bound_nano_usd
    FROM metering.calls k
    WHERE k.tenant_id = p_tenant AND k.unresolved_time IS NOT NULL;

    RETURN QUERY
    SELECT 3::smallint, NULL::uuid, NULL::smallint, NULL::timestamptz, to_char(n.reserve_time AT TIME ZONE 'UTC', 'YYYY-MM-DD') AS day,
           sum(n.total_tokens)::bigint, NULL::bigint
    FROM metering.entries n
    WHERE n.tenant_id = p_tenant AND n.reserve_time >= v_day - interval '1 day' AND n.reserve_time < v_day + interval '1 day'
    GROUP BY day;

    RETURN QUERY
    SELECT 4::smallint, NULL::uuid, NULL::smallint, NULL::timestamptz, to_char(n.reserve_time AT TIME ZONE 'UTC', 'YYYY-MM') AS month,
           NULL::bigint, sum(n.cost_nano_usd)::bigint
    FROM metering.entries n
    WHERE n.tenant_id = p_tenant
      AND n.reserve_time >= (v_month AT TIME ZONE 'UTC' - interval '1 month') AT TIME ZONE 'UTC'
      AND n.reserve_time < (v_month AT TIME ZONE 'UTC' + interval '1 month') AT TIME ZONE 'UTC'
    GROUP BY month;
END
$$;

-- An operator closes an unresolved call with what the provider's own report says: usage and cost, or zeros. Only after the call can no
-- longer be dispatched, with a minute's grace. Answers the entry, also of a repeated call; a call in another state is refused.
CREATE FUNCTION reconcile_call(
    p_tenant uuid, p_reservation uuid, p_entry uuid, p_input bigint, p_output bigint, p_cache_read bigint, p_cache_write_5m bigint,
    p_cache_write_1h bigint, p_cost bigint, p_cause text
) RETURNS uuid
LANGUAGE plpgsql VOLATILE SECURITY INVOKER AS $$
#variable_conflict use_column
DECLARE
    v_call metering.calls;
    v_epoch bigint;
    v_total bigint := p_input + p_output + p_cache_read + p_cache_write_5m + p_cache_write_1h;
BEGIN
    PERFORM pg_advisory_xact_lock_shared(metering.tenant_lock(p_tenant));
    v_epoch := coalesce((SELECT e.epoch FROM metering.tenant_epochs e WHERE e.tenant_id = p_tenant), 0);
    SELECT k.* INTO v_call FROM metering.calls k WHERE k.tenant_id = p_tenant AND k.reservation_id = p_reservation AND k.state = 4 FOR UPDATE;
    IF NOT FOUND THEN
        SELECT k.* INTO v_call FROM metering.calls k WHERE k.tenant_id = p_tenant AND k.reservation_id = p_reservation;
        IF v_call.state = 5 THEN
            RETURN v_call.entry_id;
        END IF;
        RAISE EXCEPTION 'only an unresolved call can be reconciled' USING ERRCODE = 'object_not_in_prerequisite_state';
    END IF;
    IF v_call.dispatch_deadline + interval '1 minute' > clock_timestamp() THEN
        RAISE EXCEPTION 'the call may still be dispatched: reconcile it a minute after %', v_call.dispatch_deadline
            USING ERRCODE = 'object_not_in_prerequisite_state';
    END IF;
    INSERT INTO metering.entries (
        tenant_id, reservation_id, number, entry_id, kind, price_version, provider, model, reserve_time, record_time, epoch,
        input_tokens, output_tokens, cache_read_tokens, cache_write_5m_tokens, cache_write_1h_tokens, total_tokens, cost_nano_usd)
    VALUES (p_tenant, p_reservation, 1, p_entry, 2, v_call.price_version, v_call.provider, v_call.model, v_call.reserve_time, clock_timestamp(),
            v_epoch, p_input, p_output, p_cache_read, p_cache_write_5m, p_cache_write_1h, v_total, p_cost);
    INSERT INTO metering.outbox (tenant_id, reservation_id, kind, epoch, tokens, cost_nano_usd)
    VALUES (p_tenant, p_reservation, 1, v_epoch, v_total, p_cost);
    UPDATE metering.calls
    SET state = 5, unresolved_time = NULL, end_time = clock_timestamp(), settled_epoch = v_epoch, entry_id = p_entry, input_tokens = p_input,
        output_tokens = p_output, cache_read_tokens = p_cache_read, cache_write_5m_tokens = p_cache_write_5m,
        cache_write_1h_tokens = p_cache_write_1h, cost_nano_usd = p_cost, end_cause = p_cause
    WHERE tenant_id = p_tenant AND reservation_id = p_reservation;
    RETURN p_entry;
END
$$;

REVOKE ALL ON FUNCTION begin_epoch, reconcile_call FROM PUBLIC;
GRANT EXECUTE ON FUNCTION begin_epoch TO :service;
GRANT EXECUTE ON FUNCTION reconcile_call TO :jobs;
