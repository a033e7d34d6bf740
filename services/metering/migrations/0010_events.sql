-- Events of the product: what a tenant used, recorded once for ever. Batches are passed, locked and ordered as in 0003.

-- Types are shared reference data, no tenant: an operator registers them, by the jobs role, and nobody changes one.
-- Aggregations are the contract's: 1 sum, 2 count, 3 max.
CREATE TABLE event_types (
    product text NOT NULL CHECK (product ~ '^[a-z][a-z0-9_]{0,62}$'),
    event_type text NOT NULL CHECK (event_type ~ '^[a-z][a-z0-9_.]{0,99}$'),
    unit text NOT NULL CHECK (unit ~ '^[a-z][a-z0-9_]{0,62}$'),
    aggregation smallint NOT NULL CHECK (aggregation BETWEEN 1 AND 3),
    create_time timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (product, event_type)
);
CREATE TRIGGER event_types_are_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON event_types
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_change();
GRANT SELECT ON event_types TO :service;
GRANT SELECT, INSERT ON event_types TO :jobs;

-- One row an event, and one for its reversal: the same quantity, negative, with the time of use of the event and a record time of its own.
-- No index but the key: it rises with time, so every row goes to the right edge of its tenant's part. Whoever sums a period of use reads from
-- a day before it on, because nothing is recorded more than a day before it happens.
CREATE TABLE events (
    tenant_id uuid NOT NULL,
    event_id uuid NOT NULL,
    product text NOT NULL,
    source text NOT NULL,
    id text NOT NULL,
    event_type text NOT NULL,
    quantity bigint NOT NULL,
    occurred_at timestamptz NOT NULL,
    record_time timestamptz NOT NULL,
    user_name text NOT NULL,
    feature text NOT NULL,
    reverses uuid,
    metadata jsonb,
    PRIMARY KEY (tenant_id, record_time, event_id),
    CONSTRAINT only_reversals_go_down CHECK (CASE WHEN reverses IS NULL THEN quantity > 0 ELSE quantity < 0 END)
) PARTITION BY RANGE (record_time);

-- Which ids are taken, for ever: a unique key on `events` would have to hold the time, and would then let an id in again with another one.
-- The digest says what was recorded. It is empty for a reversal, whose source is empty and whose id is the event's: so an event is taken back
-- once. It is empty, too, for an erased tenant, because names could be guessed from it.
CREATE TABLE event_claims (
    tenant_id uuid NOT NULL,
    source text COLLATE "C" NOT NULL,
    id text COLLATE "C" NOT NULL,
    digest bytea NOT NULL CHECK (octet_length(digest) IN (0, 32)),
    event_id uuid NOT NULL,
    record_time timestamptz NOT NULL,
    PRIMARY KEY (tenant_id, source, id)
) PARTITION BY HASH (tenant_id);

ALTER TABLE events ENABLE ROW LEVEL SECURITY;
ALTER TABLE events FORCE ROW LEVEL SECURITY;
ALTER TABLE event_claims ENABLE ROW LEVEL SECURITY;
ALTER TABLE event_claims FORCE ROW LEVEL SECURITY;
CREATE POLICY own_tenant ON events TO :service
    USING (tenant_id = (SELECT current_setting('app.tenant_id')::uuid)) WITH CHECK (tenant_id = (SELECT current_setting('app.tenant_id')::uuid));
CREATE POLICY own_tenant ON event_claims TO :service
    USING (tenant_id = (SELECT current_setting('app.tenant_id')::uuid)) WITH CHECK (tenant_id = (SELECT current_setting('app.tenant_id')::uuid));
CREATE POLICY every_tenant_read ON events FOR SELECT TO :jobs USING (true);
GRANT SELECT, INSERT, UPDATE (user_name, feature, metadata) ON events TO :service;
GRANT SELECT, INSERT, UPDATE (digest) ON event_claims TO :service;
GRANT SELECT ON events TO :jobs;

-- Rows and not statements are watched: a trigger of a row is there in every partition, under its own name too.
CREATE FUNCTION only_forget() RETURNS trigger
LANGUAGE plpgsql SECURITY INVOKER SET search_path = metering, pg_temp AS $$
DECLARE
    v_old jsonb := to_jsonb(OLD) - ARRAY ['user_name', 'feature', 'metadata', 'digest'];
