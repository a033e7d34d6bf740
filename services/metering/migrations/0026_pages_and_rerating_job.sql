-- Lists that are read page by page by their keys, and re-ratings that a job ends.

-- Credits in the order they were granted, and what invoices took of each.
CREATE INDEX credits_by_record_time ON credits (tenant_id, record_time, credit_id);
CREATE INDEX credit_uses_by_credit ON credit_uses (tenant_id, credit_id) INCLUDE (number, amount_nano_usd);

-- What is due for a receiver: without what waits for a later attempt, and without what was given up.
CREATE INDEX export_outbox_due ON export_outbox (tenant_id, sink, due_time) WHERE NOT is_dead;

-- Operators see which re-ratings of all tenants are done, and a job asks for those that are not. It writes as the service, for one tenant.
CREATE POLICY every_tenant_read ON reratings FOR SELECT TO :jobs USING (true);
CREATE POLICY every_tenant_read ON rerating_ends FOR SELECT TO :jobs USING (true);
GRANT SELECT ON reratings, rerating_ends TO :jobs;
