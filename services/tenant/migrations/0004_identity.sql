-- Credentials and names: where a key may be used from and what replaced it, whose JWTs are taken, which hosts are whose, who the users are.

ALTER TABLE tenant.api_keys
    ADD COLUMN allowed_cidrs text[] NOT NULL DEFAULT '{}' CHECK (cardinality(allowed_cidrs) <= 20),
    ADD COLUMN replaced_by text,
    -- Of the wish that made this key as another one's successor.
    ADD COLUMN rotation_request_id uuid,
    ADD COLUMN rotation_digest bytea CHECK (octet_length(rotation_digest) = 32);
CREATE UNIQUE INDEX api_keys_rotation ON tenant.api_keys (tenant_id, rotation_request_id) WHERE rotation_request_id IS NOT NULL;

ALTER TABLE tenant.users DROP CONSTRAINT users_role_check;
ALTER TABLE tenant.users ADD CONSTRAINT users_role_check CHECK (role IN ('OWNER', 'ADMIN', 'MEMBER'));

-- revoke_time is set when the tenant ends: its issuers must be dead before its records are removed.
CREATE TABLE tenant.issuers (
    tenant_id uuid NOT NULL REFERENCES tenant.tenants,
    issuer_id uuid NOT NULL DEFAULT uuidv7(),
    issuer text NOT NULL,
    audience text NOT NULL,
    jwks_uri text NOT NULL,
    algorithms text[] NOT NULL CHECK (algorithms <@ ARRAY['RS256', 'PS256', 'ES256', 'EdDSA'] AND cardinality(algorithms) >= 1),
    scopes text[] NOT NULL,
    clock_skew_seconds integer NOT NULL CHECK (clock_skew_seconds BETWEEN 0 AND 60),
    create_time timestamptz NOT NULL DEFAULT clock_timestamp(),
    revoke_time timestamptz,
    PRIMARY KEY (tenant_id, issuer_id)
);

CREATE TABLE tenant.domains (
    tenant_id uuid NOT NULL REFERENCES tenant.tenants,
    domain text COLLATE "C" NOT NULL,
    create_time timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (tenant_id, domain)
);

-- Two more names that are looked up before the tenant is known and unique over all tenants, in the shape of the other directories.
CREATE TABLE tenant.issuer_directory (
    issuer text COLLATE "C" NOT NULL,
    audience text COLLATE "C" NOT NULL,
    tenant_id uuid NOT NULL,
    PRIMARY KEY (issuer, audience)
);
CREATE INDEX issuer_directory_tenant ON tenant.issuer_directory (tenant_id);
CREATE TABLE tenant.domain_directory (
    domain text COLLATE "C" PRIMARY KEY,
    tenant_id uuid NOT NULL
);
CREATE INDEX domain_directory_tenant ON tenant.domain_directory (tenant_id);

DO $$
DECLARE
    v_table text;
BEGIN
    FOREACH v_table IN ARRAY ARRAY['issuers', 'domains'] LOOP
        EXECUTE format('ALTER TABLE tenant.%I ENABLE ROW LEVEL SECURITY', v_table);
        EXECUTE format('ALTER TABLE tenant.%I FORCE ROW LEVEL SECURITY', v_table);
        EXECUTE format(
            'CREATE POLICY tenant_isolation ON tenant.%I USING (tenant_id = (SELECT current_setting(''app.tenant_id'')::uuid)) '
            'WITH CHECK (tenant_id = (SELECT current_setting(''app.tenant_id'')::uuid))', v_table);
    END LOOP;
    FOREACH v_table IN ARRAY ARRAY['issuer_directory', 'domain_directory'] LOOP
        EXECUTE format('ALTER TABLE tenant.%I ENABLE ROW LEVEL SECURITY', v_table);
        EXECUTE format('ALTER TABLE tenant.%I FORCE ROW LEVEL SECURITY', v_table);
        EXECUTE format('CREATE POLICY directory_lookup ON tenant.%I FOR SELECT TO :service USING (true)', v_table);
        EXECUTE format(
            'CREATE POLICY tenant_entry ON tenant.%I FOR INSERT TO :service '
            'WITH CHECK (tenant_id = (SELECT current_setting(''app.tenant_id'')::uuid))', v_table);
        EXECUTE format(
            'CREATE POLICY tenant_removal ON tenant.%I FOR DELETE TO :service '
            'USING (tenant_id = (SELECT current_setting(''app.tenant_id'')::uuid))', v_table);
    END LOOP;
