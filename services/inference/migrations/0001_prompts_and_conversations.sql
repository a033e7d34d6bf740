-- Prompts by version, conversations and their turns. Every key leads with the tenant; the service's role owns nothing.

CREATE TABLE inference.prompts (
    tenant_id uuid NOT NULL,
    version integer NOT NULL CHECK (version >= 1),
    text text NOT NULL CHECK (octet_length(text) BETWEEN 1 AND 20000),
    create_time timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (tenant_id, version)
);

CREATE TABLE inference.conversations (
    tenant_id uuid NOT NULL,
    conversation_id text NOT NULL CHECK (conversation_id ~ '^[0-9a-f]{64}$'),
    user_name text NOT NULL,
    create_time timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (tenant_id, conversation_id)
);

CREATE TABLE inference.turns (
    tenant_id uuid NOT NULL,
    conversation_id text NOT NULL,
    sequence integer NOT NULL CHECK (sequence >= 1),
    role text NOT NULL CHECK (role IN ('user', 'assistant')),
    text text NOT NULL,
    call_id uuid NOT NULL,
    create_time timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (tenant_id, conversation_id, sequence),
    FOREIGN KEY (tenant_id, conversation_id) REFERENCES inference.conversations (tenant_id, conversation_id) ON DELETE CASCADE
);

CREATE INDEX turns_call ON inference.turns (tenant_id, conversation_id, call_id);

ALTER TABLE inference.prompts ENABLE ROW LEVEL SECURITY;
ALTER TABLE inference.prompts FORCE ROW LEVEL SECURITY;
CREATE POLICY prompts_of_tenant ON inference.prompts TO :service
    USING (tenant_id = (SELECT current_setting('app.tenant_id')::uuid))
    WITH CHECK (tenant_id = (SELECT current_setting('app.tenant_id')::uuid));

ALTER TABLE inference.conversations ENABLE ROW LEVEL SECURITY;
ALTER TABLE inference.conversations FORCE ROW LEVEL SECURITY;
CREATE POLICY conversations_of_tenant ON inference.conversations TO :service
    USING (tenant_id = (SELECT current_setting('app.tenant_id')::uuid))
    WITH CHECK (tenant_id = (SELECT current_setting('app.tenant_id')::uuid));

ALTER TABLE inference.turns ENABLE ROW LEVEL SECURITY;
ALTER TABLE inference.turns FORCE ROW LEVEL SECURITY;
CREATE POLICY turns_of_tenant ON inference.turns TO :service
    USING (tenant_id = (SELECT current_setting('app.tenant_id')::uuid))
    WITH CHECK (tenant_id = (SELECT current_setting('app.tenant_id')::uuid));

GRANT SELECT, INSERT, DELETE ON inference.prompts TO :service;
GRANT SELECT, INSERT, DELETE ON inference.turns TO :service;
-- UPDATE only for the row lock that orders a conversation's writers.
GRANT SELECT, INSERT, DELETE, UPDATE ON inference.conversations TO :service;

-- The newest prompt and the last turns of a conversation, newest turn last, no more text than p_history_bytes.
-- One row always; conversation_known is false when the conversation was named and is not this tenant's.
CREATE FUNCTION inference.recall(p_tenant_id uuid, p_conversation_id text, p_history_bytes integer)
RETURNS TABLE (prompt_version integer, prompt_text text, conversation_known boolean, roles text[], texts text[])
LANGUAGE plpgsql SECURITY INVOKER SET search_path = inference, pg_temp AS $$
BEGIN
    PERFORM set_config('app.tenant_id', p_tenant_id::text, true);
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

-- Adds a call's turns; false when the conversation is gone. Repeatable: a call's turns are added once.
CREATE FUNCTION inference.remember(p_tenant_id uuid, p_conversation_id text, p_call_id uuid, p_roles text[], p_texts text[])
RETURNS boolean
LANGUAGE plpgsql SECURITY INVOKER SET search_path = inference, pg_temp AS $$
DECLARE
    v_last integer;
BEGIN
    PERFORM set_config('app.tenant_id', p_tenant_id::text, true);
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

-- Stores a prompt unless it equals the newest, or, with p_only_first, unless there is one; returns the newest.
CREATE FUNCTION inference.put_prompt(p_tenant_id uuid, p_text text, p_only_first boolean)
RETURNS TABLE (version integer, text text, create_time timestamptz)
LANGUAGE plpgsql SECURITY INVOKER SET search_path = inference, pg_temp AS $$
DECLARE
    v_newest prompts%ROWTYPE;
BEGIN
    PERFORM set_config('app.tenant_id', p_tenant_id::text, true);
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

REVOKE ALL ON FUNCTION inference.recall(uuid, text, integer) FROM PUBLIC;
REVOKE ALL ON FUNCTION inference.remember(uuid, text, uuid, text[], text[]) FROM PUBLIC;
REVOKE ALL ON FUNCTION inference.put_prompt(uuid, text, boolean) FROM PUBLIC;
GRANT EXECUTE ON FUNCTION inference.recall(uuid, text, integer) TO :service;
GRANT EXECUTE ON FUNCTION inference.remember(uuid, text, uuid, text[], text[]) TO :service;
GRANT EXECUTE ON FUNCTION inference.put_prompt(uuid, text, boolean) TO :service;
