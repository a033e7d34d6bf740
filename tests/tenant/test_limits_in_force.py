"""A change of limits as a replica of another service sees it: through the feed of changes, in less than a second, under old tokens too."""

import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace

import pytest
from pydantic import SecretStr

from mesh.common.v1 import limit_rule_pb2 as rules_pb2
from mesh.tenant.v1 import configuration_service_pb2 as pb
from services.kernel.background import BackgroundTasks
from services.kernel.change_feed import ChangeFeed
from services.kernel.credential_resolver import CredentialResolver, remote_trust
from services.kernel.rpc.channel import MeshChannel
from services.kernel.tenant_config import TenantConfigCache
from services.kernel.tenant_context import TenantContext
from services.ratelimit.settings import RatelimitSettings
from services.tenant.adapters.plan_loader import load_plans, read_plan_file
from services.tenant.app import PLAN_FILE
from services.tenant.plan import PlanCatalog
from tests.support.stores import PostgresStore
from tests.support.waiting import eventually
from tests.tenant.harness import SERVICE_TOKENS, Harness, call, running_service, update

IN_FORCE_SECONDS = 1.0


@dataclass(frozen=True)
class Replica:
    """What a replica of ratelimit knows of tenants: who calls, and what each is held to."""

    resolver: CredentialResolver
    configs: TenantConfigCache
    feed: ChangeFeed

    async def limits(self, context: TenantContext) -> dict[str, int]:
        """The rules in force for the call's tenant, by name."""
        return {rule.name: rule.limit for rule in (await self.configs.get(context)).limit_rules.rules}


@pytest.fixture
async def own_harness(postgres: PostgresStore) -> AsyncIterator[Harness]:
    """A tenant service of the test's own: plan files change there."""
    async with running_service(postgres) as harness:
        yield harness


@pytest.fixture
async def replica(own_harness: Harness) -> AsyncIterator[Replica]:
    """A running replica that hears the feed."""
    settings = RatelimitSettings(service_token=SecretStr(SERVICE_TOKENS["ratelimit"]), listen_address="127.0.0.1:0")
    address = f"127.0.0.1:{own_harness.app.server.bound_port}"
    channel = MeshChannel(address, settings=settings, target_service="tenant")
    feed, background = ChangeFeed(channel), BackgroundTasks()
    configs = TenantConfigCache(channel, feed=feed)
    resolver, _ = remote_trust(channel, feed=feed)
    background.start("feed", feed.run)

    async def is_fresh() -> bool:
        return feed.is_fresh

    try:
        await eventually(is_fresh, within_seconds=10)
        yield Replica(resolver, configs, feed)
    finally:
        await background.close()
        await channel.close()


async def seconds_until_seen(replica: Replica, api_key: str, old: TenantContext, name: str, limit: int | None) -> float:
    """Waits until new callers and the holder of an old token are both held to the number; None: to no such rule."""

    async def is_seen() -> bool:
        new = await replica.resolver.resolve(api_key, None)
        return [(await replica.limits(context)).get(name) for context in (new, old)] == [limit, limit]

    began = time.monotonic()
    await eventually(is_seen, within_seconds=10)
    return time.monotonic() - began


async def test_a_changed_limit_is_in_force_at_a_replica_within_a_second(own_harness: Harness, replica: Replica) -> None:
    """A number, a rule, a plan and the plan file itself: a second after the answer each is what new calls and running ones are held to."""
    harness, created = own_harness, await own_harness.create()
    operator = harness.as_operator(created.tenant.tenant_id)
    old = await replica.resolver.resolve(created.api_key, None)
    assert (await replica.limits(old))["requests_per_minute"] == 60

    async def in_force(name: str, limit: int | None) -> bool:
        return await seconds_until_seen(replica, created.api_key, old, name, limit) < IN_FORCE_SECONDS

    await update(harness, operator, ["limits.requests_per_minute"], limits={"requests_per_minute": 61})
    assert await in_force("requests_per_minute", 61)
    rule = rules_pb2.LimitRule(
        name="ours",
        unit=rules_pb2.LIMIT_UNIT_TOKENS,
        window=rules_pb2.LIMIT_WINDOW_DAY,
        scope=rules_pb2.LIMIT_SCOPE_USER,
        limit=7,
    )
    await update(harness, operator, ["limit_rules.rules.ours"], limit_rules={"rules": [rule]})
    assert await in_force("ours", 7)
    await update(harness, operator, ["limit_rules.rules.ours"])
    assert await in_force("ours", None)
    await call(harness.configuration.ChangePlan, pb.ChangePlanRequest(plan="starter"), operator)
    assert await in_force("tokens_per_day", 200_000)
    catalog = read_plan_file(PLAN_FILE)
    others = tuple(replace(plan, tokens_per_day=plan.tokens_per_day + 1) for plan in catalog.plans)
    assert await load_plans(harness.admin_dsn, PlanCatalog(catalog.version + 1, others))
    assert await in_force("tokens_per_day", 200_001)
