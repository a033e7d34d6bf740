-- What the sweeps over all tenants read: the few sagas that have not ended, and how old those are that have.

CREATE INDEX sagas_due ON tenant.sagas (tenant_id, due_time) WHERE state IN ('RUNNING', 'COMPENSATING');
CREATE INDEX events_delivered ON tenant.events (tenant_id, end_time) WHERE state = 'DELIVERED';
GRANT SELECT (end_time) ON tenant.sagas TO :jobs;
