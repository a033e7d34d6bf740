-- One round trip each. SECURITY INVOKER: every statement inside runs under the caller's own row-level security.

-- The one lookup that starts without a tenant: the key id leads to its tenant, and only then is anything of the tenant read.
-- An unknown id takes the same path with the nil tenant, so that known and unknown ids cost the same.
CREATE FUNCTION tenant.find_api_key(p_key_id text)
RETURNS TABLE (
    tenant_id uuid, secret_sha256 bytea, scopes text[], expire_time timestamptz, revoke_time timestamptz, used boolean,
    state text, plan text, region text, config_version bigint
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
        SELECT k.tenant_id, k.secret_sha256, k.scopes, k.expire_time, k.revoke_time, k.last_use_time IS NOT NULL,
               t.state, t.plan, t.region, coalesce(s.config_version, 0) + p.version
        FROM tenant.api_keys k
        JOIN tenant.tenants t ON t.tenant_id = k.tenant_id
        JOIN tenant.plans p ON p.plan = t.plan
        LEFT JOIN tenant.tenant_settings s ON s.tenant_id = k.tenant_id
        WHERE k.tenant_id = v_tenant_id AND k.key_id = p_key_id;
END
$$;

-- True unless the key was revoked meanwhile: a key that is being replaced cannot be used for the first time as well.
CREATE FUNCTION tenant.record_first_use(p_tenant_id uuid, p_key_id text) RETURNS boolean
LANGUAGE plpgsql SECURITY INVOKER AS $$
BEGIN
    PERFORM set_config('app.tenant_id', p_tenant_id::text, true);
    UPDATE tenant.api_keys k SET last_use_time = clock_timestamp()
        WHERE k.tenant_id = p_tenant_id AND k.key_id = p_key_id AND k.revoke_time IS NULL;
    RETURN FOUND;
END
$$;

CREATE FUNCTION tenant.record_last_uses(p_tenant_ids uuid[], p_key_ids text[], p_use_times timestamptz[]) RETURNS void
LANGUAGE plpgsql SECURITY INVOKER AS $$
BEGIN
    FOR i IN 1 .. cardinality(p_tenant_ids) LOOP
        PERFORM set_config('app.tenant_id', p_tenant_ids[i]::text, true);
        -- The distance keeps several replicas from writing the same minute.
        UPDATE tenant.api_keys k SET last_use_time = p_use_times[i]
            WHERE k.tenant_id = p_tenant_ids[i] AND k.key_id = p_key_ids[i] AND k.last_use_time < p_use_times[i] - interval '55 seconds';
    END LOOP;
END
$$;

CREATE FUNCTION tenant.append_audit(
    p_tenant_ids uuid[], p_actions text[], p_subjects text[], p_targets text[], p_peer_addresses text[], p_counts integer[]
) RETURNS void
LANGUAGE plpgsql SECURITY INVOKER AS $$
BEGIN
    FOR i IN 1 .. cardinality(p_tenant_ids) LOOP
        PERFORM set_config('app.tenant_id', p_tenant_ids[i]::text, true);
        INSERT INTO tenant.audit (tenant_id, action, subject, target, peer_address, occurrence_count)
            VALUES (p_tenant_ids[i], p_actions[i], p_subjects[i], p_targets[i], p_peer_addresses[i], p_counts[i]);
    END LOOP;
END
$$;

-- Written before the operator gets anything. Naming a tenant that is not there is recorded under the nil tenant.
CREATE FUNCTION tenant.record_operator_access(p_tenant_id uuid, p_subject text, p_reason text, p_peer_address text)
RETURNS TABLE (plan text, region text, config_version bigint)
LANGUAGE plpgsql SECURITY INVOKER AS $$
#variable_conflict use_column
DECLARE
    v_nil constant uuid := '00000000-0000-0000-0000-000000000000';
    v_tenant_id uuid := coalesce(p_tenant_id, v_nil);
BEGIN
    PERFORM set_config('app.tenant_id', v_tenant_id::text, true);
    RETURN QUERY
        SELECT t.plan, t.region, coalesce(s.config_version, 0) + p.version
        FROM tenant.tenants t
        JOIN tenant.plans p ON p.plan = t.plan
        LEFT JOIN tenant.tenant_settings s ON s.tenant_id = t.tenant_id
        WHERE t.tenant_id = v_tenant_id;
    IF NOT FOUND THEN
        v_tenant_id := v_nil;
        PERFORM set_config('app.tenant_id', v_tenant_id::text, true);
    END IF;
    INSERT INTO tenant.audit (tenant_id, action, subject, target, reason, peer_address)
        VALUES (v_tenant_id, 'OPERATOR_ACCESS', p_subject, coalesce('tenant:' || p_tenant_id::text, ''), p_reason, p_peer_address);
END
$$;

-- Claims the request id, then the slug, then writes the tenant: always in this order, so that two callers cannot wait for each other.
-- Answers EXISTING with what an earlier call of the same request recorded. A refusal leaves nothing behind.
CREATE FUNCTION tenant.record_tenant(
    p_tenant_id uuid, p_request_id uuid, p_content_digest bytea, p_slug text, p_display_name text, p_plan text, p_region text,
    p_subject text, p_reason text, p_peer_address text
)
RETURNS TABLE (outcome text, tenant_id uuid, content_digest bytea, steps_done smallint)
LANGUAGE plpgsql SECURITY INVOKER AS $$
#variable_conflict use_column
DECLARE
    v_existing_id uuid;
BEGIN
    PERFORM set_config('app.tenant_id', p_tenant_id::text, true);
    INSERT INTO tenant.request_directory (request_id, tenant_id) VALUES (p_request_id, p_tenant_id) ON CONFLICT DO NOTHING;
    IF NOT FOUND THEN
        SELECT d.tenant_id INTO v_existing_id FROM tenant.request_directory d WHERE d.request_id = p_request_id;
        PERFORM set_config('app.tenant_id', v_existing_id::text, true);
        RETURN QUERY SELECT 'EXISTING', r.tenant_id, r.content_digest, r.steps_done
            FROM tenant.provisioning r WHERE r.tenant_id = v_existing_id;
        IF NOT FOUND THEN
            RETURN QUERY SELECT 'ERASED', v_existing_id, NULL::bytea, NULL::smallint;
        END IF;
        RETURN;
    END IF;
    IF NOT EXISTS (SELECT FROM tenant.plans p WHERE p.plan = p_plan) THEN
        DELETE FROM tenant.request_directory d WHERE d.request_id = p_request_id AND d.tenant_id = p_tenant_id;
        RETURN QUERY SELECT 'UNKNOWN_PLAN', NULL::uuid, NULL::bytea, NULL::smallint;
        RETURN;
    END IF;
    INSERT INTO tenant.slug_directory (slug, tenant_id) VALUES (p_slug, p_tenant_id) ON CONFLICT DO NOTHING;
    IF NOT FOUND THEN
        DELETE FROM tenant.request_directory d WHERE d.request_id = p_request_id AND d.tenant_id = p_tenant_id;
        RETURN QUERY SELECT 'SLUG_TAKEN', NULL::uuid, NULL::bytea, NULL::smallint;
        RETURN;
    END IF;
    INSERT INTO tenant.tenants (tenant_id, slug, display_name, plan, region, state)
        VALUES (p_tenant_id, p_slug, p_display_name, p_plan, p_region, 'PROVISIONING');
    INSERT INTO tenant.provisioning (tenant_id, request_id, content_digest, steps_done) VALUES (p_tenant_id, p_request_id, p_content_digest, 1);
    INSERT INTO tenant.audit (tenant_id, action, subject, target, reason, peer_address)
        VALUES (p_tenant_id, 'TENANT_CREATED', p_subject, 'tenant:' || p_tenant_id::text, p_reason, p_peer_address);
    RETURN QUERY SELECT 'RECORDED', p_tenant_id, p_content_digest, 1::smallint;
END
$$;

CREATE FUNCTION tenant.get_tenant(p_tenant_id uuid)
RETURNS TABLE (tenant_id uuid, slug text, display_name text, plan text, region text, state text, create_time timestamptz)
LANGUAGE plpgsql SECURITY INVOKER AS $$
#variable_conflict use_column
BEGIN
    PERFORM set_config('app.tenant_id', p_tenant_id::text, true);
    RETURN QUERY SELECT t.tenant_id, t.slug, t.display_name, t.plan, t.region, t.state, t.create_time
        FROM tenant.tenants t WHERE t.tenant_id = p_tenant_id;
END
$$;

-- Readable in every state: services ask for it while the tenant is still being made.
CREATE FUNCTION tenant.get_config(p_tenant_id uuid)
RETURNS TABLE (
    tenant_id uuid, version bigint, plan text, region text, display_name text, assistant_name text,
    requests_per_minute bigint, tokens_per_minute bigint, tokens_per_day bigint, cost_nano_usd_per_month bigint, concurrent_calls bigint,
    context_tokens bigint, weight integer, default_model text, allowed_models text[], default_max_output_tokens integer,
    max_output_tokens integer
)
LANGUAGE plpgsql SECURITY INVOKER AS $$
#variable_conflict use_column
BEGIN
    PERFORM set_config('app.tenant_id', p_tenant_id::text, true);
    RETURN QUERY
        SELECT t.tenant_id, coalesce(s.config_version, 0) + p.version, t.plan, t.region, t.display_name, s.assistant_name,
               v.requests_per_minute, v.tokens_per_minute, v.tokens_per_day, v.cost_nano_usd_per_month, v.concurrent_calls,
               v.context_tokens, v.weight, v.default_model, v.allowed_models, v.default_max_output_tokens, v.max_output_tokens
        FROM tenant.tenants t
        JOIN tenant.plans p ON p.plan = t.plan
        JOIN tenant.plan_versions v ON v.plan = p.plan AND v.version = p.version
        LEFT JOIN tenant.tenant_settings s ON s.tenant_id = t.tenant_id
        WHERE t.tenant_id = p_tenant_id;
END
$$;

-- Walks the slug directory and enters each tenant in turn: a list over all tenants without any policy that sees two at once.
CREATE FUNCTION tenant.list_tenants(p_after_slug text, p_limit integer)
RETURNS TABLE (tenant_id uuid, slug text, display_name text, plan text, region text, state text, create_time timestamptz)
LANGUAGE plpgsql SECURITY INVOKER AS $$
#variable_conflict use_column
DECLARE
    v_tenant_id uuid;
BEGIN
    FOR v_tenant_id IN
        SELECT d.tenant_id FROM tenant.slug_directory d WHERE d.slug > p_after_slug ORDER BY d.slug LIMIT p_limit
    LOOP
        PERFORM set_config('app.tenant_id', v_tenant_id::text, true);
        RETURN QUERY SELECT t.tenant_id, t.slug, t.display_name, t.plan, t.region, t.state, t.create_time
            FROM tenant.tenants t WHERE t.tenant_id = v_tenant_id;
    END LOOP;
END
$$;

REVOKE EXECUTE ON ALL FUNCTIONS IN SCHEMA tenant FROM PUBLIC;
GRANT EXECUTE ON ALL FUNCTIONS IN SCHEMA tenant TO :service;
