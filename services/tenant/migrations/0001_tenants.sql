-- Plans are reference data shared by every tenant: the service reads them, only `migrate` (as the owner) writes them.

CREATE TABLE tenant.plan_catalogs (
    version integer PRIMARY KEY CHECK (version >= 1),
    content_digest bytea NOT NULL CHECK (octet_length(content_digest) = 32),
    load_time timestamptz NOT NULL DEFAULT now()
);

-- `version` points at the plan's terms in force; older terms stay in plan_versions.
CREATE TABLE tenant.plans (
    plan text PRIMARY KEY,
    position integer NOT NULL,
    version integer NOT NULL REFERENCES tenant.plan_catalogs
);

CREATE TABLE tenant.plan_versions (
    plan text NOT NULL REFERENCES tenant.plans,
    version integer NOT NULL REFERENCES tenant.plan_catalogs,
    requests_per_minute bigint NOT NULL CHECK (requests_per_minute >= 0),
    tokens_per_minute bigint NOT NULL CHECK (tokens_per_minute >= 0),
    tokens_per_day bigint NOT NULL CHECK (tokens_per_day >= 0),
    cost_nano_usd_per_month bigint NOT NULL CHECK (cost_nano_usd_per_month >= 0),
    concurrent_calls bigint NOT NULL CHECK (concurrent_calls >= 0),
    context_tokens bigint NOT NULL CHECK (context_tokens >= 0),
    weight integer NOT NULL CHECK (weight BETWEEN 1 AND 1000),
    default_model text NOT NULL,
    allowed_models text[] NOT NULL CHECK (default_model = ANY (allowed_models)),
    default_max_output_tokens integer NOT NULL CHECK (default_max_output_tokens >= 1),
    max_output_tokens integer NOT NULL CHECK (max_output_tokens >= default_max_output_tokens),
    PRIMARY KEY (plan, version)
);

-- Tenant data: every key and index leads with tenant_id, every table forces row-level security.

CREATE TABLE tenant.tenants (
    tenant_id uuid PRIMARY KEY,
    slug text NOT NULL,
    display_name text NOT NULL,
    plan text NOT NULL REFERENCES tenant.plans,
    region text NOT NULL,
    state text NOT NULL CHECK (state IN ('PROVISIONING', 'ACTIVE', 'SUSPENDED')),
    create_time timestamptz NOT NULL DEFAULT now()
);

CREATE TABLE tenant.users (
    tenant_id uuid NOT NULL REFERENCES tenant.tenants,
    user_id uuid NOT NULL DEFAULT uuidv7(),
    email text NOT NULL,
    role text NOT NULL CHECK (role IN ('OWNER')),
    create_time timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (tenant_id, user_id)
);
CREATE UNIQUE INDEX users_email ON tenant.users (tenant_id, lower(email));

CREATE TABLE tenant.api_keys (
    tenant_id uuid NOT NULL REFERENCES tenant.tenants,
    key_id text NOT NULL,
    secret_sha256 bytea NOT NULL CHECK (octet_length(secret_sha256) = 32),
    display_name text NOT NULL,
    scopes text[] NOT NULL,
    create_time timestamptz NOT NULL DEFAULT clock_timestamp(),
    expire_time timestamptz,
    revoke_time timestamptz,
    last_use_time timestamptz,
    PRIMARY KEY (tenant_id, key_id)
);
CREATE INDEX api_keys_newest ON tenant.api_keys (tenant_id, create_time DESC, key_id DESC);

CREATE TABLE tenant.tenant_settings (
    tenant_id uuid PRIMARY KEY REFERENCES tenant.tenants,
    assistant_name text NOT NULL,
    config_version bigint NOT NULL DEFAULT 1 CHECK (config_version >= 1),
    update_time timestamptz NOT NULL DEFAULT now()
);

