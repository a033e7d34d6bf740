"""Whole stories with exact numbers: crowds at an edge, a shared budget, a mirror in shadow, refusals that leave no trace."""

import asyncio
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from uuid import UUID

import pytest
from structlog.testing import capture_logs

from mesh.common.v1 import limit_rule_pb2 as rules
from mesh.ratelimit.v1 import rate_limit_service_pb2 as messages
from services.kernel.errors import MeshError
from services.kernel.ids import ReservationId, new_uuid7
from services.ratelimit.adapters.redis_link import PipelinedLink
from services.ratelimit.calendar_periods import moment
from services.ratelimit.limit_rule import MINUTE_US, SECOND_US, LimitRule, Scope, Unit, Window
from services.ratelimit.limits import NOBODY, Amounts, Demand, Shortening, Subject
from services.ratelimit.request import Ask
from services.ratelimit.settlement import CommitKind, Settlement
from services.ratelimit.standing import Answer, Verdict, refusing
from services.ratelimit.terms import Terms
from tests.ratelimit.callers import AtService, AtStore, Service, Stores
from tests.ratelimit.oracle import Oracle
from tests.ratelimit.rules import rule
from tests.ratelimit.set_clock import SetClockScripts
from tests.support.stores import RedisStore as RedisServer

MakeTenant = Callable[..., AtStore]
USERS = ("", "ada", "bob", "eve")
DAY_US = 86_400 * SECOND_US

# Three scopes, every unit of a call, windows of each kind.
NESTED = [
    LimitRule("requests", Unit.REQUESTS, Window.SLIDING, 60, MINUTE_US),
    LimitRule("tokens", Unit.TOKENS, Window.SLIDING, 4000, MINUTE_US),
    LimitRule("money", Unit.COST, Window.MONTH, 90_000, shortens=True, min_output_tokens=5),
    LimitRule("slots", Unit.RUNNING, Window.RUNNING, 20),
    LimitRule("user_tokens", Unit.TOKENS, Window.DAY, 1500, scope=Scope.USER, shortens=True),
    LimitRule("user_slots", Unit.RUNNING, Window.RUNNING, 8, scope=Scope.USER),
    LimitRule("feature_requests", Unit.REQUESTS, Window.SLIDING, 12, MINUTE_US, Scope.FEATURE),
    LimitRule("pair_retries", Unit.RETRIES, Window.SLIDING, 4, MINUTE_US, Scope.USER_FEATURE),
]


