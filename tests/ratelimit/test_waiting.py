"""Waiting for a turn instead of being refused: in order, woken and not polled, never past a deadline, one line for all replicas."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from uuid import UUID

import pytest
from google.protobuf.duration_pb2 import Duration

from mesh.common.v1 import limit_rule_pb2 as rules
from mesh.ratelimit.v1 import rate_limit_service_pb2 as messages
from services.kernel.errors import MeshError
from services.kernel.ids import new_uuid7
from tests.ratelimit.callers import AtService, Service, eventually, running_service
from tests.ratelimit.rules import rule
from tests.ratelimit.scripted_peer import running_peer
from tests.support.steadiness import steadily
from tests.support.stores import RedisStore as RedisServer

# A busy machine is slow, and never this slow; who looked again only by chance would be later.
PROMPTLY_SECONDS = 0.4
BUDGET_WAITS = rules.NearEdge(wait=True)


@asynccontextmanager
async def waiting(tenant: AtService, tokens: int = 0, cost: int = 0, *, max_wait: float = 20.0, **fields: Any) -> AsyncIterator[Any]:
    """A Reserve that waits, given once its ticket stands in line."""
    before = await tickets(tenant)
    task = asyncio.create_task(reserve(tenant, tokens, cost, max_wait=max_wait, **fields))

    async def stands() -> bool:
        return task.done() or await tickets(tenant) > before

    await eventually(stands)
    assert not task.done(), task.result()
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.wait([task])


async def reserve(tenant: AtService, tokens: int = 0, cost: int = 0, *, max_wait: float, **fields: Any) -> messages.ReserveResponse:
    """A Reserve that may wait so many seconds, with a deadline far behind them."""
    wait = Duration(seconds=int(max_wait), nanos=int(max_wait % 1 * 1e9))
    return await tenant.reserve(tokens, cost, max_wait=wait, **{"timeout_seconds": 30.0, **fields})


async def tickets(tenant: AtService) -> int:
    """How many stand in the tenant's line."""
    return int(str(await tenant.store.link.send("HLEN", f"{{{tenant.tenant_id}}}:waiters")))


async def no_tickets(tenant: AtService) -> bool:
    """Whether nobody does."""
    return await tickets(tenant) == 0


@pytest.fixture
async def replicas(redis_server: RedisServer) -> AsyncIterator[tuple[Service, Service]]:
    """Two processes' worth of the service on one store, with the same peers."""
    async with (
        running_peer() as peer,
        running_service(redis_server.url, peer, redis_timeout_seconds=2.0) as one,
        running_service(redis_server.url, peer, redis_timeout_seconds=2.0) as other,
    ):
        yield one, other


def at(tenant: AtService, service: Service) -> AtService:
    """The same tenant, called at another replica."""
    stub = type(tenant.stub)(service.inference.channel)
    return AtService(stub, service.inference, service.metering, service.tenant, tenant.context, tenant.store)


@steadily
async def test_a_waiting_call_is_admitted_when_its_window_frees(service: Service) -> None:
    """Woken by the clock: at the moment the oldest request leaves the window, by the store's clock, and not before."""
    tenant = service.tenant_with(rule("rate", "requests", 2, 1))
    first = await tenant.reserve()
    held = await reserve(tenant, max_wait=10)
    waited_us = held.reserve_time.ToMicroseconds() - first.reserve_time.ToMicroseconds()
    assert 2_000_000 <= waited_us < 2_000_000 + PROMPTLY_SECONDS * 1e6
    assert 1.5 < held.waited.ToTimedelta().total_seconds() < 2 + PROMPTLY_SECONDS
    assert not first.HasField("waited")


@steadily
async def test_a_waiting_call_is_woken_by_a_commit(service: Service) -> None:
    """What a settled call gives back is had by who waits at once, long before any clock frees it."""
    tenant = service.tenant_with(rule("rate", "tokens", 60, 100))
    running = new_uuid7()
    await tenant.reserve(100, id=running)
    async with waiting(tenant, 90) as task:
        began = time.monotonic()
        await tenant.settled(running, 10)
        held = await task
        assert time.monotonic() - began < PROMPTLY_SECONDS
    assert held.granted.tokens == 90
    assert await tickets(tenant) == 0


