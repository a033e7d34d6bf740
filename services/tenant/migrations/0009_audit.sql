-- The audit log becomes a chain a tenant: each record carries the hash of the one before, computed here whoever writes it.

-- call_id, user_name and document_ids are what "who saw what" is asked by; detail is a JSON object as text, hashed as written.
ALTER TABLE tenant.audit
    ADD COLUMN sequence bigint,
    ADD COLUMN record_time timestamptz,
    ADD COLUMN source text NOT NULL DEFAULT 'tenant' CHECK (octet_length(source) <= 64),
    ADD COLUMN user_name text NOT NULL DEFAULT '' CHECK (octet_length(user_name) <= 800),
    ADD COLUMN call_id uuid,
    ADD COLUMN document_ids uuid[] NOT NULL DEFAULT '{}' CHECK (cardinality(document_ids) <= 200 AND array_position(document_ids, NULL) IS NULL),
    ADD COLUMN detail text NOT NULL DEFAULT '' CHECK (octet_length(detail) <= 4096 AND (detail = '' OR detail IS JSON OBJECT)),
    ADD COLUMN previous_hash bytea CHECK (octet_length(previous_hash) = 32),
    ADD COLUMN record_hash bytea CHECK (octet_length(record_hash) = 32);

-- Which records name a document. Only a way in: the record's own document_ids are what the hash covers, and verifying compares the two.
CREATE TABLE tenant.audit_documents (
    tenant_id uuid NOT NULL,
    document_id uuid NOT NULL,
    sequence bigint NOT NULL,
    PRIMARY KEY (tenant_id, document_id, sequence)
);
CREATE INDEX audit_documents_record ON tenant.audit_documents (tenant_id, sequence);
ALTER TABLE tenant.audit_documents ENABLE ROW LEVEL SECURITY;
ALTER TABLE tenant.audit_documents FORCE ROW LEVEL SECURITY;
CREATE POLICY tenant_isolation ON tenant.audit_documents
    USING (tenant_id = (SELECT current_setting('app.tenant_id')::uuid))
    WITH CHECK (tenant_id = (SELECT current_setting('app.tenant_id')::uuid));
GRANT SELECT, INSERT ON tenant.audit_documents TO :service;

-- A field as the hash sees it: its length in four bytes, then itself; NULL is a length no field has.
CREATE FUNCTION tenant.audit_field(p_value bytea) RETURNS bytea
LANGUAGE sql IMMUTABLE SECURITY INVOKER AS $$
    SELECT CASE WHEN p_value IS NULL THEN '\xffffffff'::bytea ELSE int4send(octet_length(p_value)) || p_value END
$$;

CREATE FUNCTION tenant.audit_moment(p_time timestamptz) RETURNS bytea
LANGUAGE sql IMMUTABLE SECURITY INVOKER AS $$
    SELECT int8send((extract(epoch FROM p_time) * 1000000)::bigint)
$$;

-- Version 1 of the encoding: every field in this order. A column added later needs a version of its own.
-- services/tenant/audit_chain.py computes the same, apart from this function, so that a changed function is noticed as well.
CREATE FUNCTION tenant.audit_hash(p_record tenant.audit) RETURNS bytea
LANGUAGE sql STABLE SECURITY INVOKER SET search_path = pg_catalog AS $$
    SELECT sha256(
        '\x01'::bytea
        || tenant.audit_field(uuid_send((p_record).tenant_id))
        || tenant.audit_field(int8send((p_record).sequence))
        || tenant.audit_field(uuid_send((p_record).audit_id))
        || tenant.audit_field(tenant.audit_moment((p_record).occur_time))
        || tenant.audit_field(tenant.audit_moment((p_record).record_time))
        || tenant.audit_field(convert_to((p_record).action, 'UTF8'))
        || tenant.audit_field(convert_to((p_record).subject, 'UTF8'))
        || tenant.audit_field(convert_to((p_record).target, 'UTF8'))
        || tenant.audit_field(convert_to((p_record).reason, 'UTF8'))
        || tenant.audit_field(convert_to((p_record).peer_address, 'UTF8'))
        || tenant.audit_field(int8send((p_record).occurrence_count))
        || tenant.audit_field(convert_to((p_record).source, 'UTF8'))
        || tenant.audit_field(convert_to((p_record).user_name, 'UTF8'))
        || tenant.audit_field(uuid_send((p_record).call_id))
        || tenant.audit_field(coalesce(
            (SELECT string_agg(uuid_send(d.id), ''::bytea ORDER BY d.position)
             FROM unnest((p_record).document_ids) WITH ORDINALITY AS d (id, position)), ''::bytea))
        || tenant.audit_field(convert_to((p_record).detail, 'UTF8'))
        || tenant.audit_field((p_record).previous_hash)
    )
