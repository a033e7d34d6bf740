"""The limits under load: four processes on one store, wrong clocks, replicas that are killed, and every decision replayed."""

import asyncio
import os
import random
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from mesh.common.v1 import limit_rule_pb2 as rules
from mesh.tenant.v1 import tenant_service_pb2
from services.kernel.ids import TenantId, new_uuid7
from services.ratelimit.adapters.redis_link import PipelinedLink
from services.ratelimit.adapters.tenant_rules import terms_of
from services.ratelimit.limit_rule import SECOND_US
from tests.ratelimit.callers import now_us
from tests.ratelimit.limiters import running_limiters
from tests.ratelimit.load import EVERYBODY, Load, LoadedTenant
from tests.ratelimit.replay import Findings, Replay
from tests.ratelimit.rules import SHADOW, rule
from tests.ratelimit.scripted_peer import Peer, running_peer
from tests.ratelimit.store_reader import StoreReader, counted
from tests.support.stores import RedisStore, running_redis
from tests.support.waiting import eventually

DECISIONS = int(os.environ.get("TENANTRY_TEST_DECISIONS", "3000"))
CALLERS = 24
LEASE_SECONDS = 5
# Seconds by which the limits' clocks are wrong: days off, so that they do not even know which day it is, and a little.
SKEWS = (0.0, 3 * 86_400.0, -2 * 86_400.0, 37.0)


def of_size(size: int) -> rules.LimitRules:
    """Rules of all three scopes; at size 1 no log has so many entries that it is rounded."""
    return rules.LimitRules(
        rules=[
            rule("all", "requests", 2, 60 * size),
            rule("all_tokens", "tokens", 3, 6_000 * size),
            rule("all_cost", "cost", "month", 40_000 * DECISIONS),
            rule("all_retries", "retries", 2, 6 * size),
            rule("all_running", "running", "running", 30 * size),
            rule("user", "requests", 2, 25 * size, "user"),
            rule("user_tokens", "tokens", "day", 2 * DECISIONS * size, "user"),
            rule("user_running", "running", "running", 8 * size, "user"),
            rule("feature", "requests", 2, 20 * size, "feature"),
            rule("both", "requests", 2, 9 * size, "both"),
            rule("both_cost", "cost", "day", 5_000 * DECISIONS * size, "both"),
            rule("tried", "tokens", 2, 900 * size, mode=SHADOW),
            rule("searches", "searches", 2, 12 * size),
            rule("searches_user", "searches", 5, 20 * size, "user"),
            rule("interviews", "interviews", "day", 1 + DECISIONS // 200),
            rule("interviews_user", "interviews", 2, 8 * size, "user"),
        ]
    )


@pytest.fixture
async def peer() -> AsyncIterator[Peer]:
    """The ledger and the tenant service."""
    async with running_peer() as running:
        yield running


@pytest.fixture
async def own_redis() -> AsyncIterator[RedisStore]:
    """A Redis that nothing else keeps busy."""
    async with running_redis() as server:
        yield server


def loaded_tenant(peer: Peer, told: rules.LimitRules) -> LoadedTenant:
    """A tenant with these rules."""
    context = peer.tenants.context(TenantId(new_uuid7()), told)
    return LoadedTenant(context, terms_of(tenant_service_pb2.TenantConfig(limit_rules=told)), EVERYBODY, ["searches", "interviews"])


@pytest.mark.slow
@pytest.mark.timeout(1800)
async def test_no_decision_of_a_loaded_and_dying_service_is_wrong(own_redis: RedisStore, peer: Peer, tmp_path: Path) -> None:
    """Four replicas, one killed each second, wrong clocks, lost answers: nothing admitted too much or refused wrongly, nothing left."""
    tenants = [loaded_tenant(peer, of_size(size)) for size in (1, 1, 1, 12, 12)]
    link = PipelinedLink(own_redis.url, timeout_seconds=10.0)
    rng = random.Random(7)
    async with running_limiters(peer, own_redis.url, tmp_path, SKEWS, rng=rng, redis_timeout_seconds=2.0) as limiters:
        load = Load(limiters, peer, tenants, DECISIONS, rng)
        reader = StoreReader(link, [tenant.context.tenant_id for tenant in tenants], load.log.kept)
        reading = asyncio.ensure_future(reader.run())
        killing = asyncio.ensure_future(limiters.kill_one_each(1.0))
        started = asyncio.get_running_loop().time()
        await load.run(CALLERS)
        took = asyncio.get_running_loop().time() - started
        limiters.spared = True
        await killing
        # One lease, a sweep and the sweep that follows it: whatever the dead left was asked about, and the ledger's word is in.
        await asyncio.sleep(LEASE_SECONDS + 2.5)
        load.outbox.resolve()
        await load.outbox.empty()

        async def nothing_is_left() -> bool:
            return await reader.outstanding() == 0

        await eventually(nothing_is_left, within_seconds=5)
        reading.cancel()
        await reader.read_ended()
        assert await reader.read_held() == []
    findings = Findings()
    for tenant in tenants:
        replay = Replay(load.log, tenant.context.tenant_id, tenant.terms, LEASE_SECONDS * SECOND_US, findings)
        replay.run()
        await compare(replay, reader, tenant)
    await link.close()
    assert {told.asked.id for told in load.log.held} <= set(load.log.kept), "every hold that a caller was told of is in the store"
    print(  # noqa: T201 - how much was proven
        f"{load.log.decision_count} decisions in {took:.0f} s ({load.log.decision_count / took:.0f}/s), "
        f"{limiters.kill_count} kills, {load.log.unknown_count} answers lost; replayed: {findings.admitted_count} admitted, "
        f"{findings.raised_count} raised, {findings.refused_count} refused ({findings.rounded_count} within a quantum), "
        f"{findings.figure_count} figures; others {load.log.others}"
    )
    assert (findings.over_admissions[:5], findings.false_refusals[:5], findings.wrong_figures[:5]) == ([], [], [])
    assert findings.admitted_count > DECISIONS // 10
    assert findings.refused_count > DECISIONS // 10
    assert set(load.log.others) <= {"DEPENDENCY_UNAVAILABLE", "RESERVATION_LOST", "DEADLINE_EXCEEDED"}


async def compare(replay: Replay, reader: StoreReader, tenant: LoadedTenant) -> None:
    """Every counter of the store is the sum of the records that it kept."""
    now = now_us()
    stored = await reader.counters(tenant.context.tenant_id)
    for name, counter in replay.counters.items():
        if not name.startswith("running:"):
            counter.pass_to(now)
            value = stored.get(name)
            assert counter.low <= (counted(value, now, counter.window_us) if value else 0) <= counter.most(now), name
    assert {name for name in stored if "~" not in name} <= set(replay.counters)