@steadily
async def test_a_waiting_call_is_woken_by_a_release(service: Service) -> None:
    """A slot that is let go is taken by who waits for it."""
    tenant = service.tenant_with(rule("slots", "running", "running", 1))
    running = new_uuid7()
    await tenant.reserve(id=running)
    async with waiting(tenant) as task:
        await service.inference.unary(
            tenant.stub.Release, messages.ReleaseRequest(reservation_id=str(running), epoch=1), timeout_seconds=5, tenant=tenant.context
        )
        began = time.monotonic()
        await task
        assert time.monotonic() - began < PROMPTLY_SECONDS


@steadily
async def test_the_slot_of_a_dead_caller_is_had_by_who_waits(service: Service) -> None:
    """A lease that nobody prolongs ends, the ledger is asked, and the next in line is woken."""
    tenant = service.tenant_with(rule("slots", "running", "running", 1))
    running = new_uuid7()
    await tenant.reserve(id=running)
    async with waiting(tenant) as task:
        await tenant.store.end_lease(running)
        began = time.monotonic()
        await task
        assert time.monotonic() - began < 1.0 + PROMPTLY_SECONDS
    assert await tenant.store.state(running) == "released"


@steadily
async def test_a_wait_that_cannot_end_in_time_does_not_begin(service: Service) -> None:
    """A caller is refused at once when what it waits for frees after its time, or never."""
    tenant = service.tenant_with(rule("rate", "requests", 60, 1), rule("budget", "cost", "month", 100, near_edge=BUDGET_WAITS))
    await tenant.reserve(0, 10)
    began = time.monotonic()
    with pytest.raises(MeshError) as refused:
        await reserve(tenant, max_wait=5)
    with pytest.raises(MeshError) as too_large:
        await reserve(tenant, 0, 101, max_wait=20)
    assert time.monotonic() - began < 2
    assert (refused.value.reason_name, too_large.value.reason_name) == ("PLAN_LIMIT", "BUDGET")
    assert await tickets(tenant) == 0


async def test_a_budget_that_is_spent_is_not_waited_for(service: Service) -> None:
    """Only holds come back to a budget: when none is left, waiting is of no use and the refusal is immediate."""
    tenant = service.tenant_with(rule("budget", "cost", "month", 100, near_edge=BUDGET_WAITS))
    running = new_uuid7()
    await tenant.reserve(0, 100, id=running)
    async with waiting(tenant, 0, 50) as task:
        await tenant.settled(running, 0, 90)
        with pytest.raises(MeshError) as refused:
            await task
    assert refused.value.reason_name == "BUDGET"
    assert await tickets(tenant) == 0


async def test_a_rule_that_does_not_let_wait_refuses_at_once(service: Service) -> None:
    """A budget lets a caller wait only where its rule says so, whatever the caller would."""
    tenant = service.tenant_with(rule("budget", "cost", "month", 100))
    await tenant.reserve(0, 100)
    with pytest.raises(MeshError):
        await reserve(tenant, 0, 50, max_wait=20)
    assert await tickets(tenant) == 0


async def test_who_waits_is_admitted_in_order_across_replicas(replicas: tuple[Service, Service]) -> None:
    """First come, first served: at whichever replica each asked, and however little a later one needs."""
    one, other = replicas
    first_at = one.tenant_with(rule("rate", "tokens", 60, 100))
    running = new_uuid7()
    await first_at.reserve(100, id=running)
    places, order = [first_at, at(first_at, other)], list[tuple[int, int]]()
    async with asyncio.TaskGroup() as group:

        async def one_call(number: int, tokens: int) -> None:
            answer = await reserve(places[number % 2], tokens, max_wait=20)
            # By the store's clock: answers of two replicas may arrive in another order than they were decided in.
            order.append((answer.reserve_time.ToMicroseconds(), number))

        for number, tokens in enumerate((20, 1, 20, 3, 20, 2)):
            group.create_task(one_call(number, tokens))
            await eventually(lambda expected=number + 1: _stand(first_at, expected))  # type: ignore[misc] # bound at once
        await first_at.settled(running, 30)
    assert [number for _, number in sorted(order)] == [0, 1, 2, 3, 4, 5]
    assert await tickets(first_at) == 0


async def _stand(tenant: AtService, count: int) -> bool:
    return await tickets(tenant) == count


