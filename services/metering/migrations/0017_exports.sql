-- What other systems are told of use: meter events at Stripe, and events at the operator's own endpoint.
--
-- Whoever records use writes in the same transaction what is to be told of it: nothing is told that was rolled back, nothing is forgotten, and
-- nobody has to know in which order transactions commit. A row goes once its receiver has it. Tenants and sinks that tell nothing cost a look
-- into a small table a statement.
--
-- Sinks are the contract's ExportSink: 1 Stripe, 2 the endpoint. Sources are its UsageSource.

-- Shared reference data, no tenant: an operator sets them, by the jobs role.
CREATE TABLE export_sinks (
    sink smallint PRIMARY KEY CHECK (sink = 2),
    is_on boolean NOT NULL
);
INSERT INTO export_sinks (sink, is_on) VALUES (2, false);
CREATE TABLE stripe_meters (
    meter text PRIMARY KEY CHECK (length(meter) BETWEEN 1 AND 63),
    event_name text NOT NULL CHECK (length(event_name) BETWEEN 1 AND 100)
);
GRANT SELECT ON export_sinks, stripe_meters TO :service;
GRANT SELECT, UPDATE ON export_sinks TO :jobs;
GRANT SELECT, INSERT, UPDATE, DELETE ON stripe_meters TO :jobs;

-- Whom Stripe bills for a tenant. Kept when the tenant is erased: it is the operator's own, and what is recorded late is still billed.
CREATE TABLE stripe_customers (
    tenant_id uuid PRIMARY KEY,
    customer_id text NOT NULL CHECK (length(customer_id) BETWEEN 1 AND 255),
    change_time timestamptz NOT NULL DEFAULT clock_timestamp()
);

-- `meter` and `event_name` are empty for the endpoint, which is told whole records. `send_time` is when the first attempt began whose outcome
-- nobody knows; NULL while every attempt was certainly refused.
CREATE TABLE export_outbox (
    tenant_id uuid NOT NULL,
    sink smallint NOT NULL CHECK (sink BETWEEN 1 AND 2),
    usage_id uuid NOT NULL,
    meter text NOT NULL,
    event_name text NOT NULL,
    source smallint NOT NULL CHECK (source BETWEEN 1 AND 3),
    quantity bigint NOT NULL,
    use_time timestamptz NOT NULL,
    record_time timestamptz NOT NULL,
    reservation_id uuid,
    is_dead boolean NOT NULL DEFAULT false,
    attempts integer NOT NULL DEFAULT 0 CHECK (attempts >= 0),
    due_time timestamptz NOT NULL DEFAULT clock_timestamp(),
    lease_until timestamptz,
    send_time timestamptz,
    last_error text NOT NULL DEFAULT '' CHECK (length(last_error) <= 300),
    PRIMARY KEY (tenant_id, sink, usage_id, meter),
    CONSTRAINT calls_and_units_are_reserved CHECK ((reservation_id IS NULL) = (source = 3))
) WITH (fillfactor = 70, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 2000, autovacuum_vacuum_cost_delay = 0);

CREATE FUNCTION queue_entries() RETURNS trigger
LANGUAGE plpgsql SECURITY INVOKER SET search_path = metering, pg_temp AS $$
BEGIN
    INSERT INTO metering.export_outbox (tenant_id, sink, usage_id, meter, event_name, source, quantity, use_time, record_time, reservation_id)
    SELECT n.tenant_id, 1, n.entry_id, s.meter, s.event_name, 1, m.quantity, n.reserve_time, n.record_time, n.reservation_id
    FROM rows_added n
    JOIN metering.stripe_customers c ON c.tenant_id = n.tenant_id
    CROSS JOIN LATERAL (VALUES
        ('calls.count'::text, CASE WHEN n.number = 1 THEN 1::bigint ELSE 0::bigint END),
        ('calls.cost_nano_usd', n.cost_nano_usd),
        ('calls.tokens', n.total_tokens),
        ('calls.input_tokens', n.input_tokens),
        ('calls.output_tokens', n.output_tokens),
        ('calls.cache_read_tokens', n.cache_read_tokens),
        ('calls.cache_write_tokens', n.cache_write_5m_tokens + n.cache_write_1h_tokens)) AS m (meter, quantity)
    JOIN metering.stripe_meters s ON s.meter = m.meter
    WHERE m.quantity <> 0
    UNION ALL
    SELECT n.tenant_id, 2, n.entry_id, '', '', 1, 0, n.reserve_time, n.record_time, n.reservation_id
    FROM rows_added n WHERE EXISTS (SELECT FROM metering.export_sinks k WHERE k.sink = 2 AND k.is_on);
    RETURN NULL;
