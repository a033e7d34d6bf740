"""A batch of many tenants is put to the store at once, and each tenant is answered as if it had come by itself."""

import asyncio
import os
import random
import signal
from collections.abc import AsyncIterator, Awaitable, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID, uuid4

import pytest
from google.protobuf.duration_pb2 import Duration

from mesh.common.v1 import limit_rule_pb2 as rules
from mesh.metering.v1 import ledger_service_pb2 as ledger
from mesh.ratelimit.v1 import rate_limit_service_pb2 as messages
from mesh.tenant.v1 import tenant_service_pb2
from services.kernel.errors import MeshError
from services.kernel.ids import ReservationId, new_uuid7
from services.kernel.rpc.channel import MeshChannel
from services.kernel.rpc.wire_status import decode
from services.ratelimit.adapters.metering_client import MeteringClient
from services.ratelimit.adapters.redis_link import Command, Link
from services.ratelimit.adapters.tenant_rules import terms_of
from services.ratelimit.fencing import Fencing
from services.ratelimit.gathered import GatheredReservations
from services.ratelimit.limits import NOBODY, Amounts, Demand
from services.ratelimit.open_allowance import OpenAllowance
from services.ratelimit.ready_counters import ReadyCounters
from services.ratelimit.rebuild import Rebuilder
from services.ratelimit.request import Request
from services.ratelimit.reservation import Held, Reservations
from services.ratelimit.terms import Terms
from tests.ratelimit.callers import AtService, AtStore, MeteringSettings, Service, Stores, eventually, now_us, running_service
from tests.ratelimit.rules import OPEN, rule
from tests.ratelimit.scripted_peer import LedgerCall, running_peer
from tests.ratelimit.test_abuse_guard import is_open
from tests.ratelimit.test_abuse_guard import tenant_of as guarded_tenant
from tests.support.stores import RedisStore as RedisServer
from tests.support.stores import running_redis

LIMITS = (rule("rate", "requests", 60, 6), rule("day", "tokens", "day", 100), rule("running", "running", "running", 5))


@pytest.fixture
async def own_redis() -> AsyncIterator[RedisServer]:
    """A Redis that a test may stop."""
    async with running_redis() as server:
        yield server


@pytest.fixture
async def patient(own_redis: RedisServer) -> AsyncIterator[Service]:
    """A service on it that waits as long as a busy machine may take."""
    async with running_peer() as peer, running_service(own_redis.url, peer, redis_timeout_seconds=5.0) as running:
        yield running


def item(tenant: AtService, tokens: int = 1, *, id: UUID | None = None, **fields: Any) -> messages.ReserveBatchItem:
    """One reservation of a batch."""
    request = messages.ReserveRequest(reservation_id=str(id or new_uuid7()), amounts=messages.Amounts(tokens=tokens), **fields)
    return messages.ReserveBatchItem(context_token=tenant.context.token, request=request)


async def batch(service: Service, items: Sequence[messages.ReserveBatchItem]) -> list[messages.ReserveBatchOutcome]:
    """The outcomes of a batch."""
    stub = service.tenant_with().stub
    request = messages.ReserveBatchRequest(items=items)
    return list((await service.inference.unary(stub.ReserveBatch, request, timeout_seconds=20)).outcomes)


def said(outcome: messages.ReserveBatchOutcome) -> str:
    """What came of an item: held, or why not."""
    match outcome.WhichOneof("outcome"):
        case "refused":
            return outcome.refused.reason
        case "error_status":
            return decode(outcome.error_status).reason_name
        case other:
            return str(other)


async def warmed(*tenants: AtService) -> None:
    """Calls for each, so that its rules are known and its counters are there."""
    for tenant in tenants:
        await tenant.reserve(1)


@dataclass
class CountingLink:
    """A link, and how often it was asked, for one command or for many."""

    link: Link
    alone: int = 0
    together: int = 0

    async def send(self, *command: str | bytes | int) -> object:
        self.alone += 1
        return await self.link.send(*command)

    async def send_all(self, commands: Sequence[Command]) -> list[object | Exception]:
        self.together += 1
        return await self.link.send_all(commands)

    async def scan(self, pattern: str, cursor: object) -> tuple[object, list[bytes]]:
        return await self.link.scan(pattern, cursor)

    async def close(self) -> None:
        await self.link.close()


