"""Tenants, their configuration and the plans, read in one round trip each."""

from collections.abc import Sequence

import asyncpg

from services.kernel.ids import TenantId
from services.kernel.tenant_database import TenantDatabase
from services.tenant.adapters.configuration_rows import configuration_of, plan_of
from services.tenant.effective_config import effective
from services.tenant.plan import Plan
from services.tenant.tenant_record import Tenant, TenantConfig, TenantFacts, TenantState

GET_TENANT = "SELECT tenant_id, slug, display_name, plan, region, state, create_time FROM tenant.get_tenant($1)"
LIST_TENANTS = "SELECT tenant_id, slug, display_name, plan, region, state, create_time FROM tenant.list_tenants($1, $2)"
GET_FACTS = "SELECT state, plan, region, config_version, placement, encrypt_content FROM tenant.get_facts($1)"
GET_CONFIG = """
SELECT tenant_id, version, region, placement, display_name, create_time, terms, features, settings, ladder
FROM tenant.get_limited_config($1)
"""
LIST_PLANS = """
SELECT to_jsonb(v) AS terms,
       (SELECT jsonb_object_agg(f.feature, jsonb_build_object('enabled', f.enabled, 'limit', f.usage_limit))
        FROM tenant.plan_features f WHERE f.plan = v.plan AND f.version = v.version) AS features
FROM tenant.plans p JOIN tenant.plan_versions v ON v.plan = p.plan AND v.version = p.version
ORDER BY p.position
"""


class PostgresTenants:
    """The tenant directory and the plan directory on the service's own role."""

    def __init__(self, database: TenantDatabase) -> None:
        self._database = database

    async def get_tenant(self, tenant_id: TenantId) -> Tenant | None:
        """Returns the tenant."""
        row = await self._database.fetch_row(tenant_id, GET_TENANT, tenant_id)
        return None if row is None else _tenant(row)

    async def list_tenants(self, after_slug: str, limit: int) -> Sequence[Tenant]:
        """Returns at most `limit` tenants by slug; the function enters each tenant in turn."""
        return [_tenant(row) for row in await self._database.call(None, LIST_TENANTS, after_slug, limit)]

    async def get_facts(self, tenant_id: TenantId) -> TenantFacts | None:
        """Returns what a token says of the tenant."""
        row = await self._database.fetch_row(tenant_id, GET_FACTS, tenant_id)
        return None if row is None else tenant_facts(row)

    async def get_config(self, tenant_id: TenantId) -> TenantConfig | None:
        """Returns the tenant's configuration."""
        row = await self._database.fetch_row(tenant_id, GET_CONFIG, tenant_id)
        return None if row is None else effective(configuration_of(row))

    async def list_plans(self) -> Sequence[Plan]:
        """Returns the plans in force, from the smallest to the largest."""
        return [plan_of(row) for row in await self._database.call(None, LIST_PLANS)]


def tenant_facts(row: asyncpg.Record) -> TenantFacts:
    """Builds the facts from the columns of `tenant.tenant_facts`."""
    return TenantFacts(
        state=TenantState(row["state"]),
        tier=row["plan"],
        region=row["region"],
        config_version=row["config_version"],
        placement=row["placement"],
        encrypt_content=row["encrypt_content"],
    )


def _tenant(row: asyncpg.Record) -> Tenant:
    return Tenant(
        tenant_id=TenantId(row["tenant_id"]),
        slug=row["slug"],
        display_name=row["display_name"],
        plan=row["plan"],
        region=row["region"],
        state=TenantState(row["state"]),
        create_time=row["create_time"],
    )
