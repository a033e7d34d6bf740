-- Plans say more, a tenant may differ from its plan, and flags switch features on. Every change leaves its history.

ALTER TABLE tenant.plan_versions
    ADD COLUMN tokens_per_month bigint NOT NULL DEFAULT 0 CHECK (tokens_per_month >= 0),
    ADD COLUMN data_retention_days integer NOT NULL DEFAULT 0 CHECK (data_retention_days >= 0),
    ADD COLUMN encrypt_content boolean NOT NULL DEFAULT false,
    ADD COLUMN isolation text[] NOT NULL DEFAULT '{pool}'
        CHECK (cardinality(isolation) >= 1 AND isolation <@ ARRAY['pool', 'bridge', 'silo']);

CREATE TABLE tenant.plan_features (
    plan text NOT NULL,
    version integer NOT NULL,
    feature text NOT NULL,
    enabled boolean NOT NULL,
    usage_limit bigint NOT NULL CHECK (usage_limit >= 0),
    PRIMARY KEY (plan, version, feature),
    FOREIGN KEY (plan, version) REFERENCES tenant.plan_versions
);

-- What a tenant has instead of its plan's terms; NULL: as the plan says. operator_fields names what only an operator may change back.
ALTER TABLE tenant.tenant_settings
    ADD COLUMN requests_per_minute bigint CHECK (requests_per_minute >= 0),
    ADD COLUMN tokens_per_minute bigint CHECK (tokens_per_minute >= 0),
    ADD COLUMN tokens_per_day bigint CHECK (tokens_per_day >= 0),
    ADD COLUMN tokens_per_month bigint CHECK (tokens_per_month >= 0),
    ADD COLUMN cost_nano_usd_per_month bigint CHECK (cost_nano_usd_per_month >= 0),
    ADD COLUMN concurrent_calls bigint CHECK (concurrent_calls >= 0),
    ADD COLUMN context_tokens bigint CHECK (context_tokens >= 0),
    ADD COLUMN weight integer CHECK (weight BETWEEN 1 AND 1000),
    ADD COLUMN default_model text,
    ADD COLUMN allowed_models text[] CHECK (cardinality(allowed_models) >= 1),
    ADD COLUMN default_max_output_tokens integer CHECK (default_max_output_tokens >= 1),
    ADD COLUMN max_output_tokens integer CHECK (max_output_tokens >= 1),
    ADD COLUMN system_prompt_prefix text CHECK (octet_length(system_prompt_prefix) <= 4000),
    ADD COLUMN dedicated_endpoint text,
    ADD COLUMN encrypt_content boolean,
    ADD COLUMN data_retention_days integer CHECK (data_retention_days >= 0),
    ADD COLUMN operator_fields text[] NOT NULL DEFAULT '{}';

-- Only ever appended to while the tenant is there, and removed with it: the audit log keeps that something changed, this keeps what.
CREATE TABLE tenant.configuration_changes (
    tenant_id uuid NOT NULL REFERENCES tenant.tenants,
    version bigint NOT NULL CHECK (version >= 1),
    change_time timestamptz NOT NULL DEFAULT clock_timestamp(),
    subject text NOT NULL,
    reason text NOT NULL,
    changed_fields text[] NOT NULL CHECK (cardinality(changed_fields) >= 1),
    before jsonb NOT NULL,
    after jsonb NOT NULL,
    PRIMARY KEY (tenant_id, version)
);

-- The operator's, one row a flag: no tenant's data, but a list of tenants' ids. `version` is that of the flag set at the flag's last change.
CREATE TABLE tenant.flags (
    name text COLLATE "C" PRIMARY KEY CHECK (name ~ '^[a-z][a-z0-9_]{0,62}$'),
    description text NOT NULL,
    default_value boolean NOT NULL,
    tenants_on uuid[] NOT NULL,
    tenants_off uuid[] NOT NULL CHECK (cardinality(tenants_on) + cardinality(tenants_off) <= 1000),
    tiers_on text[] NOT NULL,
    tiers_off text[] NOT NULL,
    percentage_basis_points integer NOT NULL CHECK (percentage_basis_points BETWEEN 0 AND 10000),
    version bigint NOT NULL,
    update_time timestamptz NOT NULL DEFAULT clock_timestamp()
);

-- Its newest version is that of the whole set: what every replica looks at to learn that it must read the flags again.
CREATE TABLE tenant.flag_changes (
    version bigint PRIMARY KEY CHECK (version >= 1),
    name text NOT NULL,
    change_time timestamptz NOT NULL DEFAULT clock_timestamp(),
    subject text NOT NULL,
    reason text NOT NULL,
    before jsonb,
    after jsonb
);

