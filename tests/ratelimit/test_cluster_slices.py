"""Slices on a Redis Cluster of three masters: no limit is passed, through a resharding and the loss of a master."""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import pytest

from services.kernel.errors import MeshError
from services.kernel.ids import new_uuid7
from tenantry.limits import LimitSlices
from tests.ratelimit.callers import AtService, Service, running_service
from tests.ratelimit.redis_cluster import Cluster, running_cluster
from tests.ratelimit.rules import rule
from tests.ratelimit.scripted_peer import running_peer
from tests.ratelimit.slice_client import UNIT, AdmittedUse
from tests.ratelimit.test_limit_slices import USERS, assert_within, metadata_of
from tests.ratelimit.test_slices import give_back, take
from tests.support.waiting import eventually

TOTAL, EACH = rule("searches", UNIT, 2, 600), rule("each", UNIT, 1, 300, "user")
# The cluster's own second, its vote, a rebuild, a window for which nobody knows what was used, and a busy machine.
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
class Holders:
    """Clients of one tenant, each with slices of its own, and what they used together."""

    clients: Sequence[LimitSlices]
    uses: list[AdmittedUse] = field(default_factory=list)
    codes: set[str] = field(default_factory=set)
    stopped: bool = False

    async def use_up(self, limits: LimitSlices) -> None:
        """Uses units one after the other until told to stop."""
        turn = 0
        while not self.stopped:
            turn += 1
            user, quantity, after = turn % len(USERS), 1 + turn % 3, time.monotonic()
            try:
                answer = await limits.try_use(UNIT, quantity, user=USERS[user])
            except grpc.aio.AioRpcError as error:
                self.codes.add(error.code().name)
                await asyncio.sleep(0.01)
                continue
            if answer:
                self.uses.append(AdmittedUse(after, time.monotonic(), quantity, user, answer.local))
            await asyncio.sleep(0.001 if answer else 0.01)

    async def have_used(self, count: int) -> None:
        """Returns when so many more uses were decided from slices."""
        begun = len(self.uses)

        async def enough() -> bool:
            return sum(use.local for use in self.uses[begun:]) >= count

        await eventually(enough, within_seconds=RECOVERY_SECONDS)


@asynccontextmanager
async def holders(tenant: AtService) -> AsyncIterator[Holders]:
    """Two clients with three loops each; at the end they have given back what they held."""
    async with AsyncExitStack() as closing:
        # Patient, so that it is the service that says what is wrong, however slow the machine.
        patient = {"metadata": metadata_of(tenant), "timeout_seconds": RECOVERY_SECONDS}
        clients = [await closing.enter_async_context(LimitSlices(tenant.stub, **patient)) for _ in range(2)]  # type: ignore[arg-type] # by name
        using = Holders(clients)
        async with asyncio.TaskGroup() as group:
            for limits in clients * 3:
                group.create_task(using.use_up(limits))
            try:
                yield using
            finally:
                using.stopped = True


async def test_slices_are_the_same_on_three_masters(service: Service, cluster: Cluster) -> None:
    """Taken, refused and given back, for tenants on every master."""
    places = set[int]()
    while len(places) < 3:
        tenant = service.tenant_with(rule("searches", UNIT, 60, 8))
        places.add(cluster.owner_place(f"{{{tenant.tenant_id}}}"))
        slice_id = new_uuid7()
        assert (await take(tenant, 5, id=slice_id)).granted == 2
        await tenant.consume(UNIT, 6)
        with pytest.raises(MeshError):
            await take(tenant, 1)
        await give_back(tenant, (slice_id, 1))
        assert (await take(tenant, 1)).granted == 1
        assert (await tenant.limits())["searches"].used == 8


@pytest.mark.slow
async def test_a_slot_moves_while_slices_are_held(service: Service, cluster: Cluster) -> None:
    """What is held is used on, what is asked is UNAVAILABLE for a while, and then there are slices again: no window holds too much."""
    tenant = service.tenant_with(TOTAL, EACH)
    key = f"{{{tenant.tenant_id}}}:meta"
    async with holders(tenant) as using:
        await using.have_used(100)
        await cluster.move(key, cluster.masters[(cluster.owner_place(key) + 1) % 3])
        await using.have_used(100)
    assert_within(using.uses, TOTAL, EACH)
    assert using.codes <= {"UNAVAILABLE"}


@pytest.mark.slow
async def test_a_master_is_lost_while_slices_are_held(service: Service, cluster: Cluster) -> None:
    """Its replica may know less of them: nothing is admitted on it that a use of before the loss leaves no room for."""
    tenant = service.tenant_with(TOTAL, EACH)
    place = cluster.owner_place(f"{{{tenant.tenant_id}}}")
    async with holders(tenant) as using:
        await using.have_used(100)
        cluster.masters[place].process.kill()
        replica = cluster.replicas[place]
        await eventually(lambda: replica.says("role:master", "INFO", "replication"), within_seconds=RECOVERY_SECONDS)
        await using.have_used(100)
    assert_within(using.uses, TOTAL, EACH)
    assert using.codes <= {"UNAVAILABLE"}
    assert service.peer.ledger.of(tenant.tenant_id).epoch > 1
