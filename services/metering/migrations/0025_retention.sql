-- What is kept one by one is kept for a while: events by months, counts of refusals by minutes. What goes leaves its sums, so that whatever was worked
-- out from it can be worked out again.
--
-- A month of events goes in two steps. Its events are added up a part at a time, in transactions of their own, as rows that nobody reads yet; then one
-- transaction drops the partition and says that it is dropped, which is what makes its sums count. So each event counts exactly once at any moment,
-- and whoever dies in between leaves nothing to put right.

-- Which months are dropped: of no tenant. Written by the owner, with the partition's end.
CREATE TABLE dropped_event_months (
    month date PRIMARY KEY CHECK (month = date_trunc('month', month::timestamp)::date),
    drop_time timestamptz NOT NULL DEFAULT clock_timestamp()
);
CREATE TRIGGER dropped_event_months_are_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON dropped_event_months
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_change();
GRANT SELECT ON dropped_event_months TO :service, :jobs;

-- Events of one hour of use, type, user and feature; of a type whose highest counts, of one level. `use_time` is the hour's beginning or where, within it, a
-- subscription or a version of a plan begins; `record_time` the last of theirs. No closing of the tenant lies between the first record and the last: so each
-- sum is in the same span and on the same invoice as every event in it. `begin_time` is when they first say that the tenant used anything: see first_event_time.
-- `quantity` is what they add to their meter, levels taken as often as they stand. At most 20,000 of 10^12 each: a bigint holds it.
CREATE TABLE event_sums (
    tenant_id uuid NOT NULL,
    use_time timestamptz NOT NULL,
    sum_id uuid NOT NULL,
    month date NOT NULL,
    record_time timestamptz NOT NULL,
    begin_time timestamptz NOT NULL,
    product text NOT NULL,
    event_type text NOT NULL,
    level bigint CHECK (level > 0),
    user_name text NOT NULL,
    feature text NOT NULL,
    quantity bigint NOT NULL,
    event_count bigint NOT NULL CHECK (event_count > 0),
    PRIMARY KEY (tenant_id, use_time, sum_id)
);
CREATE TRIGGER event_sums_only_forget BEFORE UPDATE OR DELETE ON event_sums FOR EACH ROW EXECUTE FUNCTION only_forget();
CREATE TRIGGER event_sums_are_not_emptied BEFORE TRUNCATE ON event_sums FOR EACH STATEMENT EXECUTE FUNCTION refuse_change();

-- How far a tenant's events of a month are added up: those recorded before `summed_until`.
CREATE TABLE summed_event_months (
    tenant_id uuid NOT NULL,
    month date NOT NULL,
    summed_until timestamptz NOT NULL,
    event_count bigint NOT NULL,
    PRIMARY KEY (tenant_id, month)
);

ALTER TABLE event_sums ENABLE ROW LEVEL SECURITY;
ALTER TABLE event_sums FORCE ROW LEVEL SECURITY;
ALTER TABLE summed_event_months ENABLE ROW LEVEL SECURITY;
ALTER TABLE summed_event_months FORCE ROW LEVEL SECURITY;
CREATE POLICY own_tenant ON event_sums TO :service
    USING (tenant_id = (SELECT current_setting('app.tenant_id')::uuid)) WITH CHECK (tenant_id = (SELECT current_setting('app.tenant_id')::uuid));
CREATE POLICY own_tenant ON summed_event_months TO :service
    USING (tenant_id = (SELECT current_setting('app.tenant_id')::uuid)) WITH CHECK (tenant_id = (SELECT current_setting('app.tenant_id')::uuid));
CREATE POLICY every_tenant_read ON event_sums FOR SELECT TO :jobs USING (true);
CREATE POLICY every_tenant_sum ON event_sums FOR INSERT TO :jobs WITH CHECK (true);
CREATE POLICY every_tenant ON summed_event_months TO :jobs USING (true) WITH CHECK (true);
-- The service's own updates are those of an erasure, which blanks names.
GRANT SELECT, UPDATE (user_name, feature) ON event_sums TO :service;
GRANT SELECT ON summed_event_months TO :service;
GRANT SELECT, INSERT ON event_sums TO :jobs;
GRANT SELECT, INSERT, UPDATE ON summed_event_months TO :jobs;

