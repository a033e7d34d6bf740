"""A provider that writes past the max_tokens it was sent: its bill never passes what is held. One that keeps to them is left alone."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest

from devstack.provider_stub.server import ROUTES
from mesh.common.v1 import error_reason_pb2 as reasons
from mesh.metering.v1 import ledger_service_pb2 as ledger_pb
from services.inference.overrun import COUNT_SECONDS, EXTEND_SECONDS
from services.inference.settings import InferenceSettings
from services.inference.worst_case import ceil_cost
from services.kernel.errors import LimitExceeded, Unavailable
from tests.inference.conftest import World, until
from tests.inference.peers import INPUT_PRICE, OUTPUT_PRICE, Tenant, held
from tests.inference.test_protocol import Hook, failing

# About 400 tokens a second, which is faster than models write.
RUNAWAY = "[[stub: ignore_max_tokens output_tokens=4000 token_ms=2]] Never stop"
REFUSED = LimitExceeded(reasons.ERROR_REASON_BUDGET, "used up", 30.0, rule="cost_nano_usd_per_month", limit="9", used="9", remaining="0")
STOPPED = ["reserve", "open", "dispatch", "extend", "void_unknown"]


@pytest.fixture
async def known(world: World) -> Tenant:
    """A tenant whose prompt's size is known, so that hardly more input is held than is used."""
    tenant = await world.new_tenant()
    await world.answer(tenant)
    world.script.heard.clear()
    return tenant


async def billed(world: World) -> tuple[int, int, int]:
    """What the provider bills for its last call, in tokens of input and output and in nano-USD, once it noticed the end."""
    await until(lambda: ended(world))
    entry: Any = (await world.provider_ledger.folded())[-1]
    given, written = entry["input_tokens"], entry["output_tokens"]
    return given, written, ceil_cost(given, INPUT_PRICE) + ceil_cost(written, OUTPUT_PRICE)


def ended(world: World) -> bool:
    """Whether the last line of the provider's ledger tells an end."""
    return b'"outcome":"started"' not in world.provider_ledger.path.read_bytes().splitlines()[-1]


async def test_a_runaway_stream_is_closed_before_its_bill_passes_the_hold(world: World, known: Tenant) -> None:
    """Refused an extension, the stream is closed at once: the caller has the text so far and the refusal, the ledger an unresolved call."""
    world.script.hooks["extend"] = failing(REFUSED)
    refusal = await world.refusal(known, RUNAWAY, max_output_tokens=100)
    assert (refusal.code, refusal.reason_name) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "BUDGET")
    assert refusal.metadata["rule"] == "cost_nano_usd_per_month"
    assert refusal.metadata["call_id"]
    assert refusal.__notes__[0]
    assert world.script.names() == STOPPED
    [opening], [void] = world.script.all("open")[0].calls, world.script.all("void_unknown")[0].calls
    assert void.cause == "budget"
    given, written, cost = await billed(world)
    assert written > 100
    assert given + written <= opening.bound_tokens
    assert cost <= opening.bound_nano_usd


async def test_a_provider_that_notices_late_stays_within_the_hold(world: World, known: Tenant) -> None:
    """What is written between the decision to close and its being noticed was held from the start."""
    world.script.hooks["extend"] = failing(REFUSED)
    late = "[[stub: ignore_max_tokens output_tokens=4000 token_ms=4 notice_ms=400]] Never stop"
    await world.refusal(known, late, max_output_tokens=100)
    [opening] = world.script.all("open")[0].calls
    given, written, cost = await billed(world)
    assert written > 200
    assert given + written <= opening.bound_tokens
    assert cost <= opening.bound_nano_usd


