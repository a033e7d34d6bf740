"""Walls of what was added to the ledger: budgets, receivers, exports, re-ratings and the comparison with the provider."""

from pathlib import Path

from tests.isolation.mutations import REACHES, STORES, WALLS, Edit, Mutation, one

HOUSE = "tests/contract/test_house.py::test_every_statement_on_tenant_data_names_the_tenant"
JOBS = f"{STORES}::test_the_jobs_role_does_its_jobs_and_nothing_else"

_OWN = "(tenant_id = (SELECT current_setting('app.tenant_id')::uuid))"
_ROOT = Path(__file__).parents[2]
_ADAPTERS = "services/metering/adapters"
_SERVICERS = "services/metering/servicers"


def _migration(name: str) -> str:
    return next(str(path.relative_to(_ROOT)) for path in (_ROOT / "services/metering/migrations").glob(f"[0-9]*[0-9]_{name}.sql"))


_BUDGETS, _EXPORTS, _RERATING, _RECONCILIATION = map(_migration, ("budgets", "exports", "rerating", "reconciliation"))


def _open(table: str, path: str) -> Mutation:
    found = f"CREATE POLICY own_tenant ON {table} TO :service\n    USING "
    return one(
        f"policy of metering.{table} lets everybody through",
        path,
        f"{found}{_OWN} WITH CHECK {_OWN}",
        f"{found}(true) WITH CHECK (true)",
        REACHES,
    )


def _forgetful(statement: str, path: str, find: str) -> Mutation:
    return one(f"{statement} forgets its tenant", path, find, find.replace("tenant_id = $1", "$1::uuid IS NOT NULL"), HOUSE)


_POLICIES = (
    *(_open(table, _BUDGETS) for table in ("budgets", "budget_alerts", "budget_marks", "webhook_endpoints", "webhook_deliveries")),
    *(_open(table, _EXPORTS) for table in ("stripe_customers", "export_outbox")),
    *(_open(table, _RERATING) for table in ("reratings", "rerating_ends")),
)

_ROLES = (
    Mutation(
        "the jobs role may change budgets",
        (JOBS,),
        (
            Edit(
                _BUDGETS,
                "CREATE POLICY every_tenant_read ON budgets FOR SELECT TO :jobs USING (true);",
                "CREATE POLICY every_tenant_read ON budgets TO :jobs USING (true);",
            ),
            Edit(
                _BUDGETS,
                "GRANT SELECT ON budgets, webhook_endpoints TO :jobs;",
                "GRANT SELECT, UPDATE, DELETE ON budgets, webhook_endpoints TO :jobs;",
            ),
        ),
    ),
    Mutation(
        "the jobs role may change whom Stripe bills",
        (JOBS,),
        (
            Edit(
                _EXPORTS,
                "CREATE POLICY every_tenant_read ON stripe_customers FOR SELECT TO :jobs USING (true);",
                "CREATE POLICY every_tenant_read ON stripe_customers TO :jobs USING (true);",
            ),
            Edit(_EXPORTS, "GRANT SELECT ON stripe_customers TO :jobs;", "GRANT SELECT, UPDATE, DELETE ON stripe_customers TO :jobs;"),
        ),
    ),
    one(
        "the service may read what is compared over all tenants",
        _RECONCILIATION,
        "GRANT SELECT, INSERT, UPDATE ON reconciliations TO :jobs;",
        "GRANT SELECT, INSERT, UPDATE ON reconciliations TO :jobs, :service;",
        f"{STORES}::test_what_is_compared_over_all_tenants_is_closed_to_the_service",
    ),
    one(
        "no trigger guards alerts",
        _BUDGETS,
        "CREATE TRIGGER budget_alerts_only_forget BEFORE UPDATE OR DELETE ON budget_alerts FOR EACH ROW EXECUTE FUNCTION only_forget();\n",
        "",
        "tests/metering/test_walls.py::test_an_alert_never_changes",
    ),
    one(
        "a re-rating may be edited by the service",
        _RERATING,
        "GRANT SELECT, INSERT ON reratings, rerating_ends TO :service;",
        "GRANT SELECT, INSERT, UPDATE, DELETE ON reratings, rerating_ends TO :service;",
        f"{WALLS}::test_changing_what_was_recorded_is_not_granted",
    ),
)

_STATEMENTS = (
    _forgetful(
        "removing a budget",
        f"{_ADAPTERS}/postgres_budgets.py",
        'DELETE_BUDGET = "DELETE FROM metering.budgets WHERE tenant_id = $1 AND name = $2 RETURNING budget_id"',
    ),
    _forgetful(
        "removing a receiver",
        f"{_ADAPTERS}/postgres_webhooks.py",
        'DELETE_ENDPOINT = "DELETE FROM metering.webhook_endpoints WHERE tenant_id = $1 AND endpoint_id = $2"',
    ),
    _forgetful(
        "whom Stripe bills",
        f"{_ADAPTERS}/postgres_export_settings.py",
        'SELECT_CUSTOMER = "SELECT customer_id FROM metering.stripe_customers WHERE tenant_id = $1"',
    ),
)

_CHECKS = (
    one(
        "a page of alerts goes on in another tenant's",
        f"{_SERVICERS}/budget_messages.py",
        'return f"budget_alerts:{tenant_id}"',
        'return "budget_alerts"',
        "tests/metering/test_budgets.py::test_alerts_page_newest_first",
    ),
    one(
        "a customer of Stripe's is nobody's",
        f"{_SERVICERS}/export_sinks.py",
        "        tenant_id = current_tenant().tenant_id\n        if tenant_id is None:\n            raise",
        "        tenant_id = current_tenant().tenant_id or TenantId(UUID(int=1))\n        if tenant_id is None:\n            raise",
        "tests/metering/test_stripe_export.py::test_only_operators_set_and_see_exports",
    ),
    one(
        "what waits is told of every tenant",
        f"{_SERVICERS}/export_sinks.py",
        "await self._settings.waiting(tenant_id, sink, after,",
        "await self._settings.waiting(None, sink, after,",
        "tests/metering/test_stripe_export.py::test_what_waits_is_listed_of_the_tenant_that_is_named",
    ),
    one(
        "calls of no tenant are rated anew",
        f"{_SERVICERS}/prices.py",
        '        raise InvalidRequest("x-tenant-id", "must name the tenant whose calls are rated anew")',
        '        tenant_id = TenantId(parse_uuid("00000000-0000-0000-0000-000000000001", ""))',
        "tests/metering/test_rerating.py::test_nothing_is_done_unseen_or_before_its_time_or_beside_another",
    ),
    one(
        "a secret of a receiver opens in another's row",
        "services/metering/webhooks/secrets.py",
        'row_identity("metering.webhook_endpoints", "secret", endpoint_id.bytes)',
        'row_identity("metering.webhook_endpoints", "secret", b"")',
        "tests/metering/test_webhooks.py::test_a_secret_moved_to_another_row_opens_nothing",
    ),
    one(
        "a request that two tenants' calls could be closes one",
        "services/metering/reconciliation/by_requests.py",
        "        elif len(rivals) > 1:",
        "        elif len(rivals) > 2:",
        "tests/metering/test_reconciliation.py::test_request_that_two_calls_could_be_closes_neither",
    ),
)

METERING_MUTATIONS = (*_POLICIES, *_ROLES, *_STATEMENTS, *_CHECKS)