-- As in 0013; a sum of dropped events is a source of its own, on the invoice its events were on. `level` is that of a MAX, whose quantities add up to the
-- level times how often it stands. `event_count` is how many records a row stands for.
CREATE OR REPLACE VIEW billable_usage WITH (security_invoker = true) AS
SELECT n.tenant_id, 1::smallint AS source, n.entry_id AS usage_id, n.reserve_time AS use_time, n.record_time, 'SUM'::text AS aggregation,
       m.meter, m.quantity, ''::text AS series, false AS is_near, NULL::bigint AS level, 1::bigint AS event_count
FROM entries n
CROSS JOIN LATERAL (VALUES
    ('calls.count'::text, CASE WHEN n.number = 1 THEN 1::bigint ELSE 0::bigint END),
    ('calls.cost_nano_usd', n.cost_nano_usd),
    ('calls.tokens', n.total_tokens),
    ('calls.input_tokens', n.input_tokens),
    ('calls.output_tokens', n.output_tokens),
    ('calls.cache_read_tokens', n.cache_read_tokens),
    ('calls.cache_write_tokens', n.cache_write_5m_tokens + n.cache_write_1h_tokens)) AS m (meter, quantity)
UNION ALL
SELECT u.tenant_id, 2::smallint, u.entry_id, u.reserve_time, u.record_time, 'SUM'::text, u.product_unit, u.quantity, ''::text, false,
       NULL::bigint, 1::bigint
FROM unit_entries u
UNION ALL
SELECT e.tenant_id, 3::smallint, e.event_id, e.occurred_at, e.record_time, CASE t.aggregation WHEN 3 THEN 'MAX'::text ELSE 'SUM'::text END, t.unit,
       CASE WHEN t.aggregation <> 2 THEN e.quantity WHEN e.reverses IS NULL THEN 1::bigint ELSE (-1)::bigint END,
       e.product || '/' || e.event_type, true, CASE t.aggregation WHEN 3 THEN abs(e.quantity) END, 1::bigint
FROM events e JOIN event_types t ON t.product = e.product AND t.event_type = e.event_type
WHERE e.record_time - e.occurred_at <= interval '1 day' AND e.record_time - e.occurred_at >= interval '-1 day'
UNION ALL
SELECT e.tenant_id, 3::smallint, e.event_id, e.occurred_at, e.record_time, CASE t.aggregation WHEN 3 THEN 'MAX'::text ELSE 'SUM'::text END, t.unit,
       CASE WHEN t.aggregation <> 2 THEN e.quantity WHEN e.reverses IS NULL THEN 1::bigint ELSE (-1)::bigint END,
       e.product || '/' || e.event_type, false, CASE t.aggregation WHEN 3 THEN abs(e.quantity) END, 1::bigint
FROM events e JOIN event_types t ON t.product = e.product AND t.event_type = e.event_type
WHERE e.record_time - e.occurred_at > interval '1 day' OR e.record_time - e.occurred_at < interval '-1 day'
UNION ALL
SELECT s.tenant_id, 4::smallint, s.sum_id, s.use_time, s.record_time, CASE t.aggregation WHEN 3 THEN 'MAX'::text ELSE 'SUM'::text END, t.unit,
       s.quantity, s.product || '/' || s.event_type, false, s.level, s.event_count
FROM event_sums s JOIN event_types t ON t.product = s.product AND t.event_type = s.event_type
WHERE EXISTS (SELECT FROM dropped_event_months d WHERE d.month = s.month);

