"""kill -9 in mid-stream: no call unrecorded, no phantom hold, and the service goes on."""

import uuid

import grpc
import redis.asyncio

from devstack.mesh_client import credentials
from devstack.state import DemoTenant
from mesh.inference.v1 import inference_service_pb2
from mesh.metering.v1 import ledger_service_pb2, usage_service_pb2
from mesh.ratelimit.v1 import rate_limit_service_pb2
from tests.support.mesh import Mesh, account_use, running_mesh
from tests.support.waiting import eventually

# One lease (5 s), the sweeps' second, and room for a slow machine.
SETTLES_WITHIN_SECONDS = 10.0
ENDED = {ledger_service_pb2.CALL_STATE_SETTLED, ledger_service_pb2.CALL_STATE_UNRESOLVED}


async def begin_slow_stream(
    mesh: Mesh, tenant: DemoTenant, call_id: uuid.UUID, text: str = "[[stub: output_tokens=200 token_ms=100]] Go on."
) -> grpc.aio.UnaryStreamCall:
    """Starts a streamed call and returns once its first text has arrived; the provider is still busy with it."""
    request = inference_service_pb2.StreamGenerateRequest(
        messages=[inference_service_pb2.Message(role=inference_service_pb2.ROLE_USER, text=text)],
        options=inference_service_pb2.GenerateOptions(max_output_tokens=250),
    )
    stream = mesh.client.inference.StreamGenerate(request, metadata=credentials(tenant.api_key, call_id=call_id), timeout=60)
    async for event in stream:
        if event.WhichOneof("event") == "delta":
            break
    return stream


async def ledger_state(mesh: Mesh, tenant: DemoTenant, call_id: uuid.UUID) -> int:
    """Where the ledger has the call."""
    request = usage_service_pb2.GetCallRequest(call_id=str(call_id))
    record = await mesh.client.usage.GetCall(request, metadata=credentials(tenant.api_key), timeout=5)
    return int(record.attempts[0].state)


async def used_limits(mesh: Mesh, tenant: DemoTenant) -> dict[str, int]:
    """What is used of each limit."""
    listed = await mesh.client.limits.ListLimits(
        rate_limit_service_pb2.ListLimitsRequest(), metadata=credentials(tenant.api_key), timeout=5
    )
    return {limit.rule: limit.used for limit in listed.limits}


async def test_killed_inference_leaves_no_call_unrecorded() -> None:
    """A call killed in mid-stream is UNRESOLVED within 10 s, held at its bound, its slot free; a new call works after a restart."""
    async with running_mesh(trace_sample_ratio=0.0) as mesh:
        tenant = await mesh.tenant()
        call_id = uuid.uuid4()
        stream = await begin_slow_stream(mesh, tenant, call_id)
        held = await used_limits(mesh, tenant)
        assert held["concurrent_calls"] == 1
        process = mesh.stack.processes["inference"]
        process.kill()
        await process.wait()
        stream.cancel()

        async def is_over() -> bool:
            ended = await ledger_state(mesh, tenant, call_id) in ENDED
            return ended and not (await used_limits(mesh, tenant))["concurrent_calls"]

        await eventually(is_over, within_seconds=SETTLES_WITHIN_SECONDS)
        report = await mesh.client.usage.GetUsageReport(usage_service_pb2.GetUsageReportRequest(), metadata=credentials(tenant.api_key))
        assert (report.open_count, report.unresolved_count) == (0, 1)
        after = await used_limits(mesh, tenant)
        assert after["cost_nano_usd_per_month"] == report.outstanding_bound.nano_usd == held["cost_nano_usd_per_month"]
        await mesh.stack.start_service("inference")
        request = inference_service_pb2.GenerateRequest(
            messages=[inference_service_pb2.Message(role=inference_service_pb2.ROLE_USER, text="Hello.")]
        )
        answer = await mesh.client.inference.Generate(request, metadata=credentials(tenant.api_key), timeout=20, wait_for_ready=True)
        assert answer.summary.ledger_entry_id
        assert (await used_limits(mesh, tenant))["concurrent_calls"] <= 1


async def test_a_cancelled_stream_is_unresolved_and_frees_its_slot(mesh: Mesh) -> None:
    """A caller that goes away leaves a call whose usage nobody knows: listed, held at its bound, its slot free at once."""
    tenant = await mesh.tenant()
    call_id = uuid.uuid4()
    stream = await begin_slow_stream(mesh, tenant, call_id)
    stream.cancel()

    async def is_over() -> bool:
        unresolved = await ledger_state(mesh, tenant, call_id) == ledger_service_pb2.CALL_STATE_UNRESOLVED
        return unresolved and not (await used_limits(mesh, tenant))["concurrent_calls"]

    await eventually(is_over, within_seconds=SETTLES_WITHIN_SECONDS)
    report = await mesh.client.usage.GetUsageReport(usage_service_pb2.GetUsageReportRequest(), metadata=credentials(tenant.api_key))
    assert (await used_limits(mesh, tenant))["cost_nano_usd_per_month"] == report.outstanding_bound.nano_usd > 0


async def test_what_a_call_did_not_use_of_the_account_survives_killed_limits() -> None:
    """A call that ends while no limits are there gives back to the provider's account what it did not use as soon as they are again."""
    async with running_mesh() as mesh:
        tenant = await mesh.tenant()
        stream = await begin_slow_stream(mesh, tenant, uuid.uuid4(), "[[stub: output_tokens=40 token_ms=20]] Go on.")
        _, input_tokens, output_tokens = await account_use(mesh, tenant)
        process = mesh.stack.processes["ratelimit"]
        process.kill()
        await process.wait()
        usage = await anext(event.final.usage async for event in stream if event.WhichOneof("event") == "final")
        assert await account_use(mesh, tenant) == (1, input_tokens, output_tokens)
        assert usage.input_tokens < input_tokens
        assert usage.output_tokens < output_tokens
        await mesh.stack.start_service("ratelimit")

        async def is_counted() -> bool:
            return await account_use(mesh, tenant) == (1, usage.input_tokens, usage.output_tokens)

        await eventually(is_counted, within_seconds=30)


async def test_limits_are_rebuilt_from_the_ledger_when_redis_forgets(mesh: Mesh) -> None:
    """After Redis lost everything, the next call finds exactly what the ledger knows."""
    tenant = await mesh.tenant()
    request = inference_service_pb2.GenerateRequest(
        messages=[inference_service_pb2.Message(role=inference_service_pb2.ROLE_USER, text="Hello.")]
    )
    answer = await mesh.client.inference.Generate(request, metadata=credentials(tenant.api_key), timeout=20)

    async def is_committed() -> bool:
        return not (await used_limits(mesh, tenant))["concurrent_calls"]

    await eventually(is_committed, within_seconds=30)
    before = await used_limits(mesh, tenant)
    await empty_redis(mesh)
    assert await used_limits(mesh, tenant) == before
    assert before["cost_nano_usd_per_month"] == answer.summary.cost.nano_usd


async def empty_redis(mesh: Mesh) -> None:
    """Loses all of Redis's data."""
    client = redis.asyncio.from_url(mesh.stack.redis.url)
    await client.flushall()
    await client.aclose()
