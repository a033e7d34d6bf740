-- Plans as they are billed, subscriptions, credits, closed periods and their invoices. Everything here is append-only.
--
-- A period is closed in two steps. close_period takes the tenant's lock EXCLUSIVE, reads the clock and writes the closing: from then on every
-- row of usage belongs to it or to a later one, by its record_time alone (see 0003 for the lock, and why it is a statement of its own).
-- What the invoice says is a function of rows that were recorded before; so it is worked out and written afterwards, without the lock, by
-- whoever comes first, and whoever comes second finds the same.

CREATE TABLE billing_plan_versions (
    plan text NOT NULL CHECK (plan ~ '^[a-z][a-z0-9-]{0,62}$'),
    version text NOT NULL CHECK (version ~ '^[A-Za-z0-9._-]{1,100}$'),
    effective_time timestamptz NOT NULL,
    terms jsonb NOT NULL,
    digest bytea NOT NULL CHECK (octet_length(digest) = 32),
    load_time timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (plan, version),
    UNIQUE (plan, effective_time)
);
CREATE TRIGGER billing_plan_versions_are_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON billing_plan_versions
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_change();
GRANT SELECT ON billing_plan_versions TO :service, :jobs;

CREATE TABLE subscriptions (
    tenant_id uuid NOT NULL,
    number integer NOT NULL CHECK (number >= 1),
    subscription_id uuid NOT NULL,
    plan text NOT NULL,
    effective_time timestamptz NOT NULL CHECK (effective_time = date_trunc('second', effective_time)),
    anchor_day smallint NOT NULL CHECK (anchor_day BETWEEN 1 AND 31),
    record_time timestamptz NOT NULL,
    PRIMARY KEY (tenant_id, number),
    UNIQUE (tenant_id, subscription_id)
);

CREATE TABLE credits (
    tenant_id uuid NOT NULL,
    credit_id uuid NOT NULL,
    amount_nano_usd bigint NOT NULL CHECK (amount_nano_usd > 0),
    priority smallint NOT NULL CHECK (priority BETWEEN 0 AND 1000),
    effective_time timestamptz NOT NULL,
    expire_time timestamptz CHECK (expire_time > effective_time),
    reason text NOT NULL CHECK (length(reason) <= 500),
    digest bytea NOT NULL CHECK (octet_length(digest) = 32),
    record_time timestamptz NOT NULL,
    PRIMARY KEY (tenant_id, credit_id)
);

-- Periods follow each other without a gap: number n begins where n - 1 ended.
CREATE TABLE invoice_closings (
    tenant_id uuid NOT NULL,
    number integer NOT NULL CHECK (number >= 1),
    invoice_id uuid NOT NULL,
    period_start timestamptz NOT NULL,
    period_end timestamptz NOT NULL CHECK (period_end > period_start),
    close_time timestamptz NOT NULL CHECK (close_time >= period_end),
    tier_plan text NOT NULL CHECK (length(tier_plan) <= 63),
    PRIMARY KEY (tenant_id, number),
    UNIQUE (tenant_id, period_start),
    UNIQUE (tenant_id, invoice_id)
);

CREATE TABLE invoices (
    tenant_id uuid NOT NULL,
    number integer NOT NULL,
    charges_nano_usd bigint NOT NULL,
    carried_in_nano_usd bigint NOT NULL CHECK (carried_in_nano_usd <= 0),
    credits_nano_usd bigint NOT NULL CHECK (credits_nano_usd >= 0),
    due_nano_usd bigint NOT NULL CHECK (due_nano_usd >= 0),
    carried_out_nano_usd bigint NOT NULL CHECK (carried_out_nano_usd <= 0),
    digest bytea NOT NULL CHECK (octet_length(digest) = 32),
    PRIMARY KEY (tenant_id, number),
    FOREIGN KEY (tenant_id, number) REFERENCES invoice_closings (tenant_id, number),
    CONSTRAINT due_is_the_sum CHECK (
        due_nano_usd + carried_out_nano_usd = charges_nano_usd + carried_in_nano_usd - credits_nano_usd
        AND (due_nano_usd = 0 OR carried_out_nano_usd = 0))
);