-- As in 0019; how many events of a level a sum has is its quantity by the level.
CREATE OR REPLACE VIEW counted_events WITH (security_invoker = true) AS
SELECT c.tenant_id, 1::smallint AS sign, c.use_time, ''::text AS provider, ''::text AS model, c.feature, c.user_name, ''::text AS prompt_version,
       ''::text AS tier, t.unit AS product_unit, c.product || '/' || c.event_type AS event_type, 0::smallint AS state, NULL::smallint AS attempt,
       NULL::smallint AS cause, 0::bigint AS input_tokens, 0::bigint AS output_tokens, 0::bigint AS cache_read_tokens,
       0::bigint AS cache_write_5m_tokens, 0::bigint AS cache_write_1h_tokens, 0::bigint AS cost_nano_usd,
       CASE WHEN c.is_sum THEN c.quantity / coalesce(c.level, 1) WHEN t.aggregation = 1 THEN c.quantity WHEN c.is_reversal THEN -1 ELSE 1 END::numeric
           AS quantity,
       CASE WHEN c.is_sum THEN c.level WHEN t.aggregation = 3 THEN abs(c.quantity) END AS level, 0::bigint AS first_token_ms, 0::bigint AS total_ms,
       c.record_time, c.is_near
FROM (
    SELECT e.tenant_id, e.occurred_at AS use_time, e.record_time, e.product, e.event_type, e.feature, e.user_name, e.quantity,
           e.reverses IS NOT NULL AS is_reversal, true AS is_near, false AS is_sum, NULL::bigint AS level
    FROM events e WHERE e.record_time - e.occurred_at <= interval '1 day' AND e.record_time - e.occurred_at >= interval '-1 day'
    UNION ALL
    SELECT e.tenant_id, e.occurred_at, e.record_time, e.product, e.event_type, e.feature, e.user_name, e.quantity, e.reverses IS NOT NULL, false,
           false, NULL
    FROM events e WHERE e.record_time - e.occurred_at > interval '1 day' OR e.record_time - e.occurred_at < interval '-1 day'
    UNION ALL
    SELECT s.tenant_id, s.use_time, s.record_time, s.product, s.event_type, s.feature, s.user_name, s.quantity, false, false, true, s.level
    FROM event_sums s WHERE EXISTS (SELECT FROM dropped_event_months d WHERE d.month = s.month)
) c JOIN event_types t ON t.product = c.product AND t.event_type = c.event_type;

-- As in 0013; sums are found as events are that were recorded far from their use.
CREATE OR REPLACE FUNCTION late_days(p_tenant uuid, p_start timestamptz, p_recorded_from timestamptz, p_recorded_before timestamptz)
RETURNS TABLE (day timestamptz)
LANGUAGE sql STABLE SECURITY INVOKER
SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off
AS $$
    SELECT date_trunc('day', u.use_time, 'UTC') FROM metering.billable_usage u
    WHERE u.tenant_id = p_tenant AND u.source < 3 AND u.use_time >= p_start - interval '15 minutes' AND u.use_time < p_start
      AND u.record_time >= p_recorded_from AND u.record_time < p_recorded_before
    UNION
    SELECT date_trunc('day', u.use_time, 'UTC') FROM metering.billable_usage u
    WHERE u.tenant_id = p_tenant AND u.source < 3 AND u.use_time < p_start - interval '15 minutes'
      AND u.record_time - u.use_time > interval '15 minutes'
      AND u.record_time >= p_recorded_from AND u.record_time < p_recorded_before
    UNION
    SELECT date_trunc('day', u.use_time, 'UTC') FROM metering.billable_usage u
    WHERE u.tenant_id = p_tenant AND u.source >= 3 AND u.use_time < p_start
      AND u.record_time >= p_recorded_from AND u.record_time < p_recorded_before
      AND (NOT u.is_near OR u.record_time < p_start + interval '1 day')
$$;

