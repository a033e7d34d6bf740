-- Raising the bounds of open calls, and recording units of the product. Batches are passed, locked and ordered as in 0003.

-- A use of units is a row of `calls` that was never open: settled from its beginning, with no call id, model or bound. It stands there and not
-- in a table of its own because whoever fences, voids or opens its id must meet it under one key, and because names live in `calls` alone.
ALTER TABLE calls
    ADD COLUMN product_unit text CHECK (product_unit ~ '^[a-z][a-z0-9_]{0,62}$'),
    ADD COLUMN quantity bigint CHECK (quantity BETWEEN 1 AND 1000000000);
-- NOT VALID: every row that is there passed the stricter one, and nobody waits while that is checked again.
ALTER TABLE calls DROP CONSTRAINT opened_whole_or_tombstone;
ALTER TABLE calls ADD CONSTRAINT opened_whole_or_units_or_tombstone CHECK (
    CASE WHEN product_unit IS NULL THEN
        quantity IS NULL
        AND num_nulls(call_id, attempt, open_epoch, reserve_time, open_time, dispatch_deadline, bound_tokens, bound_nano_usd,
                      price_version, provider, model, feature, user_name, prompt_version) IN (0, CASE WHEN state = 3 THEN 14 ELSE 0 END)
    ELSE
        state = 2 AND num_nulls(quantity, open_epoch, reserve_time, feature, user_name, prompt_version) = 0
        AND num_nonnulls(call_id, attempt, open_time, dispatch_deadline, bound_tokens, bound_nano_usd, price_version, provider, model) = 0
        AND input_tokens + output_tokens + cache_read_tokens + cache_write_5m_tokens + cache_write_1h_tokens + cost_nano_usd = 0
    END) NOT VALID;

-- What was used of the product, for ever: the counterpart of `entries`. `reservation_id` is what the user of the units called the use, so the
-- key itself refuses to count one twice, whatever time a repetition tells. No personal data here.
CREATE TABLE unit_entries (
    tenant_id uuid NOT NULL,
    reservation_id uuid NOT NULL,
    entry_id uuid NOT NULL,
    product_unit text NOT NULL CHECK (product_unit ~ '^[a-z][a-z0-9_]{0,62}$'),
    quantity bigint NOT NULL CHECK (quantity BETWEEN 1 AND 1000000000),
    reserve_time timestamptz NOT NULL,
    record_time timestamptz NOT NULL,
    epoch bigint NOT NULL CHECK (epoch >= 0),
    PRIMARY KEY (tenant_id, reservation_id)
);
CREATE TRIGGER unit_entries_are_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON unit_entries
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_change();
ALTER TABLE unit_entries ENABLE ROW LEVEL SECURITY;
ALTER TABLE unit_entries FORCE ROW LEVEL SECURITY;
CREATE POLICY own_tenant ON unit_entries TO :service
    USING (tenant_id = (SELECT current_setting('app.tenant_id')::uuid)) WITH CHECK (tenant_id = (SELECT current_setting('app.tenant_id')::uuid));
CREATE POLICY every_tenant_read ON unit_entries FOR SELECT TO :jobs USING (true);
GRANT SELECT, INSERT ON unit_entries TO :service;
GRANT SELECT ON unit_entries TO :jobs;

