-- Plans say more of limits, a tenant may have rules of its own, and days, months and cycles begin where the tenant is.

-- Further rules, how rules behave and the guard, as services/tenant/plan_rules.py writes and reads them.
ALTER TABLE tenant.plan_versions
    ADD COLUMN limit_terms jsonb NOT NULL DEFAULT '{}' CHECK (jsonb_typeof(limit_terms) = 'object');

-- limit_rules: a list of rules, each with by_operator, which says who may change it. NULL: as the plan says, UTC, from the tenant's creation.
ALTER TABLE tenant.tenant_settings
    ADD COLUMN limit_rules jsonb NOT NULL DEFAULT '[]' CHECK (jsonb_typeof(limit_rules) = 'array' AND jsonb_array_length(limit_rules) <= 100),
    ADD COLUMN time_zone text CHECK (octet_length(time_zone) BETWEEN 1 AND 64),
    ADD COLUMN cycle_anchor_time timestamptz,
    ADD COLUMN abuse_guard jsonb CHECK (jsonb_typeof(abuse_guard) = 'object');

-- Beside tenant.get_config, which the release before calls until it is replaced: the same, and with the tenant's creation and all plans in their order: which plan lifts a limit is seen from all of them.
CREATE FUNCTION tenant.get_limited_config(p_tenant_id uuid)
RETURNS TABLE (
    tenant_id uuid, version bigint, plan text, region text, placement text, display_name text, terms jsonb, features jsonb, settings jsonb,
    create_time timestamptz, ladder jsonb
)
LANGUAGE plpgsql SECURITY INVOKER AS $$
#variable_conflict use_column
BEGIN
    PERFORM set_config('app.tenant_id', p_tenant_id::text, true);
    RETURN QUERY
        WITH plans AS (
            SELECT p.plan, p.position, to_jsonb(v) AS terms,
                   (SELECT jsonb_object_agg(f.feature, jsonb_build_object('enabled', f.enabled, 'limit', f.usage_limit))
                    FROM tenant.plan_features f WHERE f.plan = v.plan AND f.version = v.version) AS features
            FROM tenant.plans p JOIN tenant.plan_versions v ON v.plan = p.plan AND v.version = p.version
        )
        SELECT t.tenant_id, a.config_version, t.plan, t.region, t.placement, t.display_name, n.terms, n.features, to_jsonb(s), t.create_time,
               (SELECT jsonb_agg(jsonb_build_object('terms', l.terms, 'features', l.features) ORDER BY l.position) FROM plans l)
        FROM tenant.tenants t
        CROSS JOIN tenant.facts(p_tenant_id) a
        JOIN plans n ON n.plan = t.plan
        LEFT JOIN tenant.tenant_settings s ON s.tenant_id = t.tenant_id
        WHERE t.tenant_id = p_tenant_id;
END
$$;

REVOKE ALL ON FUNCTION tenant.get_limited_config FROM PUBLIC;
GRANT EXECUTE ON FUNCTION tenant.get_limited_config TO :service;