END
$$;

GRANT SELECT, INSERT, UPDATE, DELETE ON tenant.issuers TO :service;
GRANT SELECT, INSERT, DELETE ON tenant.domains TO :service;
GRANT SELECT, INSERT, DELETE ON tenant.issuer_directory, tenant.domain_directory TO :service;

DROP FUNCTION tenant.find_api_key(text);
-- The lookup that starts without a tenant: the key id leads to its tenant, and only then is anything of the tenant read.
-- An unknown id takes the same path with the nil tenant, so that known and unknown ids cost the same.
-- The facts stay one value, so that whoever adds to them changes nothing here.
CREATE FUNCTION tenant.find_api_key(p_key_id text)
RETURNS TABLE (
    tenant_id uuid, secret_sha256 bytea, scopes text[], expire_time timestamptz, revoke_time timestamptz, used boolean,
    allowed_cidrs text[], facts tenant.tenant_facts
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
        SELECT k.tenant_id, k.secret_sha256, k.scopes, k.expire_time, k.revoke_time, k.last_use_time IS NOT NULL, k.allowed_cidrs, f
        FROM tenant.api_keys k, tenant.facts(k.tenant_id) f
        WHERE k.tenant_id = v_tenant_id AND k.key_id = p_key_id;
END
$$;

DROP FUNCTION tenant.record_first_use(uuid, text);
-- True unless the key was revoked or got another secret meanwhile: a text that is being replaced cannot be used for the first time as well.
CREATE FUNCTION tenant.record_first_use(p_tenant_id uuid, p_key_id text, p_secret_sha256 bytea) RETURNS boolean
LANGUAGE plpgsql SECURITY INVOKER AS $$
BEGIN
    PERFORM set_config('app.tenant_id', p_tenant_id::text, true);
    UPDATE tenant.api_keys k SET last_use_time = clock_timestamp()
        WHERE k.tenant_id = p_tenant_id AND k.key_id = p_key_id AND k.secret_sha256 = p_secret_sha256 AND k.revoke_time IS NULL;
    RETURN FOUND;
END
$$;

-- The other lookup that starts without a tenant. Audiences that lead to two registrations lead nowhere: nobody could say for whom the token is.
CREATE FUNCTION tenant.find_issuer(p_issuer text, p_audiences text[])
RETURNS TABLE (
    tenant_id uuid, issuer_id uuid, issuer text, audience text, jwks_uri text, algorithms text[], scopes text[], clock_skew_seconds integer,
    create_time timestamptz, facts tenant.tenant_facts
)
LANGUAGE plpgsql SECURITY INVOKER AS $$
#variable_conflict use_column
DECLARE
    v_found tenant.issuer_directory[];
BEGIN
    SELECT array_agg(d) INTO v_found FROM tenant.issuer_directory d WHERE d.issuer = p_issuer AND d.audience = ANY (p_audiences);
    IF coalesce(cardinality(v_found), 0) <> 1 THEN
        RETURN;
    END IF;
    PERFORM set_config('app.tenant_id', v_found[1].tenant_id::text, true);
    RETURN QUERY
        SELECT i.tenant_id, i.issuer_id, i.issuer, i.audience, i.jwks_uri, i.algorithms, i.scopes, i.clock_skew_seconds, i.create_time, f
        FROM tenant.issuers i, tenant.facts(i.tenant_id) f
        WHERE i.tenant_id = v_found[1].tenant_id AND i.issuer = p_issuer AND i.audience = v_found[1].audience AND i.revoke_time IS NULL;
END
$$;

-- Directories alone: no tenant is entered.
CREATE FUNCTION tenant.resolve_names(p_host_slug text, p_domain text, p_path_slug text)
RETURNS TABLE (host_slug_tenant_id uuid, domain_tenant_id uuid, path_slug_tenant_id uuid)
LANGUAGE sql STABLE SECURITY INVOKER AS $$
    SELECT (SELECT d.tenant_id FROM tenant.slug_directory d WHERE d.slug = p_host_slug),
           (SELECT d.tenant_id FROM tenant.domain_directory d WHERE d.domain = p_domain),
           (SELECT d.tenant_id FROM tenant.slug_directory d WHERE d.slug = p_path_slug)
$$;

REVOKE EXECUTE ON ALL FUNCTIONS IN SCHEMA tenant FROM PUBLIC;
GRANT EXECUTE ON ALL FUNCTIONS IN SCHEMA tenant TO :service;
