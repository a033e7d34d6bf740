"""Holds whose lease ended: the ledger is asked, and its answer alone moves them."""

import asyncio
from collections.abc import Sequence

import pytest

from mesh.metering.v1 import ledger_service_pb2 as ledger
from services.kernel.errors import MeshError, Unavailable
from services.kernel.ids import TenantId, new_uuid7
from services.kernel.rpc.channel import MeshChannel
from services.ratelimit.adapters.metering_client import MeteringClient
from services.ratelimit.adapters.redis_link import Command, Link
from services.ratelimit.fencing import Fencing
from tests.ratelimit.callers import MeteringSettings, Service, Stores, eventually
from tests.ratelimit.scripted_peer import LedgerCall
from tests.support.stores import RedisStore as RedisServer


async def test_nobody_is_refused_for_the_holds_of_a_dead_caller(service: Service) -> None:
    """A Reserve that only ended leases keep out asks about them first, and is admitted."""
    tenant = service.tenant_with(tokens_per_day=500, requests_per_minute=6)
    ids = [new_uuid7() for _ in range(6)]
    for reservation_id in ids:
        await tenant.reserve(75, id=reservation_id)
    with pytest.raises(MeshError):
        await tenant.reserve(75)
    assert service.peer.ledger.fence_count == 0
    await tenant.store.end_lease(*ids)
    await tenant.reserve(75)
    assert (await tenant.limits())["tokens_per_day"].used == 75


async def test_a_hold_that_may_have_been_billed_still_refuses(service: Service) -> None:
    """An ended lease of a call that the ledger has open keeps its bound, and the refusal counts it."""
    tenant = service.tenant_with(cost_nano_usd_per_month=1000)
    reservation_id = new_uuid7()
    await tenant.reserve(1, 900, id=reservation_id)
    service.peer.ledger.of(tenant.tenant_id).calls[reservation_id.bytes] = LedgerCall(ledger.CALL_STATE_OPEN)
    await tenant.store.end_lease(reservation_id)
    with pytest.raises(MeshError) as refused:
        await tenant.reserve(1, 200)
    assert refused.value.reason_name == "BUDGET"
    assert refused.value.metadata["used"] == "900"
    assert await tenant.store.state(reservation_id) == "pinned"


async def test_a_settled_call_waits_for_its_commit(service: Service) -> None:
    """Only the commit knows the amount: the fence changes nothing, and the commit then counts."""
    tenant = service.tenant_with(tokens_per_day=100)
    reservation_id = new_uuid7()
    held = await tenant.reserve(100, id=reservation_id)
    at_ledger = service.peer.ledger.of(tenant.tenant_id)
    at_ledger.calls[reservation_id.bytes] = LedgerCall(ledger.CALL_STATE_OPEN)
    epoch = service.peer.ledger.settle(tenant.tenant_id, reservation_id, 40)
    assert epoch == held.epoch
    await tenant.store.end_lease(reservation_id)
    with pytest.raises(MeshError):
        await tenant.reserve(50)
    assert await tenant.store.state(reservation_id) == "held"
    await tenant.settled(reservation_id, 40, epoch=epoch)
    await tenant.reserve(50)


async def test_without_the_ledger_a_doubtful_refusal_is_not_made(service: Service) -> None:
    """When ended leases may be all that is in the way and the ledger is silent, the caller is told to come back, not that it is over."""
    tenant = service.tenant_with(tokens_per_day=100)
    reservation_id = new_uuid7()
    await tenant.reserve(100, id=reservation_id)
    service.peer.ledger.silent = True
    await tenant.store.end_lease(reservation_id)
    with pytest.raises(MeshError) as refused:
        await tenant.reserve(50)
    assert refused.value.code.name == "UNAVAILABLE"
    assert refused.value.retry_after_seconds is not None
    assert await tenant.store.state(reservation_id) == "held"


