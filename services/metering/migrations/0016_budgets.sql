-- Budgets, the alerts that their thresholds fire, and what is sent to tenants' receivers.
--
-- Whoever records usage of a tenant that has budgets leaves a mark in the same transaction: plain inserts, as in the log of use, so no writer waits for
-- another. A job takes the marks, adds up and fires. What was marked was committed with its mark, so who sees a mark sees its usage. A budget is put
-- under the tenant's exclusive lock: writers that did not see it were committed before it, and later ones see it.

-- Measures, periods and actions are the contract's. `budget_id` stands for what is counted and the amount: it is another one when they change.
CREATE TABLE budgets (
    tenant_id uuid NOT NULL,
    name text NOT NULL CHECK (name ~ '^[a-z][a-z0-9_]{0,62}$'),
    budget_id uuid NOT NULL,
    measure smallint NOT NULL CHECK (measure BETWEEN 1 AND 3),
    product_unit text NOT NULL CHECK ((measure = 3) = (product_unit <> '')),
    user_name text NOT NULL CHECK (length(user_name) <= 200),
    feature text NOT NULL CHECK (length(feature) <= 100),
    amount bigint NOT NULL CHECK (amount BETWEEN 1 AND 9000000000000000),
    period smallint NOT NULL CHECK (period BETWEEN 1 AND 3),
    action smallint NOT NULL CHECK (action BETWEEN 1 AND 3),
    thresholds integer[] NOT NULL CHECK (cardinality(thresholds) BETWEEN 1 AND 21 AND 1 <= ALL (thresholds) AND 1000 >= ALL (thresholds)),
    update_time timestamptz NOT NULL,
    PRIMARY KEY (tenant_id, name),
    UNIQUE (tenant_id, budget_id)
);

-- The key decides that a threshold fires once in a period. Erasing a tenant blanks the names and keeps the amounts; `metadata` holds the budget's name.
CREATE TABLE budget_alerts (
    tenant_id uuid NOT NULL,
    budget_id uuid NOT NULL,
    period_start timestamptz NOT NULL,
    threshold integer NOT NULL CHECK (threshold BETWEEN 1 AND 1000),
    alert_id uuid NOT NULL,
    measure smallint NOT NULL,
    product_unit text NOT NULL,
    user_name text NOT NULL,
    feature text NOT NULL,
    metadata jsonb,
    amount bigint NOT NULL,
    action smallint NOT NULL,
    period_end timestamptz NOT NULL CHECK (period_end > period_start),
    used bigint NOT NULL CHECK (used::numeric * 100 >= amount::numeric * threshold),
    fire_time timestamptz NOT NULL,
    PRIMARY KEY (tenant_id, budget_id, period_start, threshold)
);
CREATE INDEX budget_alerts_by_time ON budget_alerts (tenant_id, fire_time DESC, alert_id DESC);
CREATE TRIGGER budget_alerts_only_forget BEFORE UPDATE OR DELETE ON budget_alerts FOR EACH ROW EXECUTE FUNCTION only_forget();
CREATE TRIGGER budget_alerts_are_not_emptied BEFORE TRUNCATE ON budget_alerts FOR EACH STATEMENT EXECUTE FUNCTION refuse_change();

-- That usage of a tenant with budgets changed, by the quarter of an hour of its use: no period of any time zone begins within one. The unit is empty
-- of calls.
CREATE TABLE budget_marks (
    tenant_id uuid NOT NULL,
    mark_id bigint GENERATED ALWAYS AS IDENTITY,
    use_quarter timestamptz NOT NULL,
    product_unit text NOT NULL,
    PRIMARY KEY (tenant_id, mark_id)
) WITH (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 2000, autovacuum_vacuum_cost_delay = 0);

-- A secret is sealed; the one before the last rotation signs too until its end.
CREATE TABLE webhook_endpoints (
    tenant_id uuid NOT NULL,
    endpoint_id uuid NOT NULL,
    url text NOT NULL CHECK (length(url) BETWEEN 1 AND 2000),
    secret bytea NOT NULL,
    previous_secret bytea,
    previous_end_time timestamptz,
    create_time timestamptz NOT NULL,
    PRIMARY KEY (tenant_id, endpoint_id),
    CONSTRAINT previous_whole CHECK ((previous_secret IS NULL) = (previous_end_time IS NULL))
);

