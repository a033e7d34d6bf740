"""What a tenant's configuration says of its calls: the words before its prompt, its models, its own endpoint."""

from __future__ import annotations

from pathlib import Path

import pytest

from mesh.common.v1 import error_reason_pb2
from mesh.inference.v1 import prompt_service_pb2
from services.inference.adapters.endpoint_clients import EndpointClients
from services.inference.prompt_assembly import USER, Turn, assemble, least_bound, with_prefix
from services.inference.worst_case import text_bytes
from tests.inference.conftest import World, credentials, running_provider
from tests.inference.peers import HAIKU, OPUS, Tenant


async def tenant_with(world: World, *, prefix: str = "", endpoint: str = "", context_tokens: int = 30_000) -> Tenant:
    """A provisioned tenant whose configuration says this."""
    tenant = await world.new_tenant(provision=False, context_tokens=context_tokens)
    tenant.config.ai.system_prompt_prefix = prefix
    tenant.config.ai.dedicated_endpoint = endpoint
    await world.provision(tenant)
    await world.prompts.PutPrompt(prompt_service_pb2.PutPromptRequest(text="You are Ada."), metadata=credentials(tenant))
    world.script.heard.clear()
    return tenant


async def test_the_prefix_stands_before_the_tenants_prompt(world: World) -> None:
    """The provider hears the prefix, a blank line and the prompt; without a prefix the prompt alone."""
    await world.answer(await tenant_with(world, prefix="Answer in Latin."))
    assert world.sent()["system"] == "Answer in Latin.\n\nYou are Ada."
    await world.answer(await tenant_with(world))
    assert world.sent()["system"] == "You are Ada."


async def test_the_prefix_is_held_for(world: World) -> None:
    """The hold of a call grows by the prefix's bytes, and one attempt is enough although the prompt was never seen before."""
    plain, long = await tenant_with(world), await tenant_with(world, prefix="é" * 2_000)
    await world.answer(plain)
    await world.answer(long)
    first, second = world.script.all("reserve")
    assert second.amounts.tokens - first.amounts.tokens == 4_002
    assert world.script.names() == ["reserve", "open", "dispatch", "settle"] * 2


async def test_a_prefix_that_leaves_no_room_refuses_the_call(world: World) -> None:
    """Prefix, prompt and question above the plan's context are too large, before anything reaches the provider."""
    tenant = await tenant_with(world, prefix="x" * 4_000, context_tokens=3_000)
    error = await world.refusal(tenant)
    assert error.reason == error_reason_pb2.ERROR_REASON_REQUEST_TOO_LARGE
    assert "dispatch" not in world.script.names()


def test_the_prefixs_bytes_are_counted_in_the_bound() -> None:
    """The bound of an assembled request covers the prefix byte by byte."""
    question = (Turn(USER, "Hi"),)
    for prefix in ("", "short", "é" * 2_000):
        prompt = with_prefix(prefix, "You are Ada.")
        bound = assemble(prompt, (), (), question, with_documents=False, hold=10_000).bound
        assert bound == least_bound(prompt, question, with_documents=False)
        extra = text_bytes(prefix) + 2 if prefix else 0
        assert bound - assemble("You are Ada.", (), (), question, with_documents=False, hold=10_000).bound == extra


async def test_a_tenant_that_narrowed_its_models_is_refused_the_others(world: World, tenant: Tenant) -> None:
    """A model outside of the configuration's is not dispatched, although it has a price."""
    error = await world.refusal(tenant, model=OPUS)
    assert error.reason == error_reason_pb2.ERROR_REASON_MODEL_TIER
    assert "dispatch" not in world.script.names()
    await world.answer(tenant, model=HAIKU)
    assert "dispatch" in world.script.names()


async def test_a_dedicated_endpoint_hears_its_tenants_calls_and_nobody_elses(world: World, tmp_path: Path) -> None:
    """Two endpoints at once: each hears exactly the calls of the tenants that are sent there."""
    async with running_provider(world.script, tmp_path) as (own, _, url):
        special, usual = await tenant_with(world, endpoint=url), await tenant_with(world)
        await world.answer(special, "For the dedicated one.")
        await world.answer(usual, "For everybody's.")
        await world.answer(special, "Once more.")
        assert [received["body"]["messages"][0]["content"] for received in own._received.last(9)] == [
            "For the dedicated one.",
            "Once more.",
        ]
        assert [received["body"]["messages"][0]["content"] for received in world.stub._received.last(9)] == ["For everybody's."]


async def test_a_dedicated_endpoint_that_is_away_fails_its_own_tenant_alone(world: World, unused_tcp_port: int) -> None:
    """Nothing falls back to everybody's endpoint, and the others are answered meanwhile."""
    special, usual = await tenant_with(world, endpoint=f"http://127.0.0.1:{unused_tcp_port}"), await tenant_with(world)
    error = await world.refusal(special)
    assert error.reason == error_reason_pb2.ERROR_REASON_PROVIDER_UNAVAILABLE
    assert world.stub._received.last(9) == []
    assert (await world.answer(usual)).text


@pytest.mark.parametrize("kept", [1, 2])
async def test_clients_of_idle_endpoints_are_dropped_and_those_in_use_never(kept: int) -> None:
    """At most so many dedicated clients are kept, the least recently used goes first, and none is closed under a call."""
    clients = EndpointClients(base_url="", api_key="k", max_connections=1, max_dedicated=kept)
    endpoints = [f"https://e{number}.example" for number in range(4)]
    try:
        async with clients.lend(endpoints[0]) as busy:
            for endpoint in endpoints[1:]:
                async with clients.lend(endpoint) as client:
                    assert str(client.base_url).rstrip("/") == endpoint
                assert endpoints[0] in clients.endpoints()
                assert len(clients.endpoints()) <= max(kept, 1)
            assert not busy.is_closed()
        async with clients.lend(endpoints[0]) as again:
            assert again is busy
        for endpoint in endpoints[1:]:
            async with clients.lend(endpoint):
                pass
        assert endpoints[0] not in clients.endpoints()
        assert busy.is_closed()
        assert clients.endpoints() == tuple(endpoints[4 - kept :])
    finally:
        await clients.close()
    assert clients.endpoints() == ()
