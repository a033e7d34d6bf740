-- Turns and names of users, sealed under the tenant's data key where its context says so. A row is either plain or sealed; which of the
-- two is read from the row alone. `text_bytes` is the size of a sealed turn's plaintext: the history's bound counts what is sent.

ALTER TABLE inference.turns
    ADD COLUMN call_position integer,
    ADD COLUMN sealed_text bytea,
    ADD COLUMN text_bytes integer,
    ADD COLUMN key_version integer,
    ADD CONSTRAINT turns_sealed_or_plain CHECK (
        CASE WHEN sealed_text IS NULL THEN key_version IS NULL
        ELSE text = '' AND key_version >= 1 AND text_bytes >= 0 AND call_position >= 1 END
    );
ALTER TABLE inference.conversations
    ADD COLUMN sealed_user_name bytea,
    ADD COLUMN key_version integer,
    ADD CONSTRAINT conversations_sealed_or_plain CHECK (
        CASE WHEN sealed_user_name IS NULL THEN key_version IS NULL ELSE user_name = '' AND key_version >= 1 END
    );
CREATE INDEX turns_key_version ON inference.turns (tenant_id, key_version) WHERE key_version IS NOT NULL;
CREATE INDEX conversations_key_version ON inference.conversations (tenant_id, key_version) WHERE key_version IS NOT NULL;

-- The least key version that may still be written. It only ever rises, when a rotation begins here.
CREATE TABLE inference.sealing (
    tenant_id uuid PRIMARY KEY,
    least_version integer NOT NULL CHECK (least_version >= 1)
);
ALTER TABLE inference.sealing ENABLE ROW LEVEL SECURITY;
ALTER TABLE inference.sealing FORCE ROW LEVEL SECURITY;
CREATE POLICY sealing_of_tenant ON inference.sealing TO :service
    USING (tenant_id = (SELECT current_setting('app.tenant_id')::uuid))
    WITH CHECK (tenant_id = (SELECT current_setting('app.tenant_id')::uuid));
GRANT SELECT, INSERT, UPDATE, DELETE ON inference.sealing TO :service;
GRANT UPDATE (sealed_text, key_version) ON inference.turns TO :service;

-- Called in the transaction that writes a sealed value, after the tenant is set. A writer that passed is committed before a rotation
-- looks for what is left; one that comes after it is refused an older key, and fetches the new one.
CREATE FUNCTION inference.require_key_version(p_tenant_id uuid, p_version integer) RETURNS void
LANGUAGE plpgsql SECURITY INVOKER SET search_path = inference, pg_temp AS $$
BEGIN
    PERFORM pg_advisory_xact_lock_shared(hashtextextended('inference.sealing:' || p_tenant_id::text, 0));
    IF p_version < coalesce((SELECT s.least_version FROM sealing s WHERE s.tenant_id = p_tenant_id), 0) THEN
        RAISE EXCEPTION 'the data key was rotated' USING ERRCODE = 'TK001';
    END IF;
END
$$;

CREATE FUNCTION inference.begin_key_version(p_tenant_id uuid, p_version integer) RETURNS integer
LANGUAGE plpgsql SECURITY INVOKER SET search_path = inference, pg_temp AS $$
DECLARE
    v_least integer;
BEGIN
    PERFORM set_config('app.tenant_id', p_tenant_id::text, true);
    PERFORM pg_advisory_xact_lock(hashtextextended('inference.sealing:' || p_tenant_id::text, 0));
    INSERT INTO sealing AS s (tenant_id, least_version) VALUES (p_tenant_id, p_version)
        ON CONFLICT (tenant_id) DO UPDATE SET least_version = greatest(s.least_version, excluded.least_version)
        RETURNING s.least_version INTO v_least;
    RETURN v_least;
END
$$;

