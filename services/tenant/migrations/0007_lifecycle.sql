-- What a tenant's beginning and end need to go on by themselves: sagas with their steps, events for the outside, receipts of erasures.

ALTER TABLE tenant.tenants DROP CONSTRAINT tenants_state_check;
ALTER TABLE tenant.tenants ADD CONSTRAINT tenants_state_check
    CHECK (state IN ('PROVISIONING', 'ACTIVE', 'SUSPENDED', 'ERASING', 'FAILED'));

-- One row a tenant and kind. `content` is what the caller asked for, so that any replica can go on without the caller; it is emptied when the
-- saga ends. A lease keeps two replicas from running one saga at once; every step is safe to repeat all the same.
-- References nothing: the row of an erasure outlives its tenant.
CREATE TABLE tenant.sagas (
    tenant_id uuid NOT NULL,
    kind text NOT NULL CHECK (kind IN ('PROVISION', 'ERASE')),
    request_id uuid NOT NULL,
    content_digest bytea NOT NULL CHECK (octet_length(content_digest) = 32),
    state text NOT NULL DEFAULT 'RUNNING' CHECK (state IN ('RUNNING', 'COMPENSATING', 'DONE', 'FAILED')),
    content jsonb NOT NULL DEFAULT '{}',
    subject text NOT NULL,
    reason text NOT NULL DEFAULT '',
    cause text NOT NULL DEFAULT '',
    attempts integer NOT NULL DEFAULT 0 CHECK (attempts >= 0),
    due_time timestamptz NOT NULL DEFAULT clock_timestamp(),
    lease_holder uuid,
    lease_until timestamptz,
    create_time timestamptz NOT NULL DEFAULT clock_timestamp(),
    end_time timestamptz,
    PRIMARY KEY (tenant_id, kind)
);

-- Step numbers are those of services/tenant/provisioning.py and erasure.py. `detail` is what an erasure's step found and removed.
CREATE TABLE tenant.saga_steps (
    tenant_id uuid NOT NULL,
    kind text NOT NULL,
    step smallint NOT NULL,
    state text NOT NULL CHECK (state IN ('BEGUN', 'DONE', 'UNDONE')),
    begin_time timestamptz NOT NULL DEFAULT clock_timestamp(),
    end_time timestamptz,
    detail jsonb NOT NULL DEFAULT '[]',
    PRIMARY KEY (tenant_id, kind, step),
    FOREIGN KEY (tenant_id, kind) REFERENCES tenant.sagas (tenant_id, kind) ON DELETE CASCADE
);

-- Written in the transaction of the change they tell of. `position` orders the events of one tenant. No personal data in a body: an event
-- cannot be called back.
CREATE TABLE tenant.events (
    tenant_id uuid NOT NULL,
    event_id uuid NOT NULL DEFAULT uuidv7(),
    position bigint GENERATED ALWAYS AS IDENTITY,
    sink text NOT NULL CHECK (sink IN ('webhook', 'mail')),
    event_type text NOT NULL,
    data jsonb NOT NULL,
    state text NOT NULL DEFAULT 'PENDING' CHECK (state IN ('PENDING', 'DELIVERED', 'DEAD')),
    attempts integer NOT NULL DEFAULT 0 CHECK (attempts >= 0),
    due_time timestamptz NOT NULL DEFAULT clock_timestamp(),
    lease_until timestamptz,
    last_error text NOT NULL DEFAULT '',
    create_time timestamptz NOT NULL DEFAULT clock_timestamp(),
    end_time timestamptz,
    PRIMARY KEY (tenant_id, event_id)
);
CREATE INDEX events_pending ON tenant.events (tenant_id, sink, position) WHERE state = 'PENDING';

-- For ever: what was found and removed, signed. The body names a tenant by its id alone.
CREATE TABLE tenant.erasure_receipts (
    tenant_id uuid PRIMARY KEY,
    request_id uuid NOT NULL,
    body text NOT NULL,
    signature bytea NOT NULL CHECK (octet_length(signature) = 64),
    key_id text NOT NULL,
    create_time timestamptz NOT NULL DEFAULT clock_timestamp()
);

-- When a tenant's old conversations are next looked at.
CREATE TABLE tenant.purges (
    tenant_id uuid PRIMARY KEY,
    next_time timestamptz NOT NULL,
    last_time timestamptz,
    removed_count bigint NOT NULL DEFAULT 0
);

