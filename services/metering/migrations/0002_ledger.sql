-- The ledger's tables. Every row belongs to a tenant; row-level security is the database's own wall, the statements' tenant_id the first.
--
-- States are the contract's CallState: 1 open, 2 settled, 3 void, 4 unresolved, 5 reconciled.
-- Outbox kinds are the contract's CommitKind: 1 settled, 2 void, 3 pin.

-- A tenant without a row is in epoch 0.
CREATE TABLE tenant_epochs (
    tenant_id uuid PRIMARY KEY,
    epoch bigint NOT NULL CHECK (epoch >= 0),
    begin_time timestamptz NOT NULL DEFAULT clock_timestamp()
);

-- One row an attempt. Columns of the open are NULL together only in a tombstone: a void left for a call that was never opened.
--
-- No index covers `state`: settling an open call then changes no indexed column and stays a heap-only update. `live` and
-- `unresolved_time` repeat what the state says exactly because they do NOT change on the common way from open to settled.
CREATE TABLE calls (
    tenant_id uuid NOT NULL,
    reservation_id uuid NOT NULL,
    state smallint NOT NULL CHECK (state BETWEEN 1 AND 5),
    live boolean NOT NULL,
    call_id uuid,
    attempt smallint CHECK (attempt BETWEEN 1 AND 100),
    open_epoch bigint CHECK (open_epoch >= 0),
    reserve_time timestamptz,
    open_time timestamptz,
    dispatch_deadline timestamptz,
    bound_tokens bigint CHECK (bound_tokens BETWEEN 0 AND 10000000),
    bound_nano_usd bigint CHECK (bound_nano_usd BETWEEN 0 AND 1000000000000000),
    price_version text CHECK (length(price_version) BETWEEN 1 AND 100),
    provider text CHECK (length(provider) BETWEEN 1 AND 63),
    model text CHECK (length(model) BETWEEN 1 AND 200),
    feature text CHECK (length(feature) <= 100),
    user_name text CHECK (length(user_name) <= 200),
    prompt_version text CHECK (length(prompt_version) <= 200),
    unresolved_time timestamptz,
    end_time timestamptz,
    settled_epoch bigint CHECK (settled_epoch >= 0),
    entry_id uuid,
    input_tokens bigint CHECK (input_tokens BETWEEN 0 AND 100000000),
    output_tokens bigint CHECK (output_tokens BETWEEN 0 AND 100000000),
    cache_read_tokens bigint CHECK (cache_read_tokens BETWEEN 0 AND 100000000),
    cache_write_5m_tokens bigint CHECK (cache_write_5m_tokens BETWEEN 0 AND 100000000),
    cache_write_1h_tokens bigint CHECK (cache_write_1h_tokens BETWEEN 0 AND 100000000),
    cost_nano_usd bigint CHECK (cost_nano_usd >= 0),
    end_cause text NOT NULL DEFAULT '' CHECK (length(end_cause) <= 100),
    provider_request_id text NOT NULL DEFAULT '' CHECK (length(provider_request_id) <= 200),
    first_token_ms bigint NOT NULL DEFAULT 0 CHECK (first_token_ms >= 0),
    total_ms bigint NOT NULL DEFAULT 0 CHECK (total_ms >= 0),
    PRIMARY KEY (tenant_id, reservation_id),
    CONSTRAINT opened_whole_or_tombstone CHECK (
        num_nulls(call_id, attempt, open_epoch, reserve_time, open_time, dispatch_deadline, bound_tokens, bound_nano_usd,
                  price_version, provider, model, feature, user_name, prompt_version) IN (0, CASE WHEN state = 3 THEN 14 ELSE 0 END)),
    CONSTRAINT live_unless_void CHECK (live = (state <> 3)),
    CONSTRAINT unresolved_has_its_time CHECK ((state = 4) = (unresolved_time IS NOT NULL)),
    CONSTRAINT ended_unless_open CHECK ((state = 1) = (end_time IS NULL)),
    CONSTRAINT billed_whole CHECK (num_nulls(settled_epoch, entry_id, cost_nano_usd) = CASE WHEN state IN (2, 5) THEN 0 ELSE 3 END),
    CONSTRAINT usage_whole CHECK (
        CASE num_nulls(input_tokens, output_tokens, cache_read_tokens, cache_write_5m_tokens, cache_write_1h_tokens)
            WHEN 0 THEN state IN (2, 4, 5)
            WHEN 5 THEN state IN (1, 3, 4)
            ELSE false
        END)
) WITH (fillfactor = 60);