DROP FUNCTION inference.recall(uuid, text, integer);
-- The newest prompt and the last turns of a conversation, newest turn last, no more plaintext than p_history_bytes.
-- One row always; conversation_known is false when the conversation was named and is not this tenant's.
CREATE FUNCTION inference.recall(p_tenant_id uuid, p_conversation_id text, p_history_bytes integer)
RETURNS TABLE (
    prompt_version integer, prompt_text text, conversation_known boolean, roles text[], texts text[], sealed_texts bytea[], call_ids uuid[],
    call_positions integer[]
)
LANGUAGE plpgsql SECURITY INVOKER SET search_path = inference, pg_temp AS $$
BEGIN
    PERFORM set_config('app.tenant_id', p_tenant_id::text, true);
    SELECT p.version, p.text INTO prompt_version, prompt_text
        FROM prompts p WHERE p.tenant_id = p_tenant_id ORDER BY p.version DESC LIMIT 1;
    conversation_known := true;
    roles := '{}';
    texts := '{}';
    sealed_texts := '{}';
    call_ids := '{}';
    call_positions := '{}';
    IF p_conversation_id <> '' THEN
        conversation_known := EXISTS (SELECT 1 FROM conversations c WHERE c.tenant_id = p_tenant_id AND c.conversation_id = p_conversation_id);
        SELECT coalesce(array_agg(k.role ORDER BY k.sequence), '{}'), coalesce(array_agg(k.text ORDER BY k.sequence), '{}'),
               coalesce(array_agg(k.sealed_text ORDER BY k.sequence), '{}'), coalesce(array_agg(k.call_id ORDER BY k.sequence), '{}'),
               coalesce(array_agg(k.call_position ORDER BY k.sequence), '{}')
        INTO roles, texts, sealed_texts, call_ids, call_positions
        FROM (
            SELECT n.*, sum(coalesce(n.text_bytes, octet_length(n.text))) OVER (ORDER BY n.sequence DESC) AS bytes
            FROM (
                SELECT t.sequence, t.role, t.text, t.sealed_text, t.text_bytes, t.call_id, t.call_position FROM turns t
                WHERE t.tenant_id = p_tenant_id AND t.conversation_id = p_conversation_id
                ORDER BY t.sequence DESC LIMIT 200
            ) n
        ) k
        WHERE k.bytes <= p_history_bytes;
    END IF;
    RETURN NEXT;
END
$$;

DROP FUNCTION inference.remember(uuid, text, uuid, text[], text[]);
-- Adds a call's turns; false when the conversation is gone. Repeatable: a call's turns are added once. Sealed when p_key_version is given:
-- p_sealed_texts and p_text_bytes then stand for the texts, which are empty.
CREATE FUNCTION inference.remember(
    p_tenant_id uuid, p_conversation_id text, p_call_id uuid, p_roles text[], p_texts text[], p_sealed_texts bytea[], p_text_bytes integer[],
    p_key_version integer
)
RETURNS boolean
LANGUAGE plpgsql SECURITY INVOKER SET search_path = inference, pg_temp AS $$
DECLARE
    v_last integer;
BEGIN
    PERFORM set_config('app.tenant_id', p_tenant_id::text, true);
    IF p_key_version IS NOT NULL THEN
        PERFORM require_key_version(p_tenant_id, p_key_version);
    END IF;
    PERFORM 1 FROM conversations c WHERE c.tenant_id = p_tenant_id AND c.conversation_id = p_conversation_id FOR UPDATE;
    IF NOT FOUND THEN
        RETURN false;
    END IF;
    IF EXISTS (SELECT 1 FROM turns t WHERE t.tenant_id = p_tenant_id AND t.conversation_id = p_conversation_id AND t.call_id = p_call_id) THEN
        RETURN true;
    END IF;
    SELECT coalesce(max(t.sequence), 0) INTO v_last FROM turns t WHERE t.tenant_id = p_tenant_id AND t.conversation_id = p_conversation_id;
    INSERT INTO turns (tenant_id, conversation_id, sequence, role, text, call_id, call_position, sealed_text, text_bytes, key_version)
        SELECT p_tenant_id, p_conversation_id, v_last + n.position, n.role, n.text, p_call_id, n.position, n.sealed_text, n.text_bytes,
               p_key_version
        FROM unnest(p_roles, p_texts, p_sealed_texts, p_text_bytes) WITH ORDINALITY AS n(role, text, sealed_text, text_bytes, position);
    RETURN true;
END
$$;

REVOKE ALL ON FUNCTION inference.require_key_version(uuid, integer) FROM PUBLIC;
REVOKE ALL ON FUNCTION inference.begin_key_version(uuid, integer) FROM PUBLIC;
REVOKE ALL ON FUNCTION inference.recall(uuid, text, integer) FROM PUBLIC;
REVOKE ALL ON FUNCTION inference.remember(uuid, text, uuid, text[], text[], bytea[], integer[], integer) FROM PUBLIC;
GRANT EXECUTE ON FUNCTION inference.require_key_version(uuid, integer) TO :service;
GRANT EXECUTE ON FUNCTION inference.begin_key_version(uuid, integer) TO :service;
GRANT EXECUTE ON FUNCTION inference.recall(uuid, text, integer) TO :service;
GRANT EXECUTE ON FUNCTION inference.remember(uuid, text, uuid, text[], text[], bytea[], integer[], integer) TO :service;
