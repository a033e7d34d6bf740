"""A tenant's configuration on a running mesh: each change is in force at every service within a moment, without a restart."""

import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.field_mask_pb2 import FieldMask

from devstack.mesh_client import Metadata, credentials, operator_credentials, refusal
from devstack.provider_stub.cache import PromptCache
from devstack.provider_stub.ledger import Ledger
from devstack.provider_stub.models import KNOWN, catalogue
from devstack.provider_stub.server import ProviderStub
from devstack.state import DemoTenant
from mesh.inference.v1 import inference_service_pb2
from mesh.ratelimit.v1 import rate_limit_service_pb2
from mesh.tenant.v1 import configuration_service_pb2
from tests.isolation.canaries import received_by_provider
from tests.support.mesh import Mesh
from tests.support.waiting import eventually

HAIKU, SONNET = "claude-haiku-4-5-20251001", "claude-sonnet-4-6"
# Far above the second it takes, for machines that do other things as well.
PATIENCE_SECONDS = 20.0


def operator(mesh: Mesh, tenant: DemoTenant) -> Metadata:
    """An operator who acts for the tenant."""
    return (*operator_credentials(mesh.stack.state.secrets.operator_key, "configures"), ("x-tenant-id", tenant.tenant_id))


async def update(mesh: Mesh, metadata: Metadata, *paths: str, **overrides: Any) -> configuration_service_pb2.Configuration:
    """Changes what the paths name."""
    request = configuration_service_pb2.UpdateConfigurationRequest(
        overrides=configuration_service_pb2.ConfigurationOverrides(**overrides), update_mask=FieldMask(paths=paths)
    )
    return (await mesh.client.configuration.UpdateConfiguration(request, metadata=metadata, timeout=10)).configuration


async def generate(mesh: Mesh, tenant: DemoTenant, text: str, **options: Any) -> inference_service_pb2.GenerateResponse:
    """One call."""
    request = inference_service_pb2.GenerateRequest(
        messages=[inference_service_pb2.Message(role=inference_service_pb2.ROLE_USER, text=text)],
        options=inference_service_pb2.GenerateOptions(**{"max_output_tokens": 50, **options}),
    )
    return await mesh.client.inference.Generate(request, metadata=credentials(tenant.api_key), timeout=20)


async def seconds_until(is_true: Callable[[], Awaitable[bool]]) -> float:
    """Waits until something is in force and returns how long that took."""
    began = time.monotonic()
    await eventually(is_true, within_seconds=PATIENCE_SECONDS)
    return time.monotonic() - began


async def calls_at_provider(mesh: Mesh) -> list[dict[str, Any]]:
    """The calls that arrived at the provider; what it was only asked to count is none."""
    return [one for one in await received_by_provider(mesh.stack) if one["path"] == "/v1/messages"]


@asynccontextmanager
async def another_endpoint(mesh: Mesh, folder: Path) -> AsyncIterator[tuple[ProviderStub, str]]:
    """A second provider endpoint for the same account, on a port of its own."""
    ledger = Ledger(folder / "dedicated-ledger.jsonl")
    offered = catalogue([model.id for model in KNOWN])
    stub = ProviderStub(ledger, [mesh.stack.state.secrets.provider_api_key], offered, PromptCache(), allow_directives=True)
    runner, port = await stub.listen(0)
    try:
        yield stub, f"http://127.0.0.1:{port}"
    finally:
        await runner.cleanup()
        await ledger.close()


