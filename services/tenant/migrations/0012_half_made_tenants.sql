-- Creations that stopped before they were sagas are undone: what was asked for is not kept of them, so that nobody could finish them.
-- Undoing is what a saga does with a creation that fails for good: every service removes what it has, the slug is free, the tenant FAILED.
-- One that moved within the last hour may still have a caller; repeated, the request finishes it.

ALTER TABLE tenant.tenants NO FORCE ROW LEVEL SECURITY;
ALTER TABLE tenant.provisioning NO FORCE ROW LEVEL SECURITY;
ALTER TABLE tenant.sagas NO FORCE ROW LEVEL SECURITY;
ALTER TABLE tenant.saga_steps NO FORCE ROW LEVEL SECURITY;

INSERT INTO tenant.sagas (tenant_id, kind, request_id, content_digest, state, subject, reason, cause, due_time)
SELECT p.tenant_id, 'PROVISION', p.request_id, p.content_digest, 'COMPENSATING', 'mesh:tenant', 'left half made by an earlier release',
       'HALF_MADE', clock_timestamp() + interval '10 seconds'
FROM tenant.provisioning p JOIN tenant.tenants t ON t.tenant_id = p.tenant_id
WHERE t.state = 'PROVISIONING' AND p.update_time < clock_timestamp() - interval '1 hour'
  AND NOT EXISTS (SELECT FROM tenant.sagas s WHERE s.tenant_id = p.tenant_id AND s.kind = 'PROVISION');

-- Every step but the last, as if it had begun: undoing what never was is safe, and missing what was is not.
INSERT INTO tenant.saga_steps (tenant_id, kind, step, state)
SELECT s.tenant_id, s.kind, n.step, 'BEGUN'
FROM tenant.sagas s CROSS JOIN unnest(ARRAY[1, 2, 3, 4, 5, 6, 7, 8, 10]) AS n(step)
WHERE s.kind = 'PROVISION' AND s.state = 'COMPENSATING' AND s.cause = 'HALF_MADE'
ON CONFLICT DO NOTHING;

ALTER TABLE tenant.tenants FORCE ROW LEVEL SECURITY;
ALTER TABLE tenant.provisioning FORCE ROW LEVEL SECURITY;
ALTER TABLE tenant.sagas FORCE ROW LEVEL SECURITY;
ALTER TABLE tenant.saga_steps FORCE ROW LEVEL SECURITY;
