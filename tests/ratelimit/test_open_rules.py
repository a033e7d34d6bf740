"""Rules that admit while the store is away: from a small allowance, marked, and counted afterwards."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Collection
from dataclasses import dataclass, field, replace

import pytest

from mesh.common.v1 import limit_rule_pb2 as rules
from mesh.metering.v1 import ledger_service_pb2 as ledger
from mesh.ratelimit.v1 import rate_limit_service_pb2 as messages
from services.kernel.errors import MeshError, Unavailable
from services.kernel.ids import TenantId, new_uuid7
from services.ratelimit.adapters.redis_link import PipelinedLink
from services.ratelimit.limit_rule import MINUTE_US, LimitRule, Scope, Unit, Window
from services.ratelimit.limits import NOBODY, Demand, Subject
from services.ratelimit.open_allowance import DroppableStore, OpenAllowance, allowance
from services.ratelimit.terms import Terms
from tests.ratelimit.callers import AtService, AtStore, Service, Stores, eventually, running_service
from tests.ratelimit.rules import OPEN, rule
from tests.ratelimit.scripted_peer import LedgerCall, running_peer
from tests.support.stores import RedisStore as RedisServer
from tests.support.stores import running_redis

REQUESTS = rule("requests", "requests", 60, 20, on_store_failure=OPEN)


@pytest.fixture
async def own_redis() -> AsyncIterator[RedisServer]:
    """A Redis that a test may stop."""
    async with running_redis() as server:
        yield server


@pytest.fixture
async def service(own_redis: RedisServer) -> AsyncIterator[Service]:
    """The service on it, with scripted peers."""
    async with running_peer() as peer, running_service(own_redis.url, peer, redis_timeout_seconds=1.0) as running:
        yield running


async def admitted(tenant: AtService, times: int) -> list[messages.ReserveResponse]:
    """Those of so many calls that were admitted; the others must have been told that the store is away."""
    answers = await tenant.reserve_many(times)
    refusals = [answer for answer in answers if isinstance(answer, MeshError)]
    assert {error.reason_name for error in refusals} <= {"DEPENDENCY_UNAVAILABLE"}
    assert all(error.retry_after_seconds is not None for error in refusals)
    return [answer for answer in answers if isinstance(answer, messages.ReserveResponse)]


async def test_an_open_rule_admits_a_quarter_and_says_so(own_redis: RedisServer, service: Service) -> None:
    """In a window one process admits a quarter of the limit by itself, under the last known epoch; the rest is refused as closed."""
    tenant = service.tenant_with(REQUESTS)
    await tenant.reserve()
    await own_redis.server.stop()
    held = await admitted(tenant, 12)
    assert len(held) == 5
    assert {(answer.degraded, answer.epoch, len(answer.limits)) for answer in held} == {(True, 1, 0)}
    assert await admitted(tenant, 3) == []


@pytest.mark.parametrize("closed", [rule("running", "running", "running", 100), rule("money", "cost", "month", 100, on_store_failure=OPEN)])
async def test_one_closed_rule_closes_all(own_redis: RedisServer, service: Service, closed: rules.LimitRule) -> None:
    """A call is admitted only if every rule in question may be open; money never is, whatever its rule says."""
    tenant = service.tenant_with(REQUESTS, closed)
    await tenant.reserve()
    await own_redis.server.stop()
    assert await admitted(tenant, 3) == []


async def test_no_number_of_users_renews_the_allowance(link: PipelinedLink) -> None:
    """The whole tenant's window is kept while it is asked for, however many users of it were refused since."""
    allowance = OpenAllowance(Stores(link).decisions, clock=lambda: 1000.0)
    open_rule = LimitRule("all", Unit.REQUESTS, Window.SLIDING, 8, MINUTE_US, fails_open=True)
    terms, tenant_id = Terms([open_rule, replace(open_rule, name="each", scope=Scope.USER)]), TenantId(new_uuid7())
    allowance.learn(tenant_id, 1)
    admitted_users = [user for user in range(50_002) if allowance.admit(tenant_id, terms.plan(Subject(f"user-{user}")), Demand())]
    assert admitted_users == [0, 1]


@dataclass
class PartlyAway:
    """A store of which the part with these tenants does not answer."""

    store: DroppableStore
    away: Collection[TenantId]
    asked: list[TenantId] = field(default_factory=list)

    async def drop(self, tenant_id: TenantId) -> None:
        self.asked.append(tenant_id)
        if tenant_id in self.away:
            raise Unavailable("redis")
        await self.store.drop(tenant_id)


