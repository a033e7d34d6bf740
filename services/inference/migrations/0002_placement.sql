-- The wall between a tenant's places: who does not live here is neither read nor written here, whatever a caller remembers.

-- Tenants that live elsewhere (AWAY), or are being copied elsewhere and still live here (MOVING). Who lives here has no row.
-- Named for the service: in a bridge the tables of two services share one schema.
CREATE TABLE inference.inference_placed_tenants (
    tenant_id uuid PRIMARY KEY,
    kind text NOT NULL CHECK (kind IN ('pool', 'bridge', 'silo')),
    state text NOT NULL CHECK (state IN ('MOVING', 'AWAY')),
    update_time timestamptz NOT NULL DEFAULT clock_timestamp()
);
ALTER TABLE inference.inference_placed_tenants ENABLE ROW LEVEL SECURITY;
ALTER TABLE inference.inference_placed_tenants FORCE ROW LEVEL SECURITY;
CREATE POLICY tenant_only ON inference.inference_placed_tenants TO :service
    USING (tenant_id = (SELECT current_setting('app.tenant_id')::uuid))
    WITH CHECK (tenant_id = (SELECT current_setting('app.tenant_id')::uuid));
GRANT SELECT, INSERT, UPDATE, DELETE ON inference.inference_placed_tenants TO :service;

-- Raises TM001 when the tenant lives elsewhere. The lock is held until the transaction ends: a move waits for whoever is at work here
-- and nobody gets to work while it ends. Every transaction begins with this, and so does every function that is a transaction of its own.
-- The lock's name contains the place's, so that a move within one database does not wait for itself.
CREATE FUNCTION inference.inference_assert_here(p_tenant_id uuid) RETURNS void
LANGUAGE plpgsql SECURITY INVOKER AS $$
BEGIN
    PERFORM pg_advisory_xact_lock_shared(hashtextextended('inference.inference_placed_tenants:' || p_tenant_id::text, 0));
    IF EXISTS (SELECT FROM inference.inference_placed_tenants p WHERE p.tenant_id = p_tenant_id AND p.state = 'AWAY') THEN
        RAISE EXCEPTION 'the tenant lives elsewhere' USING ERRCODE = 'TM001';
    END IF;
END
$$;
REVOKE ALL ON FUNCTION inference.inference_assert_here(uuid) FROM PUBLIC;
GRANT EXECUTE ON FUNCTION inference.inference_assert_here(uuid) TO :service;

-- As in 0001, behind the wall.
CREATE OR REPLACE FUNCTION inference.recall(p_tenant_id uuid, p_conversation_id text, p_history_bytes integer)
RETURNS TABLE (prompt_version integer, prompt_text text, conversation_known boolean, roles text[], texts text[])
LANGUAGE plpgsql SECURITY INVOKER SET search_path = inference, pg_temp AS $$
BEGIN
    PERFORM set_config('app.tenant_id', p_tenant_id::text, true);
    PERFORM inference.inference_assert_here(p_tenant_id);
    SELECT p.version, p.text INTO prompt_version, prompt_text
        FROM prompts p WHERE p.tenant_id = p_tenant_id ORDER BY p.version DESC LIMIT 1;
    conversation_known := true;
    roles := '{}';
    texts := '{}';
    IF p_conversation_id <> '' THEN
        conversation_known := EXISTS (SELECT 1 FROM conversations c WHERE c.tenant_id = p_tenant_id AND c.conversation_id = p_conversation_id);
        SELECT coalesce(array_agg(k.role ORDER BY k.sequence), '{}'), coalesce(array_agg(k.text ORDER BY k.sequence), '{}') INTO roles, texts
        FROM (
            SELECT n.sequence, n.role, n.text, sum(octet_length(n.text)) OVER (ORDER BY n.sequence DESC) AS bytes
            FROM (
                SELECT t.sequence, t.role, t.text FROM turns t
                WHERE t.tenant_id = p_tenant_id AND t.conversation_id = p_conversation_id
                ORDER BY t.sequence DESC LIMIT 200
            ) n
        ) k
        WHERE k.bytes <= p_history_bytes;
    END IF;
    RETURN NEXT;
END
$$;

CREATE OR REPLACE FUNCTION inference.remember(p_tenant_id uuid, p_conversation_id text, p_call_id uuid, p_roles text[], p_texts text[])
RETURNS boolean
LANGUAGE plpgsql SECURITY INVOKER SET search_path = inference, pg_temp AS $$
DECLARE
    v_last integer;
BEGIN
    PERFORM set_config('app.tenant_id', p_tenant_id::text, true);
    PERFORM inference.inference_assert_here(p_tenant_id);
    PERFORM 1 FROM conversations c WHERE c.tenant_id = p_tenant_id AND c.conversation_id = p_conversation_id FOR UPDATE;
    IF NOT FOUND THEN
        RETURN false;
    END IF;
    IF EXISTS (SELECT 1 FROM turns t WHERE t.tenant_id = p_tenant_id AND t.conversation_id = p_conversation_id AND t.call_id = p_call_id) THEN
        RETURN true;
    END IF;
    SELECT coalesce(max(t.sequence), 0) INTO v_last FROM turns t WHERE t.tenant_id = p_tenant_id AND t.conversation_id = p_conversation_id;
    INSERT INTO turns (tenant_id, conversation_id, sequence, role, text, call_id)
        SELECT p_tenant_id, p_conversation_id, v_last + n.position, n.role, n.text, p_call_id
        FROM unnest(p_roles, p_texts) WITH ORDINALITY AS n(role, text, position);
    RETURN true;
END
$$;

CREATE OR REPLACE FUNCTION inference.put_prompt(p_tenant_id uuid, p_text text, p_only_first boolean)
RETURNS TABLE (version integer, text text, create_time timestamptz)
LANGUAGE plpgsql SECURITY INVOKER SET search_path = inference, pg_temp AS $$
DECLARE
    v_newest prompts%ROWTYPE;
BEGIN
    PERFORM set_config('app.tenant_id', p_tenant_id::text, true);
    PERFORM inference.inference_assert_here(p_tenant_id);
    -- Two writers of one tenant take turns; a serial version has no row to lock before the first.
    PERFORM pg_advisory_xact_lock(hashtextextended('inference.prompts:' || p_tenant_id::text, 0));
    SELECT p.* INTO v_newest FROM prompts p WHERE p.tenant_id = p_tenant_id ORDER BY p.version DESC LIMIT 1;
    IF v_newest.version IS NULL OR (NOT p_only_first AND v_newest.text <> p_text) THEN
        INSERT INTO prompts AS p (tenant_id, version, text)
            VALUES (p_tenant_id, coalesce(v_newest.version, 0) + 1, p_text)
            RETURNING p.* INTO v_newest;
    END IF;
    RETURN QUERY SELECT v_newest.version, v_newest.text, v_newest.create_time;
END
$$;