-- As in 0013.
CREATE OR REPLACE FUNCTION usage_sums(
    p_tenant uuid, p_starts timestamptz[], p_ends timestamptz[], p_recorded_before timestamptz, p_meters text[]
) RETURNS TABLE (span_start timestamptz, meter text, quantity numeric)
LANGUAGE sql STABLE SECURITY INVOKER
SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off
AS $$
    SELECT s.start_time, u.meter, sum(u.quantity)
    FROM unnest(p_starts, p_ends) AS s (start_time, end_time)
    CROSS JOIN LATERAL (
        SELECT l.meter,
               CASE l.aggregation WHEN 'MAX' THEN coalesce(max(l.level) FILTER (WHERE l.quantity > 0), 0) ELSE sum(l.quantity) END AS quantity
        FROM (
            SELECT b.meter, b.aggregation, b.series, b.level, sum(b.quantity) AS quantity
            FROM metering.billable_usage b
            WHERE b.tenant_id = p_tenant AND b.use_time >= s.start_time AND b.use_time < s.end_time AND b.record_time < p_recorded_before
              AND (NOT b.is_near OR b.record_time >= s.start_time - interval '1 day' AND b.record_time < s.end_time + interval '1 day')
              AND b.meter = ANY (p_meters)
            GROUP BY 1, 2, 3, 4) l
        GROUP BY l.meter, l.aggregation, l.series) u
    GROUP BY s.start_time, u.meter
$$;

-- As in 0022, of events that are kept and of the sums of others.
CREATE OR REPLACE FUNCTION first_event_time(p_tenant uuid) RETURNS timestamptz
LANGUAGE sql STABLE SECURITY INVOKER
SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off
AS $$
    SELECT least(
        (SELECT min(s.begin_time) FROM metering.event_sums s
         WHERE s.tenant_id = p_tenant AND EXISTS (SELECT FROM metering.dropped_event_months d WHERE d.month = s.month)),
        (SELECT min(e.record_time) FROM metering.events e
         WHERE e.tenant_id = p_tenant AND (e.record_time - e.occurred_at > interval '1 day' OR e.record_time - e.occurred_at < interval '-1 day')
           AND e.record_time - e.occurred_at > interval '92 days'),
        (SELECT min(e.occurred_at) FROM metering.events e
         WHERE e.tenant_id = p_tenant AND (e.record_time - e.occurred_at > interval '1 day' OR e.record_time - e.occurred_at < interval '-1 day')
           AND e.record_time - e.occurred_at <= interval '92 days'),
        (SELECT min(e.occurred_at) FROM metering.events e
         WHERE e.tenant_id = p_tenant AND e.record_time - e.occurred_at <= interval '1 day' AND e.record_time - e.occurred_at >= interval '-1 day'
           AND e.record_time <= interval '2 days' + (
             SELECT f.record_time FROM metering.events f
             WHERE f.tenant_id = p_tenant
               AND f.record_time - f.occurred_at <= interval '1 day' AND f.record_time - f.occurred_at >= interval '-1 day'
             ORDER BY f.record_time LIMIT 1)))
$$;

-- Until when everything a tenant used is on invoices that are closed and written. A tenant that was never closed and has no subscription is not billed, and
-- waits for nothing; neither does an erased one that was billed to its end.
CREATE OR REPLACE FUNCTION closed_until(p_tenant uuid) RETURNS timestamptz
LANGUAGE sql STABLE SECURITY INVOKER AS $$
    SELECT CASE
        WHEN EXISTS (SELECT FROM metering.invoice_closings c LEFT JOIN metering.invoices i ON i.tenant_id = c.tenant_id AND i.number = c.number
                     WHERE c.tenant_id = p_tenant AND i.number IS NULL) THEN timestamptz '-infinity'
        WHEN l.period_end IS NULL AND EXISTS (SELECT FROM metering.subscriptions s WHERE s.tenant_id = p_tenant) THEN timestamptz '-infinity'
        WHEN l.period_end IS NULL THEN timestamptz 'infinity'
        WHEN EXISTS (SELECT FROM metering.erased_tenants e WHERE e.tenant_id = p_tenant AND e.erase_time < l.period_end) THEN timestamptz 'infinity'
        ELSE l.period_end END
    FROM (SELECT max(c.period_end) AS period_end FROM metering.invoice_closings c WHERE c.tenant_id = p_tenant) l
