-- Where a tenant's content lives when it has left the pool, or is leaving it. Who is in the pool and stays there has no row.

-- `stores` holds addresses with their secrets, sealed by the service; `made` says that this service made them, so it drops them.
-- While a tenant moves, following_* is where to, and moved_services names the services whose part lives there already.
CREATE TABLE tenant.placements (
    tenant_id uuid PRIMARY KEY REFERENCES tenant.tenants,
    kind text NOT NULL CHECK (kind IN ('pool', 'bridge', 'silo')),
    stores bytea,
    made boolean NOT NULL DEFAULT false,
    following_kind text CHECK (following_kind IN ('bridge', 'silo')),
    following_stores bytea,
    following_made boolean NOT NULL DEFAULT false,
    moved_services text[] NOT NULL DEFAULT '{}',
    create_time timestamptz NOT NULL DEFAULT now(),
    update_time timestamptz NOT NULL DEFAULT now()
);
ALTER TABLE tenant.placements ENABLE ROW LEVEL SECURITY;
ALTER TABLE tenant.placements FORCE ROW LEVEL SECURITY;
CREATE POLICY tenant_isolation ON tenant.placements
    USING (tenant_id = (SELECT current_setting('app.tenant_id')::uuid))
    WITH CHECK (tenant_id = (SELECT current_setting('app.tenant_id')::uuid));
GRANT SELECT, INSERT, UPDATE, DELETE ON tenant.placements TO :service;

-- What a finished move left behind, until it is removed.
ALTER TABLE tenant.placements ADD COLUMN left_kind text CHECK (left_kind IN ('pool', 'bridge'));

-- Moves to go on with and remains to remove: an id and a time, read over all tenants by the sweep, and nothing of a tenant's.
CREATE TABLE tenant.move_directory (
    tenant_id uuid PRIMARY KEY,
    due_time timestamptz NOT NULL
);
ALTER TABLE tenant.move_directory ENABLE ROW LEVEL SECURITY;
ALTER TABLE tenant.move_directory FORCE ROW LEVEL SECURITY;
CREATE POLICY directory_lookup ON tenant.move_directory FOR SELECT TO :service USING (true);
CREATE POLICY tenant_entry ON tenant.move_directory FOR INSERT TO :service
    WITH CHECK (tenant_id = (SELECT current_setting('app.tenant_id')::uuid));
CREATE POLICY tenant_change ON tenant.move_directory FOR UPDATE TO :service
    USING (tenant_id = (SELECT current_setting('app.tenant_id')::uuid))
    WITH CHECK (tenant_id = (SELECT current_setting('app.tenant_id')::uuid));
CREATE POLICY tenant_removal ON tenant.move_directory FOR DELETE TO :service
    USING (tenant_id = (SELECT current_setting('app.tenant_id')::uuid));
GRANT SELECT, INSERT, UPDATE, DELETE ON tenant.move_directory TO :service;
