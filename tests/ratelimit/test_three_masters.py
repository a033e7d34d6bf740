"""The service on a Redis Cluster of three masters: as on one server, through a resharding and the loss of a master."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from uuid import UUID

import grpc
import pytest

from devstack.ports import LOOPBACK
from mesh.metering.v1 import ledger_service_pb2 as ledger
from mesh.ratelimit.v1 import rate_limit_service_pb2 as messages
from mesh.ratelimit.v1 import rate_limit_service_pb2_grpc
from services.kernel.errors import MeshError
from services.kernel.ids import new_uuid7
from tests.ratelimit.callers import AtService, Service, running_service
from tests.ratelimit.redis_cluster import Cluster, Node, running_cluster
from tests.ratelimit.rules import SHADOW, rule
from tests.ratelimit.scripted_peer import LedgerCall, running_peer
from tests.ratelimit.test_rules import batch_item
from tests.support.waiting import eventually

LIMIT = 400
# How long a tenant may be refused while its slot moves, or its master is replaced: the cluster's own second, its vote, and a machine that
# has much else to do.
RECOVERY_SECONDS = 60.0


@pytest.fixture(scope="module")
async def cluster(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Cluster]:
    """Three masters and their replicas."""
    async with running_cluster(Path(tmp_path_factory.mktemp("cluster"))) as running:
        yield running


@pytest.fixture
async def service(cluster: Cluster) -> AsyncIterator[Service]:
    """The service on it, with scripted peers."""
    options = {"redis_cluster": True, "redis_timeout_seconds": 1.0}
    async with running_peer() as peer, running_service(cluster.url, peer, **options) as running:
        yield running


@dataclass
class Callers:
    """Callers of one tenant who open each hold in the ledger before they count on it, as the protocol demands."""

    service: Service
    tenant: AtService
    opened: list[bytes] = field(default_factory=list)
    refusals: int = 0
    outage_seconds: float = 0.0
    codes: set[str] = field(default_factory=set)
    epochs: set[int] = field(default_factory=set)

    async def until_full(self, count: int, meanwhile: Callable[[], Awaitable[None]]) -> None:
        """Calls until refused by the limit, while something happens to the store."""
        async with asyncio.TaskGroup() as group:
            happening = group.create_task(meanwhile())  # type: ignore[arg-type] # a coroutine
            for _ in range(count):
                group.create_task(self._call(happening))

    async def _call(self, happening: "asyncio.Task[None]") -> None:
        loop = asyncio.get_running_loop()
        failing_since = 0.0
        while True:
            try:
                reservation_id = new_uuid7()
                held = await self.tenant.reserve(1, id=reservation_id)
            except MeshError as error:
                self.codes.add(error.code.name)
                if error.code is grpc.StatusCode.RESOURCE_EXHAUSTED:
                    self.refusals += 1
                    if happening.done():
                        return
                elif error.code is grpc.StatusCode.UNAVAILABLE:
                    assert error.retry_after_seconds is not None
                    failing_since = failing_since or loop.time()
                await asyncio.sleep(0.02)
                continue
            if failing_since:
                self.outage_seconds = max(self.outage_seconds, loop.time() - failing_since)
                failing_since = 0.0
            self._open(reservation_id, held)
            # A call that takes its time: what is being done to the store falls in the middle of many.
            await asyncio.sleep(0.05)

    def _open(self, reservation_id: UUID, held: messages.ReserveResponse) -> None:
        known = self.service.peer.ledger.of(self.tenant.tenant_id)
        self.epochs.add(held.epoch)
        if held.epoch == known.epoch:
            # Under the hold's own id: a call that lasts longer than its lease is asked about, and stays held.
            known.calls[reservation_id.bytes] = LedgerCall(
                ledger.CALL_STATE_OPEN, held.reserve_time.ToMicroseconds(), tokens=1, epoch=held.epoch
            )
            self.opened.append(reservation_id.bytes)


async def test_a_tenants_life_is_the_same_on_three_masters(service: Service, cluster: Cluster) -> None:
    """Decisions, commits, uses, shadow rules and rebuilds, for tenants on every master."""
    places = set[int]()
    while len(places) < 3:
        tenant = service.tenant_with(
            rule("tokens", "tokens", "day", 100),
            rule("tried", "tokens", "day", 30, mode=SHADOW),
            rule("searches", "searches", 60, 2),
            rule("interviews", "interviews", "day", 2),
        )
        places.add(cluster.owner_place(f"{{{tenant.tenant_id}}}"))
        reservation_id = new_uuid7()
        held = await tenant.reserve(60, id=reservation_id)
        assert [item.status.rule for item in held.shadow_refusals] == ["tried"]
        with pytest.raises(MeshError) as caught:
            await tenant.reserve(41)
        assert caught.value.metadata["used"] == "60"
        assert await tenant.settled(reservation_id, 20) == messages.COMMIT_OUTCOME_DONE
        assert (await tenant.reserve(80)).epoch == 1
        for unit in ("searches", "interviews"):
            await tenant.consume(unit, 2)
            with pytest.raises(MeshError):
                await tenant.consume(unit)
        key = f"{{{tenant.tenant_id}}}:meta"
        await cluster.masters[cluster.owner_place(key)].link.send("DEL", key)
        assert (await tenant.reserve(1)).epoch == 2


async def test_a_batch_of_tenants_on_every_master_is_answered_as_on_one(service: Service, cluster: Cluster) -> None:
    """Held and refused beside each other; what has lost its counters, or its scripts, is put right by itself."""
    tenants = [tenant_at(service, cluster, place) for place in (0, 1, 2) * 4]
    for tenant in tenants:
        await tenant.reserve(1)
    items = [batch_item(tenant, tokens) for tenant in tenants for tokens in (8, 2)]
    assert await outcomes(service, items) == ["held", "refused"] * 12
    key = f"{{{tenants[3].tenant_id}}}:meta"
    await cluster.masters[cluster.owner_place(key)].link.send("DEL", key)
    for master in cluster.masters:
        await master.link.send("SCRIPT", "FLUSH")
    assert await outcomes(service, [batch_item(tenant, 1) for tenant in tenants]) == ["held"] * 12
    assert [(await tenant.limits())["tokens"].used for tenant in tenants] == [10] * 3 + [1] + [10] * 8


async def test_a_batch_follows_a_slot_that_has_moved(service: Service, cluster: Cluster) -> None:
    """The first batch after it is answered by the new master, which nobody has told the service of; what was opened stays counted."""
    callers = [Callers(service, service.tenant_with(rule("tokens", "tokens", "day", 10))) for _ in range(6)]
    for caller in callers:
        caller._open(reservation_id := new_uuid7(), await caller.tenant.reserve(1, id=reservation_id))
    key = f"{{{callers[0].tenant.tenant_id}}}:meta"
    here, there = (cluster.masters[(cluster.owner_place(key) + further) % 3] for further in (0, 1))
    await cluster.move(key, there)
    try:
        for used in (2, 3):
            items = [batch_item(caller.tenant, 1) for caller in callers]
            answers = await answered(service, items)
            for caller, item, answer in zip(callers, items, answers, strict=True):
                assert answer.HasField("held")
                caller._open(UUID(item.request.reservation_id), answer.held)
            assert [(await caller.tenant.limits())["tokens"].used for caller in callers] == [used] * 6
    finally:
        # The tests after this one look for slots where they were given out.
        await cluster.move(key, here, there)


@pytest.mark.slow
async def test_a_slot_moves_under_load(service: Service, cluster: Cluster) -> None:
    """While its keys go to another master one by one its tenant gets at most UNAVAILABLE, for a short while, and never too much."""
    tenant = service.tenant_with(rule("tokens", "tokens", "day", LIMIT))
    callers = Callers(service, tenant)
    key = f"{{{tenant.tenant_id}}}:meta"

    async def move() -> None:
        await eventually(lambda: _opened(callers, LIMIT // 8), within_seconds=RECOVERY_SECONDS)
        await cluster.move(key, cluster.masters[(cluster.owner_place(key) + 1) % 3])

    await callers.until_full(8, move)
    assert callers.codes <= {"UNAVAILABLE", "RESOURCE_EXHAUSTED"}
    assert callers.outage_seconds < RECOVERY_SECONDS
    # Nothing was lost and nothing given twice: holds of before that were never opened are void, those that were are counted.
    assert len(callers.opened) <= LIMIT
    assert (await tenant.limits())["tokens"].used == LIMIT


@pytest.mark.slow
async def test_a_master_is_lost_under_load(service: Service, cluster: Cluster) -> None:
    """Its replica takes over with data that may be behind: nothing is admitted on it before the ledger has said what is used."""
    tenant, other = service.tenant_with(rule("tokens", "tokens", "day", LIMIT)), None
    callers = Callers(service, tenant)
    place = cluster.owner_place(f"{{{tenant.tenant_id}}}")
    while other is None or cluster.owner_place(f"{{{other.tenant_id}}}") == place:
        other = service.tenant_with(rule("tokens", "tokens", "day", LIMIT))
    await other.reserve(1)
    elsewhere: list[str] = []

    async def lose() -> None:
        assert other is not None
        await eventually(lambda: _opened(callers, LIMIT // 8), within_seconds=RECOVERY_SECONDS)
        cluster.masters[place].process.kill()
        for _ in range(20):
            try:
                await other.reserve(1)
            except MeshError as error:
                elsewhere.append(error.reason_name)
            # In one message with the tenant whose master is gone.
            _, of_other = await outcomes(service, [batch_item(tenant, LIMIT + 1), batch_item(other, 1)])
            if of_other != "held":
                elsewhere.append(of_other)
            await asyncio.sleep(0.05)
        replica = cluster.replicas[place]
        await eventually(lambda: replica.says("role:master", "INFO", "replication"), within_seconds=RECOVERY_SECONDS)

    await callers.until_full(8, lose)
    assert callers.codes <= {"UNAVAILABLE", "RESOURCE_EXHAUSTED"}
    assert callers.outage_seconds < RECOVERY_SECONDS
    assert min(callers.epochs) == 1
    assert max(callers.epochs) > 1
    assert len(callers.opened) <= LIMIT
    assert (await tenant.limits())["tokens"].used == LIMIT
    assert len(elsewhere) < 5, "a master that is gone is no reason to refuse the tenants of the others"


@pytest.mark.slow
async def test_batches_alone_find_the_master_that_took_over(cluster: Cluster) -> None:
    """Where nothing but batches comes: others are held meanwhile, and the lost one's as soon as there is a new master."""
    # Another test may have killed one of them: the service begins at one that lives, and loses another.
    living, place = [place for place, master in enumerate(cluster.masters) if master.process.exit_code is None][:2]
    url, options = f"redis://{LOOPBACK}:{cluster.masters[living].port}/0", {"redis_cluster": True, "redis_timeout_seconds": 1.0}
    async with running_peer() as peer, running_service(url, peer, **options) as service:
        there, elsewhere = tenant_at(service, cluster, place), tenant_at(service, cluster, living)
        seen: list[list[str]] = []

        async def held() -> bool:
            seen.append(await outcomes(service, [batch_item(there, 0), batch_item(elsewhere, 0)]))
            return seen[-1] == ["held", "held"]

        # The first of all looks for the masters too, and may be refused on a busy machine.
        await eventually(held, within_seconds=RECOVERY_SECONDS)
        seen.clear()
        cluster.masters[place].process.kill()
        await eventually(held, within_seconds=RECOVERY_SECONDS)
    assert sum(of_other != "held" for _, of_other in seen) < 5, "a master that is gone is no reason to refuse the tenants of the others"


