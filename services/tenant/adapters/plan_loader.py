"""Brings plans.yaml into the database as the schema's owner. Refuses to change what a version stands for."""

import json
from pathlib import Path

import yaml

from services.kernel.ids import NO_TENANT
from services.kernel.tenant_database import Connection, JobsDatabase
from services.tenant.adapters.postgres_changes import announce
from services.tenant.change_hub import ChangeKind
from services.tenant.plan import Plan, PlanCatalog, needs_loading, read_catalog
from services.tenant.plan_rules import limit_terms_form

BECOME_OWNER = "SET LOCAL ROLE tenant_owner"
# Two processes that migrate at once take turns; the lock ends with the transaction.
LOCK_CATALOGS = "LOCK TABLE tenant.plan_catalogs IN SHARE ROW EXCLUSIVE MODE"
SELECT_LOADED = "SELECT version, content_digest FROM tenant.plan_catalogs ORDER BY version DESC LIMIT 1"
SELECT_NAMES = "SELECT plan FROM tenant.plans"
INSERT_CATALOG = "INSERT INTO tenant.plan_catalogs (version, content_digest) VALUES ($1, $2)"
UPSERT_PLAN = """
INSERT INTO tenant.plans (plan, position, version) VALUES ($1, $2, $3)
ON CONFLICT (plan) DO UPDATE SET position = excluded.position, version = excluded.version
"""
INSERT_TERMS = """
INSERT INTO tenant.plan_versions (
    plan, version, requests_per_minute, tokens_per_minute, tokens_per_day, cost_nano_usd_per_month, concurrent_calls, context_tokens,
    weight, default_model, allowed_models, default_max_output_tokens, max_output_tokens, tokens_per_month, data_retention_days,
    encrypt_content, isolation, limit_terms
) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16, $17, $18::jsonb)
"""
INSERT_FEATURE = "INSERT INTO tenant.plan_features (plan, version, feature, enabled, usage_limit) VALUES ($1, $2, $3, $4, $5)"
# The nil tenant: every tenant's terms may be others now.


def read_plan_file(plan_file: Path) -> PlanCatalog:
    """Reads plans.yaml. Raises: PlanCatalogRefused."""
    return read_catalog(yaml.safe_load(plan_file.read_text(encoding="utf-8")))


async def load_plans(dsn_admin: str, catalog: PlanCatalog) -> bool:
    """Loads the catalog; True when it was new. Idempotent. Raises: PlanCatalogRefused."""
    database = await JobsDatabase.open(dsn_admin, max_size=1, application_name="tenantry-tenant-plans")
    try:
        async with database.transaction() as connection:
            return await _load(connection, catalog)
    finally:
        await database.close()


async def _load(connection: Connection, catalog: PlanCatalog) -> bool:
    await connection.execute(BECOME_OWNER)
    await connection.execute(LOCK_CATALOGS)
    loaded = await connection.fetchrow(SELECT_LOADED)
    names = frozenset(row["plan"] for row in await connection.fetch(SELECT_NAMES))
    version, digest = (None, None) if loaded is None else (loaded["version"], loaded["content_digest"])
    if not needs_loading(catalog, version, digest, names):
        return False
    await connection.execute(INSERT_CATALOG, catalog.version, catalog.digest())
    for position, plan in enumerate(catalog.plans):
        await connection.execute(UPSERT_PLAN, plan.name, position, catalog.version)
        await _insert_terms(connection, plan, catalog.version)
        for feature in plan.features:
            await connection.execute(INSERT_FEATURE, plan.name, catalog.version, feature.name, feature.enabled, feature.limit)
    await announce(connection, NO_TENANT, ChangeKind.PLANS)
    return True


async def _insert_terms(connection: Connection, plan: Plan, version: int) -> None:
    await connection.execute(
        INSERT_TERMS,
        plan.name,
        version,
        plan.requests_per_minute,
        plan.tokens_per_minute,
        plan.tokens_per_day,
        plan.cost_nano_usd_per_month,
        plan.concurrent_calls,
        plan.context_tokens,
        plan.weight,
        plan.default_model,
        list(plan.allowed_models),
        plan.default_max_output_tokens,
        plan.max_output_tokens,
        plan.tokens_per_month,
        plan.data_retention_days,
        plan.encrypt_content,
        list(plan.isolation),
        json.dumps(limit_terms_form(plan.limit_terms)),
    )
