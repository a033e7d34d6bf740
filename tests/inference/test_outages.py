"""The service when what it needs is away: it starts, answers with a typed refusal, and recovers by itself."""

from __future__ import annotations

from pathlib import Path

import grpc

from devstack.ports import free_port
from mesh.inference.v1 import inference_service_pb2 as pb
from mesh.metering.v1 import ledger_service_pb2 as ledger_pb
from services.inference.adapters.metering_prices_client import MeteringPrices
from services.kernel.errors import Unavailable
from services.kernel.rpc.channel import MeshChannel
from tests.inference.conftest import World, running_service, service_settings
from tests.inference.peers import HAIKU, Tenant, price_book
from tests.inference.test_documents_and_conversations import new_conversation, turns


async def test_without_its_postgres_the_service_starts_and_refuses(world: World, tenant: Tenant, tmp_path: Path) -> None:
    """While its own store is away every call is UNAVAILABLE with a time to try again, its hold is let go and nothing is recorded."""
    nowhere = f"postgresql://inference_service:x@127.0.0.1:{free_port()}/none"
    settings = service_settings(nowhere, world.peers.address, "http://127.0.0.1:9")
    async with running_service(settings) as (app, channel):
        alone = World(app, world.peers, channel, world.stub, world.provider_ledger)
        refusal = await alone.refusal(tenant)
    assert (refusal.code, refusal.metadata["dependency"]) == (grpc.StatusCode.UNAVAILABLE, "postgres")
    assert refusal.retry_after_seconds
    assert world.script.names() == ["reserve", "release"]


async def test_without_its_peers_the_service_starts_and_refuses(world: World, tenant: Tenant, inference_dsn: str) -> None:
    """While no peer can be reached every call is UNAVAILABLE, and nobody is trusted."""
    settings = service_settings(inference_dsn, f"127.0.0.1:{free_port()}", "http://127.0.0.1:9")
    async with running_service(settings) as (app, channel):
        alone = World(app, world.peers, channel, world.stub, world.provider_ledger)
        refusal = await alone.refusal(tenant)
    assert refusal.code is grpc.StatusCode.UNAVAILABLE
    assert world.script.names() == []


async def test_a_provider_out_of_reach_bills_nothing(world: World, tenant: Tenant, inference_dsn: str) -> None:
    """When no connection to the provider can be made, the record is void and the hold released."""
    settings = service_settings(inference_dsn, world.peers.address, f"http://127.0.0.1:{free_port()}")
    async with running_service(settings) as (app, channel):
        alone = World(app, world.peers, channel, world.stub, world.provider_ledger)
        refusal = await alone.refusal(tenant)
    assert refusal.reason_name == "PROVIDER_UNAVAILABLE"
    assert world.script.names() == ["reserve", "open", "void", "release"]


async def test_a_full_queue_voids_and_releases(world: World, tenant: Tenant, inference_dsn: str) -> None:
    """A call that cannot wait behind others is refused, its record void and its hold gone."""
    settings = service_settings(
        inference_dsn, world.peers.address, "http://127.0.0.1:9", max_concurrent_provider_calls=1, max_waiting_calls=0
    )
    async with running_service(settings) as (app, channel):
        alone = World(app, world.peers, channel, world.stub, world.provider_ledger)
        async with app.gate.slot(tenant.tenant_id, weight=1, expected_tokens=1, remaining_seconds=60.0):
            refusal = await alone.refusal(tenant)
    assert (refusal.code, refusal.reason_name) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL")
    assert world.script.names() == ["reserve", "open", "void", "release"]


async def test_a_conversation_with_odd_characters_is_kept(world: World, tenant: Tenant) -> None:
    """Control characters and characters beyond the first plane are kept as they came."""
    conversation_id = await new_conversation(world, tenant)
    answer = await world.answer(tenant, "a\x01b\U0001f6b2", conversation_id=conversation_id)
    assert answer.summary.ledger_entry_id
    assert (await turns(world, tenant, conversation_id))[0] == (1, pb.ROLE_USER, "a\x01b\U0001f6b2", answer.summary.call_id)


async def test_no_text_reaches_the_ledger_or_the_limits(world: World, tenant: Tenant) -> None:
    """What is said stays between the caller, the provider and the conversation: peers get numbers and names."""
    await world.answer(tenant, "a very private question")
    assert "private" not in str([request for name, request in world.script.heard if name != "dispatch"])
    assert world.script.all("settle")[0].calls[0].usage != ledger_pb.TokenUsage()


async def test_prices_are_kept_a_minute_and_never_past_the_next_version(world: World) -> None:
    """The book is asked for again after 60 s, or when its successor takes over; without an answer there is no price."""
    now = [1000.0]
    channel = MeshChannel(world.peers.address, settings=service_settings("", "", ""), target_service="metering")
    prices = MeteringPrices(channel, monotonic=lambda: now[0])
    for seconds, fetches in ((0.0, 1), (59.0, 1), (2.0, 2)):
        now[0] += seconds
        price = await prices.price(HAIKU)
        assert price is not None
        assert (price.version, len(world.script.all("prices"))) == ("prices-1", fetches)

    def ending_now(_: object) -> object:
        book = price_book("prices-2")
        book.next_effective_time.GetCurrentTime()
        return book

    world.script.hooks["prices"] = ending_now
    now[0] += 61.0
    for fetches in (3, 4):
        await prices.price(HAIKU)
        assert len(world.script.all("prices")) == fetches

    def away(_: object) -> object:
        raise Unavailable("postgres")

    world.script.hooks["prices"] = away
    try:
        await prices.price(HAIKU)
    except Exception as error:
        assert str(error).startswith("UNAVAILABLE")
    else:
        raise AssertionError
    await channel.close()
