"""What a call says to the limits and what it makes of their answers: shortened, waiting, refused, together with others or alone."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration

from mesh.common.v1 import limit_rule_pb2
from mesh.metering.v1 import ledger_service_pb2 as ledger_pb
from mesh.ratelimit.v1 import rate_limit_service_pb2 as limit_pb
from services.inference.stream_bound import spare_tokens
from services.kernel.errors import Unavailable
from tests.inference.conftest import World, running_service, service_settings
from tests.inference.peers import OUTPUT_PRICE, Tenant, held, opened

SPARE = spare_tokens(192)


async def test_a_reservation_says_whose_and_what_it_is(world: World, tenant: Tenant) -> None:
    """User, feature, attempt, input and how far it may be shortened go with the amounts, which hold output beyond `max_tokens` as well."""
    await world.answer(tenant, user="u-1", feature="chat", max_output_tokens=40, min_output_tokens=8)
    [reserve] = world.script.all("reserve")
    assert (reserve.user, reserve.feature, reserve.attempt, reserve.provider_account) == ("u-1", "chat", 1, "")
    assert (reserve.shorten.max_output_tokens, reserve.shorten.min_output_tokens) == (40, 8)
    assert reserve.shorten.output_nano_usd_per_million == OUTPUT_PRICE
    assert reserve.amounts.tokens == reserve.input_tokens + 40 + SPARE
    assert not reserve.HasField("max_wait")


async def test_the_houses_account_is_named_unless_the_call_uses_another(world: World) -> None:
    """A call on the house's key shares the configured account's limits; one on the tenant's own key does not. The ledger is told which."""
    settings = service_settings(world.inference_dsn, world.peers.address, world.provider_url, provider_account="house")
    with_house, with_own = await world.new_tenant(), await world.new_tenant(provider_key="own-key-one")
    async with running_service(settings) as (_, channel):
        elsewhere = world.through(channel)
        world.script.heard.clear()
        await elsewhere.answer(with_house)
        await elsewhere.answer(with_own)
    assert [reserve.provider_account for reserve in world.script.all("reserve")] == ["house", ""]
    opened = [call for request in world.script.all("open") for call in request.calls]
    assert [(call.provider_account, call.bills_tenant_account) for call in opened] == [("house", False), ("", True)]


async def test_a_shortened_answer_is_marked_and_bound(world: World, tenant: Tenant) -> None:
    """What the limits grant is what the provider is told, what the ledger is opened with, and what the caller reads first and last."""
    world.script.hooks["reserve"] = lambda request: held(request, 20)
    answer = await world.answer(tenant, "[[stub: output_tokens=200]] Tell me a story", max_output_tokens=200)
    assert world.sent()["max_tokens"] == 20
    [reserve], [opening] = world.script.all("reserve"), world.script.all("open")
    [call] = opening.calls
    assert (call.bound_tokens, call.bound_nano_usd) == (reserve.amounts.tokens - 180, reserve.amounts.cost_nano_usd - 180 * 5000)
    assert answer.started is not None
    assert [(said.shortened, said.granted_output_tokens) for said in (answer.started, answer.summary)] == [(True, 20)] * 2
    assert (answer.summary.usage.output_tokens, answer.summary.stop_reason) == (20, "max_tokens")


async def test_an_answer_that_is_not_shortened_says_so(world: World, tenant: Tenant) -> None:
    """Granted in full, the answer names its output tokens and no wait."""
    answer = await world.answer(tenant, max_output_tokens=50)
    assert (answer.summary.shortened, answer.summary.granted_output_tokens, answer.summary.HasField("waited")) == (False, 50, False)


@pytest.mark.parametrize("less", [limit_pb.Amounts(tokens=1), limit_pb.Amounts(cost_nano_usd=1)], ids=["tokens", "cost"])
async def test_a_hold_that_does_not_cover_the_call_is_given_back(world: World, tenant: Tenant, less: limit_pb.Amounts) -> None:
    """Nothing is opened on a hold below what the call may cost."""

    def too_little(request: Any) -> Any:
        response = held(request)
        response.granted.tokens -= less.tokens
        response.granted.cost_nano_usd -= less.cost_nano_usd
        return response

    world.script.hooks["reserve"] = too_little
    refusal = await world.refusal(tenant)
    assert refusal.code is grpc.StatusCode.UNAVAILABLE
    assert world.script.names() == ["reserve", "release"]


