"""Input that does not fit by the bytes it has: counted by the provider, where what was seen of the model says that this may help."""

from __future__ import annotations

from typing import Any

import grpc
import pytest

from devstack.provider_stub.server import ROUTES
from mesh.common.v1 import limit_rule_pb2
from mesh.inference.v1 import inference_service_pb2 as pb
from mesh.ratelimit.v1 import rate_limit_service_pb2 as limit_pb
from services.inference.stream_bound import spare_tokens
from tests.inference.conftest import World
from tests.inference.peers import OPUS, Tenant
from tests.inference.test_protocol import Hook

# 6,000 bytes, which the stub counts as 1,500 tokens.
QUESTION = "[[stub: output_tokens=5]] " + "Why is it so? " * 427
SPARE = spare_tokens(192)


def with_room_for(tokens: int, reason: str = "PLAN_LIMIT", unit: Any = limit_rule_pb2.LIMIT_UNIT_TOKENS) -> Hook:
    """A limit of tokens that has so much left."""

    def hook(request: Any) -> Any:
        if request.amounts.tokens <= tokens:
            return None
        status = limit_pb.LimitStatus(rule="tokens_per_minute", limit=10_000, used=10_000 - tokens, remaining=tokens, unit=unit)
        return limit_pb.Refusal(reason=reason, status=status, needed=request.amounts.tokens, message="Too many tokens.")

    return hook


def counts(world: World) -> list[Any]:
    """The requests that asked the provider to count."""
    return [request for request in world.stub._received.last(100) if request["path"] == "/v1/messages/count_tokens"]


@pytest.fixture
async def seen(world: World) -> Tenant:
    """A tenant whose model's density, and whose prompt, were seen."""
    tenant = await world.new_tenant()
    await world.answer(tenant, QUESTION)
    world.script.heard.clear()
    world.stub._received.clear()
    return tenant


async def test_what_fits_only_by_its_count_is_held_by_its_count(world: World, seen: Tenant) -> None:
    """Refused by its bytes, the input is counted exactly before anything is sent; the count is held and opened, and is what is billed."""
    world.script.hooks["reserve"] = with_room_for(3_000)
    answer = await world.answer(seen, QUESTION, max_output_tokens=100)
    refused, taken = world.script.all("reserve")
    [call], [request] = world.script.all("open")[0].calls, counts(world)
    assert refused.reservation_id != taken.reservation_id
    assert refused.input_tokens > 6_000 > 3_000 > taken.input_tokens
    assert taken.input_tokens == answer.summary.usage.input_tokens
    assert taken.amounts.tokens == call.bound_tokens == answer.summary.usage.input_tokens + 100 + SPARE
    assert {name: request["body"][name] for name in ("system", "messages")} == {name: world.sent()[name] for name in ("system", "messages")}
    assert world.script.names() == ["reserve", "open", "dispatch", "settle"]


async def test_documents_and_history_are_counted_as_they_are_sent(world: World, seen: Tenant) -> None:
    """What was found and remembered is read before the count, once, and is in the answer's sources."""
    world.script.hooks["reserve"] = with_room_for(3_000)
    answer = await world.answer(seen, QUESTION, max_output_tokens=100, retrieval=pb.RetrievalOptions(mode=pb.RETRIEVAL_MODE_REQUIRED))
    assert [source.title for source in answer.summary.sources] == ["Refund policy"]
    assert world.script.all("reserve")[1].input_tokens == answer.summary.usage.input_tokens
    assert world.script.names("search") == ["reserve", "open", "dispatch", "settle"]
    assert len(world.script.all("search")) == 1


@pytest.mark.parametrize(
    ("hook", "reason"),
    [
        (with_room_for(900), "PLAN_LIMIT"),
        (with_room_for(3_000, "CONCURRENCY", limit_rule_pb2.LIMIT_UNIT_CONCURRENT_CALLS), "CONCURRENCY"),
    ],
    ids=["not by the estimate either", "not for its size"],
)
async def test_nothing_is_counted_where_that_cannot_help(world: World, seen: Tenant, hook: Hook, reason: str) -> None:
    """A call that would not fit by its estimate, or was refused for something else, is refused at once."""
    world.script.hooks["reserve"] = hook
    refusal = await world.refusal(seen, QUESTION, max_output_tokens=100)
    assert refusal.reason_name == reason
    assert (world.script.names(), counts(world)) == (["reserve"], [])


async def test_a_model_that_was_never_seen_is_held_by_its_bytes(world: World) -> None:
    """Without an observation the bound of bytes is the estimate as well."""
    tenant = await world.new_tenant()
    tenant.config.ai.allowed_models.append(OPUS)
    tenant.config.version = 2
    world.script.heard.clear()
    world.script.hooks["reserve"] = with_room_for(3_000)
    refusal = await world.refusal(tenant, QUESTION, max_output_tokens=100, model=OPUS)
    assert refusal.reason_name == "PLAN_LIMIT"
    assert (world.script.names(), counts(world)) == (["reserve"], [])


async def test_what_the_provider_does_not_count_is_refused(world: World, seen: Tenant, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the count the refusal stands: an estimate is never held."""

    async def unable(*_: Any) -> Any:
        raise ConnectionResetError

    monkeypatch.setitem(ROUTES["/v1/messages/count_tokens"], "POST", unable)
    world.script.hooks["reserve"] = with_room_for(3_000)
    refusal = await world.refusal(seen, QUESTION, max_output_tokens=100)
    assert (refusal.code, refusal.reason_name) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "PLAN_LIMIT")
    assert world.script.names() == ["reserve"]


async def test_a_count_that_does_not_fit_either_is_refused(world: World, seen: Tenant) -> None:
    """The second refusal is the caller's answer; nothing is opened and nothing held."""
    calls = 0

    def refuse_twice(request: Any) -> Any:
        nonlocal calls
        calls += 1
        return with_room_for(3_000 if calls == 1 else 100)(request)

    world.script.hooks["reserve"] = refuse_twice
    refusal = await world.refusal(seen, QUESTION, max_output_tokens=100)
    assert refusal.metadata["remaining"] == "100"
    assert len(world.script.all("reserve")) == 2
    assert world.script.names() == ["reserve"]
