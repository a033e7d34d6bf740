-- Whose turn it is, by rows that the tenant service's own roles alone may lock: an advisory lock is anybody's who may connect to the database.
-- One order everywhere: a tenant's chain first, then the feed.

-- Held until this commits: nobody is in the middle of an insert whose turn was taken the other way.
LOCK TABLE tenant.audit, tenant.changes IN SHARE ROW EXCLUSIVE MODE;

-- One row a tenant with records, for as long as its chain: the id alone.
CREATE TABLE tenant.audit_chains (
    tenant_id uuid PRIMARY KEY
);
ALTER TABLE tenant.audit_chains ENABLE ROW LEVEL SECURITY;
ALTER TABLE tenant.audit_chains FORCE ROW LEVEL SECURITY;
CREATE POLICY tenant_isolation ON tenant.audit_chains
    USING (tenant_id = (SELECT current_setting('app.tenant_id')::uuid))
    WITH CHECK (tenant_id = (SELECT current_setting('app.tenant_id')::uuid));
-- A row is locked by who may change it.
GRANT SELECT, INSERT, UPDATE ON tenant.audit_chains TO :service;

-- One row, ever.
CREATE TABLE tenant.change_turn (
    is_the_row boolean PRIMARY KEY DEFAULT true CHECK (is_the_row)
);
INSERT INTO tenant.change_turn DEFAULT VALUES;
ALTER TABLE tenant.change_turn ENABLE ROW LEVEL SECURITY;
ALTER TABLE tenant.change_turn FORCE ROW LEVEL SECURITY;
CREATE POLICY turn_reading ON tenant.change_turn FOR SELECT TO :service, :owner USING (true);
-- Locked by anybody of this service, changed by nobody.
CREATE POLICY turn_taking ON tenant.change_turn FOR UPDATE TO :service, :owner USING (true) WITH CHECK (false);
GRANT SELECT, UPDATE ON tenant.change_turn TO :service;

-- Nobody inserts a record that is not the chain's next one: place, time of recording and hashes are written here over whatever was given.
CREATE OR REPLACE FUNCTION tenant.chain_audit() RETURNS trigger
LANGUAGE plpgsql SECURITY INVOKER SET search_path = pg_catalog AS $$
DECLARE
    v_last record;
BEGIN
    -- Held until the commit: two writers of one tenant can never both follow the same record.
    PERFORM FROM tenant.audit_chains c WHERE c.tenant_id = NEW.tenant_id FOR UPDATE;
    IF NOT FOUND THEN
        -- Two who begin a chain at once wait for each other here, and the second locks what the first wrote.
        INSERT INTO tenant.audit_chains (tenant_id) VALUES (NEW.tenant_id) ON CONFLICT DO NOTHING;
        PERFORM FROM tenant.audit_chains c WHERE c.tenant_id = NEW.tenant_id FOR UPDATE;
    END IF;
    -- At least once is what a relay delivers; the second delivery adds nothing.
    IF EXISTS (SELECT FROM tenant.audit a WHERE a.tenant_id = NEW.tenant_id AND a.audit_id = NEW.audit_id) THEN
        RETURN NULL;
    END IF;
    SELECT a.sequence, a.record_hash INTO v_last
        FROM tenant.audit a WHERE a.tenant_id = NEW.tenant_id ORDER BY a.sequence DESC LIMIT 1;
    NEW.sequence := coalesce(v_last.sequence, 0) + 1;
    NEW.previous_hash := coalesce(v_last.record_hash, decode(repeat('00', 32), 'hex'));
    NEW.record_time := clock_timestamp();
    NEW.record_hash := tenant.audit_hash(NEW);
    RETURN NEW;
END
$$;

-- Ids commit in their order, whoever inserts: the turn is taken before the statement draws an id, and held until the commit, so that a
-- reader who has seen one change has seen every earlier one. Changes are rare; calls make none.
CREATE FUNCTION tenant.take_change_turn() RETURNS trigger
LANGUAGE plpgsql SECURITY INVOKER SET search_path = pg_catalog AS $$
BEGIN
    PERFORM FROM tenant.change_turn FOR UPDATE;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'tenant.change_turn has lost its row: nobody can tell in which order changes commit; put it back'
            USING ERRCODE = 'object_not_in_prerequisite_state';
    END IF;
    RETURN NULL;
END
$$;
CREATE TRIGGER changes_take_turns BEFORE INSERT ON tenant.changes FOR EACH STATEMENT EXECUTE FUNCTION tenant.take_change_turn();
-- ALWAYS: a session that calls itself a replica waits like any other.
ALTER TABLE tenant.changes ENABLE ALWAYS TRIGGER changes_take_turns;

-- Called in the transaction of the change itself, after the tenant is set, and after the transaction's audit records.
CREATE OR REPLACE FUNCTION tenant.announce(p_tenant_id uuid, p_kind text) RETURNS void
LANGUAGE plpgsql SECURITY INVOKER AS $$
BEGIN
    INSERT INTO tenant.changes (tenant_id, kind) VALUES (p_tenant_id, p_kind);
    PERFORM pg_notify('tenant_changes', p_kind);
END
$$;

REVOKE EXECUTE ON FUNCTION tenant.take_change_turn() FROM PUBLIC;
GRANT EXECUTE ON FUNCTION tenant.take_change_turn() TO :service;
