"""Tenants, their configuration and the plans, read in one round trip each."""

from collections.abc import Sequence

import asyncpg

from services.kernel.ids import TenantId
from services.kernel.tenant_database import TenantDatabase
from services.tenant.plan import Plan
from services.tenant.tenant_record import DEFAULT_ASSISTANT_NAME, Tenant, TenantConfig, TenantFacts, TenantState

GET_TENANT = "SELECT tenant_id, slug, display_name, plan, region, state, create_time FROM tenant.get_tenant($1)"
LIST_TENANTS = "SELECT tenant_id, slug, display_name, plan, region, state, create_time FROM tenant.list_tenants($1, $2)"
GET_FACTS = "SELECT state, plan, region, config_version, placement, encrypt_content FROM tenant.get_facts($1)"
GET_CONFIG = """
SELECT tenant_id, version, plan, region, display_name, assistant_name, requests_per_minute, tokens_per_minute, tokens_per_day,
       cost_nano_usd_per_month, concurrent_calls, context_tokens, weight, default_model, allowed_models, default_max_output_tokens,
       max_output_tokens
FROM tenant.get_config($1)
"""
LIST_PLANS = """
SELECT v.plan, v.requests_per_minute, v.tokens_per_minute, v.tokens_per_day, v.cost_nano_usd_per_month, v.concurrent_calls,
       v.context_tokens, v.weight, v.default_model, v.allowed_models, v.default_max_output_tokens, v.max_output_tokens
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
        if row is None:
            return None
        return TenantConfig(
            tenant_id=tenant_id,
            version=row["version"],
            region=row["region"],
            display_name=row["display_name"],
            # Settings are written one step after the tenant: a service that asks in between gets the default.
            assistant_name=row["assistant_name"] or DEFAULT_ASSISTANT_NAME,
            plan=_plan(row),
        )

    async def list_plans(self) -> Sequence[Plan]:
        """Returns the plans in force, from the smallest to the largest."""
        return [_plan(row) for row in await self._database.call(None, LIST_PLANS)]


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


def _plan(row: asyncpg.Record) -> Plan:
    return Plan(
        name=row["plan"],
        requests_per_minute=row["requests_per_minute"],
        tokens_per_minute=row["tokens_per_minute"],
        tokens_per_day=row["tokens_per_day"],
        cost_nano_usd_per_month=row["cost_nano_usd_per_month"],
        concurrent_calls=row["concurrent_calls"],
        context_tokens=row["context_tokens"],
        weight=row["weight"],
        default_model=row["default_model"],
        allowed_models=tuple(row["allowed_models"]),
        default_max_output_tokens=row["default_max_output_tokens"],
        max_output_tokens=row["max_output_tokens"],
    )
