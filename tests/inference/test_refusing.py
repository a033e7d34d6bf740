"""Bad input: refused before anything is held, with the reason, the field and the numbers."""

from __future__ import annotations

from typing import Any

import grpc
import pytest

from mesh.inference.v1 import inference_service_pb2 as pb
from mesh.metering.v1 import ledger_service_pb2 as ledger_pb
from services.kernel.ids import new_uuid7
from services.kernel.rpc.wire_status import decode_rpc_error
from tests.inference.conftest import World, credentials
from tests.inference.peers import OPUS, Tenant, opened

USER, ASSISTANT = pb.ROLE_USER, pb.ROLE_ASSISTANT
CASES: list[tuple[str, Any, dict[str, Any], grpc.StatusCode, str]] = [
    ("no messages", [], {}, grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST"),
    ("blank message", " \n", {}, grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST"),
    ("last message the assistant's", [pb.Message(role=USER, text="a"), pb.Message(role=ASSISTANT, text="b")], {},
     grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST"),
    ("role not told", [pb.Message(text="a")], {}, grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST"),
    ("unknown model", "Hi", {"model": "gpt-9"}, grpc.StatusCode.INVALID_ARGUMENT, "UNKNOWN_MODEL"),
    ("model not in the plan", "Hi", {"model": OPUS}, grpc.StatusCode.PERMISSION_DENIED, "MODEL_TIER"),
    ("too many output tokens", "Hi", {"max_output_tokens": 1001}, grpc.StatusCode.INVALID_ARGUMENT, "REQUEST_TOO_LARGE"),
    ("longer than the plan's context", "x" * 40_000, {}, grpc.StatusCode.INVALID_ARGUMENT, "REQUEST_TOO_LARGE"),
    ("one message over a megabyte", "x" * 1_000_001, {}, grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST"),
    ("negative output tokens", "Hi", {"max_output_tokens": -1}, grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST"),
    ("too many stop sequences", "Hi", {"stop_sequences": ["a"] * 9}, grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "question", "options", "code", "reason"), CASES, ids=[case[0] for case in CASES])
async def test_bad_input_is_refused_before_anything_is_held(
    world: World, tenant: Tenant, name: str, question: Any, options: dict[str, Any], code: grpc.StatusCode, reason: str
) -> None:
    """A request that breaks a rule reaches no peer that holds, records or bills."""
    refusal = await world.refusal(tenant, question, **options)
    assert (refusal.code, refusal.reason_name) == (code, reason)
    assert world.script.names() == []


async def test_ten_megabytes_are_refused_as_too_large(world: World, tenant: Tenant) -> None:
    """A request above the message size is refused before it is read."""
    request = pb.StreamGenerateRequest(messages=[pb.Message(role=USER, text="x" * 10_000_000)])
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in world.inference.StreamGenerate(request, metadata=credentials(tenant), timeout=10.0):
            pass
    refusal = decode_rpc_error(caught.value, "inference")
    assert (refusal.code, refusal.metadata["limit"]) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "4194304")
    assert world.script.names() == []


async def test_a_refused_cap_names_rule_limit_and_request(world: World, tenant: Tenant) -> None:
    """A request over a cap says which, how much is allowed and how much was asked."""
    refusal = await world.refusal(tenant, max_output_tokens=1001)
    assert refusal.metadata == {"field": "options.max_output_tokens", "rule": "max_output_tokens", "limit": "1000", "requested": "1001"}


async def test_a_prompt_that_leaves_no_room_is_refused_and_released(world: World) -> None:
    """When the question fits the plan alone but not with the prompt, nothing is opened and the hold goes."""
    tenant = await world.new_tenant(context_tokens=1_000)
    world.script.heard.clear()
    refusal = await world.refusal(tenant, "x" * 900)
    assert (refusal.reason_name, refusal.metadata["limit"]) == ("REQUEST_TOO_LARGE", "1000")
    assert world.script.names() == ["reserve", "release"]


async def test_a_used_call_id_is_refused_with_advice(world: World, tenant: Tenant) -> None:
    """A call id is used once; the refusal names it and says what to do."""
    call_id = str(new_uuid7())
    world.script.hooks["open"] = lambda request: opened(request, ledger_pb.OPEN_OUTCOME_CALL_ID_TAKEN)
    refusal = await world.refusal(tenant, call_id=call_id)
    assert refusal.code is grpc.StatusCode.ALREADY_EXISTS
    assert refusal.metadata["call_id"] == call_id
    assert "x-request-id" in refusal.message


async def test_a_call_id_that_is_no_uuid_is_refused(world: World, tenant: Tenant) -> None:
    """x-request-id is a UUID or absent."""
    refusal = await world.refusal(tenant, call_id="order-17")
    assert refusal.reason_name == "INVALID_METADATA"


async def test_a_tenant_without_a_prompt_is_not_served(world: World) -> None:
    """Before it is provisioned a tenant has no prompt, and its call ends without a record."""
    tenant = await world.new_tenant(provision=False)
    refusal = await world.refusal(tenant)
    assert (refusal.code, refusal.metadata["resource"]) == (grpc.StatusCode.NOT_FOUND, "prompt")
    assert world.script.names() == ["reserve", "release"]
