"""The call protocol, message by message: every point of failure leads to exactly the messages the protocol names."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import grpc
import pytest

from devstack.provider_stub.ledger import fold
from mesh.common.v1 import error_reason_pb2 as reasons
from mesh.inference.v1 import inference_service_pb2 as pb
from mesh.metering.v1 import ledger_service_pb2 as ledger_pb
from mesh.ratelimit.v1 import rate_limit_service_pb2 as limit_pb
from mesh.retrieval.v1 import search_service_pb2 as search_pb
from services.inference.admission import AdmissionGate
from services.kernel.errors import InvalidRequest, LimitExceeded, MeshError, ReservationLost, Unavailable
from services.kernel.ids import new_uuid7
from tests.inference.conftest import World, until
from tests.inference.peers import Tenant, opened

REQUIRED = pb.RetrievalOptions(mode=pb.RETRIEVAL_MODE_REQUIRED)
BEST_EFFORT = pb.RetrievalOptions(mode=pb.RETRIEVAL_MODE_BEST_EFFORT)

Hook = Callable[[Any], Any]


@dataclass(frozen=True)
class Case:
    """A failure: where, how, and what must follow."""

    name: str
    sequence: list[str]
    reason: str
    code: grpc.StatusCode
    hooks: dict[str, Hook]
    question: str = "How are you?"
    options: dict[str, Any] | None = None
    retry_after_seconds: float | None = None


def failing(error: MeshError) -> Hook:
    """A hook that raises."""

    def hook(_: Any) -> Any:
        raise error

    return hook


def outcome(kind: Any, state: Any = ledger_pb.CALL_STATE_UNSPECIFIED) -> Hook:
    """A hook that answers an open."""
    return lambda request: opened(request, kind, state)


REFUSAL = LimitExceeded(reasons.ERROR_REASON_BUDGET, "used up", 30.0, rule="cost_nano_usd_per_month")
NO_BILL = ["reserve", "open", "dispatch", "void", "release"]
UNKNOWN_BILL = ["reserve", "open", "dispatch", "void_unknown"]
CASES = [
    Case("reserve refused", ["reserve"], "BUDGET", grpc.StatusCode.RESOURCE_EXHAUSTED, {"reserve": failing(REFUSAL)},
         retry_after_seconds=30.0),
    Case("limits rebuilding", ["reserve"], "LIMITS_REBUILDING", grpc.StatusCode.UNAVAILABLE,
         {"reserve": failing(Unavailable("redis", reason=reasons.ERROR_REASON_LIMITS_REBUILDING))}),
    Case("reservation too old", ["reserve"], "RESERVATION_LOST", grpc.StatusCode.ABORTED,
         {"reserve": failing(ReservationLost("x", "lost"))}),
    Case("open unavailable", ["reserve", "open", "void", "release"], "DEPENDENCY_UNAVAILABLE", grpc.StatusCode.UNAVAILABLE,
         {"open": failing(Unavailable("postgres"))}),
    Case("epoch stale twice", 2 * ["reserve", "open", "void", "release"], "RESERVATION_LOST", grpc.StatusCode.ABORTED,
         {"open": outcome(ledger_pb.OPEN_OUTCOME_STALE_EPOCH)}),
    Case("call voided before open", ["reserve", "open", "release"], "RESERVATION_LOST", grpc.StatusCode.ABORTED,
         {"open": outcome(ledger_pb.OPEN_OUTCOME_ENDED, ledger_pb.CALL_STATE_VOID)}),
    Case("lease ended before open was heard", ["reserve", "open", "void", "release"], "RESERVATION_LOST", grpc.StatusCode.ABORTED,
         {"open": outcome(ledger_pb.OPEN_OUTCOME_ENDED, ledger_pb.CALL_STATE_UNRESOLVED)}),
    Case("call id taken", ["reserve", "open", "release"], "CONTENT_CONFLICT", grpc.StatusCode.ALREADY_EXISTS,
         {"open": outcome(ledger_pb.OPEN_OUTCOME_CALL_ID_TAKEN)}),
    Case("price missing at the ledger", ["reserve", "open", "release"], "PRICE_MISSING", grpc.StatusCode.FAILED_PRECONDITION,
         {"open": outcome(ledger_pb.OPEN_OUTCOME_PRICE_MISSING)}),
    Case("tenant not proven", ["reserve", "open", "release"], "CONTEXT_INVALID", grpc.StatusCode.UNAUTHENTICATED,
         {"open": outcome(ledger_pb.OPEN_OUTCOME_TENANT_NOT_PROVEN)}),
    Case("provider 400", NO_BILL, "PROVIDER_REFUSED", grpc.StatusCode.INVALID_ARGUMENT, {}, "[[stub: error=400]] Hi"),
    Case("provider 401", NO_BILL, "PROVIDER_MISCONFIGURED", grpc.StatusCode.FAILED_PRECONDITION, {}, "[[stub: error=401]] Hi"),
    Case("provider 403", NO_BILL, "PROVIDER_MISCONFIGURED", grpc.StatusCode.FAILED_PRECONDITION, {}, "[[stub: error=403]] Hi"),
    Case("provider 404", NO_BILL, "PROVIDER_REFUSED", grpc.StatusCode.INVALID_ARGUMENT, {}, "[[stub: error=404]] Hi"),
    Case("provider 413", NO_BILL, "PROVIDER_REFUSED", grpc.StatusCode.INVALID_ARGUMENT, {}, "[[stub: error=413]] Hi"),
    Case("provider 429", NO_BILL, "PROVIDER_UNAVAILABLE", grpc.StatusCode.UNAVAILABLE, {}, "[[stub: error=429 retry_after=7]] Hi",
         retry_after_seconds=7.0),
    Case("provider 429 for an hour", NO_BILL, "PROVIDER_UNAVAILABLE", grpc.StatusCode.UNAVAILABLE, {},
         "[[stub: error=429 retry_after=3600]] Hi",
         retry_after_seconds=60.0),
    Case("provider 529", NO_BILL, "PROVIDER_UNAVAILABLE", grpc.StatusCode.UNAVAILABLE, {}, "[[stub: error=529]] Hi",
         retry_after_seconds=1.0),
    Case("provider 500", UNKNOWN_BILL, "PROVIDER_UNAVAILABLE", grpc.StatusCode.UNAVAILABLE, {}, "[[stub: error=500]] Hi"),
    Case("overloaded mid-stream", UNKNOWN_BILL, "STREAM_INTERRUPTED", grpc.StatusCode.UNAVAILABLE, {},
         "[[stub: output_tokens=40 overload_after=20]] Hi"),
    Case("stream cut", UNKNOWN_BILL, "STREAM_INTERRUPTED", grpc.StatusCode.UNAVAILABLE, {}, "[[stub: output_tokens=40 cut_after=20]] Hi"),
    Case("unknown conversation", ["reserve", "release"], "NOT_FOUND", grpc.StatusCode.NOT_FOUND, {},
         options={"conversation_id": "ab" * 32}),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
async def test_each_failure_leads_to_exactly_the_protocols_messages(world: World, tenant: Tenant, case: Case) -> None:
    """Whatever fails, the hold and the record end as the protocol says, and the caller hears the reason."""
    world.script.hooks.update(case.hooks)
    refusal = await world.refusal(tenant, case.question, **(case.options or {}))
    assert (refusal.reason_name, refusal.code) == (case.reason, case.code)
    if case.retry_after_seconds is not None:
        assert refusal.retry_after_seconds == case.retry_after_seconds
    assert world.script.names() == case.sequence
    assert not world.app.leases._leases


async def test_nothing_is_dispatched_before_open_is_acknowledged(world: World, tenant: Tenant) -> None:
    """While the ledger has not acknowledged, the provider hears nothing."""
    acknowledge = asyncio.Event()

    async def later(_: Any) -> None:
        await acknowledge.wait()

    world.script.hooks["open"] = later
    async with asyncio.TaskGroup() as calls:
        call = calls.create_task(world.answer(tenant))
        await world.script.wait_for("open")
        await asyncio.sleep(0.1)
        assert world.script.names() == ["reserve", "open"]
        acknowledge.set()
        await call
    assert world.script.names() == ["reserve", "open", "dispatch", "settle"]


async def test_a_stale_epoch_starts_again_with_a_new_reservation(world: World, tenant: Tenant) -> None:
    """An open refused for its epoch is voided, which tells the limits of the newer one, and a new reservation carries the call through."""
    answers = iter([ledger_pb.OPEN_OUTCOME_STALE_EPOCH, ledger_pb.OPEN_OUTCOME_OPENED])
    world.script.hooks["open"] = lambda request: opened(request, next(answers))
    await world.answer(tenant)
    assert world.script.names() == ["reserve", "open", "void", "release", "reserve", "open", "dispatch", "settle"]
    first, second = world.script.all("reserve")
    assert first.reservation_id != second.reservation_id


async def test_release_waits_for_the_voids_acknowledgement(world: World, tenant: Tenant) -> None:
    """A hold is let go only after the ledger acknowledged the void, however often that has to be asked."""
    world.script.hooks["open"] = failing(Unavailable("postgres"))
    failures = iter([True] * 4)

    def void(_: Any) -> None:
        if next(failures, False):
            raise Unavailable("postgres")

    world.script.hooks["void"] = void
    await world.refusal(tenant)
    names = [name for name, _ in world.script.heard if name in ("void", "release")]
    assert names == ["void"] * 5 + ["release"]


async def test_failed_required_search_voids_and_releases(world: World, tenant: Tenant) -> None:
    """A search that must succeed and fails ends the call before anything is dispatched."""
    open_now = asyncio.Event()

    async def after_open(_: Any) -> None:
        await open_now.wait()
        raise Unavailable("qdrant")

    def opening(_: Any) -> None:
        open_now.set()

    world.script.hooks.update(search=after_open, open=opening)
    refusal = await world.refusal(tenant, retrieval=REQUIRED)
    assert (refusal.code, refusal.reason_name) == (grpc.StatusCode.UNAVAILABLE, "DEPENDENCY_UNAVAILABLE")
    assert [name for name in world.script.names() if name != "search"] == ["reserve", "open", "void", "release"]


async def test_failed_best_effort_search_degrades_the_answer(world: World, tenant: Tenant) -> None:
    """A search that may fail leaves an answer without documents, marked degraded from the first message on."""
    world.script.hooks["search"] = failing(Unavailable("qdrant"))
    answer = await world.answer(tenant, retrieval=BEST_EFFORT)
    assert answer.started is not None
    assert answer.started.retrieval_degraded
    assert answer.summary.retrieval_degraded
    assert not answer.summary.sources
    assert world.script.names("search") == ["reserve", "open", "dispatch", "settle"]


async def test_blank_chunks_are_not_sources(world: World, tenant: Tenant) -> None:
    """A chunk without words is neither sent nor listed."""
    world.script.hooks["search"] = lambda _: search_pb.SearchResponse(chunks=[search_pb.FoundChunk(text=" \n", title="Empty")])
    answer = await world.answer(tenant, retrieval=REQUIRED)
    assert not answer.summary.sources
    assert "<documents>" not in world.sent()["messages"][-1]["content"]


async def test_cancelling_mid_stream_leaves_the_call_unresolved(world: World, tenant: Tenant) -> None:
    """A caller that goes away closes the provider's stream; the usage received so far is reported, never billed."""
    call = world.stream(tenant, "[[stub: output_tokens=400 token_ms=10]] Tell me a story")
    while (await call.read()).WhichOneof("event") != "delta":
        pass
    call.cancel()
    await world.script.wait_for("void_unknown")
    assert world.script.names() == UNKNOWN_BILL
    [void] = world.script.all("void_unknown")[0].calls
    assert (void.kind, void.cause) == (ledger_pb.VOID_KIND_UNKNOWN, "cancelled")
    assert void.received.input_tokens > 0
    await stream_closed(world)


