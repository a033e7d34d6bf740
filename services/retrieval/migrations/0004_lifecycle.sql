-- At home only.
-- Erased tenants: what is still on its way to a tenant's rows when they are removed is refused, for ever.

CREATE TABLE erased_tenants (
    tenant_id uuid PRIMARY KEY,
    erase_time timestamptz NOT NULL DEFAULT clock_timestamp()
);
ALTER TABLE erased_tenants ENABLE ROW LEVEL SECURITY;
ALTER TABLE erased_tenants FORCE ROW LEVEL SECURITY;
CREATE POLICY tenant_only ON erased_tenants TO :service
    USING (tenant_id = (SELECT current_setting('app.tenant_id')::uuid))
    WITH CHECK (tenant_id = (SELECT current_setting('app.tenant_id')::uuid));
GRANT SELECT, INSERT ON erased_tenants TO :service;

CREATE FUNCTION erasure_lock(p_tenant_id uuid) RETURNS bigint
LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$ SELECT hashtextextended('retrieval.erased:' || p_tenant_id::text, 0) $$;

-- Shared by writers, exclusive for the erasure: a writer that passed is waited for and its rows are removed with the rest; one that comes
-- later sees the tombstone, because the look is a statement of its own after the lock.
CREATE FUNCTION refuse_erased() RETURNS trigger
LANGUAGE plpgsql SECURITY INVOKER SET search_path = retrieval, pg_temp AS $$
BEGIN
    PERFORM pg_advisory_xact_lock_shared(retrieval.erasure_lock(NEW.tenant_id));
    IF EXISTS (SELECT FROM retrieval.erased_tenants e WHERE e.tenant_id = NEW.tenant_id) THEN
        RAISE EXCEPTION 'the tenant is erased' USING ERRCODE = 'TN001';
    END IF;
    RETURN NEW;
END
$$;
-- Chunks hang on a document of the same transaction, so the document's own look covers them.
CREATE TRIGGER documents_of_the_living BEFORE INSERT ON documents FOR EACH ROW EXECUTE FUNCTION refuse_erased();
CREATE TRIGGER removals_of_the_living BEFORE INSERT ON removed_documents FOR EACH ROW EXECUTE FUNCTION refuse_erased();

REVOKE ALL ON FUNCTION refuse_erased(), erasure_lock(uuid) FROM PUBLIC;
GRANT EXECUTE ON FUNCTION refuse_erased(), erasure_lock(uuid) TO :service;