async def test_more_output_than_asked_for_is_never_of_use(world: World, tenant: Tenant) -> None:
    """A least output above the most is refused before anything is held."""
    refusal = await world.refusal(tenant, max_output_tokens=10, min_output_tokens=11)
    assert (refusal.reason_name, refusal.metadata["field"]) == ("INVALID_REQUEST", "options.min_output_tokens")
    assert world.script.names() == []


async def test_a_call_that_may_wait_says_how_long_and_hears_how_long_it_did(world: World, tenant: Tenant) -> None:
    """The caller's patience reaches the limits, less what is left of the call, and what it took is in the first message and the last."""

    def after_waiting(request: Any) -> Any:
        response = held(request)
        response.waited.FromMilliseconds(1500)
        return response

    world.script.hooks["reserve"] = after_waiting
    answer = await world.answer(tenant, max_wait=Duration(seconds=3))
    impatient = await world.answer(tenant, max_wait=Duration(seconds=60), timeout=5.0)
    first, second = world.script.all("alone")
    assert first.max_wait.ToMilliseconds() == 3000
    assert 3000 < second.max_wait.ToMilliseconds() < 5000
    assert answer.started is not None
    assert [said.waited.ToMilliseconds() for said in (answer.started, answer.summary, impatient.summary)] == [1500] * 3


async def test_a_caller_that_leaves_gives_up_its_place_in_the_line(world: World, tenant: Tenant) -> None:
    """While a call waits at the limits its end is told to them."""
    waiting, left = asyncio.Event(), asyncio.Event()

    async def wait(_: Any) -> None:
        waiting.set()
        try:
            await asyncio.Event().wait()
        finally:
            left.set()

    world.script.hooks["reserve"] = wait
    call = world.stream(tenant, max_wait=Duration(seconds=8))
    await waiting.wait()
    call.cancel()
    await asyncio.wait_for(left.wait(), 5.0)
    assert world.script.names() == ["reserve"]


async def test_a_refusal_keeps_everything_it_says(world: World, tenant: Tenant) -> None:
    """Rule, limit, use, reset, the plan that lifts it and the sentence for people reach the caller as the limits said them."""
    refused = limit_pb.Refusal(reason="RETRY_BUDGET", needed=2, message="Enough of that.", lifting_plan="enterprise")
    status = limit_pb.LimitStatus(rule="retries", limit=10, used=9, remaining=1, unit=limit_rule_pb2.LIMIT_UNIT_RETRIES)
    status.reset_time.FromDatetime(datetime(2030, 1, 1, tzinfo=UTC))
    refused.status.CopyFrom(status)
    refused.retry_after.FromMilliseconds(2500)
    world.script.hooks["reserve"] = lambda _: refused
    refusal = await world.refusal(tenant)
    assert (refusal.code, refusal.reason_name, refusal.message) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "RETRY_BUDGET", "Enough of that.")
    assert refusal.metadata == {
        "rule": "retries",
        "limit": "10",
        "used": "9",
        "remaining": "1",
        "reset_time": "2030-01-01T00:00:00Z",
        "lifting_plan": "enterprise",
    }
    assert refusal.retry_after_seconds == 2.5
    [quota] = refusal.quota_violations
    assert quota.subject == f"tenant:{tenant.tenant_id}"
    assert world.script.names() == ["reserve"]


@pytest.mark.parametrize(
    ("reason", "code"),
    [("REQUEST_TOO_LARGE", grpc.StatusCode.INVALID_ARGUMENT), ("FEATURE", grpc.StatusCode.PERMISSION_DENIED)],
)
async def test_what_waiting_cannot_mend_has_its_own_code(world: World, tenant: Tenant, reason: str, code: grpc.StatusCode) -> None:
    """A request that is too large, or not in the plan at all, is no exhausted quota."""
    world.script.hooks["reserve"] = lambda _: limit_pb.Refusal(reason=reason, message="No.", needed=7)
    refusal = await world.refusal(tenant)
    assert (refusal.code, refusal.reason_name) == (code, reason)