-- Outcomes are the contract's RecordUnitsOutcome. A row that is there decides; only then the epoch is looked at. The time is not compared: a
-- repetition may tell another. Nor are the names of an erased tenant: they are forgotten.
-- `told_epoch` is set on the one item that was written now: it is in the outbox.
CREATE FUNCTION record_units(
    p_tenants uuid[], p_first integer[], p_last integer[], p_reservations uuid[], p_entries uuid[], p_epochs bigint[], p_reserve_us bigint[],
    p_units text[], p_quantities bigint[], p_users text[], p_features text[]
) RETURNS TABLE (item integer, outcome smallint, told_epoch bigint)
LANGUAGE plpgsql VOLATILE SECURITY INVOKER
SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off
AS $$
#variable_conflict use_column
DECLARE
    v_tenant uuid;
    v_epoch bigint;
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
        v_epoch := coalesce((SELECT e.epoch FROM metering.tenant_epochs e WHERE e.tenant_id = v_tenant), 0);
        v_erased := EXISTS (SELECT FROM metering.erased_tenants e WHERE e.tenant_id = v_tenant);
        WITH used AS (
            -- Of two items with one id the first is written; the second is compared with it below.
            INSERT INTO metering.calls (
                tenant_id, reservation_id, state, live, open_epoch, reserve_time, feature, user_name, prompt_version, product_unit, quantity,
                end_time, settled_epoch, entry_id, input_tokens, output_tokens, cache_read_tokens, cache_write_5m_tokens,
                cache_write_1h_tokens, cost_nano_usd)
            SELECT v_tenant, c.reservation_id, 2, true, c.epoch, metering.micros(c.reserve_us), c.feature, c.user_name, '', c.unit, c.quantity,
                   clock_timestamp(), v_epoch, c.entry_id, 0, 0, 0, 0, 0, 0
            FROM unnest(p_reservations[a:z], p_entries[a:z], p_epochs[a:z], p_reserve_us[a:z], p_units[a:z], p_quantities[a:z], p_users[a:z],
                        p_features[a:z]) AS c (reservation_id, entry_id, epoch, reserve_us, unit, quantity, user_name, feature)
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
        FROM unnest(p_reservations[a:z], p_entries[a:z], p_units[a:z], p_quantities[a:z], p_users[a:z], p_features[a:z]) WITH ORDINALITY
             AS c (reservation_id, entry_id, unit, quantity, user_name, feature, n)
        LEFT JOIN metering.calls k ON k.tenant_id = v_tenant AND k.reservation_id = c.reservation_id;
    END LOOP;
END
$$;

-- Returns the items that are extended: whose open call now has at least these bounds. A bound only rises, so whatever comes late or twice
-- changes nothing.
--
-- Only in the epoch the call was opened in: the limits raised their hold before this was asked for. Had they begun anew meanwhile, they would
-- have loaded the old bound, and hold too little for the new one. A bound that is there already was in that snapshot, and is answered.
CREATE FUNCTION extend_calls(
    p_tenants uuid[], p_first integer[], p_last integer[], p_reservations uuid[], p_bound_tokens bigint[], p_bound_nano_usd bigint[]
) RETURNS TABLE (item integer)
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
        PERFORM 1 FROM metering.calls WHERE tenant_id = v_tenant AND reservation_id = ANY (p_reservations[a:z]) ORDER BY reservation_id FOR UPDATE;
        UPDATE metering.calls k
        SET bound_tokens = greatest(k.bound_tokens, w.tokens), bound_nano_usd = greatest(k.bound_nano_usd, w.nano_usd)
        FROM (SELECT c.reservation_id, max(c.tokens) AS tokens, max(c.nano_usd) AS nano_usd
              FROM unnest(p_reservations[a:z], p_bound_tokens[a:z], p_bound_nano_usd[a:z]) AS c (reservation_id, tokens, nano_usd)
              GROUP BY c.reservation_id) w
        WHERE k.tenant_id = v_tenant AND k.reservation_id = w.reservation_id AND k.state = 1 AND k.open_epoch = v_epoch
          AND (k.bound_tokens < w.tokens OR k.bound_nano_usd < w.nano_usd);
        RETURN QUERY
        SELECT a + c.n::integer - 1
        FROM unnest(p_reservations[a:z], p_bound_tokens[a:z], p_bound_nano_usd[a:z]) WITH ORDINALITY AS c (reservation_id, tokens, nano_usd, n)
        JOIN metering.calls k ON k.tenant_id = v_tenant AND k.reservation_id = c.reservation_id
        WHERE k.state = 1 AND k.bound_tokens >= c.tokens AND k.bound_nano_usd >= c.nano_usd;
    END LOOP;
END
$$;

REVOKE ALL ON FUNCTION record_units, extend_calls FROM PUBLIC;
GRANT EXECUTE ON FUNCTION record_units, extend_calls TO :service;