DO $$
DECLARE
    v_table text;
    v_nil constant text := '''00000000-0000-0000-0000-000000000000''::uuid = (SELECT current_setting(''app.tenant_id'')::uuid)';
BEGIN
    FOREACH v_table IN ARRAY ARRAY['plan_features', 'configuration_changes', 'flags', 'flag_changes'] LOOP
        EXECUTE format('ALTER TABLE tenant.%I ENABLE ROW LEVEL SECURITY', v_table);
        EXECUTE format('ALTER TABLE tenant.%I FORCE ROW LEVEL SECURITY', v_table);
    END LOOP;
    -- Flags are read without a tenant and written in the name of none: a transaction of a tenant's own can never switch one.
    FOREACH v_table IN ARRAY ARRAY['flags', 'flag_changes'] LOOP
        EXECUTE format('CREATE POLICY flag_reading ON tenant.%I FOR SELECT TO :service USING (true)', v_table);
        EXECUTE format('CREATE POLICY flag_entry ON tenant.%I FOR INSERT TO :service WITH CHECK (%s)', v_table, v_nil);
        EXECUTE format('CREATE POLICY flag_change ON tenant.%I FOR UPDATE TO :service USING (%s) WITH CHECK (%s)', v_table, v_nil, v_nil);
        EXECUTE format('CREATE POLICY flag_removal ON tenant.%I FOR DELETE TO :service USING (%s)', v_table, v_nil);
    END LOOP;
END
$$;
CREATE POLICY tenant_isolation ON tenant.configuration_changes
    USING (tenant_id = (SELECT current_setting('app.tenant_id')::uuid))
    WITH CHECK (tenant_id = (SELECT current_setting('app.tenant_id')::uuid));
CREATE POLICY plan_reading ON tenant.plan_features FOR SELECT TO :service USING (true);
CREATE POLICY plan_loading ON tenant.plan_features TO :owner USING (true) WITH CHECK (true);

GRANT SELECT ON tenant.plan_features TO :service;
GRANT SELECT, INSERT, DELETE ON tenant.configuration_changes TO :service;
GRANT SELECT, INSERT, UPDATE, DELETE ON tenant.flags TO :service;
GRANT SELECT, INSERT ON tenant.flag_changes TO :service;

-- The version adds two numbers that only rise: the tenant's own count of changes, and the newest plan file's. It adds no number of the
-- tenant's plan, so no change of plan can lower it.
CREATE OR REPLACE FUNCTION tenant.facts(p_tenant_id uuid) RETURNS SETOF tenant.tenant_facts
LANGUAGE sql STABLE SECURITY INVOKER AS $$
    SELECT t.state, t.plan, t.region, coalesce(s.config_version, 0) + (SELECT max(c.version) FROM tenant.plan_catalogs c),
           t.placement, coalesce(s.encrypt_content, v.encrypt_content OR t.placement = 'silo')
    FROM tenant.tenants t
    JOIN tenant.plans p ON p.plan = t.plan
    JOIN tenant.plan_versions v ON v.plan = p.plan AND v.version = p.version
    LEFT JOIN tenant.tenant_settings s ON s.tenant_id = t.tenant_id
    WHERE t.tenant_id = p_tenant_id
$$;

DROP FUNCTION tenant.get_config(uuid);
-- Readable in every state: services ask for it while the tenant is still being made. The plan's terms and the tenant's own settings are
-- handed over apart; services/tenant/effective_config.py alone puts them together.
CREATE FUNCTION tenant.get_config(p_tenant_id uuid)
RETURNS TABLE (
    tenant_id uuid, version bigint, plan text, region text, placement text, display_name text, terms jsonb, features jsonb, settings jsonb
)
LANGUAGE plpgsql SECURITY INVOKER AS $$
#variable_conflict use_column
BEGIN
    PERFORM set_config('app.tenant_id', p_tenant_id::text, true);
    RETURN QUERY
        SELECT t.tenant_id, a.config_version, t.plan, t.region, t.placement, t.display_name, to_jsonb(v),
               (SELECT jsonb_object_agg(f.feature, jsonb_build_object('enabled', f.enabled, 'limit', f.usage_limit))
                FROM tenant.plan_features f WHERE f.plan = v.plan AND f.version = v.version),
               to_jsonb(s)
        FROM tenant.tenants t
        CROSS JOIN tenant.facts(p_tenant_id) a
        JOIN tenant.plans p ON p.plan = t.plan
        JOIN tenant.plan_versions v ON v.plan = p.plan AND v.version = p.version
        LEFT JOIN tenant.tenant_settings s ON s.tenant_id = t.tenant_id
        WHERE t.tenant_id = p_tenant_id;
END
$$;

-- Takes a tenant that is erased out of the lists of the flags; answers from how many. The tenant is set again afterwards.
CREATE FUNCTION tenant.forget_in_flags(p_tenant_id uuid) RETURNS bigint
LANGUAGE plpgsql SECURITY INVOKER AS $$
DECLARE
    v_nil constant uuid := '00000000-0000-0000-0000-000000000000';
    v_count bigint;
    v_version bigint;
BEGIN
    IF NOT EXISTS (SELECT FROM tenant.flags f WHERE p_tenant_id = ANY (f.tenants_on || f.tenants_off)) THEN
        RETURN 0;
    END IF;
    PERFORM set_config('app.tenant_id', v_nil::text, true);
    PERFORM pg_advisory_xact_lock(hashtextextended('tenant.flags', 0));
    SELECT coalesce(max(c.version), 0) + 1 INTO v_version FROM tenant.flag_changes c;
    UPDATE tenant.flags f
        SET tenants_on = array_remove(f.tenants_on, p_tenant_id), tenants_off = array_remove(f.tenants_off, p_tenant_id),
            version = v_version, update_time = clock_timestamp()
        WHERE p_tenant_id = ANY (f.tenants_on || f.tenants_off);
    GET DIAGNOSTICS v_count = ROW_COUNT;
    INSERT INTO tenant.flag_changes (version, name, subject, reason) VALUES (v_version, '*', 'mesh:tenant', 'a tenant was erased');
    PERFORM tenant.announce(v_nil, 'FLAGS');
    PERFORM set_config('app.tenant_id', p_tenant_id::text, true);
    RETURN v_count;
END
$$;

REVOKE EXECUTE ON ALL FUNCTIONS IN SCHEMA tenant FROM PUBLIC;
GRANT EXECUTE ON ALL FUNCTIONS IN SCHEMA tenant TO :service;