class ByHand:
    """The limits' own code without server, sweeps and background work, for tenants of the same rules."""

    def __init__(self, service: Service, channel: MeshChannel, terms: Terms) -> None:
        self.peer, self.terms, self.link = service.peer, terms, CountingLink(service.link)
        self.stores = Stores(self.link)
        store, metering = self.stores.decisions, MeteringClient(channel)
        self.fencing, self.allowance = Fencing(store, metering), OpenAllowance(store)
        counters = ReadyCounters(self._terms_of, Rebuilder(self.stores.snapshots, metering), self.fencing, self.allowance)
        reservations = Reservations(store, counters, self.fencing)
        self.gathered = GatheredReservations(reservations, store, self.allowance, lambda _: terms)
        self.ways = (self.gathered.reserve, reservations.reserve)

    async def tenants(self, count: int) -> list[AtStore]:
        """So many, each with one hold of nothing; the scripts are there from then on."""
        made = [await AtStore(self.stores, self.link.link, self.terms).loaded() for _ in range(count)]
        for tenant in made:
            await tenant.reserve(0)
        return made

    async def decide(self, tenants: Sequence[AtStore], *tokens: int) -> list[list[str]]:
        """What comes of a batch with these demands of each tenant."""
        calls = [(self.peer.tenants.context(tenant.tenant_id), [request_of(amount) for amount in tokens]) for tenant in tenants]
        self.link.alone = self.link.together = 0
        decided = await self.gathered.decide(calls)
        return [[type(outcome).__name__ for outcome in outcomes] for outcomes in decided if not isinstance(outcomes, Exception)]

    async def _terms_of(self, context: object, at_least: int = 0) -> Terms:
        return self.terms


@pytest.fixture
async def by_hand(service: Service) -> AsyncIterator[ByHand]:
    """Tenants of one rule that may be open, and their ledger."""
    told = tenant_service_pb2.TenantConfig(limit_rules=rules.LimitRules(rules=[rule("tokens", "tokens", 60, 100, on_store_failure=OPEN)]))
    channel = MeshChannel(service.peer.address, settings=MeteringSettings(), target_service="metering")
    yield ByHand(service, channel, terms_of(told))
    await channel.close()


async def test_a_batch_of_tenants_is_one_exchange_with_the_store(by_hand: ByHand) -> None:
    """However many tenants it names, when all of them may be held; and each is looked after from then on."""
    tenants = await by_hand.tenants(20)
    assert await by_hand.decide(tenants, 1, 2) == [["Held", "Held"]] * 20
    assert (by_hand.link.together, by_hand.link.alone) == (1, 0)
    assert [await tenant.used() for tenant in tenants] == [(3,)] * 20
    assert by_hand.fencing._watched.keys() >= {tenant.tenant_id for tenant in tenants}


async def test_a_lone_call_is_answered_as_the_whole_way_answers_it(by_hand: ByHand) -> None:
    """Twins, one asked by the short way and one by the whole: held, refused, asked again, nonsense, or without counters, all alike."""
    short, whole = await by_hand.tenants(2)
    early = ReservationId(new_uuid7())
    asked = [(1, early), (200, None), (1, early), (60, None), (60, None), (2, early), (1, ReservationId(uuid4())), (3, None)]
    answers = []
    for place, (tokens, reservation_id) in enumerate(asked):
        if place == len(asked) - 1:
            for tenant in (short, whole):
                await tenant.stores.decisions.drop(tenant.tenant_id)
        request = Request(reservation_id or ReservationId(new_uuid7()), Demand(Amounts(tokens, 0)))
        contexts = [by_hand.peer.tenants.context(tenant.tenant_id) for tenant in (short, whole)]
        said = [await answer(ask(context, request)) for ask, context in zip(by_hand.ways, contexts, strict=True)]
        assert said[0] == said[1]
        answers.append(said[0][0])
    assert answers == [1, "PLAN_LIMIT", 1, 1, "PLAN_LIMIT", "CONTENT_CONFLICT", "INVALID_REQUEST", 1]
    assert await short.used() == await whole.used() == (3,)


async def answer(asked: Awaitable[Held]) -> tuple[object, ...]:
    """What came of a call, without the moment."""
    try:
        held = await asked
    except MeshError as error:
        return (error.reason_name, error.metadata.get("used"))
    return (held.answer.epoch, held.answer.granted, [status.used for status in held.limits])