$$;

-- The function without holders stays for as long as replicas of the release before call it: they would drop a month without its sums, so it has none.
CREATE OR REPLACE FUNCTION event_months_to_drop(p_end timestamptz) RETURNS TABLE (month date)
LANGUAGE sql STABLE SECURITY INVOKER AS $$ SELECT NULL::date WHERE false $$;

-- The months that ended by `p_end`, each with how many tenants hold it and the first of them. A tenant holds a month while it has not closed a day beyond
-- the month's end, or beyond a use of it that was told ahead, or while somebody is still to be told of an event in it. Asked as the jobs role: the owner
-- sees no rows, and would find every month free.
CREATE FUNCTION event_months_due(p_end timestamptz) RETURNS TABLE (month date, holding bigint, held_by uuid)
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
        ), holders AS (
            SELECT t.tenant_id FROM tenants t CROSS JOIN LATERAL (SELECT metering.closed_until(t.tenant_id) AS closed) c
            WHERE t.tenant_id IS NOT NULL AND (
                c.closed < v_stop + interval '1 day'
                OR EXISTS (SELECT FROM metering.events e
                           WHERE e.tenant_id = t.tenant_id AND e.record_time >= v_start AND e.record_time < v_stop
                             AND e.record_time - e.occurred_at < interval '-1 day' AND e.occurred_at >= c.closed)
                OR EXISTS (SELECT FROM metering.export_outbox o
                           WHERE o.tenant_id = t.tenant_id AND o.sink = 2 AND o.source = 3 AND NOT o.is_dead
                             AND o.record_time >= v_start AND o.record_time < v_stop))
        )
        SELECT v_month, count(*), (array_agg(h.tenant_id ORDER BY h.tenant_id))[1] FROM holders h;
    END LOOP;
END
$$;

-- Adds up events of a month, at most so many and of one tenant; returns how many, 0 when all are, -1 when another process is at it. Under the tenant's
-- shared lock: whoever closes or erases it comes before or after, and after an erasure no name is written.
CREATE FUNCTION sum_event_month(p_month date, p_most integer) RETURNS integer
LANGUAGE plpgsql VOLATILE SECURITY INVOKER
SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off
AS $$
DECLARE
    v_start timestamptz := p_month::timestamp AT TIME ZONE 'UTC';
    v_stop timestamptz := (p_month::timestamp + interval '1 month') AT TIME ZONE 'UTC';
    v_tenant uuid;
    v_from timestamptz;
    v_to timestamptz;
    v_erased boolean;
    v_cuts timestamptz[];
    v_closes timestamptz[];
    v_count integer;
