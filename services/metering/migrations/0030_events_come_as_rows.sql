-- Recording an event costs less again: nothing here changes what is recorded, counted, marked or told.

-- Declared as what it is made of: a time plus an interval is STABLE, and what says less than its body is called for each row, not written in.
CREATE OR REPLACE FUNCTION micros(p_us bigint) RETURNS timestamptz
LANGUAGE sql STABLE PARALLEL SAFE AS $$ SELECT timestamptz 'epoch' + p_us * interval '1 microsecond' $$;

-- An event as the service tells it, in the order of its fields.
CREATE TYPE event_item AS (
    source text,
    id text,
    event_id uuid,
    digest bytea,
    product text,
    event_type text,
    quantity bigint,
    occurred_us bigint,
    user_name text,
    feature text,
    metadata jsonb
);

-- As in 0028, of rows: one array is gone through where a column each was, and where all names are new one statement writes claims and events.
-- Of its two parts that of the claims is the first to run: a name that is taken ends it before anything else is written.
--
-- The function of columns stays for as long as replicas of the release before call it.
CREATE FUNCTION record_events(p_tenants uuid[], p_first integer[], p_last integer[], p_items event_item[])
RETURNS TABLE (item integer, outcome smallint, event_id uuid, digest bytea)
LANGUAGE plpgsql VOLATILE SECURITY INVOKER
SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off
AS $$
#variable_conflict use_column
DECLARE
    v_tenant uuid;
    v_items metering.event_item[];
    v_erased boolean;
    v_time timestamptz;
    v_claimed integer;
BEGIN
    FOR i IN 1 .. cardinality(p_tenants) LOOP
        v_tenant := p_tenants[i];
        v_items := p_items[p_first[i]:p_last[i]];
        PERFORM set_config('app.tenant_id', v_tenant::text, true);
        PERFORM pg_advisory_xact_lock_shared(metering.tenant_lock(v_tenant));
        v_erased := EXISTS (SELECT FROM metering.erased_tenants e WHERE e.tenant_id = v_tenant);
        v_time := clock_timestamp();
        IF cardinality(v_items) >= 16 THEN
            BEGIN
                WITH items AS MATERIALIZED (
                    SELECT * FROM unnest(v_items)
                ), kept AS (
                    INSERT INTO metering.events (
                        tenant_id, event_id, product, source, id, event_type, quantity, occurred_at, record_time, user_name, feature, metadata)
                    SELECT v_tenant, c.event_id, c.product, c.source, c.id, c.event_type, c.quantity, metering.micros(c.occurred_us), v_time,
                           CASE WHEN v_erased THEN '' ELSE c.user_name END, CASE WHEN v_erased THEN '' ELSE c.feature END,
                           CASE WHEN v_erased THEN NULL ELSE c.metadata END
                    FROM items c
                )
                INSERT INTO metering.event_claims (tenant_id, source, id, digest, event_id, record_time)
                SELECT v_tenant, c.source, c.id, CASE WHEN v_erased THEN '' ELSE c.digest END, c.event_id, v_time FROM items c;
                CONTINUE;
            EXCEPTION WHEN unique_violation THEN
                -- One of them is taken: they are claimed one by one below.
                NULL;
            END;
        END IF;

        INSERT INTO metering.event_claims (tenant_id, source, id, digest, event_id, record_time)
        SELECT v_tenant, c.source, c.id, CASE WHEN v_erased THEN '' ELSE c.digest END, c.event_id, v_time FROM unnest(v_items) c
        ON CONFLICT DO NOTHING;
        GET DIAGNOSTICS v_claimed = ROW_COUNT;
        IF v_claimed = cardinality(v_items) THEN
            -- A statement of its own: one that may look at claims takes hold of all their partitions.
            INSERT INTO metering.events (
                tenant_id, event_id, product, source, id, event_type, quantity, occurred_at, record_time, user_name, feature, metadata)
            SELECT v_tenant, c.event_id, c.product, c.source, c.id, c.event_type, c.quantity, metering.micros(c.occurred_us), v_time,
                   CASE WHEN v_erased THEN '' ELSE c.user_name END, CASE WHEN v_erased THEN '' ELSE c.feature END,
                   CASE WHEN v_erased THEN NULL ELSE c.metadata END
            FROM unnest(v_items) c;
        ELSE
            INSERT INTO metering.events (
                tenant_id, event_id, product, source, id, event_type, quantity, occurred_at, record_time, user_name, feature, metadata)
            SELECT v_tenant, c.event_id, c.product, c.source, c.id, c.event_type, c.quantity, metering.micros(c.occurred_us), v_time,
                   CASE WHEN v_erased THEN '' ELSE c.user_name END, CASE WHEN v_erased THEN '' ELSE c.feature END,
                   CASE WHEN v_erased THEN NULL ELSE c.metadata END
            FROM unnest(v_items) c
            WHERE EXISTS (
                SELECT FROM metering.event_claims k
                WHERE k.tenant_id = v_tenant AND k.source = c.source AND k.id = c.id AND k.event_id = c.event_id);
            RETURN QUERY
            SELECT p_first[i] + c.ordinality::integer - 1, CASE WHEN k.digest IN (c.digest, '') THEN 2 ELSE 3 END::smallint, k.event_id, k.digest
            FROM unnest(v_items) WITH ORDINALITY c
            JOIN metering.event_claims k ON k.tenant_id = v_tenant AND k.source = c.source AND k.id = c.id AND k.event_id <> c.event_id;
        END IF;
    END LOOP;
END
$$;
REVOKE ALL ON FUNCTION record_events (uuid[], integer[], integer[], event_item[]) FROM PUBLIC;
GRANT EXECUTE ON FUNCTION record_events (uuid[], integer[], integer[], event_item[]) TO :service;

-- Sums are made in the order in which they come, and not of all the rows sorted by their names.
ALTER FUNCTION count_recorded_events() SET enable_sort = off;
