"""A call that goes well, from the caller's side and from each peer's."""

import asyncio
from uuid import UUID

from mesh.inference.v1 import inference_service_pb2 as pb
from mesh.inference.v1 import prompt_service_pb2
from services.kernel.ids import new_uuid7
from tests.inference.conftest import CALL_ID_HEADER, World, credentials, until
from tests.inference.peers import ENTRY_ID, HAIKU, Tenant


async def test_a_streamed_call_is_started_answered_and_settled(world: World, tenant: Tenant) -> None:
    """The stream is one started, deltas and one final that carries the exact usage and the ledger's cost and entry."""
    call_id = str(new_uuid7())
    answer = await world.answer(tenant, "[[stub: output_tokens=30]] Hello", call_id=call_id)
    assert answer.started is not None
    assert (answer.started.call_id, answer.started.model) == (call_id, HAIKU)
    assert answer.text
    assert answer.summary.usage.output_tokens == 30
    assert answer.summary.ledger_entry_id == str(ENTRY_ID)
    [billed] = [entry for entry in await world.provider_ledger.folded() if entry["call_id"] == call_id]
    assert (billed["input_tokens"], billed["output_tokens"]) == (answer.summary.usage.input_tokens, 30)
    [settled] = world.script.all("settle")[0].calls
    assert (settled.usage.input_tokens, settled.usage.output_tokens) == (billed["input_tokens"], 30)
    assert settled.provider_request_id == billed["request_id"]
    assert answer.summary.cost.nano_usd == settled.usage.input_tokens * 1000 + 30 * 5000


async def test_the_protocol_is_reserve_open_dispatch_settle(world: World, tenant: Tenant) -> None:
    """A call that goes well is reserved, opened, dispatched and settled, in this order and nothing else."""
    await world.answer(tenant)
    assert world.script.names() == ["reserve", "open", "dispatch", "settle"]


async def test_generate_is_the_collected_stream(world: World, tenant: Tenant) -> None:
    """Generate answers the same text as StreamGenerate, by the same protocol."""
    streamed = await world.answer(tenant, "What is your name?")
    collected = await world.generate(tenant, "What is your name?")
    assert collected.text == streamed.text
    assert world.script.names() == ["reserve", "open", "dispatch", "settle"] * 2


async def test_the_provider_hears_the_call_id_and_no_tenant(world: World, tenant: Tenant) -> None:
    """The configured header carries the call id; no trace context, baggage or tenant id leaves the mesh."""
    call_id = str(new_uuid7())
    await world.answer(tenant, call_id=call_id)
    [headers] = world.script.all("dispatch")
    lowered = {name.lower(): value for name, value in headers.items()}
    assert lowered[CALL_ID_HEADER] == call_id
    assert not {"traceparent", "baggage", "x-tenant-id"} & set(lowered)
    assert tenant.config.tenant_id not in str(lowered)


async def test_the_hold_covers_the_bill_and_binds_max_tokens(world: World, tenant: Tenant) -> None:
    """What is reserved is opened with the same bounds, covers what is settled, and bounds the max_tokens that is sent."""
    await world.answer(tenant, "[[stub: output_tokens=40]] Hello", max_output_tokens=40)
    [reserve], [opening], [settle] = (world.script.all(name) for name in ("reserve", "open", "settle"))
    call, usage = opening.calls[0], settle.calls[0].usage
    assert (call.bound_tokens, call.bound_nano_usd) == (reserve.amounts.tokens, reserve.amounts.cost_nano_usd)
    assert usage.input_tokens + usage.output_tokens <= call.bound_tokens
    assert UUID(bytes=call.ref.reservation_id) == UUID(reserve.reservation_id)
    assert (call.price_version, call.prompt_version, call.epoch, call.attempt) == ("prices-1", "default@1", 7, 1)
    assert world.sent()["max_tokens"] == 40


async def test_remaining_limits_give_back_what_the_call_did_not_use(world: World, tenant: Tenant) -> None:
    """The final message shows each limit less the call's actual use, not its hold."""
    answer = await world.answer(tenant)
    usage = answer.summary.usage
    left = {limit.rule: limit.remaining for limit in answer.summary.remaining}
    assert left == {
        "requests_per_minute": 59,
        "tokens_per_day": 1_000_000 - usage.input_tokens - usage.output_tokens,
        "cost_nano_usd_per_month": 10**12 - answer.summary.cost.nano_usd,
        "concurrent_calls": 5,
    }


async def test_concurrent_calls_ride_in_one_open(world: World, tenant: Tenant) -> None:
    """Opens that arrive while others are under way are sent together."""
    go_on = asyncio.Event()

    async def wait(_: object) -> None:
        await go_on.wait()

    world.script.hooks["open"] = wait
    async with asyncio.TaskGroup() as calls:
        for _ in range(12):
            calls.create_task(world.generate(tenant))
        await until(lambda: len(world.script.all("reserve")) == 12)
        # The last reservation's call still has to read its prompt.
        await asyncio.sleep(1.0)
        go_on.set()
    opens = world.script.all("open")
    assert sum(len(request.calls) for request in opens) == 12
    assert len(opens) <= 4


async def test_the_tenants_prompt_is_read_fresh(world: World, tenant: Tenant) -> None:
    """A prompt stored a moment ago is the one the next call uses, and the ledger names its version."""
    await world.answer(tenant)
    assert world.sent()["system"].startswith("You are Ada, the assistant of Acme.")
    await world.prompts.PutPrompt(prompt_service_pb2.PutPromptRequest(text="Answer in rhymes."), metadata=credentials(tenant))
    answer = await world.answer(tenant)
    assert world.sent()["system"] == "Answer in rhymes."
    assert answer.summary.prompt_version == "default@2"
    assert world.script.all("open")[-1].calls[0].prompt_version == "default@2"


async def test_stop_sequences_reach_the_provider(world: World, tenant: Tenant) -> None:
    """Stop sequences are passed on as they are."""
    await world.answer(tenant, stop_sequences=["END"])
    assert world.sent()["stop_sequences"] == ["END"]


async def test_messages_keep_their_order_and_roles(world: World, tenant: Tenant) -> None:
    """The caller's own turns are sent in order, the question last."""
    turns = [
        pb.Message(role=pb.ROLE_USER, text="One"),
        pb.Message(role=pb.ROLE_ASSISTANT, text="Two"),
        pb.Message(role=pb.ROLE_USER, text="Three"),
    ]
    await world.answer(tenant, turns)
    assert world.sent()["messages"] == [
        {"role": "user", "content": "One"},
        {"role": "assistant", "content": "Two"},
        {"role": "user", "content": "Three"},
    ]