@pytest.mark.slow
@pytest.mark.parametrize("alone", [True, False])
async def test_a_master_that_falls_silent_is_replaced_as_one_that_ends(cluster: Cluster, alone: bool) -> None:
    """A machine that is gone refuses nothing and answers nothing: the limit of a decision ends before the client has noticed."""
    place = max(place for place, master in enumerate(cluster.masters) if master.process.exit_code is None)
    if await cluster.masters[place].says("role:slave", "INFO", "replication"):
        await take_over(cluster.masters[place])
    url, options = f"redis://{LOOPBACK}:{cluster.replicas[place - 1].port}/0", {"redis_cluster": True, "redis_timeout_seconds": 0.5}
    async with running_peer() as peer, running_service(url, peer, **options) as service:
        tenant = tenant_at(service, cluster, place)

        async def held() -> bool:
            if not alone:
                return await outcomes(service, [batch_item(tenant, 0)]) == ["held"]
            try:
                await tenant.reserve(0)
            except MeshError:
                return False
            return True

        await eventually(held, within_seconds=RECOVERY_SECONDS)
        os.kill(cluster.masters[place].process.pid, signal.SIGSTOP)
        try:
            await eventually(held, within_seconds=RECOVERY_SECONDS)
        finally:
            os.kill(cluster.masters[place].process.pid, signal.SIGCONT)