-- steps_done counts finished steps in the order of services/tenant/provisioning.py; it only ever rises.
CREATE TABLE tenant.provisioning (
    tenant_id uuid PRIMARY KEY REFERENCES tenant.tenants,
    request_id uuid NOT NULL,
    content_digest bytea NOT NULL CHECK (octet_length(content_digest) = 32),
    steps_done smallint NOT NULL CHECK (steps_done >= 1),
    first_key_id text,
    create_time timestamptz NOT NULL DEFAULT now(),
    update_time timestamptz NOT NULL DEFAULT now()
);

-- Append-only by grant. It outlives its tenant, so it references nothing. The nil tenant holds what concerns no tenant.
CREATE TABLE tenant.audit (
    tenant_id uuid NOT NULL,
    audit_id uuid NOT NULL DEFAULT uuidv7(),
    occur_time timestamptz NOT NULL DEFAULT now(),
    action text NOT NULL,
    subject text NOT NULL,
    target text NOT NULL DEFAULT '',
    reason text NOT NULL DEFAULT '',
    peer_address text NOT NULL DEFAULT '',
    occurrence_count integer NOT NULL DEFAULT 1 CHECK (occurrence_count >= 1),
    PRIMARY KEY (tenant_id, audit_id)
);

-- Directories: three names are looked up before the tenant is known, or must be unique over all tenants. Each is a table of its own that
-- maps the name to a tenant id and holds nothing else, so reading it whole discloses neither a secret nor a tenant's data, and the tables
-- that do hold data keep one policy without exception. Writing an entry still needs the tenant to be set.
CREATE TABLE tenant.api_key_directory (
    key_id text PRIMARY KEY,
    tenant_id uuid NOT NULL
);
CREATE INDEX api_key_directory_tenant ON tenant.api_key_directory (tenant_id);
CREATE TABLE tenant.slug_directory (
    slug text COLLATE "C" PRIMARY KEY,
    tenant_id uuid NOT NULL
);
CREATE INDEX slug_directory_tenant ON tenant.slug_directory (tenant_id);
-- Kept when a tenant is erased: a late retry of its creation must not bring it back.
CREATE TABLE tenant.request_directory (
    request_id uuid PRIMARY KEY,
    tenant_id uuid NOT NULL
);

DO $$
DECLARE
    v_table text;
BEGIN
    FOREACH v_table IN ARRAY ARRAY['tenants', 'users', 'api_keys', 'tenant_settings', 'provisioning', 'audit'] LOOP
        EXECUTE format('ALTER TABLE tenant.%I ENABLE ROW LEVEL SECURITY', v_table);
        EXECUTE format('ALTER TABLE tenant.%I FORCE ROW LEVEL SECURITY', v_table);
        EXECUTE format(
            'CREATE POLICY tenant_isolation ON tenant.%I USING (tenant_id = (SELECT current_setting(''app.tenant_id'')::uuid)) '
            'WITH CHECK (tenant_id = (SELECT current_setting(''app.tenant_id'')::uuid))', v_table);
    END LOOP;
    FOREACH v_table IN ARRAY ARRAY['api_key_directory', 'slug_directory', 'request_directory'] LOOP
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
    FOREACH v_table IN ARRAY ARRAY['plan_catalogs', 'plans', 'plan_versions'] LOOP
        EXECUTE format('ALTER TABLE tenant.%I ENABLE ROW LEVEL SECURITY', v_table);
        EXECUTE format('ALTER TABLE tenant.%I FORCE ROW LEVEL SECURITY', v_table);
        EXECUTE format('CREATE POLICY plan_reading ON tenant.%I FOR SELECT TO :service USING (true)', v_table);
        EXECUTE format('CREATE POLICY plan_loading ON tenant.%I TO :owner USING (true) WITH CHECK (true)', v_table);
    END LOOP;
END
$$;

GRANT SELECT ON tenant.plan_catalogs, tenant.plans, tenant.plan_versions TO :service;
GRANT SELECT, INSERT, UPDATE, DELETE ON tenant.tenants, tenant.users, tenant.api_keys, tenant.tenant_settings, tenant.provisioning TO :service;
GRANT SELECT, INSERT ON tenant.audit TO :service;
GRANT SELECT, INSERT, DELETE ON tenant.api_key_directory, tenant.slug_directory, tenant.request_directory TO :service;