-- Kinds are the contract's InvoiceLineKind: 1 fee, 2 usage, 3 discount, 4 minimum. The period is the one the usage belongs to.
CREATE TABLE invoice_lines (
    tenant_id uuid NOT NULL,
    number integer NOT NULL,
    line_number integer NOT NULL CHECK (line_number >= 1),
    kind smallint NOT NULL CHECK (kind BETWEEN 1 AND 4),
    is_late boolean NOT NULL,
    period_start timestamptz NOT NULL,
    period_end timestamptz NOT NULL,
    span_start timestamptz NOT NULL,
    span_end timestamptz NOT NULL,
    plan text NOT NULL,
    plan_version text NOT NULL,
    position smallint NOT NULL,
    name text NOT NULL,
    tier smallint NOT NULL,
    quantity bigint NOT NULL,
    nano_usd_per_million bigint NOT NULL CHECK (nano_usd_per_million >= 0),
    amount_nano_usd bigint NOT NULL,
    PRIMARY KEY (tenant_id, number, line_number),
    FOREIGN KEY (tenant_id, number) REFERENCES invoices (tenant_id, number)
);

CREATE TABLE credit_uses (
    tenant_id uuid NOT NULL,
    number integer NOT NULL,
    credit_id uuid NOT NULL,
    position smallint NOT NULL,
    amount_nano_usd bigint NOT NULL CHECK (amount_nano_usd > 0),
    PRIMARY KEY (tenant_id, number, credit_id),
    FOREIGN KEY (tenant_id, number) REFERENCES invoices (tenant_id, number),
    FOREIGN KEY (tenant_id, credit_id) REFERENCES credits (tenant_id, credit_id)
);

CREATE TABLE credit_notes (
    tenant_id uuid NOT NULL,
    credit_note_id uuid NOT NULL,
    number integer NOT NULL,
    amount_nano_usd bigint NOT NULL CHECK (amount_nano_usd > 0),
    reason text NOT NULL CHECK (length(reason) BETWEEN 1 AND 500),
    digest bytea NOT NULL CHECK (octet_length(digest) = 32),
    issue_time timestamptz NOT NULL,
    PRIMARY KEY (tenant_id, credit_note_id),
    FOREIGN KEY (tenant_id, number) REFERENCES invoices (tenant_id, number)
);
CREATE INDEX credit_notes_by_invoice ON credit_notes (tenant_id, number);

CREATE TRIGGER subscriptions_are_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON subscriptions
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_change();
CREATE TRIGGER credits_are_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON credits
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_change();
CREATE TRIGGER invoice_closings_are_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON invoice_closings
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_change();
CREATE TRIGGER invoices_are_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON invoices
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_change();
CREATE TRIGGER invoice_lines_are_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON invoice_lines
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_change();
CREATE TRIGGER credit_uses_are_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON credit_uses
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_change();
CREATE TRIGGER credit_notes_are_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON credit_notes
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_change();

ALTER TABLE subscriptions ENABLE ROW LEVEL SECURITY;
ALTER TABLE subscriptions FORCE ROW LEVEL SECURITY;
ALTER TABLE credits ENABLE ROW LEVEL SECURITY;
ALTER TABLE credits FORCE ROW LEVEL SECURITY;
ALTER TABLE invoice_closings ENABLE ROW LEVEL SECURITY;
ALTER TABLE invoice_closings FORCE ROW LEVEL SECURITY;
ALTER TABLE invoices ENABLE ROW LEVEL SECURITY;
ALTER TABLE invoices FORCE ROW LEVEL SECURITY;
ALTER TABLE invoice_lines ENABLE ROW LEVEL SECURITY;
ALTER TABLE invoice_lines FORCE ROW LEVEL SECURITY;
ALTER TABLE credit_uses ENABLE ROW LEVEL SECURITY;
ALTER TABLE credit_uses FORCE ROW LEVEL SECURITY;
ALTER TABLE credit_notes ENABLE ROW LEVEL SECURITY;
ALTER TABLE credit_notes FORCE ROW LEVEL SECURITY;

CREATE POLICY own_tenant ON subscriptions TO :service
    USING (tenant_id = (SELECT current_setting('app.tenant_id')::uuid)) WITH CHECK (tenant_id = (SELECT current_setting('app.tenant_id')::uuid));
CREATE POLICY own_tenant ON credits TO :service
    USING (tenant_id = (SELECT current_setting('app.tenant_id')::uuid)) WITH CHECK (tenant_id = (SELECT current_setting('app.tenant_id')::uuid));
CREATE POLICY own_tenant ON invoice_closings TO :service
    USING (tenant_id = (SELECT current_setting('app.tenant_id')::uuid)) WITH CHECK (tenant_id = (SELECT current_setting('app.tenant_id')::uuid));
CREATE POLICY own_tenant ON invoices TO :service
    USING (tenant_id = (SELECT current_setting('app.tenant_id')::uuid)) WITH CHECK (tenant_id = (SELECT current_setting('app.tenant_id')::uuid));
