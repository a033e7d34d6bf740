-- A budget may be for each user, for each feature, or both: one definition, and each name's use is watched by itself.
ALTER TABLE budgets
    ADD COLUMN each_user boolean NOT NULL DEFAULT false,
    ADD COLUMN each_feature boolean NOT NULL DEFAULT false,
    ADD CONSTRAINT each_or_one CHECK (NOT (each_user AND user_name <> '') AND NOT (each_feature AND feature <> ''));

-- A threshold fires once for each name too. Names go when the tenant is erased, and with them the budgets that could fire again.
ALTER TABLE budget_alerts DROP CONSTRAINT budget_alerts_pkey, ADD PRIMARY KEY (tenant_id, alert_id);
CREATE UNIQUE INDEX budget_alerts_fire_once ON budget_alerts (tenant_id, budget_id, period_start, user_name, feature, threshold)
    WHERE metadata IS NOT NULL;

-- Whose use changed; NULL stands for everybody: a budget was put. Empty where no budget of the unit is for each, or the use names nobody.
ALTER TABLE budget_marks ADD COLUMN user_name text, ADD COLUMN feature text;

-- What a user used is found by name: a tenant may have many users who used nothing since.
CREATE INDEX usage_rollups_by_user ON usage_rollups (tenant_id, user_name, grain, start_time) WHERE user_name <> '';

CREATE OR REPLACE FUNCTION mark_budgets() RETURNS trigger
LANGUAGE plpgsql SECURITY INVOKER SET search_path = metering, pg_temp AS $$
BEGIN
    INSERT INTO metering.budget_marks (tenant_id, use_quarter, product_unit, user_name, feature)
    SELECT DISTINCT u.tenant_id, u.use_quarter, u.product_unit, CASE WHEN w.each_user THEN u.user_name ELSE '' END,
           CASE WHEN w.each_feature THEN u.feature ELSE '' END
    FROM (SELECT DISTINCT r.tenant_id, date_bin('15 minutes', r.use_time, timestamptz 'epoch') AS use_quarter, r.product_unit, r.user_name, r.feature
          FROM rows_added r WHERE r.event_type = '' AND r.refusal_reason = '') u
    CROSS JOIN LATERAL (SELECT bool_or(b.each_user) AS each_user, bool_or(b.each_feature) AS each_feature
                        FROM metering.budgets b WHERE b.tenant_id = u.tenant_id AND b.product_unit = u.product_unit) w
    WHERE w.each_user IS NOT NULL;
    RETURN NULL;
END
$$;

CREATE OR REPLACE FUNCTION mark_budgets_of_events() RETURNS trigger
LANGUAGE plpgsql SECURITY INVOKER SET search_path = metering, pg_temp AS $$
BEGIN
    INSERT INTO metering.budget_marks (tenant_id, use_quarter, product_unit, user_name, feature)
    SELECT DISTINCT u.tenant_id, u.use_quarter, u.unit, CASE WHEN w.each_user THEN u.user_name ELSE '' END,
           CASE WHEN w.each_feature THEN u.feature ELSE '' END
    FROM (SELECT DISTINCT r.tenant_id, date_bin('15 minutes', r.occurred_at, timestamptz 'epoch') AS use_quarter, t.unit, r.user_name, r.feature
          FROM rows_added r JOIN metering.event_types t ON t.product = r.product AND t.event_type = r.event_type) u
    CROSS JOIN LATERAL (SELECT bool_or(b.each_user) AS each_user, bool_or(b.each_feature) AS each_feature
                        FROM metering.budgets b WHERE b.tenant_id = u.tenant_id AND b.product_unit = u.unit) w
    WHERE w.each_user IS NOT NULL;
    RETURN NULL;
END
$$;

-- As the one before; whose use it is comes with each threshold, because a budget for each does not say it.
CREATE FUNCTION fire_budgets(
    p_tenant uuid, p_budgets uuid[], p_starts timestamptz[], p_ends timestamptz[], p_users text[], p_features text[], p_thresholds integer[],
    p_used bigint[], p_alerts uuid[]
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
        SELECT p_tenant, b.budget_id, w.period_start, w.threshold, w.alert_id, b.measure, b.product_unit, w.user_name, w.feature,
               jsonb_build_object('budget', b.name), b.amount, b.action, w.period_end, w.used, clock_timestamp()
        FROM unnest(p_budgets, p_starts, p_ends, p_users, p_features, p_thresholds, p_used, p_alerts)
             AS w (budget_id, period_start, period_end, user_name, feature, threshold, used, alert_id)
        JOIN metering.budgets b ON b.tenant_id = p_tenant AND b.budget_id = w.budget_id
        ON CONFLICT (tenant_id, budget_id, period_start, user_name, feature, threshold) WHERE metadata IS NOT NULL DO NOTHING
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
-- How replicas of the release before fire, who know no budget for each: theirs is found when another looks again.
CREATE OR REPLACE FUNCTION fire_budgets(
    p_tenant uuid, p_budgets uuid[], p_starts timestamptz[], p_ends timestamptz[], p_thresholds integer[], p_used bigint[], p_alerts uuid[]
) RETURNS integer
LANGUAGE sql VOLATILE SECURITY INVOKER AS $$
    SELECT set_config('app.tenant_id', p_tenant::text, true);
    SELECT metering.fire_budgets(
        p_tenant, array_agg(b.budget_id), array_agg(w.period_start), array_agg(w.period_end), array_agg(b.user_name), array_agg(b.feature),
        array_agg(w.threshold), array_agg(w.used), array_agg(w.alert_id))
    FROM unnest(p_budgets, p_starts, p_ends, p_thresholds, p_used, p_alerts) AS w (budget_id, period_start, period_end, threshold, used, alert_id)
    JOIN metering.budgets b ON b.tenant_id = p_tenant AND b.budget_id = w.budget_id AND NOT b.each_user AND NOT b.each_feature
$$;
REVOKE ALL ON FUNCTION fire_budgets(uuid, uuid[], timestamptz[], timestamptz[], text[], text[], integer[], bigint[], uuid[]) FROM PUBLIC;
GRANT EXECUTE ON FUNCTION fire_budgets(uuid, uuid[], timestamptz[], timestamptz[], text[], text[], integer[], bigint[], uuid[]) TO :service;
