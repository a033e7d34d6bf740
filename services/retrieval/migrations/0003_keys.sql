-- Titles, texts and chunks, sealed under the tenant's data key where its context says so. A row is either plain or sealed; which of the
-- two is read from the row alone. `sealed_header` is the content's SHA-256 and the title. In a sealed row content_sha256 is a digest
-- keyed with the data key: who has no key cannot try texts against it, nor against the ids of chunks made from it.

ALTER TABLE documents
    ADD COLUMN sealed_header bytea,
    ADD COLUMN sealed_content bytea,
    ADD COLUMN key_version integer,
    ADD CONSTRAINT documents_sealed_or_plain CHECK (
        CASE WHEN key_version IS NULL THEN sealed_header IS NULL AND sealed_content IS NULL
        ELSE key_version >= 1 AND sealed_header IS NOT NULL AND sealed_content IS NOT NULL AND title = '' AND content = '' END
    );
ALTER TABLE chunks
    ADD COLUMN sealed_content bytea,
    ADD COLUMN key_version integer,
    ADD CONSTRAINT chunks_sealed_or_plain CHECK (
        CASE WHEN key_version IS NULL THEN sealed_content IS NULL ELSE key_version >= 1 AND sealed_content IS NOT NULL AND content = '' END
    );
CREATE INDEX documents_key_version ON documents (tenant_id, key_version) WHERE key_version IS NOT NULL;
CREATE INDEX chunks_key_version ON chunks (tenant_id, key_version) WHERE key_version IS NOT NULL;

-- The least key version that may still be written. It only ever rises, when a rotation begins here.
CREATE TABLE sealing (
    tenant_id uuid PRIMARY KEY,
    least_version integer NOT NULL CHECK (least_version >= 1)
);
ALTER TABLE sealing ENABLE ROW LEVEL SECURITY;
ALTER TABLE sealing FORCE ROW LEVEL SECURITY;
CREATE POLICY tenant_only ON sealing TO :service
    USING (tenant_id = (SELECT current_setting('app.tenant_id')::uuid))
    WITH CHECK (tenant_id = (SELECT current_setting('app.tenant_id')::uuid));
GRANT SELECT, INSERT, UPDATE, DELETE ON sealing TO :service;

-- Called in the transaction that writes a sealed value, after the tenant is set. A writer that passed is committed before a rotation
-- looks for what is left; one that comes after it is refused an older key, and fetches the new one.
CREATE FUNCTION require_key_version(p_tenant_id uuid, p_version integer) RETURNS void
LANGUAGE plpgsql SECURITY INVOKER SET search_path = retrieval, pg_temp AS $$
BEGIN
    PERFORM pg_advisory_xact_lock_shared(hashtextextended('retrieval.sealing:' || p_tenant_id::text, 0));
    IF p_version < coalesce((SELECT s.least_version FROM sealing s WHERE s.tenant_id = p_tenant_id), 0) THEN
        RAISE EXCEPTION 'the data key was rotated' USING ERRCODE = 'TK001';
    END IF;
END
$$;

CREATE FUNCTION begin_key_version(p_tenant_id uuid, p_version integer) RETURNS integer
LANGUAGE plpgsql SECURITY INVOKER SET search_path = retrieval, pg_temp AS $$
DECLARE
    v_least integer;
BEGIN
    PERFORM set_config('app.tenant_id', p_tenant_id::text, true);
    PERFORM pg_advisory_xact_lock(hashtextextended('retrieval.sealing:' || p_tenant_id::text, 0));
    INSERT INTO sealing AS s (tenant_id, least_version) VALUES (p_tenant_id, p_version)
        ON CONFLICT (tenant_id) DO UPDATE SET least_version = greatest(s.least_version, excluded.least_version)
        RETURNING s.least_version INTO v_least;
    RETURN v_least;
END
$$;

DROP FUNCTION find_chunks(uuid, uuid[]);
-- What a search needs, in one round trip: the tenant is set and the first p_limit of its current chunks are read, in the order of the ids.
CREATE FUNCTION find_chunks(p_tenant_id uuid, p_chunk_ids uuid[], p_limit integer)
RETURNS TABLE (
    chunk_id uuid, document_id uuid, document_key text, title text, "position" integer, start_offset integer, end_offset integer,
    content text, sealed_header bytea, sealed_content bytea
)
LANGUAGE plpgsql SECURITY INVOKER SET search_path = retrieval, pg_temp AS $$
BEGIN
    PERFORM set_config('app.tenant_id', p_tenant_id::text, true);
    RETURN QUERY
        SELECT c.chunk_id, c.document_id, d.document_key, d.title, c.position, c.start_offset, c.end_offset, c.content,
               d.sealed_header, c.sealed_content
        FROM chunks c
        JOIN documents d ON d.tenant_id = c.tenant_id AND d.document_id = c.document_id
        WHERE c.tenant_id = p_tenant_id AND c.chunk_id = ANY (p_chunk_ids)
        ORDER BY array_position(p_chunk_ids, c.chunk_id) LIMIT p_limit;
END
$$;
REVOKE ALL ON FUNCTION require_key_version(uuid, integer) FROM PUBLIC;
REVOKE ALL ON FUNCTION begin_key_version(uuid, integer) FROM PUBLIC;
REVOKE ALL ON FUNCTION find_chunks(uuid, uuid[], integer) FROM PUBLIC;
GRANT EXECUTE ON FUNCTION require_key_version(uuid, integer) TO :service;
GRANT EXECUTE ON FUNCTION begin_key_version(uuid, integer) TO :service;
GRANT EXECUTE ON FUNCTION find_chunks(uuid, uuid[], integer) TO :service;
