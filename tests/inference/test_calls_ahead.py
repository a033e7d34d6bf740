"""Calls of a running service that take holds lying ahead, message by message: each hold ends once, and no call hears of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any
from uuid import UUID

import pytest

from mesh.metering.v1 import ledger_service_pb2 as ledger_pb
from mesh.ratelimit.v1 import rate_limit_service_pb2 as limit_pb
from mesh.tenant.v1 import authentication_service_pb2 as auth_pb
from services.inference.settings import InferenceSettings
from services.kernel.errors import MeshError
from services.kernel.ids import new_uuid7
from tests.inference.conftest import World, running_provider, running_service, service_settings, until
from tests.inference.peers import Tenant, held, opened, running_peers

WORKERS = 8


def far(request: Any) -> limit_pb.ReserveResponse:
    """What was asked for, held, with every edge far away."""
    response = held(request)
    for limit in response.limits:
        limit.limit, limit.remaining = limit.limit * 10_000, limit.limit * 10_000 - limit.used
    return response


@pytest.fixture(scope="module")
async def hot_world(inference_dsn: str, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[World]:
    """A service of the file's own that hears of changes, and in which a pace of few calls is hot."""
    async with (
        running_peers() as peers,
        running_provider(peers.script, tmp_path_factory.mktemp("provider")) as (stub, ledger, url),
    ):
        peers.script.feed = asyncio.Queue()
        settings = service_settings(inference_dsn, peers.address, url, ahead_calls_per_second=6.0)
        async with running_service(settings) as (app, channel):
            yield World(app, peers, channel, stub, ledger, inference_dsn, url)


@pytest.fixture
async def world(hot_world: World) -> World:
    """The service with limits that are far."""
    hot_world.script.hooks.clear()
    hot_world.script.hooks["reserve"] = far
    return hot_world


def ahead(world: World) -> set[str]:
    """The ids of holds that were asked for ahead: alone among all they are never to be shortened."""
    asked = [request for request in world.script.all("reserve") if request.HasField("shorten")]
    return {request.reservation_id for request in asked if request.shorten.min_output_tokens == request.shorten.max_output_tokens}


def opens(world: World) -> list[str]:
    """The ids that calls were opened under."""
    return [str(UUID(bytes=call.ref.reservation_id)) for request in world.script.all("open") for call in request.calls]


def releases(world: World) -> list[str]:
    """The ids that were released."""
    return [request.reservation_id for request in world.script.all("release")]


async def heat(world: World, tenant: Tenant, calls: int = 8) -> None:
    """Makes calls until so many took a hold that lay ahead, and some still lie there."""
    counts = world.app.ahead.counts
    aim, done = counts.ahead + calls, asyncio.Event()

    async def work() -> None:
        while not done.is_set():
            await world.generate(tenant)

    async with asyncio.timeout(20.0), asyncio.TaskGroup() as group:
        for _ in range(WORKERS):
            group.create_task(work())
        while counts.ahead < aim or not world.app.ahead.lying:  # noqa: ASYNC110 - the service decides when it is so
            await asyncio.sleep(0.01)
        done.set()


async def test_what_is_opened_is_what_is_held_ahead(world: World) -> None:
    """The ledger hears the bound that the limits hold, the provider the call's own max_tokens; every hold is opened once or released."""
    tenant = await world.new_tenant()
    world.script.heard.clear()
    await heat(world, tenant)
    asked = {request.reservation_id: request.amounts for request in world.script.all("reserve")}
    for request in world.script.all("open"):
        for call in request.calls:
            amounts = asked[str(UUID(bytes=call.ref.reservation_id))]
            assert (call.bound_tokens, call.bound_nano_usd) == (amounts.tokens, amounts.cost_nano_usd)
    assert world.sent()["max_tokens"] == tenant.config.ai.default_max_output_tokens
    assert ahead(world) & set(opens(world))
    await until(lambda: sorted([*opens(world), *releases(world)]) == sorted(asked))
    assert not world.app.ahead.lying
    assert not world.app.leases._leases


