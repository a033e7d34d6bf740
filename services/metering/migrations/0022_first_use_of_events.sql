-- When a tenant's events first say that it used anything. One that happened long before it was recorded is late usage of its month, and begins
-- nothing: a time that was mistyped would otherwise be decades of fees, one closed month after the other.
CREATE OR REPLACE FUNCTION first_event_time(p_tenant uuid) RETURNS timestamptz
LANGUAGE sql STABLE SECURITY INVOKER
SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off
AS $$
    SELECT least(
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