async def test_who_comes_later_and_waits_does_not_pass(service: Service) -> None:
    """A small demand that would fit stays behind a large one that waits; one whose caller does not wait is decided at once."""
    tenant = service.tenant_with(rule("rate", "tokens", 60, 100))
    running = new_uuid7()
    await tenant.reserve(80, id=running)
    async with waiting(tenant, 50) as large, waiting(tenant, 5) as small:
        assert (await tenant.reserve(5)).granted.tokens == 5
        await tenant.settled(running, 0)
        await large
        await small


@steadily
async def test_a_limit_of_one_user_keeps_no_other_waiting(service: Service) -> None:
    """Who waits for a limit of its own is no obstacle to those whom that limit does not count."""
    tenant = service.tenant_with(rule("all", "tokens", 60, 1000), rule("each", "tokens", 60, 100, "user"))
    running = new_uuid7()
    await tenant.reserve(100, id=running, user="ada")
    async with waiting(tenant, 50, user="ada") as ada:
        began = time.monotonic()
        assert (await reserve(tenant, 50, max_wait=10, user="bob")).granted.tokens == 50
        assert time.monotonic() - began < 2
        assert not ada.done()
        await tenant.settled(running, 0)
        await ada


@steadily
async def test_nobody_waits_past_its_deadline(service: Service) -> None:
    """The answer comes before the caller's own deadline, and names the rule; nothing stays in line."""
    tenant = service.tenant_with(rule("slots", "running", "running", 1))
    await tenant.reserve()
    began = time.monotonic()
    with pytest.raises(MeshError) as refused:
        await reserve(tenant, max_wait=60, timeout_seconds=1.5)
    assert 1.0 < time.monotonic() - began < 1.5
    assert refused.value.reason_name == "CONCURRENCY"
    assert await tickets(tenant) == 0


@steadily
async def test_nobody_waits_longer_than_it_said(service: Service) -> None:
    """max_wait bounds the wait."""
    tenant = service.tenant_with(rule("slots", "running", "running", 1))
    await tenant.reserve()
    began = time.monotonic()
    with pytest.raises(MeshError) as refused:
        await reserve(tenant, max_wait=0.5)
    assert 0.5 <= time.monotonic() - began < 0.5 + PROMPTLY_SECONDS
    assert refused.value.reason_name == "CONCURRENCY"


@steadily
async def test_a_caller_that_goes_away_leaves_its_place(service: Service) -> None:
    """Cancelled, its ticket goes at once and who was behind it is woken."""
    tenant = service.tenant_with(rule("rate", "tokens", 60, 100))
    await tenant.reserve(60)
    async with waiting(tenant, 90) as large, waiting(tenant, 30) as small:
        large.cancel()
        began = time.monotonic()
        await small
        assert time.monotonic() - began < PROMPTLY_SECONDS
    await eventually(lambda: no_tickets(tenant))


@steadily
async def test_a_dead_replica_delays_others_by_no_more_than_its_lease(service: Service) -> None:
    """A ticket that nobody renews is passed over once its lease has ended."""
    tenant = service.tenant_with(rule("rate", "tokens", 60, 100))
    await tenant.reserve(60)
    async with waiting(tenant, 90):
        key = f"{{{tenant.tenant_id}}}:waiters"
        found = await tenant.store.link.send("HGETALL", key)
    assert isinstance(found, list)
    await eventually(lambda: no_tickets(tenant))
    # Written again as it was, a process that died a moment ago leaves just this.
    await tenant.store.link.send("HSET", key, *found)
    began = time.monotonic()
    held = await reserve(tenant, 30, max_wait=10)
    assert held.granted.tokens == 30
    assert time.monotonic() - began < 2.0 + PROMPTLY_SECONDS


async def test_a_place_in_line_that_is_lost_is_taken_again(service: Service) -> None:
    """When the store loses the line, who waits stands in it again, in the order of before."""
    tenant = service.tenant_with(rule("rate", "tokens", 60, 100))
    running = new_uuid7()
    await tenant.reserve(100, id=running)
    async with waiting(tenant, 60) as first, waiting(tenant, 50) as second:
        await tenant.store.link.send("DEL", f"{{{tenant.tenant_id}}}:waiters")
        await eventually(lambda: _stand(tenant, 2))
        await tenant.settled(running, 0)
        await first
        assert not second.done()


