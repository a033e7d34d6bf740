-- At home only.
-- Records that were refused for good, by the outbox or by the audit log, with the refusal: kept for the operator, in nobody's way. No constraint
-- on what they say: it is why they are here.

CREATE TABLE inference.audit_set_aside (
    tenant_id uuid NOT NULL,
    audit_id uuid NOT NULL,
    cause text NOT NULL,
    -- The record as JSON, in bytes: it may hold what a text may not.
    entry bytea NOT NULL,
    set_aside_time timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (tenant_id, audit_id)
);
ALTER TABLE inference.audit_set_aside ENABLE ROW LEVEL SECURITY;
ALTER TABLE inference.audit_set_aside FORCE ROW LEVEL SECURITY;
CREATE POLICY audit_set_aside_of_tenant ON inference.audit_set_aside TO :service
    USING (tenant_id = (SELECT current_setting('app.tenant_id')::uuid))
    WITH CHECK (tenant_id = (SELECT current_setting('app.tenant_id')::uuid));
-- The relay works for all tenants: it adds, and neither changes nor removes.
CREATE POLICY every_tenant_read ON inference.audit_set_aside FOR SELECT TO :jobs USING (true);
CREATE POLICY every_tenant_added ON inference.audit_set_aside FOR INSERT TO :jobs WITH CHECK (true);

-- SELECT only because ON CONFLICT asks for it.
GRANT SELECT, INSERT ON inference.audit_set_aside TO :service;
GRANT SELECT, INSERT ON inference.audit_set_aside TO :jobs;
