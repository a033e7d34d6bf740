"""The provider's own ledger and ours agree, however a call ends: settled exactly, or listed as unresolved, never guessed and never lost."""

import asyncio
import json
import urllib.request
import uuid
from collections import Counter

import grpc

from devstack.mesh_client import credentials
from devstack.state import DemoTenant
from mesh.inference.v1 import inference_service_pb2
from mesh.metering.v1 import ledger_service_pb2, usage_service_pb2
from tests.support.mesh import Mesh
from tests.support.waiting import eventually

SETTLED, UNRESOLVED, VOID = (
    ledger_service_pb2.CALL_STATE_SETTLED,
    ledger_service_pb2.CALL_STATE_UNRESOLVED,
    ledger_service_pb2.CALL_STATE_VOID,
)
# What the provider is told to do, how long the caller waits, and where the call must end.
ENDS = [
    ("Say hello.", 20.0, SETTLED),
    ("[[stub: output_tokens=40]] Go on.", 20.0, SETTLED),
    ("[[stub: output_tokens=400]] Beyond the limit.", 20.0, SETTLED),
    ("[[stub: error=400]] Refused.", 20.0, VOID),
    ("[[stub: error=401]] Refused.", 20.0, VOID),
    ("[[stub: error=429 retry_after=1]] Too many.", 20.0, VOID),
    ("[[stub: error=529]] Overloaded.", 20.0, VOID),
    ("[[stub: error=500]] Broken.", 20.0, UNRESOLVED),
    ("[[stub: overload_after=5 output_tokens=40]] Overloaded while it answers.", 20.0, UNRESOLVED),
    ("[[stub: cut_after=5 output_tokens=40]] Cut while it answers.", 20.0, UNRESOLVED),
    ("[[stub: stall_after=5 output_tokens=40]] Silent while it answers.", 1.0, UNRESOLVED),
    ("[[stub: token_ms=100 output_tokens=100]] Slower than the caller waits.", 1.0, UNRESOLVED),
]


async def call(mesh: Mesh, tenant: DemoTenant, text: str, seconds: float, call_id: uuid.UUID) -> None:
    """Makes one streamed call and ignores how it ends: the ledgers tell."""
    request = inference_service_pb2.StreamGenerateRequest(
        messages=[inference_service_pb2.Message(role=inference_service_pb2.ROLE_USER, text=text)],
        options=inference_service_pb2.GenerateOptions(max_output_tokens=200),
    )
    try:
        async for _ in mesh.client.inference.StreamGenerate(
            request, metadata=credentials(tenant.api_key, call_id=call_id), timeout=seconds
        ):
            pass
    except grpc.aio.AioRpcError:
        pass


def provider_ledger(mesh: Mesh) -> dict[str, dict[str, object]]:
    """What the provider billed, by call id."""
    request = urllib.request.Request(  # noqa: S310 - loopback
        f"{mesh.stack.provider.base_url}/stub/ledger", headers={"x-api-key": mesh.stack.provider.api_key}
    )
    with urllib.request.urlopen(request, timeout=10) as answer:  # noqa: S310
        return {entry["call_id"]: entry for entry in json.load(answer)["data"]}


async def own_ledger(mesh: Mesh, tenant: DemoTenant) -> dict[str, usage_service_pb2.CallRecord]:
    """What our ledger says of the tenant's calls, by call id."""
    request = usage_service_pb2.ListCallsRequest(page_size=1000)
    listed = await mesh.client.usage.ListCalls(request, metadata=credentials(tenant.api_key), timeout=10)
    return {record.call_id: record for record in listed.calls}


async def test_every_end_of_a_call_is_what_the_provider_says(mesh: Mesh) -> None:
    """Each way a call can end leaves it settled with the provider's own figures, void and unbilled, or unresolved."""
    tenant = await mesh.tenant("enterprise")
    asked = {uuid.uuid4(): end for end in ENDS}
    async with asyncio.TaskGroup() as group:
        for call_id, (text, seconds, _) in asked.items():
            group.create_task(call(mesh, tenant, text, seconds, call_id))

    async def none_is_open() -> bool:
        ours = await own_ledger(mesh, tenant)
        return len(ours) == len(asked) and not any(record.state == ledger_service_pb2.CALL_STATE_OPEN for record in ours.values())

    await eventually(none_is_open, within_seconds=10)
    ours = await own_ledger(mesh, tenant)
    assert {end[0]: ours[str(call_id)].state for call_id, end in asked.items()} == {end[0]: end[2] for end in ENDS}
    billed = {call_id: entry for call_id, entry in provider_ledger(mesh).items() if call_id in ours}
    settled = Counter((key, r.usage.input_tokens, r.usage.output_tokens) for key, r in ours.items() if r.state == SETTLED)
    theirs = Counter((key, entry["input_tokens"], entry["output_tokens"]) for key, entry in billed.items() if ours[key].state == SETTLED)
    assert settled == theirs
    assert not [key for key in billed if ours[key].state == VOID]
    for key, entry in billed.items():
        if ours[key].state == UNRESOLVED:
            assert ours[key].usage.output_tokens <= int(str(entry["output_tokens"]))
            assert ours[key].bound.nano_usd > 0