BEGIN
    IF NOT pg_try_advisory_xact_lock(7405, 2) THEN
        RETURN -1;
    END IF;
    -- Tenants are gone through by their ids, so the last one that was begun says where this is.
    SELECT m.tenant_id, m.summed_until INTO v_tenant, v_from FROM metering.summed_event_months m
    WHERE m.month = p_month ORDER BY m.tenant_id DESC LIMIT 1;
    IF v_tenant IS NULL OR v_from >= v_stop THEN
        SELECT e.tenant_id, v_start INTO v_tenant, v_from FROM metering.events e
        WHERE (v_tenant IS NULL OR e.tenant_id > v_tenant) AND e.record_time >= v_start AND e.record_time < v_stop
        ORDER BY e.tenant_id LIMIT 1;
        IF NOT FOUND THEN
            RETURN 0;
        END IF;
    END IF;
    PERFORM pg_advisory_xact_lock_shared(metering.tenant_lock(v_tenant));
    v_erased := EXISTS (SELECT FROM metering.erased_tenants e WHERE e.tenant_id = v_tenant);
    SELECT coalesce(array_agg(b.effective_time ORDER BY b.effective_time), '{}') INTO v_cuts FROM (
        SELECT s.effective_time FROM metering.subscriptions s WHERE s.tenant_id = v_tenant
        UNION SELECT v.effective_time FROM metering.billing_plan_versions v) b;
    SELECT coalesce(array_agg(c.close_time ORDER BY c.close_time), '{}') INTO v_closes
    FROM metering.invoice_closings c WHERE c.tenant_id = v_tenant;
    -- Events that were recorded at one time are never parted.
    v_to := coalesce((SELECT e.record_time FROM metering.events e
                      WHERE e.tenant_id = v_tenant AND e.record_time >= v_from AND e.record_time < v_stop
                      ORDER BY e.record_time OFFSET p_most LIMIT 1), v_stop);
    IF v_to = v_from THEN
        v_to := coalesce((SELECT e.record_time FROM metering.events e
                          WHERE e.tenant_id = v_tenant AND e.record_time > v_from AND e.record_time < v_stop
                          ORDER BY e.record_time LIMIT 1), v_stop);
    END IF;
    INSERT INTO metering.event_sums (
        tenant_id, use_time, sum_id, month, record_time, begin_time, product, event_type, level, user_name, feature, quantity, event_count)
    SELECT v_tenant, k.use_time, uuidv7(), p_month, max(e.record_time),
           min(CASE WHEN e.record_time - e.occurred_at > interval '92 days' THEN e.record_time ELSE e.occurred_at END),
           e.product, e.event_type, k.level, k.user_name, k.feature,
           sum(CASE WHEN t.aggregation = 2 THEN CASE WHEN e.quantity > 0 THEN 1::bigint ELSE (-1)::bigint END ELSE e.quantity END), count(*)
    FROM metering.events e
    LEFT JOIN metering.event_types t ON t.product = e.product AND t.event_type = e.event_type
    CROSS JOIN LATERAL (
        SELECT greatest(date_trunc('hour', e.occurred_at, 'UTC'), v_cuts[width_bucket(e.occurred_at, v_cuts)]) AS use_time,
               width_bucket(e.record_time, v_closes) AS closing, CASE t.aggregation WHEN 3 THEN abs(e.quantity) END AS level,
               CASE WHEN v_erased THEN '' ELSE e.user_name END AS user_name, CASE WHEN v_erased THEN '' ELSE e.feature END AS feature) k
    WHERE e.tenant_id = v_tenant AND e.record_time >= v_from AND e.record_time < v_to
    GROUP BY k.use_time, k.closing, e.product, e.event_type, k.level, k.user_name, k.feature;
    SELECT count(*) INTO v_count FROM metering.events e WHERE e.tenant_id = v_tenant AND e.record_time >= v_from AND e.record_time < v_to;
    INSERT INTO metering.summed_event_months AS m (tenant_id, month, summed_until, event_count) VALUES (v_tenant, p_month, v_to, v_count)
    ON CONFLICT (tenant_id, month) DO UPDATE SET summed_until = v_to, event_count = m.event_count + v_count;
    RETURN v_count;
END
$$;

-- Removes the partition of a UTC month, and with it lets the sums of its events count. Whether it may go is `event_months_due`'s to say, and whether it is
-- added up `sum_event_month`'s.
CREATE OR REPLACE FUNCTION drop_event_month(p_month date) RETURNS void
LANGUAGE plpgsql SECURITY INVOKER AS $$
BEGIN
    PERFORM pg_advisory_xact_lock(hashtextextended('event_months', 7405));
    EXECUTE format('DROP TABLE IF EXISTS metering.%I', 'events_' || to_char(p_month, 'YYYY_MM'));
    INSERT INTO metering.dropped_event_months (month) VALUES (date_trunc('month', p_month::timestamp)::date) ON CONFLICT DO NOTHING;
END
$$;

