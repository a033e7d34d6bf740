-- Wrapped data keys, in a database of their own that is never part of the data's backups: what is destroyed here stays destroyed, and
-- a backup of the data that is brought back later holds nothing that can be read.

CREATE TABLE tenant_keys.data_keys (
    tenant_id uuid NOT NULL,
    version integer NOT NULL CHECK (version >= 1),
    active boolean NOT NULL,
    master_key_id text NOT NULL,
    wrapped_key bytea NOT NULL,
    create_time timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (tenant_id, version)
);
CREATE UNIQUE INDEX data_keys_active ON tenant_keys.data_keys (tenant_id) WHERE active;

-- Kept for ever: no key is ever made again for a tenant whose keys were destroyed.
CREATE TABLE tenant_keys.destroyed_tenants (
    tenant_id uuid PRIMARY KEY,
    destroyed_count integer NOT NULL CHECK (destroyed_count >= 0),
    destroy_time timestamptz NOT NULL DEFAULT now()
);

-- Ids and nothing else: rewrapping walks it and enters each tenant in turn, without any policy that sees two at once.
CREATE TABLE tenant_keys.tenant_directory (
    tenant_id uuid PRIMARY KEY
);

DO $$
DECLARE
    v_table text;
BEGIN
    FOREACH v_table IN ARRAY ARRAY['data_keys', 'destroyed_tenants', 'tenant_directory'] LOOP
        EXECUTE format('ALTER TABLE tenant_keys.%I ENABLE ROW LEVEL SECURITY', v_table);
        EXECUTE format('ALTER TABLE tenant_keys.%I FORCE ROW LEVEL SECURITY', v_table);
    END LOOP;
    FOREACH v_table IN ARRAY ARRAY['data_keys', 'destroyed_tenants'] LOOP
        EXECUTE format(
            'CREATE POLICY tenant_isolation ON tenant_keys.%I USING (tenant_id = (SELECT current_setting(''app.tenant_id'')::uuid)) '
            'WITH CHECK (tenant_id = (SELECT current_setting(''app.tenant_id'')::uuid))', v_table);
    END LOOP;
END
$$;
CREATE POLICY directory_lookup ON tenant_keys.tenant_directory FOR SELECT TO :service USING (true);
CREATE POLICY tenant_entry ON tenant_keys.tenant_directory FOR INSERT TO :service
    WITH CHECK (tenant_id = (SELECT current_setting('app.tenant_id')::uuid));
CREATE POLICY tenant_removal ON tenant_keys.tenant_directory FOR DELETE TO :service
    USING (tenant_id = (SELECT current_setting('app.tenant_id')::uuid));

GRANT SELECT, INSERT, UPDATE, DELETE ON tenant_keys.data_keys TO :service;
-- A tombstone can be set, and neither moved nor taken away.
GRANT SELECT, INSERT ON tenant_keys.destroyed_tenants TO :service;
GRANT SELECT, INSERT, DELETE ON tenant_keys.tenant_directory TO :service;
