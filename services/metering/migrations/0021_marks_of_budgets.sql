-- Whose row of the log leaves no mark of budgets: events, which are logged by the hour and marked by their own time, and refusals, which no budget
-- counts.
CREATE OR REPLACE FUNCTION mark_budgets() RETURNS trigger
LANGUAGE plpgsql SECURITY INVOKER SET search_path = metering, pg_temp AS $$
BEGIN
    INSERT INTO metering.budget_marks (tenant_id, use_quarter, product_unit)
    SELECT DISTINCT r.tenant_id, date_bin('15 minutes', r.use_time, timestamptz 'epoch'), r.product_unit
    FROM rows_added r
    WHERE r.event_type = '' AND r.refusal_reason = ''
      AND EXISTS (SELECT FROM metering.budgets b WHERE b.tenant_id = r.tenant_id AND b.product_unit = r.product_unit);
    RETURN NULL;
END
$$;