async def take_over(node: Node) -> None:
    """Makes a replica the master of its slots again."""
    await eventually(lambda: node.says("master_link_status:up", "INFO", "replication"), within_seconds=RECOVERY_SECONDS)
    await node.link.send("CLUSTER", "FAILOVER")
    await eventually(lambda: node.says("role:master", "INFO", "replication"), within_seconds=RECOVERY_SECONDS)


def tenant_at(service: Service, cluster: Cluster, place: int) -> AtService:
    """A tenant of 10 tokens a day whose keys lie at this master."""
    while True:
        tenant = service.tenant_with(rule("tokens", "tokens", "day", 10))
        if cluster.owner_place(f"{{{tenant.tenant_id}}}") == place:
            return tenant


async def answered(service: Service, items: Sequence[messages.ReserveBatchItem]) -> Sequence[messages.ReserveBatchOutcome]:
    """The outcomes of a batch."""
    stub = rate_limit_service_pb2_grpc.RateLimitServiceStub(service.inference.channel)
    return (await service.inference.unary(stub.ReserveBatch, messages.ReserveBatchRequest(items=items), timeout_seconds=10)).outcomes


async def outcomes(service: Service, items: Sequence[messages.ReserveBatchItem]) -> list[str]:
    """What came of each item of a batch, in a word."""
    return [str(outcome.WhichOneof("outcome")) for outcome in await answered(service, items)]


async def _opened(callers: Callers, count: int) -> bool:
    return len(callers.opened) >= count
