-- The wall between a tenant's places: who does not live here is neither read nor written here, whatever a caller remembers.

-- Tenants that live elsewhere (AWAY), or are being copied elsewhere and still live here (MOVING). Who lives here has no row.
-- Named for the service: in a bridge the tables of two services share one schema.
CREATE TABLE retrieval.retrieval_placed_tenants (
    tenant_id uuid PRIMARY KEY,
    kind text NOT NULL CHECK (kind IN ('pool', 'bridge', 'silo')),
    state text NOT NULL CHECK (state IN ('MOVING', 'AWAY')),
    update_time timestamptz NOT NULL DEFAULT clock_timestamp()
);
ALTER TABLE retrieval.retrieval_placed_tenants ENABLE ROW LEVEL SECURITY;
ALTER TABLE retrieval.retrieval_placed_tenants FORCE ROW LEVEL SECURITY;
CREATE POLICY tenant_only ON retrieval.retrieval_placed_tenants TO :service
    USING (tenant_id = (SELECT current_setting('app.tenant_id')::uuid))
    WITH CHECK (tenant_id = (SELECT current_setting('app.tenant_id')::uuid));
GRANT SELECT, INSERT, UPDATE, DELETE ON retrieval.retrieval_placed_tenants TO :service;

-- The repairing job visits the tenants that live elsewhere by this list.
CREATE POLICY jobs_find ON retrieval.retrieval_placed_tenants FOR SELECT TO :jobs USING (true);
GRANT SELECT ON retrieval.retrieval_placed_tenants TO :jobs;

-- Raises TM001 when the tenant lives elsewhere. The lock is held until the transaction ends: a move waits for whoever is at work here
-- and nobody gets to work while it ends. Every transaction begins with this, and so does every function that is a transaction of its own.
-- The lock's name contains the place's, so that a move within one database does not wait for itself.
CREATE FUNCTION retrieval.retrieval_assert_here(p_tenant_id uuid) RETURNS void
LANGUAGE plpgsql SECURITY INVOKER AS $$
BEGIN
    PERFORM pg_advisory_xact_lock_shared(hashtextextended('retrieval.retrieval_placed_tenants:' || p_tenant_id::text, 0));
    IF EXISTS (SELECT FROM retrieval.retrieval_placed_tenants p WHERE p.tenant_id = p_tenant_id AND p.state = 'AWAY') THEN
        RAISE EXCEPTION 'the tenant lives elsewhere' USING ERRCODE = 'TM001';
    END IF;
END
$$;
REVOKE ALL ON FUNCTION retrieval.retrieval_assert_here(uuid) FROM PUBLIC;
GRANT EXECUTE ON FUNCTION retrieval.retrieval_assert_here(uuid) TO :service;

-- As in 0001, behind the wall.
CREATE OR REPLACE FUNCTION find_chunks(p_tenant_id uuid, p_chunk_ids uuid[])
RETURNS TABLE (chunk_id uuid, document_id uuid, document_key text, title text, "position" integer, start_offset integer, end_offset integer, content text)
LANGUAGE plpgsql SECURITY INVOKER SET search_path = retrieval, pg_temp AS $$
BEGIN
    PERFORM set_config('app.tenant_id', p_tenant_id::text, true);
    PERFORM retrieval.retrieval_assert_here(p_tenant_id);
    RETURN QUERY
        SELECT c.chunk_id, c.document_id, d.document_key, d.title, c.position, c.start_offset, c.end_offset, c.content
        FROM chunks c
        JOIN documents d ON d.tenant_id = c.tenant_id AND d.document_id = c.document_id
        WHERE c.tenant_id = p_tenant_id AND c.chunk_id = ANY (p_chunk_ids);
END
$$;