-- States are the contract's DeliveryState: 1 pending, 2 delivered, 3 dead. An event is sent to a receiver once, however often the sending is repeated.
CREATE TABLE webhook_deliveries (
    tenant_id uuid NOT NULL,
    delivery_id uuid NOT NULL,
    endpoint_id uuid NOT NULL,
    event_id uuid NOT NULL,
    event_type text NOT NULL CHECK (length(event_type) <= 100),
    data jsonb NOT NULL,
    state smallint NOT NULL DEFAULT 1 CHECK (state BETWEEN 1 AND 3),
    attempts integer NOT NULL DEFAULT 0 CHECK (attempts >= 0),
    last_error text NOT NULL DEFAULT '' CHECK (length(last_error) <= 500),
    create_time timestamptz NOT NULL,
    due_time timestamptz NOT NULL,
    lease_end_time timestamptz,
    end_time timestamptz,
    PRIMARY KEY (tenant_id, delivery_id),
    UNIQUE (tenant_id, event_id, endpoint_id),
    FOREIGN KEY (tenant_id, endpoint_id) REFERENCES webhook_endpoints (tenant_id, endpoint_id) ON DELETE CASCADE,
    CONSTRAINT ended_unless_pending CHECK ((state = 1) = (end_time IS NULL))
) WITH (autovacuum_vacuum_scale_factor = 0.05, autovacuum_vacuum_cost_delay = 0);
CREATE INDEX webhook_deliveries_by_time ON webhook_deliveries (tenant_id, create_time DESC, delivery_id DESC);
CREATE INDEX webhook_deliveries_waiting ON webhook_deliveries (tenant_id, endpoint_id, due_time, delivery_id) WHERE state = 1;
CREATE INDEX webhook_deliveries_ended ON webhook_deliveries (tenant_id, end_time) WHERE state <> 1;

-- Marks are left where the log of use is written, which is where every change of calls and units passes.
CREATE FUNCTION mark_budgets() RETURNS trigger
LANGUAGE plpgsql SECURITY INVOKER SET search_path = metering, pg_temp AS $$
BEGIN
    INSERT INTO metering.budget_marks (tenant_id, use_quarter, product_unit)
    SELECT DISTINCT r.tenant_id, date_bin('15 minutes', r.use_time, timestamptz 'epoch'), r.product_unit
    FROM rows_added r
    WHERE EXISTS (SELECT FROM metering.budgets b WHERE b.tenant_id = r.tenant_id AND b.product_unit = r.product_unit);
    RETURN NULL;
END
$$;
CREATE TRIGGER budgets_are_marked AFTER INSERT ON usage_pending REFERENCING NEW TABLE AS rows_added
    FOR EACH STATEMENT EXECUTE FUNCTION mark_budgets();

CREATE FUNCTION mark_budgets_of_events() RETURNS trigger
LANGUAGE plpgsql SECURITY INVOKER SET search_path = metering, pg_temp AS $$
BEGIN
    INSERT INTO metering.budget_marks (tenant_id, use_quarter, product_unit)
    SELECT DISTINCT r.tenant_id, date_bin('15 minutes', r.occurred_at, timestamptz 'epoch'), t.unit
    FROM rows_added r JOIN metering.event_types t ON t.product = r.product AND t.event_type = r.event_type
    WHERE EXISTS (SELECT FROM metering.budgets b WHERE b.tenant_id = r.tenant_id AND b.product_unit = t.unit);
    RETURN NULL;
END
$$;
CREATE TRIGGER budgets_are_marked AFTER INSERT ON events REFERENCING NEW TABLE AS rows_added
    FOR EACH STATEMENT EXECUTE FUNCTION mark_budgets_of_events();

-- Fires what has not fired yet, and puts a delivery to each receiver beside each alert; returns how many fired. A budget that was changed meanwhile fires
-- nothing. An erasure takes the lock exclusive: what fires is there to be blanked, or there is no budget any more.
CREATE FUNCTION fire_budgets(
    p_tenant uuid, p_budgets uuid[], p_starts timestamptz[], p_ends timestamptz[], p_thresholds integer[], p_used bigint[], p_alerts uuid[]
) RETURNS integer
LANGUAGE plpgsql VOLATILE SECURITY INVOKER AS $$
DECLARE
    v_count integer;
