-- At home only.
-- Erased tenants: what is still on its way to a tenant's rows when they are removed is refused, for ever.

CREATE TABLE inference.erased_tenants (
    tenant_id uuid PRIMARY KEY,
    erase_time timestamptz NOT NULL DEFAULT clock_timestamp()
);
ALTER TABLE inference.erased_tenants ENABLE ROW LEVEL SECURITY;
ALTER TABLE inference.erased_tenants FORCE ROW LEVEL SECURITY;
CREATE POLICY erased_tenants_of_tenant ON inference.erased_tenants TO :service
    USING (tenant_id = (SELECT current_setting('app.tenant_id')::uuid))
    WITH CHECK (tenant_id = (SELECT current_setting('app.tenant_id')::uuid));
GRANT SELECT, INSERT ON inference.erased_tenants TO :service;

CREATE FUNCTION inference.erasure_lock(p_tenant_id uuid) RETURNS bigint
LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$ SELECT hashtextextended('inference.erased:' || p_tenant_id::text, 0) $$;

-- Shared by writers, exclusive for the erasure: a writer that passed is waited for and its rows are removed with the rest; one that comes
-- later sees the tombstone, because the look is a statement of its own after the lock.
CREATE FUNCTION inference.refuse_erased() RETURNS trigger
LANGUAGE plpgsql SECURITY INVOKER SET search_path = inference, pg_temp AS $$
BEGIN
    PERFORM pg_advisory_xact_lock_shared(inference.erasure_lock(NEW.tenant_id));
    IF EXISTS (SELECT FROM inference.erased_tenants e WHERE e.tenant_id = NEW.tenant_id) THEN
        RAISE EXCEPTION 'the tenant is erased' USING ERRCODE = 'TN001';
    END IF;
    RETURN NEW;
END
$$;
CREATE TRIGGER prompts_of_the_living BEFORE INSERT ON inference.prompts FOR EACH ROW EXECUTE FUNCTION inference.refuse_erased();
CREATE TRIGGER conversations_of_the_living BEFORE INSERT ON inference.conversations FOR EACH ROW EXECUTE FUNCTION inference.refuse_erased();
CREATE TRIGGER turns_of_the_living BEFORE INSERT ON inference.turns FOR EACH ROW EXECUTE FUNCTION inference.refuse_erased();

REVOKE ALL ON FUNCTION inference.refuse_erased(), inference.erasure_lock(uuid) FROM PUBLIC;
GRANT EXECUTE ON FUNCTION inference.refuse_erased(), inference.erasure_lock(uuid) TO :service;