DO $$
DECLARE
    v_table text;
BEGIN
    FOREACH v_table IN ARRAY ARRAY['sagas', 'saga_steps', 'events', 'erasure_receipts', 'purges'] LOOP
        EXECUTE format('ALTER TABLE tenant.%I ENABLE ROW LEVEL SECURITY', v_table);
        EXECUTE format('ALTER TABLE tenant.%I FORCE ROW LEVEL SECURITY', v_table);
        -- For the owner too: as such a deleted saga's steps are removed.
        EXECUTE format(
            'CREATE POLICY tenant_isolation ON tenant.%I USING (tenant_id = (SELECT current_setting(''app.tenant_id'')::uuid)) '
            'WITH CHECK (tenant_id = (SELECT current_setting(''app.tenant_id'')::uuid))', v_table);
    END LOOP;
END
$$;
-- The policy above is for every role; a jobs session names no tenant, and its sub-select would fail instead of answering no.
DO $$
DECLARE
    v_table text;
BEGIN
    FOREACH v_table IN ARRAY ARRAY['sagas', 'events', 'purges'] LOOP
        EXECUTE format('ALTER POLICY tenant_isolation ON tenant.%I TO :service, :owner', v_table);
    END LOOP;
END
$$;
ALTER POLICY tenant_isolation ON tenant.tenants TO :service, :owner;

-- The jobs role finds what is due over all tenants and takes leases. It reads neither what a caller asked for nor a tenant's names.
CREATE POLICY jobs_find ON tenant.sagas FOR SELECT TO :jobs USING (true);
CREATE POLICY jobs_find ON tenant.events FOR SELECT TO :jobs USING (true);
CREATE POLICY jobs_deliver ON tenant.events FOR UPDATE TO :jobs USING (true) WITH CHECK (true);
CREATE POLICY jobs_find ON tenant.purges FOR SELECT TO :jobs USING (true);
CREATE POLICY jobs_find ON tenant.tenants FOR SELECT TO :jobs USING (true);

GRANT SELECT, INSERT, UPDATE, DELETE ON tenant.sagas, tenant.saga_steps, tenant.events, tenant.purges TO :service;
GRANT SELECT, INSERT ON tenant.erasure_receipts TO :service;
GRANT SELECT (tenant_id, kind, state, due_time, lease_until) ON tenant.sagas TO :jobs;
GRANT SELECT ON tenant.events TO :jobs;
GRANT UPDATE (state, attempts, due_time, lease_until, last_error, end_time) ON tenant.events TO :jobs;
GRANT SELECT (tenant_id, next_time) ON tenant.purges TO :jobs;
GRANT SELECT (tenant_id, state) ON tenant.tenants TO :jobs;

-- The saga a request id made: the one lookup of a watcher that knows no tenant yet.
CREATE FUNCTION tenant.find_request(p_request_id uuid) RETURNS uuid
LANGUAGE sql STABLE SECURITY INVOKER AS $$
    SELECT d.tenant_id FROM tenant.request_directory d WHERE d.request_id = p_request_id
$$;

-- Days a conversation without newer turns is kept; 0 keeps it for ever. As services/tenant/effective_config.py has it: an operator's word
-- stands, a tenant's own may only shorten what its plan says.
CREATE FUNCTION tenant.retention_days(p_tenant_id uuid) RETURNS integer
LANGUAGE sql STABLE SECURITY INVOKER AS $$
    SELECT CASE
        WHEN s.data_retention_days IS NULL THEN v.data_retention_days
        WHEN 'data_retention_days' = ANY (s.operator_fields) OR v.data_retention_days = 0 THEN s.data_retention_days
        WHEN s.data_retention_days = 0 THEN v.data_retention_days
        ELSE least(s.data_retention_days, v.data_retention_days)
    END
    FROM tenant.tenants t
    JOIN tenant.plans p ON p.plan = t.plan
    JOIN tenant.plan_versions v ON v.plan = p.plan AND v.version = p.version
    LEFT JOIN tenant.tenant_settings s ON s.tenant_id = t.tenant_id
    WHERE t.tenant_id = p_tenant_id
$$;

REVOKE EXECUTE ON FUNCTION tenant.find_request(uuid), tenant.retention_days(uuid) FROM PUBLIC;
GRANT EXECUTE ON FUNCTION tenant.find_request(uuid), tenant.retention_days(uuid) TO :service;
