-- Whose account at the provider a call is billed to, and what its usage report was compared with.
--
-- The function without accounts stays for as long as replicas of the release before call it. Calls of earlier releases are taken for calls on
-- the operator's nameless account.

ALTER TABLE calls
    ADD COLUMN provider_account text NOT NULL DEFAULT '',
    ADD COLUMN bills_tenant_account boolean NOT NULL DEFAULT false;
-- NOT VALID: the rows that are there have the default, and nobody waits while that is checked.
ALTER TABLE calls ADD CONSTRAINT provider_account_length CHECK (length(provider_account) <= 100) NOT VALID;

-- As in 0011, with accounts.
CREATE FUNCTION open_calls(
    p_tenants uuid[], p_first integer[], p_last integer[],
    p_reservations uuid[], p_calls uuid[], p_attempts smallint[], p_epochs bigint[], p_reserve_us bigint[], p_deadline_us bigint[],
    p_bound_tokens bigint[], p_bound_nano_usd bigint[], p_versions text[], p_providers text[], p_models text[],
    p_features text[], p_users text[], p_prompts text[], p_tiers text[], p_accounts text[], p_tenant_bills boolean[], p_lease interval
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
                bound_tokens, bound_nano_usd, price_version, provider, model, feature, user_name, prompt_version,
                tier, provider_account, bills_tenant_account)
            SELECT v_tenant, c.reservation_id, 1, true, c.call_id, c.attempt, c.epoch, metering.micros(c.reserve_us), clock_timestamp(),
                   metering.micros(c.deadline_us), c.bound_tokens, c.bound_nano_usd, c.price_version, c.provider, c.model,
                   c.feature, c.user_name, c.prompt_version, c.tier, c.provider_account, c.bills_tenant_account
            FROM unnest(p_reservations[a:z], p_calls[a:z], p_attempts[a:z], p_epochs[a:z], p_reserve_us[a:z], p_deadline_us[a:z],
                        p_bound_tokens[a:z], p_bound_nano_usd[a:z], p_versions[a:z], p_providers[a:z], p_models[a:z],
                        p_features[a:z], p_users[a:z], p_prompts[a:z], p_tiers[a:z], p_accounts[a:z], p_tenant_bills[a:z])
                 AS c (reservation_id, call_id, attempt, epoch, reserve_us, deadline_us, bound_tokens, bound_nano_usd,
                       price_version, provider, model, feature, user_name, prompt_version, tier, provider_account, bills_tenant_account)
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

-- Closes unresolved calls with what the provider's feed says, each by reconcile_call, and returns which. Items are sorted by (tenant, reservation).
-- One that is not unresolved any more, or may still be dispatched, is left as it is: somebody else closed it, or it has to wait.
-- The id of the provider's request is written first: once the call is reconciled the jobs role may not touch it.
CREATE FUNCTION reconcile_calls(
    p_tenants uuid[], p_reservations uuid[], p_entries uuid[], p_input bigint[], p_output bigint[], p_cache_read bigint[],
    p_cache_write_5m bigint[], p_cache_write_1h bigint[], p_cost bigint[], p_request_ids text[], p_cause text
) RETURNS TABLE (item integer, told_epoch bigint)
LANGUAGE plpgsql VOLATILE SECURITY INVOKER
AS $$
#variable_conflict use_column
BEGIN
    FOR i IN 1 .. cardinality(p_reservations) LOOP
        -- As everybody who ends a call: the tenant's lock before the row's.
        PERFORM pg_advisory_xact_lock_shared(metering.tenant_lock(p_tenants[i]));
        PERFORM 1 FROM metering.calls k
        WHERE k.tenant_id = p_tenants[i] AND k.reservation_id = p_reservations[i] AND k.state = 4
          AND k.dispatch_deadline + interval '1 minute' <= clock_timestamp()
        FOR UPDATE;
        CONTINUE WHEN NOT FOUND;
        UPDATE metering.calls k SET provider_request_id = p_request_ids[i]
        WHERE k.tenant_id = p_tenants[i] AND k.reservation_id = p_reservations[i] AND p_request_ids[i] <> '';
        PERFORM metering.reconcile_call(
            p_tenants[i], p_reservations[i], p_entries[i], p_input[i], p_output[i], p_cache_read[i], p_cache_write_5m[i], p_cache_write_1h[i],
            p_cost[i], p_cause);
        RETURN QUERY
        SELECT i, k.settled_epoch FROM metering.calls k WHERE k.tenant_id = p_tenants[i] AND k.reservation_id = p_reservations[i];
    END LOOP;