CREATE POLICY own_tenant ON invoice_lines TO :service
    USING (tenant_id = (SELECT current_setting('app.tenant_id')::uuid)) WITH CHECK (tenant_id = (SELECT current_setting('app.tenant_id')::uuid));
CREATE POLICY own_tenant ON credit_uses TO :service
    USING (tenant_id = (SELECT current_setting('app.tenant_id')::uuid)) WITH CHECK (tenant_id = (SELECT current_setting('app.tenant_id')::uuid));
CREATE POLICY own_tenant ON credit_notes TO :service
    USING (tenant_id = (SELECT current_setting('app.tenant_id')::uuid)) WITH CHECK (tenant_id = (SELECT current_setting('app.tenant_id')::uuid));

-- Invoices are written by the jobs role alone, also when an operator asks for one: no tenant's own transaction can make one.
CREATE POLICY every_tenant_read ON subscriptions FOR SELECT TO :jobs USING (true);
CREATE POLICY every_tenant_read ON credits FOR SELECT TO :jobs USING (true);
CREATE POLICY every_tenant_read ON erased_tenants FOR SELECT TO :jobs USING (true);
CREATE POLICY every_tenant_read ON credit_notes FOR SELECT TO :jobs USING (true);
CREATE POLICY every_tenant_read ON invoice_closings FOR SELECT TO :jobs USING (true);
CREATE POLICY every_tenant_close ON invoice_closings FOR INSERT TO :jobs WITH CHECK (close_time >= period_end);
CREATE POLICY every_tenant_read ON invoices FOR SELECT TO :jobs USING (true);
CREATE POLICY every_tenant_write ON invoices FOR INSERT TO :jobs WITH CHECK (true);
CREATE POLICY every_tenant_read ON invoice_lines FOR SELECT TO :jobs USING (true);
CREATE POLICY every_tenant_write ON invoice_lines FOR INSERT TO :jobs WITH CHECK (true);
CREATE POLICY every_tenant_read ON credit_uses FOR SELECT TO :jobs USING (true);
CREATE POLICY every_tenant_write ON credit_uses FOR INSERT TO :jobs WITH CHECK (true);

GRANT SELECT, INSERT ON subscriptions, credits, credit_notes TO :service;
GRANT SELECT ON invoice_closings, invoices, invoice_lines, credit_uses TO :service;
GRANT SELECT ON subscriptions, credits, credit_notes, erased_tenants TO :jobs;
GRANT SELECT, INSERT ON invoice_closings, invoices, invoice_lines, credit_uses TO :jobs;

-- Usage as it is billed, whatever it was recorded as: one row for each meter of each record. A record is billed by `use_time`, and by the
-- first invoice of its period or a later one that was closed after `record_time`. Another source of usage is one more branch.
CREATE VIEW billable_usage WITH (security_invoker = true) AS
SELECT n.tenant_id, 1::smallint AS source, n.entry_id AS usage_id, n.reserve_time AS use_time, n.record_time, 'SUM'::text AS aggregation,
       m.meter, m.quantity
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
SELECT u.tenant_id, 2::smallint, u.entry_id, u.reserve_time, u.record_time, 'SUM'::text, u.product_unit, u.quantity
FROM unit_entries u;
GRANT SELECT ON billable_usage TO :service, :jobs;

CREATE INDEX unit_entries_by_reserve_time ON unit_entries (tenant_id, reserve_time);
-- What was recorded long after its use is rare and is looked for by when it was recorded; what was not is found by its use, shortly before a
-- period's beginning. So no row of an ordinary call is in these two.
CREATE INDEX entries_recorded_late ON entries (tenant_id, record_time) WHERE record_time - reserve_time > interval '15 minutes';
CREATE INDEX unit_entries_recorded_late ON unit_entries (tenant_id, record_time) WHERE record_time - reserve_time > interval '15 minutes';

-- The days, in UTC, of use before p_start that was recorded from p_recorded_from to before p_recorded_before. The first must not be before
-- p_start: then whatever was used over a quarter of an hour before p_start was recorded that late.
CREATE FUNCTION late_days(p_tenant uuid, p_start timestamptz, p_recorded_from timestamptz, p_recorded_before timestamptz)
RETURNS TABLE (day timestamptz)
LANGUAGE sql STABLE SECURITY INVOKER
SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off
AS $$
    SELECT date_trunc('day', u.use_time, 'UTC') FROM metering.billable_usage u
    WHERE u.tenant_id = p_tenant AND u.use_time >= p_start - interval '15 minutes' AND u.use_time < p_start
      AND u.record_time >= p_recorded_from AND u.record_time < p_recorded_before
    UNION
    SELECT date_trunc('day', u.use_time, 'UTC') FROM metering.billable_usage u
    WHERE u.tenant_id = p_tenant AND u.use_time < p_start - interval '15 minutes' AND u.record_time - u.use_time > interval '15 minutes'
      AND u.record_time >= p_recorded_from AND u.record_time < p_recorded_before