$$;

-- Nobody inserts a record that is not the chain's next one: place, time of recording and hashes are written here over whatever was given.
CREATE FUNCTION tenant.chain_audit() RETURNS trigger
LANGUAGE plpgsql SECURITY INVOKER SET search_path = pg_catalog AS $$
DECLARE
    v_last record;
BEGIN
    -- Held until the commit: two writers of one tenant can never both follow the same record.
    PERFORM pg_advisory_xact_lock(hashtextextended('tenant.audit:' || NEW.tenant_id::text, 0));
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

CREATE FUNCTION tenant.index_audit_documents() RETURNS trigger
LANGUAGE plpgsql SECURITY INVOKER SET search_path = pg_catalog AS $$
BEGIN
    INSERT INTO tenant.audit_documents (tenant_id, document_id, sequence)
        SELECT DISTINCT NEW.tenant_id, d.id, NEW.sequence FROM unnest(NEW.document_ids) AS d (id);
    RETURN NULL;
END
$$;

CREATE FUNCTION tenant.refuse_audit_change() RETURNS trigger
LANGUAGE plpgsql SECURITY INVOKER AS $$
BEGIN
    RAISE EXCEPTION '%.% is append-only', TG_TABLE_SCHEMA, TG_TABLE_NAME USING ERRCODE = 'restrict_violation';
END
$$;

-- What was there before is chained in the order it was written, over all tenants: for these statements alone the owner sees them all.
ALTER TABLE tenant.audit NO FORCE ROW LEVEL SECURITY;
UPDATE tenant.audit a SET sequence = n.sequence, record_time = a.occur_time
    FROM (SELECT tenant_id, audit_id, row_number() OVER (PARTITION BY tenant_id ORDER BY audit_id) AS sequence FROM tenant.audit) n
    WHERE a.tenant_id = n.tenant_id AND a.audit_id = n.audit_id;
ALTER TABLE tenant.audit
    ALTER COLUMN sequence SET NOT NULL,
    ALTER COLUMN record_time SET NOT NULL;
CREATE UNIQUE INDEX audit_chain ON tenant.audit (tenant_id, sequence);
DO $$
DECLARE
    v_record tenant.audit;
    v_tenant_id uuid;
    v_hash bytea;
BEGIN
    FOR v_record IN SELECT a.* FROM tenant.audit a ORDER BY a.tenant_id, a.sequence LOOP
        IF v_tenant_id IS DISTINCT FROM v_record.tenant_id THEN
            v_tenant_id := v_record.tenant_id;
            v_hash := decode(repeat('00', 32), 'hex');
        END IF;
        v_record.previous_hash := v_hash;
        v_hash := tenant.audit_hash(v_record);
        UPDATE tenant.audit a SET previous_hash = v_record.previous_hash, record_hash = v_hash
            WHERE a.tenant_id = v_record.tenant_id AND a.audit_id = v_record.audit_id;
    END LOOP;
END
$$;
ALTER TABLE tenant.audit
    ALTER COLUMN previous_hash SET NOT NULL,
    ALTER COLUMN record_hash SET NOT NULL;
ALTER TABLE tenant.audit FORCE ROW LEVEL SECURITY;