async def test_cancelling_while_the_hold_is_taken_leaves_none_behind(world: World, tenant: Tenant) -> None:
    """A caller that goes away while the limits decide has its hold released as soon as it is known."""
    decide = asyncio.Event()

    async def later(_: Any) -> None:
        await decide.wait()

    world.script.hooks["reserve"] = later
    call = world.stream(tenant)
    await world.script.wait_for("reserve")
    call.cancel()
    decide.set()
    await world.script.wait_for("release")
    assert world.script.names() == ["reserve", "release"]
    assert world.script.all("release")[0].reservation_id == world.script.all("reserve")[0].reservation_id


async def test_cancelling_before_dispatch_bills_nothing(world: World, tenant: Tenant) -> None:
    """A caller that goes away while the ledger is asked leaves a voided record and a released hold."""
    never = asyncio.Event()

    async def hang(_: Any) -> None:
        await never.wait()

    world.script.hooks["open"] = hang
    call = world.stream(tenant)
    await world.script.wait_for("open")
    call.cancel()
    await world.script.wait_for("void", "release")
    never.set()
    assert world.script.names() == ["reserve", "open", "void", "release"]


async def test_a_deadline_before_dispatch_still_voids_and_releases(world: World, tenant: Tenant) -> None:
    """A call whose time is over while the ledger is asked leaves nothing behind: its clean-up is not bound by its deadline."""
    go_on = asyncio.Event()

    async def hang(_: Any) -> None:
        await go_on.wait()

    world.script.hooks["open"] = hang
    refusal = await world.refusal(tenant, timeout=1.5)
    assert refusal.code is grpc.StatusCode.DEADLINE_EXCEEDED
    await world.script.wait_for("void", "release")
    go_on.set()
    assert world.script.names() == ["reserve", "open", "void", "release"]


