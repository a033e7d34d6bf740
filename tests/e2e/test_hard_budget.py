"""A budget holds whatever the provider does: many streams, a provider that ignores max_tokens, and never more billed than was allowed."""

import asyncio
import json
import urllib.request
import uuid
from collections import Counter
from typing import Any

import grpc
from google.protobuf.field_mask_pb2 import FieldMask

from devstack.mesh_client import credentials, operator_credentials, refusal
from devstack.state import DemoTenant
from mesh.inference.v1 import inference_service_pb2
from mesh.metering.v1 import ledger_service_pb2, usage_service_pb2
from mesh.ratelimit.v1 import rate_limit_service_pb2
from mesh.tenant.v1 import configuration_service_pb2
from tests.support.mesh import Mesh
from tests.support.waiting import eventually

MODEL = "claude-haiku-4-5-20251001"
# Nano-USD a token of the model, as in the price book.
INPUT_PRICE, OUTPUT_PRICE = 1_000, 5_000
STREAMS, COVERED = 200, 20
RUNAWAY = "[[stub: ignore_max_tokens output_tokens=4000 token_ms=20]] Never stop."
# Of the same length, so that it is held at the same cost.
HONEST = "[[stub: output_tokens=5]] Go on.".ljust(len(RUNAWAY))


async def call(mesh: Mesh, tenant: DemoTenant, text: str) -> tuple[str, str]:
    """Makes one streamed call and returns what it said and how it was refused, if it was."""
    request = inference_service_pb2.StreamGenerateRequest(
        messages=[inference_service_pb2.Message(role=inference_service_pb2.ROLE_USER, text=text)],
        options=inference_service_pb2.GenerateOptions(model=MODEL, max_output_tokens=100),
    )
    said = ""
    try:
        metadata = credentials(tenant.api_key, call_id=uuid.uuid4())
        async for event in mesh.client.inference.StreamGenerate(request, metadata=metadata, timeout=90):
            said += event.delta.text
    except grpc.aio.AioRpcError as error:
        return said, refusal(error).reason
    return said, ""


def provider_cost(mesh: Mesh, call_ids: set[str]) -> int:
    """What the provider has billed for the calls so far, in nano-USD."""
    request = urllib.request.Request(  # noqa: S310 - loopback
        f"{mesh.stack.provider.base_url}/stub/ledger", headers={"x-api-key": mesh.stack.provider.api_key}
    )
    with urllib.request.urlopen(request, timeout=10) as answer:  # noqa: S310
        billed: list[dict[str, Any]] = json.load(answer)["data"]
    mine = [entry for entry in billed if entry["call_id"] in call_ids]
    return sum(entry["input_tokens"] * INPUT_PRICE + entry["output_tokens"] * OUTPUT_PRICE for entry in mine)


async def own_ledger(mesh: Mesh, tenant: DemoTenant) -> list[usage_service_pb2.CallRecord]:
    """What the ledger says of the tenant's calls, the newest first."""
    request = usage_service_pb2.ListCallsRequest(page_size=1000)
    listed = await mesh.client.usage.ListCalls(request, metadata=credentials(tenant.api_key), timeout=20)
    return list(listed.calls)


async def set_budget(mesh: Mesh, tenant: DemoTenant, nano_usd: int) -> None:
    """Sets what the tenant may spend in the month, and returns once that is in force."""
    operator = operator_credentials(mesh.stack.state.secrets.operator_key, "sets a budget")
    request = configuration_service_pb2.UpdateConfigurationRequest(
        overrides=configuration_service_pb2.ConfigurationOverrides(limits={"cost_nano_usd_per_month": nano_usd}),
        update_mask=FieldMask(paths=["limits.cost_nano_usd_per_month"]),
    )
    metadata = (*operator, ("x-tenant-id", tenant.tenant_id))
    await mesh.client.configuration.UpdateConfiguration(request, metadata=metadata, timeout=10)

    async def in_force() -> bool:
        listed = await mesh.client.limits.ListLimits(
            rate_limit_service_pb2.ListLimitsRequest(), metadata=credentials(tenant.api_key), timeout=10
        )
        return nano_usd in [limit.limit for limit in listed.limits if limit.rule == "cost_nano_usd_per_month"]

    await eventually(in_force, within_seconds=20)


async def test_runaway_streams_never_cost_more_than_the_budget(mesh: Mesh) -> None:
    """Of 200 streams against a budget for 20, at a provider that ignores max_tokens, 20 run, each is stopped, and the bill stays within it.

    A bill only grows, so its last sum is its highest; what is asked in between agrees.
    """
    tenant = await mesh.tenant("enterprise")
    for _ in range(2):
        # The first call learns how large the prompt is; the second is held as every other will be.
        assert (await call(mesh, tenant, HONEST))[1] == ""
    before = await own_ledger(mesh, tenant)
    one_hold = min(record.bound.nano_usd for record in before)
    budget = sum(record.cost.nano_usd for record in before) + COVERED * one_hold
    await set_budget(mesh, tenant, budget)
    running = True
    highest = 0

    async def watch() -> None:
        nonlocal highest
        while running:
            mine = {record.call_id for record in await own_ledger(mesh, tenant)}
            highest = max(highest, await asyncio.to_thread(provider_cost, mesh, mine))
            await asyncio.sleep(0.2)

    async with asyncio.TaskGroup() as group:
        watching = group.create_task(watch())
        async with asyncio.TaskGroup() as streams:
            ends = [streams.create_task(call(mesh, tenant, RUNAWAY)) for _ in range(STREAMS)]
        running = False
        await watching
    assert highest <= budget
    assert Counter(end.result()[1] for end in ends) == {"BUDGET": STREAMS}
    admitted = [end.result() for end in ends if end.result()[0]]
    assert COVERED - 1 <= len(admitted) <= COVERED

    async def none_is_open() -> bool:
        return all(record.state != ledger_service_pb2.CALL_STATE_OPEN for record in await own_ledger(mesh, tenant))

    await eventually(none_is_open, within_seconds=20)
    ours = await own_ledger(mesh, tenant)
    assert await asyncio.to_thread(provider_cost, mesh, {record.call_id for record in ours}) <= budget
    assert sum(record.state == ledger_service_pb2.CALL_STATE_UNRESOLVED for record in ours) == len(admitted)


async def test_an_honest_provider_uses_its_budget_to_the_last_answer(mesh: Mesh) -> None:
    """With a budget for one call, calls that end as they were told are all answered, one after another, though none leaves room for two."""
    tenant = await mesh.tenant("enterprise")
    for _ in range(2):
        await call(mesh, tenant, HONEST)
    before = await own_ledger(mesh, tenant)
    spent = sum(record.cost.nano_usd for record in before)
    one_hold, one_cost = (min(amounts) for amounts in zip(*((r.bound.nano_usd, r.cost.nano_usd) for r in before), strict=True))
    await set_budget(mesh, tenant, spent + one_hold + 5 * one_cost)
    for _ in range(5):
        said, refused = await call(mesh, tenant, HONEST)
        assert (bool(said), refused) == (True, "")

        async def nothing_runs() -> bool:
            listed = await mesh.client.limits.ListLimits(
                rate_limit_service_pb2.ListLimitsRequest(), metadata=credentials(tenant.api_key), timeout=10
            )
            return all(limit.used == 0 for limit in listed.limits if limit.rule == "concurrent_calls")

        await eventually(nothing_runs, within_seconds=10)
