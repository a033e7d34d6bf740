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