def a_demand(draw: random.Random) -> tuple[Demand, Subject]:
    """Some call of somebody."""
    output, price = draw.randint(1, 60), draw.choice((0, 700_000, 15_000_000))
    amounts = Amounts(output + draw.randint(0, 60), -(-output * price // 1_000_000) + draw.randint(0, 900))
    shortening = Shortening(output, draw.randint(1, output), price) if draw.random() < 0.5 else None
    subject = Subject(draw.choice(USERS), draw.choice(("", "chat", "search")))
    return Demand(amounts, draw.choice((1, 1, 1, 2)), 0, shortening), subject


async def test_four_replicas_decide_as_one_exact_oracle(link: PipelinedLink, redis_server: RedisServer) -> None:
    """Concurrent batches of four stores with links of their own, replayed by the store's time: no over-admission, no false refusal."""
    draw = random.Random(7)
    links = [PipelinedLink(redis_server.url, timeout_seconds=5.0) for _ in range(4)]
    replicas = [AtStore(Stores(each), link, Terms(NESTED)) for each in links]
    for each in replicas:
        each.tenant_id = replicas[0].tenant_id
    await replicas[0].loaded()
    oracle = Oracle(NESTED, epoch=1, calls={})
    held: list[ReservationId] = []
    verdicts = {"held": 0, "refused": 0}
    for _ in range(25):
        for asks, answers in await decided_at_once(replicas, draw):
            for ask, answer in zip(asks, answers, strict=True):
                told = oracle.reserve(ask.reservation_id, ask.demand, answer.now_us, ask.plan.subject)
                assert (told.verdict, told.amounts) == (answer.verdict.name.lower(), answer.granted)
                verdicts[told.verdict] += 1
                held += [ask.reservation_id] if told.verdict == "held" else []
        draw.shuffle(held)
        for place, reservation_id in enumerate(held[: len(held) * 2 // 3]):
            amounts = Amounts(draw.randint(0, 80), draw.randint(0, 1500))
            assert await replicas[place % 4].commit(reservation_id, CommitKind.SETTLED, amounts.tokens, amounts.cost_nano_usd)
            oracle.commit(reservation_id, "settled", amounts, 1)
        held = held[len(held) * 2 // 3 :]
    for own_link in links:
        await own_link.close()
    assert min(verdicts.values()) > 50


async def decided_at_once(replicas: Sequence[AtStore], draw: random.Random) -> list[tuple[list[Ask], list[Answer]]]:
    """Batches through all replicas at the same time, in the order in which the store decided them."""

    async def one(tenant: AtStore) -> tuple[list[Ask], list[Answer]]:
        demands = [a_demand(draw) for _ in range(draw.randint(1, 6))]
        asks = [tenant.ask(new_uuid7(), demand, subject) for demand, subject in demands]
        return asks, await tenant.store.reserve(tenant.tenant_id, tenant.terms, asks)

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(one(tenant)) for tenant in replicas]
    return sorted((task.result() for task in tasks), key=lambda batch: batch[1][0].now_us)


async def test_shadow_and_enforcement_give_the_same_verdicts(link: PipelinedLink) -> None:
    """One trace on one clock, rules that refuse in one tenant and are in shadow in another: refused exactly where shadow says so."""
    draw, scripts = random.Random(11), SetClockScripts(link)
    stores = Stores(link, scripts=scripts)
    sliding = [replace(each, window=Window.DAY) if each.window is Window.MONTH else each for each in NESTED]
    tenants = [AtStore(stores, link, Terms([replace(each, shadow=shadow) for each in sliding])) for shadow in (False, True)]
    await scripts.set_clock(scripts.now_us)
    for tenant in tenants:
        await tenant.loaded()
    held: list[ReservationId] = []
    refused, left = 0, 0
    for _ in range(1000):
        # Moments, parts of a lease and of a window, and now and then a day.
        await scripts.set_clock(scripts.now_us + draw.choice((0, 1, 40_000, 900_000, 900_000, 4_000_000)) + (draw.random() < 0.02) * DAY_US)
        demands = [a_demand(draw) for _ in range(draw.randint(1, 6))]
        ids = [new_uuid7(moment(scripts.now_us)) for _ in demands]
        verdicts = [await kept_out(tenant, ids, demands) for tenant in tenants]
        assert verdicts[0] == verdicts[1]
        refused, left = refused + sum(verdicts[0]), left + len(ids) - sum(verdicts[0])
        held += map(ReservationId, ids)
        ended = [held.pop(draw.randrange(len(held))) for _ in range(len(held) // 2)]
        bills = [Amounts(draw.randint(0, 60), draw.randint(0, 900)) for _ in ended]
        for tenant in tenants:
            kind, own = CommitKind.SETTLED, tenant.tenant_id
            await tenant.store.commit([Settlement(own, id, 1, kind, bill) for id, bill in zip(ended, bills, strict=True)])
    assert min(refused, left) > 500


async def kept_out(tenant: AtStore, ids: Sequence[UUID], demands: Sequence[tuple[Demand, Subject]]) -> list[bool]:
    """Of each of these, decided at once: whether a rule refuses it, or would."""
    asks = [tenant.ask(id, demand, subject) for id, (demand, subject) in zip(ids, demands, strict=True)]
    answers = await tenant.store.reserve(tenant.tenant_id, tenant.terms, asks)
    return [
        answer.verdict is Verdict.REFUSED or any(refusing(ask.plan, answer, shadow=True)) for ask, answer in zip(asks, answers, strict=True)
    ]


async def test_ten_thousand_refusals_leave_every_key_as_it_was(at_store: MakeTenant) -> None:
    """By every rule, in every scope, alone and in batches: not a byte of what is kept changes."""
    tenant = at_store()
    tenant.terms = Terms([*(replace(each, limit=2) for each in NESTED), LimitRule("largest", Unit.TOKENS, Window.REQUEST, 100)])
    await tenant.loaded()
    for user in USERS:
        await tenant.reserve(2 if not user else 0, subject=Subject(user, "chat"))
    asks = [tenant.ask(new_uuid7(), Demand(Amounts(50 + number, 50)), Subject(USERS[number % 4])) for number in range(50)]
    # Reading a hash may still be moving it to a table of another size, which shows in a dump.
    for _ in range(20):
        await tenant.used()
    before = await tenant.dump()
    for _ in range(195):
        answers = await tenant.store.reserve(tenant.tenant_id, tenant.terms, asks)
        assert {answer.verdict for answer in answers} == {Verdict.REFUSED}
        assert await tenant.dump() == before
    for _ in range(250):
        assert (await tenant.reserve(70, 70))[1].verdict is Verdict.REFUSED
    assert await tenant.dump() == before


async def test_a_dollar_is_never_passed_and_everybody_gets_their_turn(service: Service) -> None:
    """Twelve callers at once whose worst case is twenty cents and whose bill is a fraction of a cent: all are served within the budget."""
    dollar, price, bill = 10**9, 25_000_000_000, 255_000
    budget = rule("budget", "cost", "month", dollar, near_edge=rules.NearEdge(shorten=True, min_output_tokens=256, wait=True))
    tenant = service.tenant_with(budget)
    short = messages.Shorten(max_output_tokens=8000, min_output_tokens=256, output_nano_usd_per_million=price)
    under_way = 0

    async def call() -> None:
        nonlocal under_way
        while True:
            reservation_id = new_uuid7()
            try:
                held = await tenant.reserve(8100, 8000 * price // 10**6, id=reservation_id, shorten=short)
            except MeshError as error:
                assert error.reason_name == "BUDGET"
                assert under_way
                await asyncio.sleep(0.01)
                continue
            under_way += 1
            assert 256 <= held.granted_output_tokens <= 8000
            assert held.limits[0].used <= dollar
            await tenant.settled(reservation_id, 8, bill)
            under_way -= 1
            return

    async with asyncio.timeout(30), asyncio.TaskGroup() as group:
        for _ in range(12):
            group.create_task(call())
    assert (await tenant.limits())["budget"].used == 12 * bill


async def test_two_hundred_streams_against_a_budget_for_twenty(service: Service) -> None:
    """Streams that ask for more as they go, each for ten times its share: what they may use together never passes the budget."""
    tenant = service.tenant_with(rule("budget", "cost", "month", 20_000))
    granted: dict[int, int] = {}

    async def stream(number: int) -> None:
        reservation_id = new_uuid7()
        try:
            await tenant.reserve(1, 200, id=reservation_id)
            granted[number] = 200
            for _ in range(10):
                granted[number] = (await tenant.extend(reservation_id, 1, granted[number] + 100)).granted.cost_nano_usd
                assert sum(granted.values()) <= 20_000
        except MeshError as error:
            assert error.reason_name == "BUDGET"

    async with asyncio.TaskGroup() as group:
        for number in range(200):
            group.create_task(stream(number))
    assert sum(granted.values()) == (await tenant.limits())["budget"].used == 20_000


async def test_a_thousand_rules_are_decided_like_ten(at_store: MakeTenant) -> None:
    """However many rules there are, the one that binds is found, and a refusal changes nothing."""
    tenant = at_store()
    many = [
        LimitRule(f"rule_{number}", Unit.TOKENS, Window.SLIDING, 1000 + number, (number + 1) * 1_000_000, shadow=number % 2 == 1)
        for number in range(999)
    ]
    tenant.terms = Terms([*many, LimitRule("binds", Unit.TOKENS, Window.DAY, 100)])
    await tenant.loaded()
    await tenant.held(60)
    for _ in range(20):
        await tenant.used()
    before = await tenant.dump()
    _, answer = await tenant.reserve(41)
    assert [each.name for _, each, _ in refusing(tenant.terms.plan(NOBODY), answer, shadow=False)] == ["binds"]
    assert await tenant.dump() == before
    await tenant.held(40)
    assert set(await tenant.used()) == {100}


async def test_ends_that_contradict_each_other_change_nothing_and_are_told(at_store: MakeTenant) -> None:
    """A commit of an unknown, released or otherwise settled reservation is done, counts nothing, and other figures are logged."""
    tenant = await at_store().loaded()
    settled, released = await tenant.held(10, 10), await tenant.held(10, 10)
    await tenant.commit(settled, tokens=5, cost=5)
    await tenant.store.release(tenant.tenant_id, released, 1)
    before = await tenant.dump()
    with capture_logs() as logs:
        assert await tenant.commit(ReservationId(new_uuid7()), tokens=9, cost=9)
        assert await tenant.commit(settled, tokens=5, cost=5)
        assert await tenant.commit(released, CommitKind.VOID)
        assert not [line for line in logs if line.get("tenant_id") == str(tenant.tenant_id)]
        assert await tenant.commit(settled, tokens=6, cost=5)
        assert await tenant.commit(released, tokens=3, cost=3)
    told = [(line["event"], line["tokens"]) for line in logs if line.get("tenant_id") == str(tenant.tenant_id)]
    assert told == [("commit_differs", 6), ("commit_differs", 3)]
    assert await tenant.dump() == before


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"tokens": -1}, "INVALID_ARGUMENT"),
        ({"cost": 10**15 + 1}, "INVALID_ARGUMENT"),
        ({"tokens": 2**62}, "INVALID_ARGUMENT"),
        ({"attempt": 101}, "INVALID_ARGUMENT"),
        ({"attempt": -1}, "INVALID_ARGUMENT"),
        ({"user": "x" * 201}, "INVALID_ARGUMENT"),
        ({"id": "nobody"}, "INVALID_ARGUMENT"),
    ],
)
async def test_what_breaks_the_contract_reaches_no_counter(service: Service, fields: dict[str, object], code: str) -> None:
    """Negative, overflowing or unreadable demands are refused by name."""
    tenant: AtService = service.tenant_with(rule("day", "tokens", "day", 100))
    with pytest.raises(MeshError) as caught:
        await tenant.reserve(**fields)  # type: ignore[arg-type] # fields of the message
    assert caught.value.code.name == code
    assert set(await tenant.store.dump()) == {None}