async def test_a_part_of_the_store_that_is_away_keeps_nobody_elses_counters(link: PipelinedLink) -> None:
    """What was admitted of tenants whose part is back is counted, however many wait for theirs, of whom a round asks for some."""
    stores = Stores(link)
    away = [TenantId(new_uuid7()) for _ in range(100)]
    store = PartlyAway(stores.decisions, away)
    allowance = OpenAllowance(store)
    terms = Terms([LimitRule("all", Unit.REQUESTS, Window.SLIDING, 8, MINUTE_US, fails_open=True)])
    back = await AtStore(stores, link, terms).loaded()
    for tenant_id in (*away, back.tenant_id):
        allowance.learn(tenant_id, 1)
        assert allowance.admit(tenant_id, terms.plan(NOBODY), Demand()) == 1
    looking = asyncio.ensure_future(allowance.run())
    await eventually(lambda: settled(allowance, back.tenant_id))
    looking.cancel()
    assert await link.send("EXISTS", f"{{{back.tenant_id}}}:meta") == 0
    assert len(store.asked) < 200
    assert all(allowance.owes(tenant_id) for tenant_id in away)


async def settled(allowance: OpenAllowance, tenant_id: TenantId) -> bool:
    """Whether nothing of the tenant is left to be counted."""
    return not allowance.owes(tenant_id)


async def test_an_open_rule_of_the_tenants_own_grants_no_unit(own_redis: RedisServer, service: Service) -> None:
    """What the plan does not include is refused while the store is away as ever: nothing of it is admitted from an allowance."""
    own = rule("ours", "searches", 60, 100, on_store_failure=OPEN, origin=rules.LIMIT_RULE_ORIGIN_TENANT)
    tenant = service.tenant_with(REQUESTS, own)
    await tenant.reserve()
    await own_redis.server.stop()
    assert (await tenant.reserve()).degraded
    with pytest.raises(MeshError) as caught:
        await tenant.consume("searches")
    assert caught.value.reason_name == "FEATURE"


async def test_a_tenant_never_seen_is_not_admitted(own_redis: RedisServer, service: Service) -> None:
    """Without a known epoch the ledger would not open its calls."""
    tenant = service.tenant_with(REQUESTS)
    await own_redis.server.stop()
    assert await admitted(tenant, 3) == []


async def test_what_was_admitted_is_counted_when_the_store_is_back(own_redis: RedisServer, service: Service) -> None:
    """The tenant's counters are dropped, and the ledger, which opened those calls, says what they are."""
    tenant = service.tenant_with(REQUESTS)
    await tenant.reserve()
    os.kill(own_redis.server.process.pid, signal.SIGSTOP)
    try:
        held = [answer for answer in await admitted(tenant, 5) if answer.degraded]
        for answer in held:
            call = LedgerCall(ledger.CALL_STATE_OPEN, answer.reserve_time.ToMicroseconds())
            service.peer.ledger.of(tenant.tenant_id).calls[new_uuid7().bytes] = call
    finally:
        os.kill(own_redis.server.process.pid, signal.SIGCONT)
    assert held

    async def counted() -> bool:
        try:
            return (await tenant.limits())["requests"].used == len(held)
        except MeshError:
            return False

    await eventually(counted)
    # One drop that was given up on may still be carried out, and then it is rebuilt twice.
    assert (await tenant.reserve()).epoch >= 2


async def test_units_of_open_rules_are_used_from_the_allowance(own_redis: RedisServer, service: Service) -> None:
    """Consume follows the same rule; a durable unit never does."""
    tenant = service.tenant_with(
        rule("searches", "searches", 60, 8, on_store_failure=OPEN), rule("interviews", "interviews", "day", 8, on_store_failure=OPEN)
    )
    await tenant.consume("searches")
    await tenant.consume("interviews")
    await own_redis.server.stop()
    assert [(await tenant.consume("searches")).degraded for _ in range(2)] == [True, True]
    for unit in ("searches", "interviews"):
        with pytest.raises(MeshError) as caught:
            await tenant.consume(unit)
        assert caught.value.code.name == "UNAVAILABLE"


async def test_refusals_stay_refusals_when_the_store_is_there(service: Service) -> None:
    """Open is about a store that is away: a rule that is reached refuses."""
    tenant = service.tenant_with(rule("one", "requests", 60, 1, on_store_failure=OPEN))
    await tenant.reserve()
    with pytest.raises(MeshError) as caught:
        await tenant.reserve()
    assert caught.value.reason_name == "PLAN_LIMIT"


def test_an_allowance_is_a_quarter_and_at_least_one() -> None:
    """Small limits still let something through; a limit of nothing does not."""
    of = {limit: allowance(LimitRule("x", Unit.REQUESTS, Window.SLIDING, limit, 60_000_000)) for limit in (0, 1, 3, 4, 7, 8, 1000)}
    assert of == {0: 0, 1: 1, 3: 1, 4: 1, 7: 1, 8: 2, 1000: 250}