async def test_a_deadline_mid_stream_leaves_the_call_unresolved(world: World, tenant: Tenant) -> None:
    """When the caller's time is over the stream is closed and the call is unresolved, by its deadline."""
    refusal = await world.refusal(tenant, "[[stub: output_tokens=400 token_ms=10]] Tell me a story", timeout=1.5)
    assert refusal.code is grpc.StatusCode.DEADLINE_EXCEEDED
    await world.script.wait_for("void_unknown")
    assert world.script.names() == UNKNOWN_BILL
    await stream_closed(world)


async def test_a_stalled_provider_ends_at_the_deadline(world: World, tenant: Tenant) -> None:
    """A stream that stops moving is given up at the deadline, not later."""
    refusal = await world.refusal(tenant, "[[stub: output_tokens=40 stall_after=8]] Hi", timeout=1.5)
    assert refusal.code is grpc.StatusCode.DEADLINE_EXCEEDED
    await world.script.wait_for("void_unknown")


async def test_the_text_before_a_cut_is_delivered(world: World, tenant: Tenant) -> None:
    """An interrupted stream delivers what it had, and only then fails."""
    refusal = await world.refusal(tenant, "[[stub: output_tokens=40 cut_after=20]] Tell me a story about ships")
    assert refusal.reason_name == "STREAM_INTERRUPTED"
    assert refusal.__notes__[0]