END
$$;
CREATE TRIGGER entries_are_exported AFTER INSERT ON entries REFERENCING NEW TABLE AS rows_added
    FOR EACH STATEMENT EXECUTE FUNCTION queue_entries();

CREATE FUNCTION queue_units() RETURNS trigger
LANGUAGE plpgsql SECURITY INVOKER SET search_path = metering, pg_temp AS $$
BEGIN
    INSERT INTO metering.export_outbox (tenant_id, sink, usage_id, meter, event_name, source, quantity, use_time, record_time, reservation_id)
    SELECT u.tenant_id, 1, u.entry_id, s.meter, s.event_name, 2, u.quantity, u.reserve_time, u.record_time, u.reservation_id
    FROM rows_added u
    JOIN metering.stripe_customers c ON c.tenant_id = u.tenant_id
    JOIN metering.stripe_meters s ON s.meter = u.product_unit
    UNION ALL
    SELECT u.tenant_id, 2, u.entry_id, '', '', 2, 0, u.reserve_time, u.record_time, u.reservation_id
    FROM rows_added u WHERE EXISTS (SELECT FROM metering.export_sinks k WHERE k.sink = 2 AND k.is_on);
    RETURN NULL;
END
$$;
CREATE TRIGGER unit_entries_are_exported AFTER INSERT ON unit_entries REFERENCING NEW TABLE AS rows_added
    FOR EACH STATEMENT EXECUTE FUNCTION queue_units();

-- A counted event is 1, its reversal -1. A level, of which Stripe takes the highest or the last, is told as it is, and cannot be taken back there.
CREATE FUNCTION queue_events() RETURNS trigger
LANGUAGE plpgsql SECURITY INVOKER SET search_path = metering, pg_temp AS $$
BEGIN
    INSERT INTO metering.export_outbox (tenant_id, sink, usage_id, meter, event_name, source, quantity, use_time, record_time)
    SELECT e.tenant_id, 1, e.event_id, s.meter, s.event_name, 3,
           CASE WHEN t.aggregation <> 2 THEN e.quantity WHEN e.reverses IS NULL THEN 1::bigint ELSE (-1)::bigint END, e.occurred_at, e.record_time
    FROM rows_added e
    JOIN metering.stripe_customers c ON c.tenant_id = e.tenant_id
    JOIN metering.event_types t ON t.product = e.product AND t.event_type = e.event_type
    JOIN metering.stripe_meters s ON s.meter = t.unit
    WHERE t.aggregation <> 3 OR e.reverses IS NULL
    UNION ALL
    SELECT e.tenant_id, 2, e.event_id, '', '', 3, 0, e.occurred_at, e.record_time
    FROM rows_added e WHERE EXISTS (SELECT FROM metering.export_sinks k WHERE k.sink = 2 AND k.is_on);
    RETURN NULL;
END
$$;
CREATE TRIGGER events_are_exported AFTER INSERT ON events REFERENCING NEW TABLE AS rows_added
    FOR EACH STATEMENT EXECUTE FUNCTION queue_events();

ALTER TABLE stripe_customers ENABLE ROW LEVEL SECURITY;
ALTER TABLE stripe_customers FORCE ROW LEVEL SECURITY;
ALTER TABLE export_outbox ENABLE ROW LEVEL SECURITY;
ALTER TABLE export_outbox FORCE ROW LEVEL SECURITY;
CREATE POLICY own_tenant ON stripe_customers TO :service
    USING (tenant_id = (SELECT current_setting('app.tenant_id')::uuid)) WITH CHECK (tenant_id = (SELECT current_setting('app.tenant_id')::uuid));
CREATE POLICY own_tenant ON export_outbox TO :service
    USING (tenant_id = (SELECT current_setting('app.tenant_id')::uuid)) WITH CHECK (tenant_id = (SELECT current_setting('app.tenant_id')::uuid));
-- The jobs role tells all tenants' rows, and writes those of the calls it reconciles.
CREATE POLICY every_tenant_read ON stripe_customers FOR SELECT TO :jobs USING (true);
CREATE POLICY every_tenant ON export_outbox TO :jobs USING (true) WITH CHECK (true);
GRANT SELECT, INSERT, UPDATE, DELETE ON stripe_customers TO :service;
GRANT SELECT, INSERT ON export_outbox TO :service;
GRANT SELECT ON stripe_customers TO :jobs;
GRANT SELECT, INSERT, UPDATE, DELETE ON export_outbox TO :jobs;

REVOKE ALL ON FUNCTION queue_entries, queue_units, queue_events FROM PUBLIC;
GRANT EXECUTE ON FUNCTION queue_entries TO :service, :jobs;
GRANT EXECUTE ON FUNCTION queue_units, queue_events TO :service;
