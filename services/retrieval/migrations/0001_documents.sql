-- Documents and their chunks. Postgres is the truth; the Qdrant collection only points at it.

CREATE TABLE documents (
    tenant_id uuid NOT NULL,
    document_id uuid NOT NULL,
    document_key text NOT NULL CHECK (length(document_key) BETWEEN 1 AND 200),
    title text NOT NULL,
    content text NOT NULL,
    content_sha256 bytea NOT NULL CHECK (length(content_sha256) = 32),
    chunk_count integer NOT NULL CHECK (chunk_count > 0),
    -- False while the collection does not hold the points of this content yet.
    indexed boolean NOT NULL DEFAULT false,
    create_time timestamptz NOT NULL DEFAULT now(),
    update_time timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (tenant_id, document_id),
    UNIQUE (tenant_id, document_key)
);

CREATE TABLE chunks (
    tenant_id uuid NOT NULL,
    chunk_id uuid NOT NULL,
    document_id uuid NOT NULL,
    position integer NOT NULL CHECK (position >= 0),
    start_offset integer NOT NULL CHECK (start_offset >= 0),
    end_offset integer NOT NULL,
    content text NOT NULL,
    PRIMARY KEY (tenant_id, chunk_id),
    FOREIGN KEY (tenant_id, document_id) REFERENCES documents (tenant_id, document_id) ON DELETE CASCADE,
    CHECK (end_offset > start_offset)
);
CREATE INDEX chunks_document ON chunks (tenant_id, document_id, position);

-- Removed documents whose points may still be in the collection.
CREATE TABLE removed_documents (
    tenant_id uuid NOT NULL,
    document_id uuid NOT NULL,
    remove_time timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (tenant_id, document_id)
);

CREATE INDEX documents_unindexed ON documents (tenant_id, update_time) WHERE NOT indexed;

ALTER TABLE documents ENABLE ROW LEVEL SECURITY;
ALTER TABLE documents FORCE ROW LEVEL SECURITY;
ALTER TABLE chunks ENABLE ROW LEVEL SECURITY;
ALTER TABLE chunks FORCE ROW LEVEL SECURITY;
ALTER TABLE removed_documents ENABLE ROW LEVEL SECURITY;
ALTER TABLE removed_documents FORCE ROW LEVEL SECURITY;

CREATE POLICY tenant_only ON documents TO :service
    USING (tenant_id = (SELECT current_setting('app.tenant_id')::uuid))
    WITH CHECK (tenant_id = (SELECT current_setting('app.tenant_id')::uuid));
CREATE POLICY tenant_only ON chunks TO :service
    USING (tenant_id = (SELECT current_setting('app.tenant_id')::uuid))
    WITH CHECK (tenant_id = (SELECT current_setting('app.tenant_id')::uuid));
CREATE POLICY tenant_only ON removed_documents TO :service
    USING (tenant_id = (SELECT current_setting('app.tenant_id')::uuid))
    WITH CHECK (tenant_id = (SELECT current_setting('app.tenant_id')::uuid));

-- Deleting a document cascades to its chunks as the tables' owner.
CREATE POLICY owner_cascade ON chunks TO :owner
    USING (tenant_id = (SELECT current_setting('app.tenant_id')::uuid))
    WITH CHECK (tenant_id = (SELECT current_setting('app.tenant_id')::uuid));
CREATE POLICY owner_cascade ON documents TO :owner
    USING (tenant_id = (SELECT current_setting('app.tenant_id')::uuid))
    WITH CHECK (tenant_id = (SELECT current_setting('app.tenant_id')::uuid));

-- The repairing job finds what is owed over all tenants; it reads names and digests, never contents.
CREATE POLICY jobs_find ON documents FOR SELECT TO :jobs USING (true);
CREATE POLICY jobs_find ON removed_documents FOR SELECT TO :jobs USING (true);

GRANT SELECT, INSERT, UPDATE, DELETE ON documents, chunks, removed_documents TO :service;
GRANT SELECT (tenant_id, document_id, content_sha256, indexed, update_time) ON documents TO :jobs;
GRANT SELECT ON removed_documents TO :jobs;

-- What a search needs, in one round trip: the tenant is set and its chunks are read in the same call.
CREATE FUNCTION find_chunks(p_tenant_id uuid, p_chunk_ids uuid[])
RETURNS TABLE (chunk_id uuid, document_id uuid, document_key text, title text, "position" integer, start_offset integer, end_offset integer, content text)
LANGUAGE plpgsql SECURITY INVOKER SET search_path = retrieval, pg_temp AS $$
BEGIN
    PERFORM set_config('app.tenant_id', p_tenant_id::text, true);
    RETURN QUERY
        SELECT c.chunk_id, c.document_id, d.document_key, d.title, c.position, c.start_offset, c.end_offset, c.content
        FROM chunks c
        JOIN documents d ON d.tenant_id = c.tenant_id AND d.document_id = c.document_id
        WHERE c.tenant_id = p_tenant_id AND c.chunk_id = ANY (p_chunk_ids);
END
$$;
REVOKE ALL ON FUNCTION find_chunks(uuid, uuid[]) FROM PUBLIC;
GRANT EXECUTE ON FUNCTION find_chunks(uuid, uuid[]) TO :service;