async def test_a_lost_lease_is_not_dispatched(world: World, tenant: Tenant) -> None:
    """A call whose hold was lost while it waited is voided instead of sent."""
    lost = asyncio.Event()

    async def after_loss(_: Any) -> None:
        await world.app.leases.renew()
        lost.set()

    def gone(request: Any) -> Any:
        return limit_pb.RenewResponse(lost=request.reservations)

    world.script.hooks.update(open=after_loss, renew=gone)
    refusal = await world.refusal(tenant)
    assert lost.is_set()
    assert refusal.reason_name == "RESERVATION_LOST"
    assert world.script.names() == ["reserve", "open", "void", "release"]


async def test_leases_are_renewed_at_both_stores_while_a_call_runs(world: World, tenant: Tenant) -> None:
    """A running call's lease is renewed at the limits and at the ledger, all calls in one batch."""
    call = world.stream(tenant, "[[stub: output_tokens=200 token_ms=10]] Tell me a story")
    await world.script.wait_for("dispatch")
    await world.app.leases.renew()
    [reserve] = world.script.all("reserve")
    assert str(new_id(world.script.all("renew")[-1].reservations[0].reservation_id)) == reserve.reservation_id
    assert str(new_id(world.script.all("renew_calls")[-1].calls[0].reservation_id)) == reserve.reservation_id
    call.cancel()
    await world.script.wait_for("void_unknown")