END
$$;

-- One report a provider's account and bucket of time, of all tenants together: it holds no tenant's data. A later run over the same bucket
-- replaces it. Kinds: 1 by sums, 2 by single requests.
CREATE TABLE reconciliations (
    provider text NOT NULL CHECK (length(provider) BETWEEN 1 AND 63),
    account text NOT NULL CHECK (length(account) <= 100),
    bucket_start timestamptz NOT NULL,
    bucket_end timestamptz NOT NULL CHECK (bucket_end > bucket_start),
    kind smallint NOT NULL CHECK (kind IN (1, 2)),
    is_complete boolean NOT NULL,
    run_time timestamptz NOT NULL,
    settled_nano_usd bigint NOT NULL CHECK (settled_nano_usd >= 0),
    unresolved_nano_usd bigint NOT NULL CHECK (unresolved_nano_usd >= 0),
    feed_nano_usd bigint NOT NULL,
    drift_nano_usd bigint NOT NULL CHECK (drift_nano_usd >= 0),
    is_drifting boolean NOT NULL,
    reconciled_count bigint NOT NULL,
    unresolved_count bigint NOT NULL,
    unfinished_count bigint NOT NULL,
    ambiguous_count bigint NOT NULL,
    unknown_count bigint NOT NULL,
    missing_count bigint NOT NULL,
    differing_count bigint NOT NULL,
    PRIMARY KEY (provider, account, bucket_start, bucket_end)
);
CREATE INDEX reconciliations_by_time ON reconciliations (bucket_start DESC, bucket_end DESC, provider, account);

CREATE TABLE reconciliation_lines (
    provider text NOT NULL,
    account text NOT NULL,
    bucket_start timestamptz NOT NULL,
    bucket_end timestamptz NOT NULL,
    model text NOT NULL CHECK (length(model) BETWEEN 1 AND 200),
    -- In the order of ClassPrices: input, output, cache read, cache write for 5 minutes, for 1 hour.
    settled_tokens bigint[] NOT NULL CHECK (cardinality(settled_tokens) = 5),
    feed_tokens bigint[] NOT NULL CHECK (cardinality(feed_tokens) = 5),
    PRIMARY KEY (provider, account, bucket_start, bucket_end, model),
    FOREIGN KEY (provider, account, bucket_start, bucket_end)
        REFERENCES reconciliations (provider, account, bucket_start, bucket_end)
);
GRANT SELECT, INSERT, UPDATE ON reconciliations TO :jobs;
GRANT SELECT, INSERT, DELETE ON reconciliation_lines TO :jobs;

REVOKE ALL ON FUNCTION
    open_calls (uuid[], integer[], integer[], uuid[], uuid[], smallint[], bigint[], bigint[], bigint[], bigint[], bigint[], text[], text[], text[],
                text[], text[], text[], text[], text[], boolean[], interval),
    reconcile_calls
FROM PUBLIC;
GRANT EXECUTE ON FUNCTION
    open_calls (uuid[], integer[], integer[], uuid[], uuid[], smallint[], bigint[], bigint[], bigint[], bigint[], bigint[], text[], text[], text[],
                text[], text[], text[], text[], text[], boolean[], interval)
TO :service;
GRANT EXECUTE ON FUNCTION reconcile_calls TO :jobs;