async def test_a_batch_teaches_under_which_epoch_open_rules_may_go_on(by_hand: ByHand) -> None:
    """A process that met a tenant in a batch alone admits a little of it when the store falls silent."""
    held, refused, unheard = await by_hand.tenants(3)
    await by_hand.decide([held], 1)
    await by_hand.decide([refused], 101)
    plan = by_hand.terms.plan(NOBODY)
    epochs = [by_hand.allowance.admit(tenant.tenant_id, plan, Demand(Amounts(1, 0))) for tenant in (held, refused, unheard)]
    assert epochs == [1, 1, None]


async def test_what_the_allowance_admitted_is_counted_before_a_batch_is_decided(by_hand: ByHand) -> None:
    """Counters that miss it are made anew, for their own tenant, before anything is admitted on them."""
    owing, other = await by_hand.tenants(2)
    await by_hand.decide([owing, other], 1)
    assert by_hand.allowance.admit(owing.tenant_id, by_hand.terms.plan(NOBODY), Demand(Amounts(2, 0))) == 1
    call = LedgerCall(ledger.CALL_STATE_OPEN, now_us(), tokens=99, epoch=1)
    by_hand.peer.ledger.of(owing.tenant_id).calls[new_uuid7().bytes] = call
    by_hand.peer.ledger.of(owing.tenant_id).epoch = 1
    assert await by_hand.decide([owing, other], 2) == [["Refusal"], ["Held"]]


async def test_what_makes_no_sense_fails_alone_beside_known_tenants(service: Service) -> None:
    """An id that is none, output that the amounts do not hold: told for that item, and every other is decided."""
    tenants = [service.tenant_with(*LIMITS) for _ in range(3)]
    await warmed(*tenants)
    shorten = messages.Shorten(max_output_tokens=9, min_output_tokens=1)
    items = [item(tenants[0], id=uuid4()), item(tenants[0]), item(tenants[1], 1, shorten=shorten), item(tenants[2])]
    assert [said(outcome) for outcome in await batch(service, items)] == ["INVALID_REQUEST", "held", "INVALID_REQUEST", "held"]


def request_of(tokens: int) -> Request:
    """A demand of the limits' own code."""
    return Request(ReservationId(new_uuid7()), Demand(Amounts(tokens, 0)), gathered=True)


async def test_a_batch_answers_what_its_items_would_be_answered_one_by_one(service: Service) -> None:
    """Twins with the same rules, one called in batches and the other alone: the same holds, refusals and figures."""
    rng = random.Random(11)
    twins = [(service.tenant_with(*LIMITS), service.tenant_with(*LIMITS)) for _ in range(5)]
    for together, _ in twins[1:]:
        # The first is not known yet when its batch comes.
        await together.limits()
    for _ in range(4):
        asked = [(rng.randrange(5), rng.choice((0, 1, 9, 40, 120)), new_uuid7()) for _ in range(12)]
        outcomes = await batch(service, [item(twins[place][0], tokens, id=id) for place, tokens, id in asked])
        for (place, tokens, id), outcome in zip(asked, outcomes, strict=True):
            assert told(outcome) == await one_by_one(twins[place][1], tokens, id)


def told(outcome: messages.ReserveBatchOutcome) -> tuple[object, ...]:
    """What does not depend on the moment."""
    if outcome.HasField("held"):
        return ("held", outcome.held.epoch, outcome.held.granted.tokens, [(status.rule, status.used) for status in outcome.held.limits])
    refused = outcome.refused
    return (refused.reason, refused.status.rule, str(refused.status.used))


async def one_by_one(tenant: AtService, tokens: int, id: UUID) -> tuple[object, ...]:
    """The same of a call that came alone."""
    try:
        held = await tenant.reserve(tokens, id=id)
    except MeshError as error:
        return (error.reason_name, error.metadata["rule"], error.metadata["used"])
    return ("held", held.epoch, held.granted.tokens, [(status.rule, status.used) for status in held.limits])


async def test_a_tenant_whose_script_fails_fails_alone(service: Service) -> None:
    """What is wrong with one tenant's keys is told for that one, as for a call by itself; the others are held."""
    tenants = [service.tenant_with(*LIMITS) for _ in range(3)]
    await warmed(*tenants)
    key = f"{{{tenants[1].tenant_id}}}:reservations"
    await service.link.send("DEL", key)
    await service.link.send("SET", key, "no hash")
    with pytest.raises(MeshError) as alone:
        await tenants[1].reserve(1)
    outcomes = await batch(service, [item(tenant) for tenant in tenants])
    assert [said(outcome) for outcome in outcomes] == ["held", alone.value.reason_name, "held"]
    for tenant in (tenants[0], tenants[2]):
        assert (await tenant.limits())["rate"].used == 2


