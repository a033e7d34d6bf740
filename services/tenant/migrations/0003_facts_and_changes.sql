-- What every credential's answer says of its tenant, in one place; and the feed of changes that ends what other processes remember.

ALTER TABLE tenant.tenants ADD COLUMN placement text NOT NULL DEFAULT 'pool' CHECK (placement IN ('pool', 'bridge', 'silo'));

CREATE TYPE tenant.tenant_facts AS (
    state text, plan text, region text, config_version bigint, placement text, encrypt_content boolean
);

-- No row for a tenant that is not there. The caller has set the tenant.
CREATE FUNCTION tenant.facts(p_tenant_id uuid) RETURNS SETOF tenant.tenant_facts
LANGUAGE sql STABLE SECURITY INVOKER AS $$
    SELECT t.state, t.plan, t.region, coalesce(s.config_version, 0) + p.version, t.placement, t.placement = 'silo'
    FROM tenant.tenants t
    JOIN tenant.plans p ON p.plan = t.plan
    LEFT JOIN tenant.tenant_settings s ON s.tenant_id = t.tenant_id
    WHERE t.tenant_id = p_tenant_id
$$;

CREATE FUNCTION tenant.get_facts(p_tenant_id uuid) RETURNS SETOF tenant.tenant_facts
LANGUAGE plpgsql SECURITY INVOKER AS $$
BEGIN
    PERFORM set_config('app.tenant_id', p_tenant_id::text, true);
    RETURN QUERY SELECT f.* FROM tenant.facts(p_tenant_id) f;
END
$$;

-- Ids and kinds, nothing of a tenant's: as with the directories, reading it whole discloses no data. The nil tenant means everybody.
CREATE TABLE tenant.changes (
    change_id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    tenant_id uuid NOT NULL,
    kind text NOT NULL,
    change_time timestamptz NOT NULL DEFAULT clock_timestamp()
);
CREATE INDEX changes_time ON tenant.changes (change_time);
ALTER TABLE tenant.changes ENABLE ROW LEVEL SECURITY;
ALTER TABLE tenant.changes FORCE ROW LEVEL SECURITY;
CREATE POLICY feed_reading ON tenant.changes FOR SELECT TO :service USING (true);
CREATE POLICY tenant_entry ON tenant.changes FOR INSERT TO :service
    WITH CHECK (tenant_id = (SELECT current_setting('app.tenant_id')::uuid));
CREATE POLICY plan_loading ON tenant.changes TO :owner USING (true) WITH CHECK (true);
GRANT SELECT, INSERT ON tenant.changes TO :service;

-- Called in the transaction of the change itself, after the tenant is set. Ids commit in their order: the lock is held until the commit,
-- so that a reader who has seen one change has seen every earlier one. Changes are rare; calls make none.
CREATE FUNCTION tenant.announce(p_tenant_id uuid, p_kind text) RETURNS void
LANGUAGE plpgsql SECURITY INVOKER AS $$
BEGIN
    PERFORM pg_advisory_xact_lock(hashtextextended('tenant.changes', 0));
    INSERT INTO tenant.changes (tenant_id, kind) VALUES (p_tenant_id, p_kind);
    PERFORM pg_notify('tenant_changes', p_kind);
END
$$;

DROP FUNCTION tenant.find_api_key(text);
-- The one lookup that starts without a tenant: the key id leads to its tenant, and only then is anything of the tenant read.
-- An unknown id takes the same path with the nil tenant, so that known and unknown ids cost the same.
CREATE FUNCTION tenant.find_api_key(p_key_id text)
RETURNS TABLE (
    tenant_id uuid, secret_sha256 bytea, scopes text[], expire_time timestamptz, revoke_time timestamptz, used boolean,
    state text, plan text, region text, config_version bigint, placement text, encrypt_content boolean
)
LANGUAGE plpgsql SECURITY INVOKER AS $$
#variable_conflict use_column
DECLARE
    v_tenant_id uuid;
BEGIN
    SELECT d.tenant_id INTO v_tenant_id FROM tenant.api_key_directory d WHERE d.key_id = p_key_id;
    v_tenant_id := coalesce(v_tenant_id, '00000000-0000-0000-0000-000000000000');
    PERFORM set_config('app.tenant_id', v_tenant_id::text, true);
    RETURN QUERY
        SELECT k.tenant_id, k.secret_sha256, k.scopes, k.expire_time, k.revoke_time, k.last_use_time IS NOT NULL, f.*
        FROM tenant.api_keys k, tenant.facts(k.tenant_id) f
        WHERE k.tenant_id = v_tenant_id AND k.key_id = p_key_id;
END
$$;

DROP FUNCTION tenant.record_operator_access(uuid, text, text, text);
-- Written before the operator gets anything. Naming a tenant that is not there is recorded under the nil tenant.
CREATE FUNCTION tenant.record_operator_access(p_tenant_id uuid, p_subject text, p_reason text, p_peer_address text)
RETURNS SETOF tenant.tenant_facts
LANGUAGE plpgsql SECURITY INVOKER AS $$
DECLARE
    v_nil constant uuid := '00000000-0000-0000-0000-000000000000';
    v_tenant_id uuid := coalesce(p_tenant_id, v_nil);
BEGIN
    PERFORM set_config('app.tenant_id', v_tenant_id::text, true);
    RETURN QUERY SELECT f.* FROM tenant.facts(v_tenant_id) f;
    IF NOT FOUND THEN
        v_tenant_id := v_nil;
        PERFORM set_config('app.tenant_id', v_tenant_id::text, true);
    END IF;
    INSERT INTO tenant.audit (tenant_id, action, subject, target, reason, peer_address)
        VALUES (v_tenant_id, 'OPERATOR_ACCESS', p_subject, coalesce('tenant:' || p_tenant_id::text, ''), p_reason, p_peer_address);
END
$$;

REVOKE EXECUTE ON ALL FUNCTIONS IN SCHEMA tenant FROM PUBLIC;
GRANT EXECUTE ON ALL FUNCTIONS IN SCHEMA tenant TO :service;
