-- What 0027 made of the other batches, for those that open calls and record units: what became of each is found by all keys in one scan. As long as
-- the statistics said nothing of a tenant's calls, each item was held against all of them.

-- As in 0015. Prices are looked up one by one, and not joined: the book may be long, and most batches are of few calls.
CREATE OR REPLACE FUNCTION open_calls(
    p_tenants uuid[], p_first integer[], p_last integer[],
    p_reservations uuid[], p_calls uuid[], p_attempts smallint[], p_epochs bigint[], p_reserve_us bigint[], p_deadline_us bigint[],
    p_bound_tokens bigint[], p_bound_nano_usd bigint[], p_versions text[], p_providers text[], p_models text[],
    p_features text[], p_users text[], p_prompts text[], p_tiers text[], p_accounts text[], p_tenant_bills boolean[], p_lease interval
) RETURNS TABLE (item integer, outcome smallint, state smallint)
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

        WITH opened AS (
            INSERT INTO metering.calls (
                tenant_id, reservation_id, state, live, call_id, attempt, open_epoch, reserve_time, open_time, dispatch_deadline,
                bound_tokens, bound_nano_usd, price_version, provider, model, feature, user_name, prompt_version,
                tier, provider_account, bills_tenant_account)
            SELECT v_tenant, c.reservation_id, 1, true, c.call_id, c.attempt, c.epoch, metering.micros(c.reserve_us), clock_timestamp(),
                   metering.micros(c.deadline_us), c.bound_tokens, c.bound_nano_usd, c.price_version, c.provider, c.model,
                   c.feature, c.user_name, c.prompt_version, c.tier, c.provider_account, c.bills_tenant_account
            FROM unnest(v_reservations, p_calls[a:z], p_attempts[a:z], p_epochs[a:z], p_reserve_us[a:z], p_deadline_us[a:z],
                        p_bound_tokens[a:z], p_bound_nano_usd[a:z], p_versions[a:z], p_providers[a:z], p_models[a:z],
                        p_features[a:z], p_users[a:z], p_prompts[a:z], p_tiers[a:z], p_accounts[a:z], p_tenant_bills[a:z])
                 AS c (reservation_id, call_id, attempt, epoch, reserve_us, deadline_us, bound_tokens, bound_nano_usd,
                       price_version, provider, model, feature, user_name, prompt_version, tier, provider_account, bills_tenant_account)
            WHERE c.epoch >= v_epoch
              AND (SELECT true FROM metering.prices p
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
        FROM unnest(v_reservations, p_calls[a:z], p_attempts[a:z], p_epochs[a:z], p_bound_tokens[a:z], p_bound_nano_usd[a:z],
                    p_versions[a:z], p_providers[a:z], p_models[a:z]) WITH ORDINALITY
             AS c (reservation_id, call_id, attempt, epoch, bound_tokens, bound_nano_usd, price_version, provider, model, n)
        LEFT JOIN metering.calls k ON k.tenant_id = v_tenant AND k.reservation_id = ANY (v_reservations) AND k.reservation_id = c.reservation_id;
    END LOOP;
END
$$;

-- As in 0011.
CREATE OR REPLACE FUNCTION record_units(
    p_tenants uuid[], p_first integer[], p_last integer[], p_reservations uuid[], p_entries uuid[], p_epochs bigint[], p_reserve_us bigint[],
    p_units text[], p_quantities bigint[], p_users text[], p_features text[], p_tiers text[]
) RETURNS TABLE (item integer, outcome smallint, told_epoch bigint)
LANGUAGE plpgsql VOLATILE SECURITY INVOKER
SET enable_seqscan = off SET enable_nestloop = off SET enable_mergejoin = off
AS $$
#variable_conflict use_column
DECLARE
    v_tenant uuid;
    v_epoch bigint;
    v_reservations uuid[];
    v_erased boolean;
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
        v_erased := EXISTS (SELECT FROM metering.erased_tenants e WHERE e.tenant_id = v_tenant);
        WITH used AS (
            -- Of two items with one id the first is written; the second is compared with it below.
            INSERT INTO metering.calls (
                tenant_id, reservation_id, state, live, open_epoch, reserve_time, feature, user_name, prompt_version, product_unit, quantity,
                end_time, settled_epoch, entry_id, input_tokens, output_tokens, cache_read_tokens, cache_write_5m_tokens,
                cache_write_1h_tokens, cost_nano_usd, tier)
            SELECT v_tenant, c.reservation_id, 2, true, c.epoch, metering.micros(c.reserve_us), c.feature, c.user_name, '', c.unit, c.quantity,
                   clock_timestamp(), v_epoch, c.entry_id, 0, 0, 0, 0, 0, 0, c.tier
            FROM unnest(v_reservations, p_entries[a:z], p_epochs[a:z], p_reserve_us[a:z], p_units[a:z], p_quantities[a:z], p_users[a:z],
                        p_features[a:z], p_tiers[a:z])
                 AS c (reservation_id, entry_id, epoch, reserve_us, unit, quantity, user_name, feature, tier)
            WHERE c.epoch >= v_epoch
            ON CONFLICT DO NOTHING
            RETURNING reservation_id, entry_id, product_unit, quantity, reserve_time, end_time
        ), written AS (
            INSERT INTO metering.unit_entries (tenant_id, reservation_id, entry_id, product_unit, quantity, reserve_time, record_time, epoch)
            SELECT v_tenant, u.reservation_id, u.entry_id, u.product_unit, u.quantity, u.reserve_time, u.end_time, v_epoch FROM used u
        )
        INSERT INTO metering.outbox (tenant_id, reservation_id, kind, epoch, tokens, cost_nano_usd)
        SELECT v_tenant, u.reservation_id, 1, v_epoch, 0, 0 FROM used u;

        RETURN QUERY
        SELECT a + c.n::integer - 1,
               CASE
                   WHEN k.state IS NULL THEN 2
                   WHEN k.state = 3 THEN 3
                   WHEN k.product_unit = c.unit AND k.quantity = c.quantity
                        AND (v_erased OR (k.user_name, k.feature) = (c.user_name, c.feature)) THEN 1
                   ELSE 4
               END::smallint,
               CASE WHEN k.entry_id = c.entry_id THEN v_epoch END
        FROM unnest(v_reservations, p_entries[a:z], p_units[a:z], p_quantities[a:z], p_users[a:z], p_features[a:z]) WITH ORDINALITY
             AS c (reservation_id, entry_id, unit, quantity, user_name, feature, n)
        LEFT JOIN metering.calls k ON k.tenant_id = v_tenant AND k.reservation_id = ANY (v_reservations) AND k.reservation_id = c.reservation_id;
    END LOOP;
END
$$;

-- As in 0012, of the calls that the units were written with and not of all of their tenant's.
CREATE OR REPLACE FUNCTION count_units() RETURNS trigger
LANGUAGE plpgsql SECURITY INVOKER
SET search_path = metering, pg_temp SET enable_seqscan = off SET enable_nestloop = off SET enable_mergejoin = off
AS $$
DECLARE
    v_tenant uuid;
    v_reservations uuid[];
BEGIN
    FOR v_tenant, v_reservations IN SELECT u.tenant_id, array_agg(u.reservation_id) FROM rows_added u GROUP BY u.tenant_id LOOP
        PERFORM metering.count_events(v_tenant, array_agg(u.reserve_time), array_agg(u.product_unit), array_agg(u.quantity),
                                      array_agg(k.user_name), array_agg(k.feature), array_agg(k.tier))
        FROM rows_added u
        JOIN metering.calls k ON k.tenant_id = v_tenant AND k.reservation_id = ANY (v_reservations) AND k.reservation_id = u.reservation_id
        WHERE u.tenant_id = v_tenant;
    END LOOP;
    RETURN NULL;
END
$$;