BEGIN
    IF TG_OP = 'UPDATE' AND to_jsonb(NEW) - ARRAY ['user_name', 'feature', 'metadata', 'digest'] = v_old
       AND EXISTS (SELECT FROM metering.erased_tenants e WHERE e.tenant_id = OLD.tenant_id)
       AND coalesce(to_jsonb(NEW) ->> 'user_name', '') = '' AND coalesce(to_jsonb(NEW) ->> 'feature', '') = ''
       AND coalesce(to_jsonb(NEW) ->> 'digest', '\x') = '\x' THEN
        RETURN NEW;
    END IF;
    RAISE EXCEPTION '%.% is append-only: write a new row instead', TG_TABLE_SCHEMA, TG_TABLE_NAME USING ERRCODE = 'restrict_violation';
END
$$;
CREATE TRIGGER events_only_forget BEFORE UPDATE OR DELETE ON events FOR EACH ROW EXECUTE FUNCTION only_forget();
CREATE TRIGGER event_claims_only_forget BEFORE UPDATE OR DELETE ON event_claims FOR EACH ROW EXECUTE FUNCTION only_forget();
CREATE TRIGGER events_are_not_emptied BEFORE TRUNCATE ON events FOR EACH STATEMENT EXECUTE FUNCTION refuse_change();
CREATE TRIGGER event_claims_are_not_emptied BEFORE TRUNCATE ON event_claims FOR EACH STATEMENT EXECUTE FUNCTION refuse_change();

-- A partition's own walls: whoever names it gets no further than by the table.
CREATE FUNCTION wall_partition(p_partition text) RETURNS void
LANGUAGE plpgsql SECURITY INVOKER AS $$
BEGIN
    EXECUTE format('ALTER TABLE metering.%I ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY', p_partition);
    EXECUTE format($policy$CREATE POLICY own_tenant ON metering.%I TO :service
        USING (tenant_id = (SELECT current_setting('app.tenant_id')::uuid))
        WITH CHECK (tenant_id = (SELECT current_setting('app.tenant_id')::uuid))$policy$, p_partition);
    EXECUTE format('CREATE TRIGGER %I BEFORE TRUNCATE ON metering.%I FOR EACH STATEMENT EXECUTE FUNCTION metering.refuse_change()',
                   p_partition || '_is_not_emptied', p_partition);
END
$$;

DO $$
BEGIN
    FOR i IN 0 .. 15 LOOP
        EXECUTE format('CREATE TABLE metering.event_claims_%s PARTITION OF metering.event_claims FOR VALUES WITH (MODULUS 16, REMAINDER %s)', i, i);
        PERFORM metering.wall_partition('event_claims_' || i);
    END LOOP;
END
$$;

-- Makes the partition of a UTC month, unless it is there; tells whether it did. Attached rather than made in its place: that waits for nobody
-- who writes, and nobody who writes waits for it.
CREATE FUNCTION make_event_month(p_month date) RETURNS boolean
LANGUAGE plpgsql SECURITY INVOKER AS $$
DECLARE
    v_first date := date_trunc('month', p_month::timestamp)::date;
    v_next date := (date_trunc('month', p_month::timestamp) + interval '1 month')::date;
    v_name text := 'events_' || to_char(v_first, 'YYYY_MM');
BEGIN
    PERFORM pg_advisory_xact_lock(hashtextextended('event_months', 7405));
    IF to_regclass('metering.' || v_name) IS NOT NULL THEN
        RETURN false;
    END IF;
    EXECUTE format('CREATE TABLE metering.%I (LIKE metering.events INCLUDING ALL)', v_name);
    PERFORM metering.wall_partition(v_name);
    EXECUTE format('ALTER TABLE metering.events ATTACH PARTITION metering.%I FOR VALUES FROM (%L) TO (%L)',
                   v_name, v_first || ' 00:00:00+00', v_next || ' 00:00:00+00');
    RETURN true;
END
$$;

-- Removes the partition of a UTC month, if it is there. Whether it may go is `event_months_to_drop`'s to say.
CREATE FUNCTION drop_event_month(p_month date) RETURNS void
LANGUAGE plpgsql SECURITY INVOKER AS $$
BEGIN
    PERFORM pg_advisory_xact_lock(hashtextextended('event_months', 7405));
    EXECUTE format('DROP TABLE IF EXISTS metering.%I', 'events_' || to_char(p_month, 'YYYY_MM'));
END
$$;

-- Until when all use of a tenant is on closed invoices. No invoice is closed yet, so no month is ever dropped: closing invoices replaces this.
CREATE FUNCTION closed_until(p_tenant uuid) RETURNS timestamptz
LANGUAGE sql STABLE SECURITY INVOKER AS $$ SELECT timestamptz '-infinity' $$;

