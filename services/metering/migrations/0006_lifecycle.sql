-- Erased tenants: a call of theirs that is opened late is billed like any other, without the names it brings along.

CREATE TABLE erased_tenants (
    tenant_id uuid PRIMARY KEY,
    erase_time timestamptz NOT NULL DEFAULT clock_timestamp()
);
ALTER TABLE erased_tenants ENABLE ROW LEVEL SECURITY;
ALTER TABLE erased_tenants FORCE ROW LEVEL SECURITY;
CREATE POLICY own_tenant ON erased_tenants TO :service
    USING (tenant_id = (SELECT current_setting('app.tenant_id')::uuid)) WITH CHECK (tenant_id = (SELECT current_setting('app.tenant_id')::uuid));
GRANT SELECT, INSERT ON erased_tenants TO :service;

-- open_calls holds the tenant's lock shared and the tombstone is written under it exclusively: a row is either there to be blanked or blank.
CREATE FUNCTION forget_names_of_erased() RETURNS trigger
LANGUAGE plpgsql SECURITY INVOKER SET search_path = metering, pg_temp AS $$
BEGIN
    IF NEW.user_name IS NOT NULL AND EXISTS (SELECT FROM metering.erased_tenants e WHERE e.tenant_id = NEW.tenant_id) THEN
        NEW.user_name := '';
        NEW.feature := '';
        NEW.prompt_version := '';
    END IF;
    RETURN NEW;
END
$$;
CREATE TRIGGER calls_of_the_erased BEFORE INSERT ON calls FOR EACH ROW EXECUTE FUNCTION forget_names_of_erased();

REVOKE ALL ON FUNCTION forget_names_of_erased() FROM PUBLIC;
GRANT EXECUTE ON FUNCTION forget_names_of_erased() TO :service;