@steadily
async def test_who_waits_hears_again_after_the_connection_for_it_was_lost(service: Service) -> None:
    """Calls missed in a gap are made good: whoever waits asks once more when the gap is over."""
    tenant = service.tenant_with(rule("slots", "running", "running", 1))
    running = new_uuid7()
    await tenant.reserve(id=running)
    async with waiting(tenant) as task:
        await tenant.store.link.send("CLIENT", "KILL", "TYPE", "pubsub")
        await tenant.settled(running, 0)
        began = time.monotonic()
        await task
        assert time.monotonic() - began < 2


async def test_waiting_without_hope_and_refusals_without_waiting_write_nothing(service: Service) -> None:
    """A refusal leaves every key as it was, also one that asked to wait."""
    tenant = service.tenant_with(rule("rate", "requests", 60, 1))
    await tenant.reserve()
    before = await tenant.store.dump()
    for max_wait in (0, 1, 5):
        with pytest.raises(MeshError):
            await reserve(tenant, max_wait=max_wait)
    assert await tenant.store.dump() == before


@steadily
async def test_units_of_a_product_are_waited_for(service: Service) -> None:
    """Consume waits as Reserve does."""
    tenant = service.tenant_with(rule("interviews", "ai_interviews", 1, 1))
    await tenant.consume("ai_interviews")
    used = await tenant.consume("ai_interviews", max_wait=Duration(seconds=4))
    assert 0.5 < used.waited.ToTimedelta().total_seconds() < 1 + PROMPTLY_SECONDS


async def test_items_of_a_batch_wait_beside_each_other(service: Service) -> None:
    """Each waits for itself, in their order; what is held meanwhile stays alive although its caller does not know of it."""
    tenant = service.tenant_with(rule("rate", "requests", 7, 2))
    ids = [str(new_uuid7()) for _ in range(4)]
    items = [
        messages.ReserveBatchItem(
            context_token=tenant.context.token,
            request=messages.ReserveRequest(reservation_id=id, amounts=messages.Amounts(), max_wait=Duration(seconds=20)),
        )
        for id in ids
    ]
    request = messages.ReserveBatchRequest(items=items)
    outcomes = (await service.inference.unary(tenant.stub.ReserveBatch, request, timeout_seconds=25)).outcomes
    assert [outcome.WhichOneof("outcome") for outcome in outcomes] == ["held"] * 4
    times = [outcome.held.reserve_time.ToMicroseconds() for outcome in outcomes]
    assert times == sorted(times)
    assert times[2] - times[0] >= 7_000_000
    refs = [messages.ReservationRef(tenant_id=tenant.tenant_id.bytes, reservation_id=UUID(id).bytes) for id in ids]
    renewed = await service.inference.unary(tenant.stub.Renew, messages.RenewRequest(reservations=refs), timeout_seconds=5)
    assert not renewed.lost


@pytest.mark.parametrize("max_tokens", [8_000])
async def test_few_cheap_calls_near_a_budget_are_none_of_them_refused(service: Service, max_tokens: int) -> None:
    """12 calls at once that cost $0.000255 each and 12 cents by their bound, on a budget of $1.00: none is refused, and never over."""
    price, spent = 15_000_000_000, 255_000  # nano-USD for 10^6 output tokens, and of each call really
    edge = rules.NearEdge(shorten=True, min_output_tokens=1_000, wait=True)
    tenant = service.tenant_with(rule("budget", "cost", "month", 1_000_000_000, near_edge=edge))
    held_now: dict[str, int] = {}
    most = 0

    async def call() -> messages.ReserveResponse:
        nonlocal most
        id = new_uuid7()
        cost = max_tokens * price // 1_000_000
        shorten = messages.Shorten(max_output_tokens=max_tokens, min_output_tokens=1_000, output_nano_usd_per_million=price)
        held = await reserve(tenant, max_tokens, cost, max_wait=20, id=id, shorten=shorten)
        held_now[str(id)] = held.granted.cost_nano_usd
        most = max(most, sum(held_now.values()))
        # The provider takes its time, so that all of them meet at the budget.
        await asyncio.sleep(0.3)
        held_now[str(id)] = spent
        await tenant.settled(id, 10, spent, epoch=held.epoch)
        return held

    async with asyncio.TaskGroup() as group:
        calls = [group.create_task(call()) for _ in range(12)]
    answers = [task.result() for task in calls]
    assert most <= 1_000_000_000
    assert any(answer.shortened for answer in answers) and any(answer.HasField("waited") for answer in answers)
    assert (await tenant.limits())["budget"].used == 12 * spent
    assert await tickets(tenant) == 0