async def test_more_is_used_only_after_limits_and_ledger_gave_it(world: World, tenant: Tenant) -> None:
    """An extension is asked of the limits, then of the ledger, for the same bound; with both the answer goes on and is settled exactly."""
    bounds: list[tuple[str, int]] = []

    def note(name: str) -> Hook:
        def hook(request: Any) -> None:
            [bound] = [request.amounts.tokens] if name == "extend" else [call.bound_tokens for call in request.calls]
            bounds.append((name, bound))

        return hook

    world.script.hooks.update(extend=note("extend"), extend_calls=note("extend_calls"))
    answer = await world.answer(
        tenant, "[[stub: ignore_max_tokens output_tokens=1200 token_ms=2]] Go on", max_output_tokens=100, timeout=20.0
    )
    assert answer.summary.usage.output_tokens == 1200
    assert len(bounds) >= 2
    assert [name for name, _ in bounds] == ["extend", "extend_calls"] * (len(bounds) // 2)
    assert [bound for _, bound in bounds[::2]] == [bound for _, bound in bounds[1::2]] == sorted(bound for _, bound in bounds[::2])
    assert world.script.names()[-1] == "settle"
    assert bounds[-1][1] >= answer.summary.usage.input_tokens + 1200


@pytest.mark.parametrize(
    ("name", "hook", "reason"),
    [
        ("extend", failing(Unavailable("redis")), "DEPENDENCY_UNAVAILABLE"),
        ("extend_calls", failing(Unavailable("postgres")), "DEPENDENCY_UNAVAILABLE"),
        ("extend_calls", lambda request: not_open(request), "RESERVATION_LOST"),
    ],
    ids=["limits away", "ledger away", "call not open"],
)
async def test_without_both_answers_the_stream_does_not_go_on(world: World, known: Tenant, name: str, hook: Hook, reason: str) -> None:
    """Whoever of the two does not say yes ends the stream."""
    world.script.hooks[name] = hook
    refusal = await world.refusal(known, RUNAWAY, max_output_tokens=100)
    assert refusal.reason_name == reason
    await world.script.wait_for("void_unknown")
    given, written, _ = await billed(world)
    [opening] = world.script.all("open")[0].calls
    assert given + written <= opening.bound_tokens


async def test_an_extension_that_is_not_answered_ends_the_stream(world: World, known: Tenant) -> None:
    """The decision has a time limit, which is part of what is held."""

    async def hang(_: Any) -> None:
        await asyncio.Event().wait()

    world.script.hooks["extend"] = hang
    refusal = await world.refusal(known, "[[stub: ignore_max_tokens output_tokens=4000 token_ms=5]] Never stop", max_output_tokens=100)
    assert refusal.code is grpc.StatusCode.UNAVAILABLE
    given, written, _ = await billed(world)
    [opening] = world.script.all("open")[0].calls
    assert given + written <= opening.bound_tokens


async def test_a_shortened_answer_of_an_honest_provider_is_not_cut(world: World, tenant: Tenant) -> None:
    """A provider that keeps to max_tokens writes them to the last, though the limits have not a token more: nothing is asked of them."""
    world.script.hooks.update(extend=failing(REFUSED), reserve=lambda request: held(request, 300))
    answer = await world.answer(tenant, "[[stub: output_tokens=900 token_ms=2]] Tell me a story", max_output_tokens=1000)
    assert (answer.summary.usage.output_tokens, answer.summary.stop_reason, answer.summary.shortened) == (300, "max_tokens", True)
    assert world.script.names() == ["reserve", "open", "dispatch", "settle"]


async def test_text_is_counted_by_the_provider_before_more_is_held(world: World, tenant: Tenant) -> None:
    """A long answer whose bytes alone could be too many tokens is counted, and where that suffices nothing more is held."""
    await world.answer(tenant, "[[stub: output_tokens=980 token_ms=1]] Tell me a story", max_output_tokens=1000)
    counts = [request for request in world.stub._received.last(100) if request["path"] == "/v1/messages/count_tokens"]
    assert counts
    assert world.script.names() == ["reserve", "open", "dispatch", "settle"]


async def test_an_answer_that_cannot_be_counted_is_extended_by_its_bytes(
    world: World, tenant: Tenant, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the provider does not count, the bound of bytes decides: more is held than is used, and given back at the end."""

    async def unable(*_: Any) -> Any:
        raise ConnectionResetError

    monkeypatch.setitem(ROUTES["/v1/messages/count_tokens"], "POST", unable)
    answer = await world.answer(tenant, "[[stub: output_tokens=980 token_ms=1]] Tell me a story", max_output_tokens=1000)
    assert answer.summary.usage.output_tokens == 980
    assert world.script.names() == ["reserve", "open", "dispatch", "extend", "extend_calls", "settle"]


def not_open(request: Any) -> Any:
    """The ledger knows no open call."""
    return ledger_pb.ExtendCallsResponse(outcomes=[ledger_pb.EXTEND_OUTCOME_NOT_OPEN for _ in request.calls])


def test_the_spare_covers_a_fast_model_for_as_long_as_a_decision_takes() -> None:
    """What may be in flight is 200 tokens a second for as long as counting, extending and a fifth of a second for closing take."""
    in_flight_tokens = InferenceSettings.model_fields["provider_in_flight_tokens"].default
    assert in_flight_tokens >= 200 * (COUNT_SECONDS + EXTEND_SECONDS + 0.2)