async def test_a_limit_override_is_in_force_within_a_moment(mesh: Mesh, record_property: Callable[[str, object], None]) -> None:
    """An operator lowers a limit: the limits show it, and the next call above it is refused by the new number."""
    tenant = await mesh.tenant("professional")

    async def shown() -> dict[str, int]:
        request = rate_limit_service_pb2.ListLimitsRequest()
        listed = await mesh.client.limits.ListLimits(request, metadata=credentials(tenant.api_key), timeout=10)
        return {limit.rule: limit.limit for limit in listed.limits}

    assert (await shown())["requests_per_minute"] == 60
    await generate(mesh, tenant, "Hello.")
    await update(mesh, operator(mesh, tenant), "limits.requests_per_minute", limits={"requests_per_minute": 1})

    async def is_lower() -> bool:
        return (await shown())["requests_per_minute"] == 1

    record_property("seconds_until_in_force", await seconds_until(is_lower))
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        for _ in range(3):
            await generate(mesh, tenant, "Hello again.")
    told = refusal(refused.value)
    assert (told.reason, told.metadata["rule"]) == ("PLAN_LIMIT", "requests_per_minute")


async def test_a_prefix_reaches_the_provider(mesh: Mesh, record_property: Callable[[str, object], None]) -> None:
    """Words that a tenant sets before its prompt are in its next calls, and in nobody else's."""
    tenant, other = await mesh.tenant(), await mesh.tenant()
    words = f"Own words of {tenant.tenant_id}."
    await generate(mesh, tenant, "Hello.")
    await update(mesh, credentials(tenant.api_key), "ai.system_prompt_prefix", ai={"system_prompt_prefix": words})
    calls = 0

    async def is_heard() -> bool:
        nonlocal calls
        calls += 1
        question = f"Question {calls} of {tenant.tenant_id}."
        await generate(mesh, tenant, question)
        [body] = [one["body"] for one in await calls_at_provider(mesh) if question in repr(one["body"]["messages"])]
        return bool(body["system"].startswith(f"{words}\n\n"))

    record_property("seconds_until_in_force", await seconds_until(is_heard))
    await generate(mesh, other, f"Question of {other.tenant_id}.")
    [body] = [one["body"] for one in await calls_at_provider(mesh) if other.tenant_id in repr(one["body"]["messages"])]
    assert words not in body["system"]


async def test_a_model_that_a_tenant_gave_up_is_refused(mesh: Mesh, record_property: Callable[[str, object], None]) -> None:
    """A tenant narrows its models: the one it gave up is refused, the one it kept is the default and answers."""
    tenant = await mesh.tenant("professional")
    assert (await generate(mesh, tenant, "Hello.")).summary.model == SONNET
    await update(mesh, credentials(tenant.api_key), "ai.allowed_models", "ai.default_model",
                 ai={"allowed_models": [HAIKU], "default_model": HAIKU})  # fmt: skip

    async def is_refused() -> bool:
        try:
            await generate(mesh, tenant, "Hello.", model=SONNET)
        except grpc.aio.AioRpcError as error:
            assert refusal(error).reason == "MODEL_TIER"
            return True
        return False

    record_property("seconds_until_in_force", await seconds_until(is_refused))
    assert (await generate(mesh, tenant, "Hello.")).summary.model == HAIKU


async def test_a_dedicated_endpoint_takes_its_tenants_calls(
    mesh: Mesh, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """An operator gives a tenant an endpoint of its own: its calls go there, others' stay, and taken back they return."""
    tenant, other = await mesh.tenant(), await mesh.tenant()
    async with another_endpoint(mesh, tmp_path) as (stub, url):
        await update(mesh, operator(mesh, tenant), "ai.dedicated_endpoint", ai={"dedicated_endpoint": url})

        async def is_used() -> bool:
            await generate(mesh, tenant, "Hello.")
            return len(stub._received.last(100)) > 0

        record_property("seconds_until_in_force", await seconds_until(is_used))
        await generate(mesh, other, f"Hello from {other.tenant_id}.")
        assert other.tenant_id not in repr(stub._received.last(100))
        await update(mesh, operator(mesh, tenant), "ai.dedicated_endpoint")

        async def is_back() -> bool:
            before = len(stub._received.last(100))
            await generate(mesh, tenant, "Hello.")
            return len(stub._received.last(100)) == before

        await eventually(is_back, within_seconds=PATIENCE_SECONDS)