-- A call id and attempt belong to one reservation for as long as that one is not void: voided ids may be used again.
CREATE UNIQUE INDEX calls_live_attempt ON calls (tenant_id, call_id, attempt) WHERE live;
CREATE INDEX calls_by_call ON calls (tenant_id, call_id) WHERE call_id IS NOT NULL;
CREATE INDEX calls_by_time ON calls (tenant_id, open_time DESC, reservation_id DESC) WHERE open_time IS NOT NULL;
CREATE INDEX calls_unresolved ON calls (tenant_id, unresolved_time) WHERE unresolved_time IS NOT NULL;

-- Leases of open calls and of no other: a row here exists exactly while its call is open. Small and hot, so that a renewal never
-- rewrites the wide row of `calls`. No index on lease_until: renewals stay heap-only, and the sweep reads the few rows there are.
CREATE TABLE call_leases (
    tenant_id uuid NOT NULL,
    reservation_id uuid NOT NULL,
    lease_until timestamptz NOT NULL,
    PRIMARY KEY (tenant_id, reservation_id)
) WITH (fillfactor = 50, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 2000, autovacuum_vacuum_cost_delay = 0);

-- What was billed, for ever. Kinds: 1 settlement, 2 reconciliation, 3 adjustment. Number 1 is the settlement or reconciliation, so the key
-- itself refuses a second bill of one attempt. No personal data here: these rows can never be pseudonymised.
CREATE TABLE entries (
    tenant_id uuid NOT NULL,
    reservation_id uuid NOT NULL,
    number smallint NOT NULL CHECK (number BETWEEN 1 AND 2),
    entry_id uuid NOT NULL,
    kind smallint NOT NULL CHECK (kind BETWEEN 1 AND 3),
    price_version text NOT NULL,
    provider text NOT NULL,
    model text NOT NULL,
    reserve_time timestamptz NOT NULL,
    record_time timestamptz NOT NULL,
    epoch bigint NOT NULL CHECK (epoch >= 0),
    input_tokens bigint NOT NULL,
    output_tokens bigint NOT NULL,
    cache_read_tokens bigint NOT NULL,
    cache_write_5m_tokens bigint NOT NULL,
    cache_write_1h_tokens bigint NOT NULL,
    total_tokens bigint NOT NULL,
    cost_nano_usd bigint NOT NULL,
    PRIMARY KEY (tenant_id, reservation_id, number),
    CONSTRAINT only_adjustments_follow CHECK ((kind = 3) = (number > 1)),
    CONSTRAINT only_adjustments_go_down CHECK (
        kind = 3 OR least(input_tokens, output_tokens, cache_read_tokens, cache_write_5m_tokens, cache_write_1h_tokens, cost_nano_usd) >= 0),
    CONSTRAINT total_is_the_sum CHECK (
        total_tokens = input_tokens + output_tokens + cache_read_tokens + cache_write_5m_tokens + cache_write_1h_tokens)
);

-- Sums by time of reservation read this index alone: an epoch begins without touching the table, and no counter row is fought over.
CREATE INDEX entries_by_reserve_time ON entries (tenant_id, reserve_time) INCLUDE (total_tokens, cost_nano_usd);

CREATE TRIGGER entries_are_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON entries
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_change();

-- Ends of calls the limits have not confirmed yet. Deleted only once they answered DONE.
CREATE TABLE outbox (
    tenant_id uuid NOT NULL,
    reservation_id uuid NOT NULL,
    kind smallint NOT NULL CHECK (kind BETWEEN 1 AND 3),
    epoch bigint NOT NULL CHECK (epoch >= 0),
    tokens bigint NOT NULL CHECK (tokens >= 0),
    cost_nano_usd bigint NOT NULL CHECK (cost_nano_usd >= 0),
    create_time timestamptz NOT NULL DEFAULT clock_timestamp(),
    -- The first second belongs to the process that wrote the row; afterwards any relay may take it.
    due_time timestamptz NOT NULL DEFAULT clock_timestamp() + interval '1 second',
    send_count integer NOT NULL DEFAULT 0 CHECK (send_count >= 0),
    PRIMARY KEY (tenant_id, reservation_id, kind),
    CONSTRAINT only_settlements_count CHECK (kind = 1 OR (tokens = 0 AND cost_nano_usd = 0))
) WITH (fillfactor = 70, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 2000, autovacuum_vacuum_cost_delay = 0);