$$;

-- What was used in each of some spans and recorded before a moment, by meter, of the meters that are charged.
CREATE FUNCTION usage_sums(p_tenant uuid, p_starts timestamptz[], p_ends timestamptz[], p_recorded_before timestamptz, p_meters text[])
RETURNS TABLE (span_start timestamptz, meter text, quantity numeric)
LANGUAGE sql STABLE SECURITY INVOKER
SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off
AS $$
    SELECT s.start_time, u.meter, sum(u.quantity)
    FROM unnest(p_starts, p_ends) AS s (start_time, end_time)
    CROSS JOIN LATERAL (
        SELECT b.meter,
               CASE b.aggregation WHEN 'COUNT' THEN sum(sign(b.quantity)) WHEN 'MAX' THEN max(b.quantity) ELSE sum(b.quantity) END AS quantity
        FROM metering.billable_usage b
        WHERE b.tenant_id = p_tenant AND b.use_time >= s.start_time AND b.use_time < s.end_time AND b.record_time < p_recorded_before
          AND b.meter = ANY (p_meters)
        GROUP BY b.meter, b.aggregation) u
    GROUP BY s.start_time, u.meter
$$;

-- Closes a period, or tells how it is closed. Outcomes: 1 closed, now or before, 2 not ended, 3 not the next one (the answer's period_end says
-- where the next one begins), 4 the tenant's subscription changed meanwhile: read it and come again.
CREATE FUNCTION close_period(
    p_tenant uuid, p_invoice uuid, p_start timestamptz, p_end timestamptz, p_tier_plan text, p_subscription integer
) RETURNS TABLE (outcome smallint, number integer, invoice_id uuid, period_start timestamptz, period_end timestamptz, close_time timestamptz,
                 tier_plan text)
LANGUAGE plpgsql VOLATILE SECURITY INVOKER AS $$
#variable_conflict use_column
DECLARE
    v_now timestamptz;
    v_last metering.invoice_closings;
BEGIN
    PERFORM pg_advisory_xact_lock(metering.tenant_lock(p_tenant));
    RETURN QUERY SELECT 1::smallint, c.number, c.invoice_id, c.period_start, c.period_end, c.close_time, c.tier_plan
                 FROM metering.invoice_closings c WHERE c.tenant_id = p_tenant AND c.period_start = p_start;
    IF FOUND THEN
        RETURN;
    END IF;
    v_now := clock_timestamp();
    SELECT c.* INTO v_last FROM metering.invoice_closings c WHERE c.tenant_id = p_tenant ORDER BY c.number DESC LIMIT 1;
    IF p_end > v_now THEN
        RETURN QUERY SELECT 2::smallint, NULL::integer, NULL::uuid, NULL::timestamptz, NULL::timestamptz, NULL::timestamptz, NULL::text;
    ELSIF v_last.period_end <> p_start THEN
        RETURN QUERY SELECT 3::smallint, NULL::integer, NULL::uuid, NULL::timestamptz, v_last.period_end, NULL::timestamptz, NULL::text;
    ELSIF p_subscription <> coalesce((SELECT max(s.number) FROM metering.subscriptions s WHERE s.tenant_id = p_tenant), 0) THEN
        RETURN QUERY SELECT 4::smallint, NULL::integer, NULL::uuid, NULL::timestamptz, NULL::timestamptz, NULL::timestamptz, NULL::text;
    ELSE
        RETURN QUERY
        INSERT INTO metering.invoice_closings AS c (tenant_id, number, invoice_id, period_start, period_end, close_time, tier_plan)
        VALUES (p_tenant, coalesce(v_last.number, 0) + 1, p_invoice, p_start, p_end, v_now, p_tier_plan)
        RETURNING 1::smallint, c.number, c.invoice_id, c.period_start, c.period_end, c.close_time, c.tier_plan;
    END IF;
END
$$;

REVOKE ALL ON FUNCTION late_days, usage_sums, close_period FROM PUBLIC;
GRANT EXECUTE ON FUNCTION late_days, usage_sums TO :service, :jobs;
GRANT EXECUTE ON FUNCTION close_period TO :jobs;