async def test_the_sweep_fences_ended_leases_unasked(service: Service) -> None:
    """No caller is needed: within a sweep or two a dead caller's holds are gone or pinned."""
    tenant = service.tenant_with(tokens_per_day=100)
    lost, opened = new_uuid7(), new_uuid7()
    await tenant.reserve(10, id=lost)
    await tenant.reserve(10, id=opened)
    service.peer.ledger.of(tenant.tenant_id).calls[opened.bytes] = LedgerCall(ledger.CALL_STATE_OPEN)
    await tenant.store.end_lease(lost, opened)

    async def both_moved() -> bool:
        return (await tenant.store.state(lost), await tenant.store.state(opened)) == ("released", "pinned")

    await eventually(both_moved)
    assert (await tenant.limits())["tokens_per_day"].used == 10


async def test_another_replica_finds_the_holds_of_a_dead_one(service: Service, redis_server: RedisServer) -> None:
    """A sweep that has never served the tenant comes across its leases and fences them."""
    tenant = service.tenant_with(tokens_per_day=100)
    reservation_id = new_uuid7()
    await tenant.reserve(10, id=reservation_id)
    await tenant.store.end_lease(reservation_id)
    channel = MeshChannel(service.peer.address, settings=MeteringSettings(), target_service="metering")
    stranger = Fencing(Stores(service.link).decisions, MeteringClient(channel))
    for _ in range(200):
        await stranger.sweep()
        if await tenant.store.state(reservation_id) == "released":
            break
    await channel.close()
    assert await tenant.store.state(reservation_id) == "released"


async def test_concurrent_fences_of_a_tenant_are_one_question(service: Service) -> None:
    """Twenty callers kept out by the same ended leases ask the ledger once."""
    tenant = service.tenant_with(tokens_per_day=100)
    reservation_id = new_uuid7()
    await tenant.reserve(100, id=reservation_id)
    service.peer.ledger.gate.clear()
    service.peer.ledger.asked.clear()
    await tenant.store.end_lease(reservation_id)
    async with asyncio.timeout(10), asyncio.TaskGroup() as group:
        calls = group.create_task(tenant.reserve_many(20, 5))
        await service.peer.ledger.asked.wait()
        await asyncio.sleep(0.1)
        service.peer.ledger.gate.set()
    assert not [answer for answer in calls.result() if isinstance(answer, MeshError)]
    assert service.peer.ledger.fence_count <= 2


class HalfAway:
    """A store of which the node of some tenant's keys is away, and with it the scan that has come to it."""

    def __init__(self, link: Link, gone: TenantId) -> None:
        self._link = link
        self._gone = f"{{{gone}}}:meta"

    async def send(self, *command: str | bytes | int) -> object:
        if self._gone in command:
            raise Unavailable("redis")
        return await self._link.send(*command)

    async def send_all(self, commands: Sequence[Command]) -> list[object | Exception]:
        return [Unavailable("redis") if self._gone in command else await self._link.send(*command) for command in commands]

    async def scan(self, pattern: str, cursor: object) -> tuple[object, list[bytes]]:
        raise Unavailable("redis")

    async def close(self) -> None:
        pass


async def test_holds_on_a_node_that_is_away_keep_nobody_elses(service: Service) -> None:
    """The sweep ends what the other nodes hold; a caller whose own store is away is not refused by what may be over."""
    gone, other = service.tenant_with(tokens_per_day=100), service.tenant_with(tokens_per_day=100)
    reservation_id = new_uuid7()
    await other.reserve(10, id=reservation_id)
    channel = MeshChannel(service.peer.address, settings=MeteringSettings(), target_service="metering")
    fencing = Fencing(Stores(HalfAway(service.link, gone.tenant_id)).decisions, MeteringClient(channel))
    for tenant_id in (gone.tenant_id, other.tenant_id):
        fencing.watch(tenant_id)
    await other.store.end_lease(reservation_id)
    await fencing.sweep()
    assert await other.store.state(reservation_id) == "released"
    with pytest.raises(Unavailable):
        await fencing.fence_expired(gone.tenant_id)
    await channel.close()