async def test_settlement_outlives_a_ledger_that_is_away(world: World, tenant: Tenant, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the ledger does not confirm, the caller hears that the answer is complete; the settlement follows when the ledger is back."""
    monkeypatch.setattr("services.inference.settlement.SETTLE_SECONDS", 0.3)
    world.script.hooks["settle"] = failing(Unavailable("postgres"))
    call_id = str(new_uuid7())
    refusal = await world.refusal(tenant, call_id=call_id)
    assert (refusal.code, refusal.metadata["answer_complete"], refusal.metadata["call_id"]) == (
        grpc.StatusCode.UNAVAILABLE,
        "true",
        call_id,
    )
    assert len(world.app.leases._leases) == 1
    del world.script.hooks["settle"]
    reservation_id = world.script.all("settle")[0].calls[0].ref.reservation_id
    await until(lambda: reservation_id in world.script.settled and not world.app.leases._leases)


async def test_cancelling_after_the_answer_still_settles_it(world: World, tenant: Tenant) -> None:
    """A caller that goes away once the usage is known changes nothing about the settlement."""
    settle_now = asyncio.Event()

    async def later(_: Any) -> None:
        await settle_now.wait()

    world.script.hooks["settle"] = later
    call = world.stream(tenant)
    await world.script.wait_for("settle")
    call.cancel()
    settle_now.set()
    reservation_id = world.script.all("settle")[0].calls[0].ref.reservation_id
    await until(lambda: reservation_id in world.script.settled)
    assert world.script.names() == ["reserve", "open", "dispatch", "settle"]


async def test_a_failure_between_answer_and_settlement_still_settles(world: World, tenant: Tenant, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever goes wrong once the usage is known, the call is settled by it."""

    def fail(self: AdmissionGate) -> None:
        self._running -= 1
        raise RuntimeError("the slot cannot be given back")

    monkeypatch.setattr(AdmissionGate, "_leave", fail)
    with pytest.raises(MeshError):
        await world.answer(tenant)
    monkeypatch.undo()
    await world.script.wait_for("settle")
    assert world.script.names() == ["reserve", "open", "dispatch", "settle"]


async def test_one_refused_settlement_does_not_keep_others_from_being_settled(world: World, tenant: Tenant) -> None:
    """A batch that the contract refuses is settled item by item."""
    refusals = 0

    def refuse_batches(request: Any) -> None:
        nonlocal refusals
        if len(request.calls) > 1:
            refusals += 1
            raise InvalidRequest("calls[1].usage", "is not valid")

    world.script.hooks["settle"] = refuse_batches
    async with asyncio.TaskGroup() as calls:
        answers = [calls.create_task(world.answer(tenant)) for _ in range(12)]
    assert all(answer.result().summary.ledger_entry_id for answer in answers)


async def test_an_unknown_price_is_refused_before_anything_is_held(world: World, tenant: Tenant) -> None:
    """A model the catalogue knows and the book does not is PRICE_MISSING, and nothing is reserved."""
    tenant.config.ai.allowed_models.append("claude-haiku-4-5")
    tenant.config.version = 2
    refusal = await world.refusal(tenant, model="claude-haiku-4-5")
    assert (refusal.reason_name, refusal.metadata["model"]) == ("PRICE_MISSING", "claude-haiku-4-5")
    assert world.script.names() == []


def new_id(raw: bytes) -> Any:
    """The id of 16 bytes."""
    return UUID(bytes=raw)


async def stream_closed(world: World) -> None:
    """Returns once the provider saw its stream closed."""
    await until(lambda: fold(world.provider_ledger.path)[-1]["outcome"] == "cancelled")