async def test_counters_that_are_gone_are_made_for_their_own_tenant(service: Service) -> None:
    """The others are answered from theirs."""
    tenants = [service.tenant_with(*LIMITS) for _ in range(3)]
    await warmed(*tenants)
    await tenants[1].store.lose()
    outcomes = await batch(service, [item(tenant) for tenant in tenants])
    assert [(said(outcome), outcome.held.epoch) for outcome in outcomes] == [("held", 1), ("held", 2), ("held", 1)]


async def test_rules_that_changed_are_asked_for(service: Service) -> None:
    """A batch whose token names older rules than the store has seen is decided by the newer ones."""
    tenant, other = service.tenant_with(rule("day", "tokens", "day", 100)), service.tenant_with(*LIMITS)
    await warmed(tenant, other)
    old = tenant.context
    newer = rules.LimitRules(rules=[rule("each", "tokens", "month", 3, "user")])
    tenant.context = service.peer.tenants.context(tenant.tenant_id, newer, 2)
    await tenant.reserve(1, user="ada")
    tenant.context = old
    outcomes = await batch(service, [item(tenant, 3, user="ada"), item(other)])
    assert [said(outcome) for outcome in outcomes] == ["PLAN_LIMIT", "held"]
    assert outcomes[0].refused.status.rule == "each"


async def test_refusals_of_a_batch_count_for_the_guard(service: Service) -> None:
    """A tenant that goes on after being refused is kept out, with the time it is for; another of the same batch is not."""
    tenant, other = guarded_tenant(service, refusals=3, limit=2), service.tenant_with(*LIMITS)
    await warmed(tenant, other)
    outcomes = await batch(service, [item(tenant), *[item(tenant) for _ in range(4)], item(other)])
    assert [said(outcome) for outcome in outcomes] == ["held", *["PLAN_LIMIT"] * 4, "held"]
    assert await is_open(tenant)
    outcomes = await batch(service, [item(tenant), item(other)])
    assert [said(outcome) for outcome in outcomes] == ["ABUSE_GUARD", "held"]


async def test_a_refusal_beside_the_holds_of_the_dead_is_looked_into(service: Service) -> None:
    """What a dead caller held is void once the ledger says so: who was refused for it is held, and who was held keeps the first answer."""
    tenant, other = service.tenant_with(rule("day", "tokens", "day", 10)), service.tenant_with(*LIMITS)
    await warmed(other)
    lost = new_uuid7()
    await tenant.reserve(8, id=lost)
    await tenant.store.end_lease(lost)
    outcomes = await batch(service, [item(tenant, 2), item(tenant, 5), item(other)])
    assert [said(outcome) for outcome in outcomes] == ["held"] * 3
    assert [status.used for outcome in outcomes[:2] for status in outcome.held.limits] == [10, 7]
    assert await tenant.store.state(lost) == "released"


async def test_who_waits_or_needs_an_account_goes_beside_the_others(redis_server: RedisServer) -> None:
    """An account's limit refuses, a caller that may wait waits; neither is skipped for having come in a batch."""
    account = f"main-{uuid4().hex}"
    accounts = {account: {"requests_per_minute": 1, "input_tokens_per_minute": 1000, "output_tokens_per_minute": 500}}
    async with (
        running_peer() as peer,
        running_service(redis_server.url, peer, provider_accounts=accounts, redis_timeout_seconds=2.0) as service,
    ):
        plain, shared, waiting = (service.tenant_with(rule("rate", "requests", 1, 2)) for _ in range(3))
        await warmed(plain, shared, waiting)
        await waiting.reserve(1)
        items = [item(plain), *(item(shared, provider_account=account) for _ in range(2)), item(waiting, max_wait=Duration(seconds=15))]
        items[1].request.input_tokens = items[2].request.input_tokens = 1
        outcomes = await batch(service, items)
    assert [said(outcome) for outcome in outcomes] == ["held", "held", "PROVIDER_SHARE", "held"]
    assert not outcomes[0].held.HasField("waited")
    assert outcomes[3].held.HasField("waited")