-- For who reads more than one statement's worth of usage: no month is dropped until the transaction ends. One whose moment is before a drop that it did not
-- see would find neither the events nor their sums: it is told to begin anew.
CREATE PROCEDURE hold_event_months()
LANGUAGE plpgsql SECURITY INVOKER AS $$
BEGIN
    LOCK TABLE metering.events IN ACCESS SHARE MODE;
    IF EXISTS (SELECT FROM pg_inherits i WHERE i.inhparent = 'metering.events'::regclass AND pg_table_is_visible(i.inhrelid) IS NULL) THEN
        RAISE EXCEPTION 'a month of events was dropped at this moment' USING ERRCODE = 'serialization_failure';
    END IF;
END
$$;

-- Counts of refusals, kept by minute and replica so that a repeat changes nothing, are added up by the hour once nobody repeats them and the log of them is
-- folded: under a replica that is none. At most so many; returns how many, 0 also when another process is at it. Under the lock of who changes sums, so that
-- an erasure blanks either the counts or their sum.
CREATE INDEX refusals_by_minute ON refusals (tenant_id, minute) WHERE replica <> 'ffffffff-ffff-ffff-ffff-ffffffffffff';
CREATE POLICY every_tenant_sum ON refusals FOR INSERT TO :jobs WITH CHECK (replica = 'ffffffff-ffff-ffff-ffff-ffffffffffff');
CREATE POLICY every_tenant_sum_more ON refusals FOR UPDATE TO :jobs
    USING (replica = 'ffffffff-ffff-ffff-ffff-ffffffffffff') WITH CHECK (replica = 'ffffffff-ffff-ffff-ffff-ffffffffffff');
CREATE POLICY every_tenant_purge ON refusals FOR DELETE TO :jobs USING (replica <> 'ffffffff-ffff-ffff-ffff-ffffffffffff');
GRANT INSERT, UPDATE, DELETE ON refusals TO :jobs;
CREATE FUNCTION sum_refusals(p_before timestamptz, p_most integer) RETURNS integer
LANGUAGE plpgsql VOLATILE SECURITY INVOKER AS $$
DECLARE
    v_count integer;
BEGIN
    IF NOT pg_try_advisory_xact_lock(7405, 0)
       OR EXISTS (SELECT FROM metering.usage_pending p WHERE p.refusals <> 0 AND p.use_time < p_before) THEN
        RETURN 0;
    END IF;
    WITH chosen AS MATERIALIZED (
        SELECT tenant_id, minute, replica, series FROM metering.refusals
        WHERE tenant_id IS NOT NULL AND minute < p_before AND replica <> 'ffffffff-ffff-ffff-ffff-ffffffffffff'
        ORDER BY tenant_id, minute LIMIT p_most
    ), purged AS (
        DELETE FROM metering.refusals r USING chosen c
        WHERE r.tenant_id = c.tenant_id AND r.minute = c.minute AND r.replica = c.replica AND r.series = c.series
        RETURNING r.*
    ), summed AS (
        INSERT INTO metering.refusals AS r (tenant_id, minute, replica, series, reason, rule, model, feature, user_name, tier, refusals)
        SELECT p.tenant_id, date_trunc('hour', p.minute, 'UTC'), 'ffffffff-ffff-ffff-ffff-ffffffffffff', p.series, p.reason, p.rule, p.model, p.feature,
               p.user_name, p.tier, sum(p.refusals)
        FROM purged p GROUP BY 1, 2, 4, 5, 6, 7, 8, 9, 10
        ON CONFLICT (tenant_id, minute, replica, series) DO UPDATE SET refusals = r.refusals + EXCLUDED.refusals
    )
    SELECT count(*) INTO v_count FROM purged;
    RETURN v_count;
END
$$;

REVOKE ALL ON FUNCTION event_months_due, sum_event_month, sum_refusals FROM PUBLIC;
REVOKE ALL ON PROCEDURE hold_event_months FROM PUBLIC;
GRANT EXECUTE ON PROCEDURE hold_event_months TO :service, :jobs;
GRANT EXECUTE ON FUNCTION event_months_due, sum_event_month, sum_refusals TO :jobs;
