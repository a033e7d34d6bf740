-- The hot path: a whole multi-tenant batch in one round trip and one transaction.
--
-- How a batch is passed: items sorted by (tenant, reservation), one array a column; p_tenants lists the distinct tenants in order, and the
-- items of p_tenants[i] are p_first[i] .. p_last[i]. Everybody therefore takes tenants, and within them rows, in one order: two batches
-- that meet wait for each other, never in a circle.
--
-- How a batch meets an epoch: each tenant's part starts by taking that tenant's advisory lock SHARED, for the rest of the transaction;
-- begin_epoch takes it EXCLUSIVE. So a change is either committed before the epoch's snapshot is read, and is in it, or starts after the epoch
-- was raised, and sees the new one. The trap: in READ COMMITTED a statement reads what was committed when the STATEMENT began. The lock
-- must be a statement of its own; a query that takes it and reads the epoch at once would wait for the lock and then read the old epoch.
-- (Postgres makes a commit visible before it lets the transaction's locks go, so who gets the lock next sees it.)
--
-- How row-level security sees a batch: set_config(…, true) names one tenant at a time; the policy's sub-select is evaluated anew in each statement.
--
-- The functions switch off sequential scans, hash and merge joins for themselves: their plans are cached while the tables are small, and a
-- plan made for an empty table would otherwise be kept while it grows.

CREATE FUNCTION tenant_lock(p_tenant uuid) RETURNS bigint
LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$ SELECT hashtextextended(p_tenant::text, 7405) $$;

CREATE FUNCTION micros(p_us bigint) RETURNS timestamptz
LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$ SELECT timestamptz 'epoch' + p_us * interval '1 microsecond' $$;

-- Outcomes are the contract's OpenOutcome. A row that is there decides; only then epoch, price and a taken call id are looked at.
CREATE FUNCTION open_calls(
    p_tenants uuid[], p_first integer[], p_last integer[],
    p_reservations uuid[], p_calls uuid[], p_attempts smallint[], p_epochs bigint[], p_reserve_us bigint[], p_deadline_us bigint[],
    p_bound_tokens bigint[], p_bound_nano_usd bigint[], p_versions text[], p_providers text[], p_models text[],
    p_features text[], p_users text[], p_prompts text[], p_lease interval
) RETURNS TABLE (item integer, outcome smallint, state smallint)
LANGUAGE plpgsql VOLATILE SECURITY INVOKER
SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off
AS $$
#variable_conflict use_column
DECLARE
    v_tenant uuid;
    v_epoch bigint;
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

        WITH opened AS (
            INSERT INTO metering.calls (
                tenant_id, reservation_id, state, live, call_id, attempt, open_epoch, reserve_time, open_time, dispatch_deadline,
                bound_tokens, bound_nano_usd, price_version, provider, model, feature, user_name, prompt_version)
            SELECT v_tenant, c.reservation_id, 1, true, c.call_id, c.attempt, c.epoch, metering.micros(c.reserve_us), clock_timestamp(),
                   metering.micros(c.deadline_us), c.bound_tokens, c.bound_nano_usd, c.price_version, c.provider, c.model,
                   c.feature, c.user_name, c.prompt_version
            FROM unnest(p_reservations[a:z], p_calls[a:z], p_attempts[a:z], p_epochs[a:z], p_reserve_us[a:z], p_deadline_us[a:z],
                        p_bound_tokens[a:z], p_bound_nano_usd[a:z], p_versions[a:z], p_providers[a:z], p_models[a:z],
                        p_features[a:z], p_users[a:z], p_prompts[a:z])
                 AS c (reservation_id, call_id, attempt, epoch, reserve_us, deadline_us, bound_tokens, bound_nano_usd,
                       price_version, provider, model, feature, user_name, prompt_version)
            WHERE c.epoch >= v_epoch
              AND EXISTS (SELECT 1 FROM metering.prices p
                          WHERE p.version = c.price_version AND p.provider = c.provider AND p.model = c.model)
            ON CONFLICT DO NOTHING
            RETURNING reservation_id
        )
        INSERT INTO metering.call_leases (tenant_id, reservation_id, lease_until)
        SELECT v_tenant, o.reservation_id, clock_timestamp() + p_lease FROM opened o;

        RETURN QUERY
        SELECT a + c.n::integer - 1,
               CASE
                   -- Repeated: answered as the first time, although the lease may have lapsed since. Refused, the caller would let go
                   -- of a hold that the ledger still counts on.
                   WHEN k.state IN (1, 4) AND (k.call_id, k.attempt, k.bound_tokens, k.bound_nano_usd, k.price_version, k.provider, k.model)
                                      = (c.call_id, c.attempt, c.bound_tokens, c.bound_nano_usd, c.price_version, c.provider, c.model) THEN 1
                   WHEN k.state = 1 THEN 4
                   WHEN k.state IS NOT NULL THEN 3
                   WHEN c.epoch < v_epoch THEN 2
                   WHEN NOT EXISTS (SELECT 1 FROM metering.prices p
                                    WHERE p.version = c.price_version AND p.provider = c.provider AND p.model = c.model) THEN 5
                   ELSE 4
               END::smallint,
               coalesce(k.state, 0::smallint)
        FROM unnest(p_reservations[a:z], p_calls[a:z], p_attempts[a:z], p_epochs[a:z], p_bound_tokens[a:z], p_bound_nano_usd[a:z],
                    p_versions[a:z], p_providers[a:z], p_models[a:z]) WITH ORDINALITY
             AS c (reservation_id, call_id, attempt, epoch, bound_tokens, bound_nano_usd, price_version, provider, model, n)
        LEFT JOIN metering.calls k ON k.tenant_id = v_tenant AND k.reservation_id = c.reservation_id;
    END LOOP;
END
$$;

-- What each call is rated by: settled at its open and never changed afterwards, so it may be remembered.
CREATE FUNCTION call_prices(p_tenants uuid[], p_first integer[], p_last integer[], p_reservations uuid[])
RETURNS TABLE (item integer, price_version text, provider text, model text)
LANGUAGE plpgsql STABLE SECURITY INVOKER
SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off
AS $$
#variable_conflict use_column
BEGIN
    FOR i IN 1 .. cardinality(p_tenants) LOOP
        PERFORM set_config('app.tenant_id', p_tenants[i]::text, true);
        RETURN QUERY
        SELECT p_first[i] + c.n::integer - 1, k.price_version, k.provider, k.model
        FROM unnest(p_reservations[p_first[i]:p_last[i]]) WITH ORDINALITY AS c (reservation_id, n)
        JOIN metering.calls k ON k.tenant_id = p_tenants[i] AND k.reservation_id = c.reservation_id
        WHERE k.price_version IS NOT NULL;
    END LOOP;
END
$$;

-- Outcomes are the contract's SettleOutcome. `told_epoch` is set on the one item whose settlement was written now: it is in the outbox.
-- An item with p_priced false had no opened call when it was rated; it settles nothing.
CREATE FUNCTION settle_calls(
    p_tenants uuid[], p_first integer[], p_last integer[],
    p_reservations uuid[], p_entries uuid[], p_priced boolean[], p_cost bigint[],
    p_input bigint[], p_output bigint[], p_cache_read bigint[], p_cache_write_5m bigint[], p_cache_write_1h bigint[],
    p_stop_reasons text[], p_request_ids text[], p_first_ms bigint[], p_total_ms bigint[]
) RETURNS TABLE (item integer, outcome smallint, cost_nano_usd bigint, entry_id uuid, told_epoch bigint)
LANGUAGE plpgsql VOLATILE SECURITY INVOKER
SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off
AS $$
#variable_conflict use_column
DECLARE
    v_tenant uuid;
    v_epoch bigint;
    v_reconciled bigint;
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
        -- Locks first, in order; the statements below then find rows that stand still.
        SELECT count(*) FILTER (WHERE k.state = 5) INTO v_reconciled
        FROM (SELECT state FROM metering.calls WHERE tenant_id = v_tenant AND reservation_id = ANY (p_reservations[a:z])
              ORDER BY reservation_id FOR UPDATE) k;

        WITH wanted AS (
            -- The first of two items for one reservation decides; the second is compared with it below.
            SELECT DISTINCT ON (c.reservation_id) c.*
            FROM unnest(p_reservations[a:z], p_entries[a:z], p_priced[a:z], p_cost[a:z], p_input[a:z], p_output[a:z], p_cache_read[a:z],
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
            WHERE k.tenant_id = v_tenant AND k.reservation_id = w.reservation_id AND k.state IN (1, 4)
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
            DELETE FROM metering.call_leases l USING settled s WHERE l.tenant_id = v_tenant AND l.reservation_id = s.reservation_id
        )
        INSERT INTO metering.outbox (tenant_id, reservation_id, kind, epoch, tokens, cost_nano_usd)
        SELECT v_tenant, s.reservation_id, 1, v_epoch, s.total_tokens, s.cost_nano_usd FROM settled s;

        -- The books of a reconciled call are closed: what it was really billed is recorded as the difference, once.
        IF v_reconciled > 0 THEN
            WITH wanted AS (
                SELECT DISTINCT ON (c.reservation_id) c.*
                FROM unnest(p_reservations[a:z], p_entries[a:z], p_priced[a:z], p_cost[a:z], p_input[a:z], p_output[a:z], p_cache_read[a:z],
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
                JOIN metering.calls k ON k.tenant_id = v_tenant AND k.reservation_id = w.reservation_id AND k.state = 5
                ON CONFLICT (tenant_id, reservation_id, number) DO NOTHING
                RETURNING reservation_id, entry_id
            )
            UPDATE metering.calls k
            SET entry_id = w.entry_id, input_tokens = w.input, output_tokens = w.output, cache_read_tokens = w.cache_read,
                cache_write_5m_tokens = w.cache_write_5m, cache_write_1h_tokens = w.cache_write_1h, cost_nano_usd = w.cost
            FROM adjusted d JOIN wanted w ON w.reservation_id = d.reservation_id
            WHERE k.tenant_id = v_tenant AND k.reservation_id = d.reservation_id;
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
        FROM unnest(p_reservations[a:z], p_entries[a:z], p_input[a:z], p_output[a:z], p_cache_read[a:z], p_cache_write_5m[a:z],
                    p_cache_write_1h[a:z]) WITH ORDINALITY
             AS c (reservation_id, entry_id, input, output, cache_read, cache_write_5m, cache_write_1h, n)
        LEFT JOIN metering.calls k ON k.tenant_id = v_tenant AND k.reservation_id = c.reservation_id;
    END LOOP;
END
$$;

REVOKE ALL ON FUNCTION open_calls, call_prices, settle_calls FROM PUBLIC;
GRANT EXECUTE ON FUNCTION open_calls, call_prices, settle_calls TO :service;