ALTER TABLE tenant_epochs ENABLE ROW LEVEL SECURITY;
ALTER TABLE tenant_epochs FORCE ROW LEVEL SECURITY;
ALTER TABLE calls ENABLE ROW LEVEL SECURITY;
ALTER TABLE calls FORCE ROW LEVEL SECURITY;
ALTER TABLE call_leases ENABLE ROW LEVEL SECURITY;
ALTER TABLE call_leases FORCE ROW LEVEL SECURITY;
ALTER TABLE entries ENABLE ROW LEVEL SECURITY;
ALTER TABLE entries FORCE ROW LEVEL SECURITY;
ALTER TABLE outbox ENABLE ROW LEVEL SECURITY;
ALTER TABLE outbox FORCE ROW LEVEL SECURITY;

CREATE POLICY own_tenant ON tenant_epochs TO :service
    USING (tenant_id = (SELECT current_setting('app.tenant_id')::uuid)) WITH CHECK (tenant_id = (SELECT current_setting('app.tenant_id')::uuid));
CREATE POLICY own_tenant ON calls TO :service
    USING (tenant_id = (SELECT current_setting('app.tenant_id')::uuid)) WITH CHECK (tenant_id = (SELECT current_setting('app.tenant_id')::uuid));
CREATE POLICY own_tenant ON call_leases TO :service
    USING (tenant_id = (SELECT current_setting('app.tenant_id')::uuid)) WITH CHECK (tenant_id = (SELECT current_setting('app.tenant_id')::uuid));
CREATE POLICY own_tenant ON entries TO :service
    USING (tenant_id = (SELECT current_setting('app.tenant_id')::uuid)) WITH CHECK (tenant_id = (SELECT current_setting('app.tenant_id')::uuid));
CREATE POLICY own_tenant ON outbox TO :service
    USING (tenant_id = (SELECT current_setting('app.tenant_id')::uuid)) WITH CHECK (tenant_id = (SELECT current_setting('app.tenant_id')::uuid));

-- The jobs role works for all tenants: the sweep, the relay, and an operator's reconciliation.
CREATE POLICY every_tenant ON tenant_epochs FOR SELECT TO :jobs USING (true);
CREATE POLICY every_tenant_read ON calls FOR SELECT TO :jobs USING (true);
CREATE POLICY every_tenant_end ON calls FOR UPDATE TO :jobs USING (state IN (1, 4)) WITH CHECK (state IN (4, 5));
CREATE POLICY every_tenant ON call_leases TO :jobs USING (true) WITH CHECK (false);
CREATE POLICY every_tenant_read ON entries FOR SELECT TO :jobs USING (true);
CREATE POLICY every_tenant_reconcile ON entries FOR INSERT TO :jobs WITH CHECK (kind = 2);
CREATE POLICY every_tenant ON outbox TO :jobs USING (true) WITH CHECK (true);

GRANT SELECT, INSERT, UPDATE ON tenant_epochs, calls TO :service;
GRANT SELECT, INSERT, UPDATE, DELETE ON call_leases TO :service;
GRANT SELECT, INSERT ON entries TO :service;
GRANT SELECT, INSERT ON outbox TO :service;

GRANT SELECT ON tenant_epochs TO :jobs;
GRANT SELECT, UPDATE ON calls TO :jobs;
-- UPDATE only because SELECT … FOR UPDATE asks for it; the policy's WITH CHECK (false) refuses every real one.
GRANT SELECT, UPDATE, DELETE ON call_leases TO :jobs;
GRANT SELECT, INSERT ON entries TO :jobs;
GRANT SELECT, INSERT, UPDATE, DELETE ON outbox TO :jobs;