CREATE INDEX audit_newest ON tenant.audit (tenant_id, occur_time DESC, sequence DESC);
CREATE INDEX audit_call ON tenant.audit (tenant_id, call_id) WHERE call_id IS NOT NULL;
CREATE INDEX audit_subject ON tenant.audit (tenant_id, subject, occur_time DESC, sequence DESC);
CREATE INDEX audit_action ON tenant.audit (tenant_id, action, occur_time DESC, sequence DESC);
CREATE INDEX audit_user ON tenant.audit (tenant_id, user_name, occur_time DESC, sequence DESC) WHERE user_name <> '';

CREATE TRIGGER audit_is_chained BEFORE INSERT ON tenant.audit FOR EACH ROW EXECUTE FUNCTION tenant.chain_audit();
CREATE TRIGGER audit_documents_are_found AFTER INSERT ON tenant.audit
    FOR EACH ROW WHEN (NEW.document_ids <> '{}') EXECUTE FUNCTION tenant.index_audit_documents();
CREATE TRIGGER audit_is_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON tenant.audit
    FOR EACH STATEMENT EXECUTE FUNCTION tenant.refuse_audit_change();
CREATE TRIGGER audit_documents_are_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON tenant.audit_documents
    FOR EACH STATEMENT EXECUTE FUNCTION tenant.refuse_audit_change();
-- ALWAYS: a session that calls itself a replica gets past neither.
ALTER TABLE tenant.audit ENABLE ALWAYS TRIGGER audit_is_chained;
ALTER TABLE tenant.audit ENABLE ALWAYS TRIGGER audit_documents_are_found;
ALTER TABLE tenant.audit ENABLE ALWAYS TRIGGER audit_is_append_only;
ALTER TABLE tenant.audit_documents ENABLE ALWAYS TRIGGER audit_documents_are_append_only;

-- In order of tenants: two batches over the same tenants take their chains' locks in the same order.
CREATE OR REPLACE FUNCTION tenant.append_audit(
    p_tenant_ids uuid[], p_actions text[], p_subjects text[], p_targets text[], p_peer_addresses text[], p_counts integer[]
) RETURNS void
LANGUAGE plpgsql SECURITY INVOKER AS $$
DECLARE
    i integer;
BEGIN
    FOR i IN SELECT t.position FROM unnest(p_tenant_ids) WITH ORDINALITY AS t (id, position) ORDER BY t.id, t.position LOOP
        PERFORM set_config('app.tenant_id', p_tenant_ids[i]::text, true);
        INSERT INTO tenant.audit (tenant_id, action, subject, target, peer_address, occurrence_count)
            VALUES (p_tenant_ids[i], p_actions[i], p_subjects[i], p_targets[i], p_peer_addresses[i], p_counts[i]);
    END LOOP;
END
$$;

-- What services saw happen. p_documents holds an array a record, written as text.
CREATE FUNCTION tenant.record_audit(
    p_tenant_ids uuid[], p_audit_ids uuid[], p_occur_times timestamptz[], p_actions text[], p_subjects text[], p_targets text[],
    p_reasons text[], p_peer_addresses text[], p_sources text[], p_users text[], p_call_ids uuid[], p_documents text[], p_details text[]
) RETURNS void
LANGUAGE plpgsql SECURITY INVOKER AS $$
DECLARE
    i integer;
BEGIN
    FOR i IN SELECT t.position FROM unnest(p_tenant_ids) WITH ORDINALITY AS t (id, position) ORDER BY t.id, t.position LOOP
        PERFORM set_config('app.tenant_id', p_tenant_ids[i]::text, true);
        INSERT INTO tenant.audit (
            tenant_id, audit_id, occur_time, action, subject, target, reason, peer_address, source, user_name, call_id, document_ids, detail
        ) VALUES (
            p_tenant_ids[i], p_audit_ids[i], p_occur_times[i], p_actions[i], p_subjects[i], p_targets[i], p_reasons[i], p_peer_addresses[i],
            p_sources[i], p_users[i], p_call_ids[i], p_documents[i]::uuid[], p_details[i]
        );
    END LOOP;
END
$$;

REVOKE EXECUTE ON ALL FUNCTIONS IN SCHEMA tenant FROM PUBLIC;
GRANT EXECUTE ON ALL FUNCTIONS IN SCHEMA tenant TO :service;
