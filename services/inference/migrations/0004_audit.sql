-- At home only.
-- What calls read and how they ended, on its way to the tenant service's audit log. Written before the provider is asked; deleted once
-- the log answered that it has it. No texts: ids, names, numbers, and the context token that proves whose it is.

CREATE TABLE inference.audit_outbox (
    tenant_id uuid NOT NULL,
    audit_id uuid NOT NULL,
    action text NOT NULL CHECK (action IN ('DOCUMENTS_READ', 'CALL_ENDED')),
    call_id uuid NOT NULL,
    occur_time timestamptz NOT NULL,
    user_name text NOT NULL CHECK (length(user_name) <= 200),
    document_ids uuid[] NOT NULL CHECK (cardinality(document_ids) <= 200),
    detail text NOT NULL CHECK (octet_length(detail) <= 4096 AND detail IS JSON OBJECT),
    peer_address text NOT NULL CHECK (length(peer_address) <= 100),
    context_token text NOT NULL CHECK (octet_length(context_token) <= 8192),
    due_time timestamptz NOT NULL DEFAULT clock_timestamp(),
    send_count integer NOT NULL DEFAULT 0 CHECK (send_count >= 0),
    PRIMARY KEY (tenant_id, audit_id)
) WITH (fillfactor = 80, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 2000, autovacuum_vacuum_cost_delay = 0);

ALTER TABLE inference.audit_outbox ENABLE ROW LEVEL SECURITY;
ALTER TABLE inference.audit_outbox FORCE ROW LEVEL SECURITY;
CREATE POLICY audit_outbox_of_tenant ON inference.audit_outbox TO :service
    USING (tenant_id = (SELECT current_setting('app.tenant_id')::uuid))
    WITH CHECK (tenant_id = (SELECT current_setting('app.tenant_id')::uuid));
-- The relay works for all tenants: it takes rows away and puts them off, and makes none.
CREATE POLICY every_tenant_read ON inference.audit_outbox FOR SELECT TO :jobs USING (true);
CREATE POLICY every_tenant_put_off ON inference.audit_outbox FOR UPDATE TO :jobs USING (true) WITH CHECK (true);
CREATE POLICY every_tenant_done ON inference.audit_outbox FOR DELETE TO :jobs USING (true);

-- SELECT only because ON CONFLICT asks for it.
GRANT SELECT, INSERT ON inference.audit_outbox TO :service;
GRANT SELECT, DELETE ON inference.audit_outbox TO :jobs;
GRANT UPDATE (due_time, send_count) ON inference.audit_outbox TO :jobs;

-- Many calls' records in one round trip, each written as its own tenant. p_documents holds an array a record, written as text.
CREATE FUNCTION inference.add_audit(
    p_tenant_ids uuid[], p_audit_ids uuid[], p_actions text[], p_call_ids uuid[], p_occur_times timestamptz[], p_users text[],
    p_documents text[], p_details text[], p_peer_addresses text[], p_context_tokens text[]
) RETURNS void
LANGUAGE plpgsql SECURITY INVOKER SET search_path = inference, pg_temp AS $$
BEGIN
    FOR i IN 1 .. cardinality(p_tenant_ids) LOOP
        PERFORM set_config('app.tenant_id', p_tenant_ids[i]::text, true);
        INSERT INTO audit_outbox (
            tenant_id, audit_id, action, call_id, occur_time, user_name, document_ids, detail, peer_address, context_token
        ) VALUES (
            p_tenant_ids[i], p_audit_ids[i], p_actions[i], p_call_ids[i], p_occur_times[i], p_users[i], p_documents[i]::uuid[], p_details[i],
            p_peer_addresses[i], p_context_tokens[i]
        ) ON CONFLICT DO NOTHING;
    END LOOP;
END
$$;
REVOKE ALL ON FUNCTION inference.add_audit(uuid[], uuid[], text[], uuid[], timestamptz[], text[], text[], text[], text[], text[]) FROM PUBLIC;
GRANT EXECUTE ON FUNCTION inference.add_audit(uuid[], uuid[], text[], uuid[], timestamptz[], text[], text[], text[], text[], text[]) TO :service;