async def test_a_stale_epoch_ends_what_lies_ahead_and_no_call(world: World) -> None:
    """One call's open is refused for its epoch: the holds beside its own are of that epoch too and are released; the call is answered."""
    tenant = await world.new_tenant()
    await heat(world, tenant)
    lying = {str(ref.reservation_id) for ref in world.app.leases._leases}
    answers = iter([ledger_pb.OPEN_OUTCOME_STALE_EPOCH])
    world.script.hooks["open"] = lambda request: opened(request, next(answers, ledger_pb.OPEN_OUTCOME_OPENED))
    world.script.heard.clear()
    await world.generate(tenant)
    await until(lambda: lying <= {*releases(world), *opens(world)})
    assert len(world.script.all("void")) == 1
    assert opens(world)[-1] not in lying


async def test_a_call_is_not_refused_for_what_lies_ahead(world: World) -> None:
    """A call of another kind is refused while holds of its tenant lie ahead: they are released, and it is asked about again."""
    tenant = await world.new_tenant()
    await heat(world, tenant)
    world.script.heard.clear()

    def refuse_while_held(request: Any) -> Any:
        if request.feature == "other" and not releases(world):
            return limit_pb.Refusal(reason="CONCURRENCY", message="No.", needed=1)
        return far(request)

    world.script.hooks["reserve"] = refuse_while_held
    await world.generate(tenant, feature="other")
    assert releases(world)
    world.script.hooks["reserve"] = lambda _: limit_pb.Refusal(reason="CONCURRENCY", message="No.", needed=1)
    await until(lambda: not world.app.ahead.lying)
    world.script.heard.clear()
    with pytest.raises(MeshError):
        await world.generate(tenant, feature="other")
    assert len(world.script.all("reserve")) == 1


async def test_a_change_that_is_told_ends_what_lies_ahead(world: World) -> None:
    """A suspension, told by the feed: no hold of before it is opened, all of them are released."""
    tenant = await world.new_tenant()
    await heat(world, tenant)
    lying = {str(ref.reservation_id) for ref in world.app.leases._leases}
    assert world.script.feed is not None
    bundles = world.app.ahead._bundles
    world.script.feed.put_nowait(auth_pb.Change(change_id=1, tenant_id=tenant.tenant_id.bytes, kind="STATE"))
    await until(lambda: not any(kind.tenant_id == tenant.tenant_id for kind in bundles))
    world.script.heard.clear()
    await world.generate(tenant)
    assert not lying & set(opens(world))
    await until(lambda: not world.app.ahead.lying and not world.app.leases._leases)


async def test_a_call_id_that_is_taken_uses_up_no_hold_of_another(world: World) -> None:
    """A repeated call takes a hold of its own, which is released when the ledger knows the id; nobody else opens that hold."""
    tenant = await world.new_tenant()
    await heat(world, tenant)
    world.script.heard.clear()
    world.script.hooks["open"] = lambda request: opened(request, ledger_pb.OPEN_OUTCOME_CALL_ID_TAKEN)
    with pytest.raises(MeshError) as caught:
        await world.generate(tenant, call_id=str(new_uuid7()))
    assert caught.value.reason_name == "CONTENT_CONFLICT"
    [taken] = opens(world)
    assert taken in releases(world)
    del world.script.hooks["open"]
    await world.generate(tenant)
    assert opens(world).count(taken) == 1


async def test_a_service_that_ends_releases_what_lies_ahead(world: World, inference_dsn: str) -> None:
    """Stopped in the middle of a pace, it leaves no hold that was neither opened nor released."""
    tenant = await world.new_tenant()
    world.script.heard.clear()
    settings: InferenceSettings = service_settings(inference_dsn, world.peers.address, world.provider_url, ahead_calls_per_second=6.0)
    async with running_service(settings) as (app, channel):
        other = World(app, world.peers, channel, world.stub, world.provider_ledger)
        await heat(other, tenant)
    assert app.ahead.lying == 0
    asked = {request.reservation_id for request in world.script.all("reserve")}
    # Beside those of the file's own service, which are still being released.
    assert sorted(one for one in [*opens(world), *releases(world)] if one in asked) == sorted(asked)