async def test_reservations_that_come_together_ride_together(world: World) -> None:
    """The first goes at once; those that come while others are under way are sent in one, each with its own tenant's proof."""
    tenants = [await world.new_tenant() for _ in range(12)]
    go_on = asyncio.Event()

    async def wait(_: Any) -> None:
        await go_on.wait()

    world.script.heard.clear()
    world.script.hooks["reserve"] = wait
    async with asyncio.TaskGroup() as calls:
        for tenant in tenants:
            calls.create_task(world.generate(tenant))
        await world.script.wait_for("batch")
        # The others have to be authenticated first.
        await asyncio.sleep(1.0)
        go_on.set()
    batches = world.script.all("batch")
    assert [len(batch.items) for batch in batches[:2]] == [1, 1]
    assert sum(len(batch.items) for batch in batches) == 12
    assert len(batches) <= 4
    assert len({item.context_token for batch in batches for item in batch.items}) == 12


async def test_one_that_waits_keeps_nobody_else(world: World, tenant: Tenant) -> None:
    """A call that may wait is not in a batch with calls that may not."""
    waiting, go_on = asyncio.Event(), asyncio.Event()

    async def wait(request: Any) -> None:
        if request.HasField("max_wait"):
            waiting.set()
            await go_on.wait()

    world.script.hooks["reserve"] = wait
    async with asyncio.TaskGroup() as calls:
        patient = calls.create_task(world.answer(tenant, max_wait=Duration(seconds=9)))
        await waiting.wait()
        await world.answer(tenant)
        assert not patient.done()
        go_on.set()


async def test_an_undecided_item_is_asked_again_by_itself(world: World, tenant: Tenant) -> None:
    """An item of a batch that met a store's failure is repeated with the same reservation id."""
    failures = iter([True])

    def fail_once(_: Any) -> None:
        if next(failures, False):
            raise Unavailable("redis")

    world.script.hooks["reserve"] = fail_once
    await world.answer(tenant)
    first, second = world.script.all("reserve")
    assert first.reservation_id == second.reservation_id
    assert len(world.script.all("batch")) == len(world.script.all("alone")) == 1


async def test_what_is_left_follows_the_rules_units_not_their_names(world: World, tenant: Tenant) -> None:
    """A rule of tokens, money or running calls gets back what was not used, whatever it is called; one in shadow mode is not listed."""

    def renamed(request: Any) -> Any:
        response = held(request)
        for limit in response.limits:
            limit.rule = f"our_{limit.unit}"
        response.limits.add(rule="not_yet", mode=limit_rule_pb2.LIMIT_MODE_SHADOW)
        return response

    world.script.hooks["reserve"] = renamed
    answer = await world.answer(tenant)
    used = answer.summary.usage.input_tokens + answer.summary.usage.output_tokens
    assert {limit.rule: limit.limit - limit.remaining for limit in answer.summary.remaining} == {
        f"our_{limit_rule_pb2.LIMIT_UNIT_REQUESTS}": 1,
        f"our_{limit_rule_pb2.LIMIT_UNIT_TOKENS}": used,
        f"our_{limit_rule_pb2.LIMIT_UNIT_COST_NANO_USD}": answer.summary.cost.nano_usd,
        f"our_{limit_rule_pb2.LIMIT_UNIT_CONCURRENT_CALLS}": 0,
    }


async def test_an_attempt_that_was_not_sent_keeps_its_number(world: World, tenant: Tenant) -> None:
    """Starting again before anything was dispatched is no retry: the attempt is the first at the limits and at the ledger."""
    answers = iter([ledger_pb.OPEN_OUTCOME_STALE_EPOCH, ledger_pb.OPEN_OUTCOME_OPENED])
    world.script.hooks["open"] = lambda request: opened(request, next(answers))
    await world.answer(tenant)
    assert [reserve.attempt for reserve in world.script.all("reserve")] == [1, 1]
    assert [request.calls[0].attempt for request in world.script.all("open")] == [1, 1]
