-- Tenants for which a data key may have been made and which are not recorded yet: written before the key, gone with the record. What is
-- left of one by a crash in between names the key that is to be destroyed, and nothing else ever is.

CREATE TABLE tenant.unrecorded_keys (
    tenant_id uuid PRIMARY KEY,
    create_time timestamptz NOT NULL DEFAULT clock_timestamp()
);
ALTER TABLE tenant.unrecorded_keys ENABLE ROW LEVEL SECURITY;
ALTER TABLE tenant.unrecorded_keys FORCE ROW LEVEL SECURITY;
CREATE POLICY tenant_isolation ON tenant.unrecorded_keys TO :service
    USING (tenant_id = (SELECT current_setting('app.tenant_id')::uuid))
    WITH CHECK (tenant_id = (SELECT current_setting('app.tenant_id')::uuid));
CREATE POLICY jobs_find ON tenant.unrecorded_keys FOR SELECT TO :jobs USING (true);
GRANT SELECT, INSERT, UPDATE, DELETE ON tenant.unrecorded_keys TO :service;
GRANT SELECT ON tenant.unrecorded_keys TO :jobs;
