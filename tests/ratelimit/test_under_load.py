"""The limits under load: four processes on one store, wrong clocks, replicas that are killed, and every decision replayed."""

import asyncio
import os
import random
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from pathlib import Path
from uuid import UUID

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
SEED = int(os.environ.get("TENANTRY_TEST_SEED", "7"))
CALLERS = 24
LEASE_SECONDS = 5
# Seconds by which the limits' clocks are wrong: days off, so that they do not even know which day it is, and a little.
SKEWS = (0.0, 3 * 86_400.0, -2 * 86_400.0, 37.0)


def of_size(size: int, *, tight: bool = False) -> rules.LimitRules:
    """Rules of all three scopes; at size 1 no log has so many entries that it is rounded. Tight: days and months are used up."""
    month = (15 + 5 * size if tight else 40_000) * DECISIONS
    user_day = (8 + 3 * size) * DECISIONS // 100 if tight else 2 * DECISIONS * size
    both_day = (27 + 9 * size) * DECISIONS // 20 if tight else 5_000 * DECISIONS * size
    return rules.LimitRules(
        rules=[
            rule("all", "requests", 2, 60 * size),
            rule("all_tokens", "tokens", 3, 2_500 * size),
            rule("all_cost", "cost", "month", month),
            rule("all_retries", "retries", 2, 6 * size),
            rule("all_running", "running", "running", 30 * size),
            rule("user", "requests", 2, 25 * size, "user"),
            rule("user_tokens", "tokens", "day", user_day, "user"),
            rule("user_running", "running", "running", 8 * size, "user"),
            rule("feature", "requests", 2, 20 * size, "feature"),
            rule("both", "requests", 2, 9 * size, "both"),
            rule("both_cost", "cost", "day", both_day, "both"),
            rule("tried", "tokens", 2, 900 * size, mode=SHADOW),
            rule("searches", "searches", 2, 12 * size),
            rule("searches_user", "searches", 5, 20 * size, "user"),
            rule("interviews", "interviews", "day", 1 + DECISIONS // 800),
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
    terms = terms_of(tenant_service_pb2.TenantConfig(limit_rules=told))
    return LoadedTenant(peer.tenants, TenantId(new_uuid7()), told, terms, EVERYBODY, ["searches", "interviews"])


async def left_behind(reader: StoreReader) -> list[UUID]:
    """Leases that outlived whoever had them: none, once each has ended and been asked about."""
    await asyncio.sleep(LEASE_SECONDS)
    with suppress(TimeoutError):
        await eventually(reader.nothing_leased, within_seconds=LEASE_SECONDS + 10)
    return await reader.leased()


@pytest.mark.slow
@pytest.mark.timeout(1800)
async def test_no_decision_of_a_loaded_and_dying_service_is_wrong(own_redis: RedisStore, peer: Peer, tmp_path: Path) -> None:
    """Four replicas, one killed each second, wrong clocks, lost answers: nothing admitted too much or refused wrongly, nothing left."""
    sizes = ((1, True), (1, False), (1, False), (12, True), (12, False))
    tenants = [loaded_tenant(peer, of_size(size, tight=tight)) for size, tight in sizes]
    link = PipelinedLink(own_redis.url, timeout_seconds=10.0)
    rng = random.Random(SEED)
    async with running_limiters(peer, own_redis.url, tmp_path, SKEWS, rng=rng, redis_timeout_seconds=2.0) as limiters:
        load = Load(limiters, peer, tenants, DECISIONS, rng)
        reader = StoreReader(link, [tenant.tenant_id for tenant in tenants], load.log.kept)
        reading = asyncio.ensure_future(reader.run())
        killing = asyncio.ensure_future(limiters.kill_one_each(1.0))
        started = asyncio.get_running_loop().time()
        await load.run(CALLERS)
        took = asyncio.get_running_loop().time() - started
        limiters.spared = True
        await killing
        residual = await left_behind(reader)
        load.outbox.resolve()
        await load.outbox.empty()
        reading.cancel()
        await reader.read_ended()
        residual += await reader.read_held()
        outstanding = await reader.outstanding()
    findings = Findings()
    wrong_sums: list[str] = []
    for tenant in tenants:
        calls = peer.ledger.of(tenant.tenant_id).calls
        replay = Replay(load.log, tenant.tenant_id, tenant.terms, LEASE_SECONDS * SECOND_US, findings, calls)
        replay.run()
        wrong_sums += await differences(replay, reader, tenant)
    await link.close()
    print(  # noqa: T201 - how much was proven
        f"seed {SEED}: {load.log.decision_count} decisions in {took:.0f} s ({load.log.decision_count / took:.0f}/s), "
        f"{limiters.kill_count} kills, {load.log.unknown_count} answers lost; replayed: {findings.admitted_count} admitted, "
        f"{findings.raised_count} raised, {findings.refused_count} refused ({findings.refused_raise_count} raises, "
        f"{findings.rounded_count} within a quantum), {findings.figure_count} figures; "
        f"refusing {dict(findings.refusing_rules)}, others {load.log.others}"
    )
    lost = {told.asked.id for told in load.log.held} - set(load.log.kept)
    wrong: dict[str, Sequence[object]] = {
        "over-admissions": findings.over_admissions,
        "false refusals": findings.false_refusals,
        "residual holds": residual,
        "wrong figures": findings.wrong_figures,
        "wrong sums": wrong_sums,
        "unfounded ends": findings.unfounded_ends,
        "second holds": [*load.log.second_holds, *findings.moved_holds],
        "wrong times": load.log.wrong_times,
        "holds of which the store knows nothing": list(lost),
    }
    print(", ".join(f"{name}: {len(found)}" for name, found in wrong.items()))  # noqa: T201 - as above
    assert {name: found[:5] for name, found in wrong.items() if found} == {}
    assert outstanding == 0
    assert findings.admitted_count > DECISIONS // 10
    assert findings.refused_count > DECISIONS // 10
    assert findings.refused_raise_count > 0
    # Whatever the pace of the load: these are used up.
    assert findings.refusing_rules.keys() >= {"all_cost", "user_tokens", "both_cost", "interviews"}
    assert set(load.log.others) <= {"DEPENDENCY_UNAVAILABLE", "RESERVATION_LOST", "DEADLINE_EXCEEDED"}


async def differences(replay: Replay, reader: StoreReader, tenant: LoadedTenant) -> list[str]:
    """The counters of the store that are not the sum of the records that it kept."""
    now = now_us()
    stored = await reader.counters(tenant.tenant_id)
    different = [name for name in stored if "~" not in name and name not in replay.counters]
    for name, counter in replay.counters.items():
        if not name.startswith("running:"):
            counter.pass_to(now)
            value = stored.get(name)
            if not counter.low <= (counted(value, now, counter.window_us) if value else 0) <= counter.most(now):
                different.append(name)
    return different
