-- Events are billed: the third source of usage. The meter is the unit of the event's registered type; each type makes up its own quantity, and
-- types of one unit add up, whatever their products.

-- What was recorded within a day of its use is found by the key of `events`, from a day before a period to a day after it. What was not is rare
-- and is in this index alone, also where a clock was wrong: nothing here rests on when an event may be recorded.
CREATE INDEX events_recorded_far_from_use ON events (tenant_id, occurred_at, record_time)
    WHERE record_time - occurred_at > interval '1 day' OR record_time - occurred_at < interval '-1 day';

-- `quantity` is what a record adds to its meter: 1 for an event that is counted, -1 for its reversal. Where the aggregation is MAX it is a level
-- that stands, or negative for one that was taken back. `series` is what is aggregated by itself. Of a row that `is_near` the use, the time of
-- record is at most a day away from it; whoever looks for a time of use says so, and reads no more of `events` than that.
CREATE OR REPLACE VIEW billable_usage WITH (security_invoker = true) AS
SELECT n.tenant_id, 1::smallint AS source, n.entry_id AS usage_id, n.reserve_time AS use_time, n.record_time, 'SUM'::text AS aggregation,
       m.meter, m.quantity, ''::text AS series, false AS is_near
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
SELECT u.tenant_id, 2::smallint, u.entry_id, u.reserve_time, u.record_time, 'SUM'::text, u.product_unit, u.quantity, ''::text, false
FROM unit_entries u
UNION ALL
SELECT e.tenant_id, 3::smallint, e.event_id, e.occurred_at, e.record_time, CASE t.aggregation WHEN 3 THEN 'MAX'::text ELSE 'SUM'::text END, t.unit,
       CASE WHEN t.aggregation <> 2 THEN e.quantity WHEN e.reverses IS NULL THEN 1::bigint ELSE (-1)::bigint END,
       e.product || '/' || e.event_type, true
FROM events e JOIN event_types t ON t.product = e.product AND t.event_type = e.event_type
WHERE e.record_time - e.occurred_at <= interval '1 day' AND e.record_time - e.occurred_at >= interval '-1 day'
UNION ALL
SELECT e.tenant_id, 3::smallint, e.event_id, e.occurred_at, e.record_time, CASE t.aggregation WHEN 3 THEN 'MAX'::text ELSE 'SUM'::text END, t.unit,
       CASE WHEN t.aggregation <> 2 THEN e.quantity WHEN e.reverses IS NULL THEN 1::bigint ELSE (-1)::bigint END,
       e.product || '/' || e.event_type, false
FROM events e JOIN event_types t ON t.product = e.product AND t.event_type = e.event_type
WHERE e.record_time - e.occurred_at > interval '1 day' OR e.record_time - e.occurred_at < interval '-1 day';

-- As in 0009; of events what is near its use was recorded until a day after p_start, and the rest has its index.
CREATE OR REPLACE FUNCTION late_days(p_tenant uuid, p_start timestamptz, p_recorded_from timestamptz, p_recorded_before timestamptz)
RETURNS TABLE (day timestamptz)
LANGUAGE sql STABLE SECURITY INVOKER
SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off
AS $$
    SELECT date_trunc('day', u.use_time, 'UTC') FROM metering.billable_usage u
    WHERE u.tenant_id = p_tenant AND u.source <> 3 AND u.use_time >= p_start - interval '15 minutes' AND u.use_time < p_start
      AND u.record_time >= p_recorded_from AND u.record_time < p_recorded_before
    UNION
    SELECT date_trunc('day', u.use_time, 'UTC') FROM metering.billable_usage u
    WHERE u.tenant_id = p_tenant AND u.source <> 3 AND u.use_time < p_start - interval '15 minutes'
      AND u.record_time - u.use_time > interval '15 minutes'
      AND u.record_time >= p_recorded_from AND u.record_time < p_recorded_before
    UNION
    SELECT date_trunc('day', u.use_time, 'UTC') FROM metering.billable_usage u
    WHERE u.tenant_id = p_tenant AND u.source = 3 AND u.use_time < p_start
      AND u.record_time >= p_recorded_from AND u.record_time < p_recorded_before
      AND (NOT u.is_near OR u.record_time < p_start + interval '1 day')
$$;

-- As in 0009. A reversal has the time of use, the type and the quantity of its event: of a MAX, a level stands while more events of it were
-- recorded than taken back before the moment. So what was known at a moment stays what it was, whatever is taken back later.
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
            SELECT b.meter, b.aggregation, b.series, CASE b.aggregation WHEN 'MAX' THEN abs(b.quantity) END AS level, sum(b.quantity) AS quantity
            FROM metering.billable_usage b
            WHERE b.tenant_id = p_tenant AND b.use_time >= s.start_time AND b.use_time < s.end_time AND b.record_time < p_recorded_before
              AND (NOT b.is_near OR b.record_time >= s.start_time - interval '1 day' AND b.record_time < s.end_time + interval '1 day')
              AND b.meter = ANY (p_meters)
            GROUP BY 1, 2, 3, 4) l
        GROUP BY l.meter, l.aggregation, l.series) u
    GROUP BY s.start_time, u.meter
$$;

-- The time of use of a tenant's first event; NULL without any. Of those near their use none that was recorded two days after the first can be
-- earlier than it.
CREATE FUNCTION first_event_time(p_tenant uuid) RETURNS timestamptz
LANGUAGE sql STABLE SECURITY INVOKER
SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off
AS $$
    SELECT least(
        (SELECT min(e.occurred_at) FROM metering.events e
         WHERE e.tenant_id = p_tenant AND (e.record_time - e.occurred_at > interval '1 day' OR e.record_time - e.occurred_at < interval '-1 day')),
        (SELECT min(e.occurred_at) FROM metering.events e
         WHERE e.tenant_id = p_tenant AND e.record_time - e.occurred_at <= interval '1 day' AND e.record_time - e.occurred_at >= interval '-1 day'
           AND e.record_time <= interval '2 days' + (
             SELECT f.record_time FROM metering.events f
             WHERE f.tenant_id = p_tenant
               AND f.record_time - f.occurred_at <= interval '1 day' AND f.record_time - f.occurred_at >= interval '-1 day'
             ORDER BY f.record_time LIMIT 1)))
$$;

-- Until when no invoice needs a tenant's events any more. All of them are needed, also on closed invoices: an invoice is made again from its rows,
-- and late usage of a closed period is the difference of two ratings of the whole period. So no month with an event in it is dropped.
CREATE OR REPLACE FUNCTION closed_until(p_tenant uuid) RETURNS timestamptz
LANGUAGE sql STABLE SECURITY INVOKER AS $$ SELECT timestamptz '-infinity' $$;

REVOKE ALL ON FUNCTION first_event_time FROM PUBLIC;
GRANT EXECUTE ON FUNCTION first_event_time TO :jobs;
