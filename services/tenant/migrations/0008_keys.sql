-- A tenant's own key at the model provider, sealed under its data key. The data keys themselves are in the key store, not here.

CREATE TABLE tenant.provider_keys (
    tenant_id uuid PRIMARY KEY REFERENCES tenant.tenants,
    sealed_key bytea NOT NULL,
    fingerprint text NOT NULL,
    update_time timestamptz NOT NULL DEFAULT clock_timestamp()
);
ALTER TABLE tenant.provider_keys ENABLE ROW LEVEL SECURITY;
ALTER TABLE tenant.provider_keys FORCE ROW LEVEL SECURITY;
CREATE POLICY tenant_isolation ON tenant.provider_keys
    USING (tenant_id = (SELECT current_setting('app.tenant_id')::uuid))
    WITH CHECK (tenant_id = (SELECT current_setting('app.tenant_id')::uuid));
GRANT SELECT, INSERT, UPDATE, DELETE ON tenant.provider_keys TO :service;