-- The months that ended by `p_end` and whose every tenant has closed them: no event in one can be on an invoice to come, as none is recorded
-- more than a day before it happens. Asked as the jobs role: the owner sees no rows, and would find every month empty.
CREATE FUNCTION event_months_to_drop(p_end timestamptz) RETURNS TABLE (month date)
LANGUAGE plpgsql STABLE SECURITY INVOKER AS $$
#variable_conflict use_column
DECLARE
    v_month date;
    v_start timestamptz;
    v_stop timestamptz;
BEGIN
    FOR v_month IN
        SELECT to_date(c.relname, '"events_"YYYY_MM') FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid
        WHERE i.inhparent = 'metering.events'::regclass ORDER BY 1
    LOOP
        v_start := v_month::timestamp AT TIME ZONE 'UTC';
        v_stop := (v_month::timestamp + interval '1 month') AT TIME ZONE 'UTC';
        EXIT WHEN v_stop > p_end;
        -- From tenant to tenant along the key: as many rows as there are tenants.
        RETURN QUERY
        WITH RECURSIVE tenants AS (
            (SELECT e.tenant_id FROM metering.events e WHERE e.record_time >= v_start AND e.record_time < v_stop ORDER BY e.tenant_id LIMIT 1)
            UNION ALL
            SELECT (SELECT e.tenant_id FROM metering.events e
                    WHERE e.tenant_id > t.tenant_id AND e.record_time >= v_start AND e.record_time < v_stop ORDER BY e.tenant_id LIMIT 1)
            FROM tenants t WHERE t.tenant_id IS NOT NULL
        )
        SELECT v_month WHERE NOT EXISTS (
            SELECT FROM tenants t WHERE t.tenant_id IS NOT NULL AND metering.closed_until(t.tenant_id) < v_stop + interval '1 day');
    END LOOP;
END
$$;

-- Answers the items that are not recorded now, with the contract's RecordEventOutcome: 2 duplicate, 3 conflict. Every other item is recorded.
-- The common case has no such item: then the rows of `events` are written as they came, without asking the claims again.
CREATE FUNCTION record_events(
    p_tenants uuid[], p_first integer[], p_last integer[], p_sources text[], p_ids text[], p_events uuid[], p_digests bytea[],
    p_products text[], p_types text[], p_quantities bigint[], p_occurred_us bigint[], p_users text[], p_features text[], p_metadata jsonb[]
) RETURNS TABLE (item integer, outcome smallint, event_id uuid, digest bytea)
LANGUAGE plpgsql VOLATILE SECURITY INVOKER
SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off
AS $$
#variable_conflict use_column
DECLARE
    v_tenant uuid;
    v_erased boolean;
    v_time timestamptz;
    v_claimed integer;
    a integer;
    z integer;
BEGIN
    FOR i IN 1 .. cardinality(p_tenants) LOOP
        v_tenant := p_tenants[i];
        a := p_first[i];
        z := p_last[i];
        PERFORM set_config('app.tenant_id', v_tenant::text, true);
        PERFORM pg_advisory_xact_lock_shared(metering.tenant_lock(v_tenant));
        v_erased := EXISTS (SELECT FROM metering.erased_tenants e WHERE e.tenant_id = v_tenant);
        v_time := clock_timestamp();
        INSERT INTO metering.event_claims (tenant_id, source, id, digest, event_id, record_time)
        SELECT v_tenant, c.source, c.id, CASE WHEN v_erased THEN '' ELSE c.digest END, c.event_id, v_time
        FROM unnest(p_sources[a:z], p_ids[a:z], p_digests[a:z], p_events[a:z]) AS c (source, id, digest, event_id)
        ON CONFLICT DO NOTHING;
        GET DIAGNOSTICS v_claimed = ROW_COUNT;

        INSERT INTO metering.events (
            tenant_id, event_id, product, source, id, event_type, quantity, occurred_at, record_time, user_name, feature, metadata)
        SELECT v_tenant, c.event_id, c.product, c.source, c.id, c.event_type, c.quantity, metering.micros(c.occurred_us), v_time,
               CASE WHEN v_erased THEN '' ELSE c.user_name END, CASE WHEN v_erased THEN '' ELSE c.feature END,
               CASE WHEN v_erased THEN NULL ELSE c.metadata END
        FROM unnest(p_sources[a:z], p_ids[a:z], p_events[a:z], p_products[a:z], p_types[a:z], p_quantities[a:z], p_occurred_us[a:z],
                    p_users[a:z], p_features[a:z], p_metadata[a:z])
             AS c (source, id, event_id, product, event_type, quantity, occurred_us, user_name, feature, metadata)
        WHERE v_claimed > z - a OR EXISTS (
            SELECT FROM metering.event_claims k
            WHERE k.tenant_id = v_tenant AND k.source = c.source AND k.id = c.id AND k.event_id = c.event_id);

        IF v_claimed <= z - a THEN
            RETURN QUERY
            SELECT a + c.n::integer - 1, CASE WHEN k.digest IN (c.digest, '') THEN 2 ELSE 3 END::smallint, k.event_id, k.digest
            FROM unnest(p_sources[a:z], p_ids[a:z], p_events[a:z], p_digests[a:z]) WITH ORDINALITY AS c (source, id, event_id, digest, n)
            JOIN metering.event_claims k ON k.tenant_id = v_tenant AND k.source = c.source AND k.id = c.id AND k.event_id <> c.event_id;
        END IF;
    END LOOP;