BEGIN
    PERFORM set_config('app.tenant_id', p_tenant::text, true);
    PERFORM pg_advisory_xact_lock_shared(metering.tenant_lock(p_tenant));
    WITH fired AS (
        INSERT INTO metering.budget_alerts (
            tenant_id, budget_id, period_start, threshold, alert_id, measure, product_unit, user_name, feature, metadata, amount, action, period_end,
            used, fire_time)
        SELECT p_tenant, b.budget_id, w.period_start, w.threshold, w.alert_id, b.measure, b.product_unit, b.user_name, b.feature,
               jsonb_build_object('budget', b.name), b.amount, b.action, w.period_end, w.used, clock_timestamp()
        FROM unnest(p_budgets, p_starts, p_ends, p_thresholds, p_used, p_alerts)
             AS w (budget_id, period_start, period_end, threshold, used, alert_id)
        JOIN metering.budgets b ON b.tenant_id = p_tenant AND b.budget_id = w.budget_id
        ON CONFLICT (tenant_id, budget_id, period_start, threshold) DO NOTHING
        RETURNING *
    ), told AS (
        INSERT INTO metering.webhook_deliveries (tenant_id, delivery_id, endpoint_id, event_id, event_type, data, create_time, due_time)
        SELECT p_tenant, gen_random_uuid(), e.endpoint_id, f.alert_id, 'budget.threshold_reached',
               jsonb_build_object(
                   'budget', f.metadata ->> 'budget', 'budget_id', f.budget_id, 'threshold_percent', f.threshold,
                   'measure', (ARRAY ['cost_nano_usd', 'tokens', 'product_unit'])[f.measure], 'product_unit', f.product_unit, 'user', f.user_name,
                   'feature', f.feature, 'amount', f.amount, 'used', f.used, 'action', (ARRAY ['notify', 'overage', 'block'])[f.action],
                   'period_start', to_char(f.period_start AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS"Z"'),
                   'period_end', to_char(f.period_end AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS"Z"')),
               f.fire_time, f.fire_time
        FROM fired f JOIN metering.webhook_endpoints e ON e.tenant_id = p_tenant
    )
    SELECT count(*) INTO v_count FROM fired;
    RETURN v_count;
END
$$;

ALTER TABLE budgets ENABLE ROW LEVEL SECURITY;
ALTER TABLE budgets FORCE ROW LEVEL SECURITY;
ALTER TABLE budget_alerts ENABLE ROW LEVEL SECURITY;
ALTER TABLE budget_alerts FORCE ROW LEVEL SECURITY;
ALTER TABLE budget_marks ENABLE ROW LEVEL SECURITY;
ALTER TABLE budget_marks FORCE ROW LEVEL SECURITY;
ALTER TABLE webhook_endpoints ENABLE ROW LEVEL SECURITY;
ALTER TABLE webhook_endpoints FORCE ROW LEVEL SECURITY;
ALTER TABLE webhook_deliveries ENABLE ROW LEVEL SECURITY;
ALTER TABLE webhook_deliveries FORCE ROW LEVEL SECURITY;
CREATE POLICY own_tenant ON budgets TO :service
    USING (tenant_id = (SELECT current_setting('app.tenant_id')::uuid)) WITH CHECK (tenant_id = (SELECT current_setting('app.tenant_id')::uuid));
CREATE POLICY own_tenant ON budget_alerts TO :service
    USING (tenant_id = (SELECT current_setting('app.tenant_id')::uuid)) WITH CHECK (tenant_id = (SELECT current_setting('app.tenant_id')::uuid));
CREATE POLICY own_tenant ON budget_marks TO :service
    USING (tenant_id = (SELECT current_setting('app.tenant_id')::uuid)) WITH CHECK (tenant_id = (SELECT current_setting('app.tenant_id')::uuid));
CREATE POLICY own_tenant ON webhook_endpoints TO :service
    USING (tenant_id = (SELECT current_setting('app.tenant_id')::uuid)) WITH CHECK (tenant_id = (SELECT current_setting('app.tenant_id')::uuid));
CREATE POLICY own_tenant ON webhook_deliveries TO :service
    USING (tenant_id = (SELECT current_setting('app.tenant_id')::uuid)) WITH CHECK (tenant_id = (SELECT current_setting('app.tenant_id')::uuid));
-- The jobs role marks what it sweeps and reconciles, takes marks, and delivers.
CREATE POLICY every_tenant_read ON budgets FOR SELECT TO :jobs USING (true);
CREATE POLICY every_tenant_read ON budget_marks FOR SELECT TO :jobs USING (true);
CREATE POLICY every_tenant_mark ON budget_marks FOR INSERT TO :jobs WITH CHECK (true);
CREATE POLICY every_tenant_take ON budget_marks FOR DELETE TO :jobs USING (true);
CREATE POLICY every_tenant_read ON webhook_endpoints FOR SELECT TO :jobs USING (true);
CREATE POLICY every_tenant_read ON webhook_deliveries FOR SELECT TO :jobs USING (true);
CREATE POLICY every_tenant_deliver ON webhook_deliveries FOR UPDATE TO :jobs USING (true) WITH CHECK (true);
CREATE POLICY every_tenant_forget ON webhook_deliveries FOR DELETE TO :jobs USING (state <> 1);
GRANT SELECT, INSERT, UPDATE, DELETE ON budgets TO :service;
GRANT SELECT, INSERT, UPDATE (user_name, feature, metadata) ON budget_alerts TO :service;
GRANT SELECT, INSERT, DELETE ON budget_marks TO :service;
GRANT SELECT, INSERT, UPDATE, DELETE ON webhook_endpoints, webhook_deliveries TO :service;
GRANT SELECT ON budgets, webhook_endpoints TO :jobs;
GRANT SELECT, INSERT, DELETE ON budget_marks TO :jobs;
GRANT SELECT, UPDATE, DELETE ON webhook_deliveries TO :jobs;

REVOKE ALL ON FUNCTION mark_budgets, mark_budgets_of_events, fire_budgets FROM PUBLIC;
GRANT EXECUTE ON FUNCTION mark_budgets TO :service, :jobs;
GRANT EXECUTE ON FUNCTION mark_budgets_of_events, fire_budgets TO :service;