async def test_who_waits_keeps_no_tenant_behind_it_from_being_decided(service: Service) -> None:
    """However many tenants a batch names, and whoever of them comes first."""
    waiting = service.tenant_with(rule("rate", "requests", 30, 1))
    others = [service.tenant_with(*LIMITS) for _ in range(70)]
    await warmed(*others, waiting)
    request = messages.ReserveBatchRequest(items=[item(waiting, max_wait=Duration(seconds=45)), *map(item, others)])
    under_way = asyncio.ensure_future(service.inference.unary(waiting.stub.ReserveBatch, request, timeout_seconds=60))

    async def last_is_held() -> bool:
        return (await others[-1].limits())["rate"].used == 2

    await eventually(last_is_held)
    assert not under_way.done()
    under_way.cancel()


async def test_a_store_that_forgot_the_scripts_is_told_again(own_redis: RedisServer, patient: Service) -> None:
    """Scripts are not data: a batch after their loss is held as before."""
    tenants = [patient.tenant_with(*LIMITS) for _ in range(5)]
    await warmed(*tenants)
    await patient.link.send("SCRIPT", "FLUSH")
    outcomes = await batch(patient, [item(tenant) for tenant in tenants])
    assert [(said(outcome), outcome.held.epoch) for outcome in outcomes] == [("held", 1)] * 5
    assert {(await tenant.limits())["rate"].used for tenant in tenants} == {2}


async def test_a_store_that_is_gone_is_each_tenants_own_affair(own_redis: RedisServer) -> None:
    """In one batch closed rules say that the store does not answer and open ones admit a quarter, which is counted when it is back."""
    async with running_peer() as peer, running_service(own_redis.url, peer) as service:
        closed = service.tenant_with(rule("tokens", "tokens", "day", 100))
        open_ = service.tenant_with(rule("tokens", "tokens", 60, 8, on_store_failure=OPEN))
        for tenant in (closed, open_):
            await eventually(lambda tenant=tenant: is_up(tenant))  # type: ignore[misc] # bound now
        used = (await open_.limits())["tokens"].used
        await own_redis.server.stop()
        outcomes = await batch(service, [item(closed), item(open_), item(open_), item(closed), item(open_)])
        assert [said(outcome) for outcome in outcomes] == [
            "DEPENDENCY_UNAVAILABLE",
            "held",
            "held",
            "DEPENDENCY_UNAVAILABLE",
            "DEPENDENCY_UNAVAILABLE",
        ]
        assert decode(outcomes[0].error_status).retry_after_seconds is not None
        assert [outcome.held.degraded for outcome in outcomes[1:3]] == [True, True]
        for number in range(used + 2):
            call = LedgerCall(ledger.CALL_STATE_OPEN, outcomes[1].held.reserve_time.ToMicroseconds(), tokens=1, epoch=1)
            service.peer.ledger.of(open_.tenant_id).calls[UUID(int=number).bytes] = call
        await own_redis.server.start()
        await eventually(lambda: counts(open_, used + 2))
        await eventually(lambda: is_up(closed))
        outcomes = await batch(service, [item(closed), item(open_)])
        assert [(said(outcome), outcome.held.degraded) for outcome in outcomes] == [("held", False)] * 2


async def is_up(tenant: AtService) -> bool:
    """Whether a call of the tenant is held."""
    try:
        await tenant.reserve(1)
    except MeshError:
        return False
    return True


async def counts(tenant: AtService, used: int) -> bool:
    """Whether its rule has counted so much."""
    try:
        return (await tenant.limits())["tokens"].used == used
    except MeshError:
        return False


async def test_a_batch_that_is_cancelled_leaves_the_next_its_own_answers(own_redis: RedisServer, patient: Service) -> None:
    """Whoever gave up while the store was slow gets nothing; the replies that come for it are nobody else's."""
    tenants = [patient.tenant_with(rule("day", "tokens", "day", 1000)) for _ in range(8)]
    await warmed(*tenants)
    pid = own_redis.server.process.pid
    os.kill(pid, signal.SIGSTOP)
    try:
        given_up = asyncio.ensure_future(batch(patient, [item(tenant, 100) for tenant in tenants]))
        await asyncio.sleep(0.2)
        given_up.cancel()
        with pytest.raises(asyncio.CancelledError):
            await given_up
        next_one = asyncio.ensure_future(batch(patient, [item(tenant, 10 + place) for place, tenant in enumerate(tenants)]))
        await asyncio.sleep(0.1)
    finally:
        os.kill(pid, signal.SIGCONT)
    outcomes = await next_one
    assert [outcome.held.granted.tokens for outcome in outcomes] == [10 + place for place in range(8)]
    for place, tenant in enumerate(tenants):
        # The cancelled one may have been held, or not: a whole hold or none.
        assert (await tenant.limits())["day"].used in (11 + place, 111 + place)