END
$$;

-- Outcomes are the contract's ReverseEventOutcome. The claim decides: whoever takes it writes the row.
CREATE FUNCTION reverse_events(
    p_tenants uuid[], p_first integer[], p_last integer[], p_sources text[], p_ids text[], p_events uuid[], p_reasons text[]
) RETURNS TABLE (item integer, outcome smallint, event_id uuid)
LANGUAGE plpgsql VOLATILE SECURITY INVOKER
SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off
AS $$
#variable_conflict use_column
DECLARE
    v_tenant uuid;
    v_time timestamptz;
    a integer;
    z integer;
BEGIN
    FOR i IN 1 .. cardinality(p_tenants) LOOP
        v_tenant := p_tenants[i];
        a := p_first[i];
        z := p_last[i];
        PERFORM set_config('app.tenant_id', v_tenant::text, true);
        PERFORM pg_advisory_xact_lock_shared(metering.tenant_lock(v_tenant));
        v_time := clock_timestamp();
        WITH wanted AS MATERIALIZED (
            -- Of two items for one event the first is written.
            SELECT DISTINCT ON (k.event_id) k.event_id AS reverses, c.event_id, c.reason, e.product, e.source, e.id, e.event_type, e.quantity,
                   e.occurred_at, e.user_name, e.feature
            FROM unnest(p_sources[a:z], p_ids[a:z], p_events[a:z], p_reasons[a:z]) WITH ORDINALITY AS c (source, id, event_id, reason, n)
            JOIN metering.event_claims k ON k.tenant_id = v_tenant AND k.source = c.source AND k.id = c.id
            JOIN metering.events e ON e.tenant_id = v_tenant AND e.record_time = k.record_time AND e.event_id = k.event_id
            ORDER BY k.event_id, c.n
        ), claimed AS (
            INSERT INTO metering.event_claims (tenant_id, source, id, digest, event_id, record_time)
            SELECT v_tenant, '', w.reverses::text, '', w.event_id, v_time FROM wanted w
            ON CONFLICT DO NOTHING
            RETURNING event_id
        )
        INSERT INTO metering.events (
            tenant_id, event_id, product, source, id, event_type, quantity, occurred_at, record_time, user_name, feature, reverses, metadata)
        SELECT v_tenant, w.event_id, w.product, w.source, w.id, w.event_type, -w.quantity, w.occurred_at, v_time, w.user_name, w.feature,
               w.reverses, jsonb_build_object('reason', w.reason)
        FROM wanted w JOIN claimed d ON d.event_id = w.event_id;

        RETURN QUERY
        SELECT a + c.n::integer - 1,
               CASE WHEN k.event_id IS NULL THEN 2 WHEN r.event_id IS NULL THEN 3 ELSE 1 END::smallint, r.event_id
        FROM unnest(p_sources[a:z], p_ids[a:z]) WITH ORDINALITY AS c (source, id, n)
        LEFT JOIN metering.event_claims k ON k.tenant_id = v_tenant AND k.source = c.source AND k.id = c.id
        LEFT JOIN metering.event_claims r ON r.tenant_id = v_tenant AND r.source = '' AND r.id = k.event_id::text;
    END LOOP;
END
$$;

REVOKE ALL ON FUNCTION only_forget, wall_partition, make_event_month, drop_event_month, closed_until, event_months_to_drop, record_events,
    reverse_events FROM PUBLIC;
GRANT EXECUTE ON FUNCTION record_events, reverse_events, only_forget TO :service;
GRANT EXECUTE ON FUNCTION closed_until, event_months_to_drop TO :jobs;
