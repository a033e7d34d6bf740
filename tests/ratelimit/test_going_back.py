"""A Redis whose data may have gone back in time, by a restart or a failover: it counts as lost, and the ledger says what is true."""

import asyncio
import secrets
import shutil
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

import pytest

from devstack.embedded_redis import EmbeddedRedis
from devstack.ports import free_port
from mesh.metering.v1 import ledger_service_pb2 as ledger
from mesh.ratelimit.v1 import rate_limit_service_pb2 as messages
from services.kernel.ids import ReservationId, new_uuid7
from services.ratelimit.adapters.redis_link import PipelinedLink
from services.ratelimit.fencing import FenceVerdict
from services.ratelimit.rebuild import Begin, CountedCall, CountedState
from services.ratelimit.settlement import CommitKind
from services.ratelimit.standing import Verdict
from tests.ratelimit.callers import AtService, AtStore, Service, Stores, eventually, now_us, running_service, standard_terms
from tests.ratelimit.scripted_peer import LedgerCall, running_peer

LIMITS = {
    "requests_per_minute": 100,
    "tokens_per_minute": 1000,
    "tokens_per_day": 1000,
    "cost_nano_usd_per_month": 10_000,
    "concurrent_calls": 10,
}


@dataclass
class DurableRedis:
    """A server with an append-only file, which a test can put back."""

    server: EmbeddedRedis
    folder: Path

    async def restart(self, before_start: Callable[[], object] = lambda: None) -> None:
        """Stops the server and starts it again, on other files if `before_start` puts them there."""
        await self.server.stop()
        before_start()
        await self.server.start()

    def remember(self) -> None:
        """Keeps what the file holds now. It is written before a reply is sent, so it holds all that was answered."""
        shutil.copy(self.folder / "appendonly.aof", self.folder / "older.aof")

    def put_back(self) -> None:
        """Makes the kept file the server's own."""
        shutil.copy(self.folder / "older.aof", self.folder / "appendonly.aof")


def redis_in(folder: Path, password: str, *, durable: bool) -> EmbeddedRedis:
    """A server that is not running yet."""
    return EmbeddedRedis(folder, port=free_port(), password=password, log_path=folder.with_suffix(".log"), durable=durable)


@pytest.fixture
async def durable(tmp_path: Path) -> AsyncIterator[DurableRedis]:
    """A durable server that a test may restart."""
    redis = DurableRedis(redis_in(tmp_path / "data", secrets.token_hex(16), durable=True), tmp_path / "data")
    await redis.server.start()
    yield redis
    await redis.server.stop()


@pytest.fixture
async def service(durable: DurableRedis) -> AsyncIterator[Service]:
    """The whole service on the durable server, with scripted peers."""
    async with running_peer() as peer, running_service(durable.server.url, peer, redis_timeout_seconds=2.0) as running:
        yield running


@pytest.fixture
async def tenant(durable: DurableRedis) -> AsyncIterator[AtStore]:
    """A tenant with counters, at the store itself."""
    link = PipelinedLink(durable.server.url, timeout_seconds=5.0)
    yield await AtStore(Stores(link), link, standard_terms(**LIMITS)).loaded()
    await link.close()


async def figures(tenant: AtService) -> list[int]:
    """What every rule counts, in the order of the rules."""
    limits = await tenant.limits()
    return [limits[rule].used for rule in LIMITS]


async def opened(service: Service, tenant: AtService, tokens: int) -> ReservationId:
    """Reserves a call and opens it at the ledger."""
    reservation_id = ReservationId(new_uuid7())
    held = await tenant.reserve(tokens, tokens * 10, id=reservation_id)
    call = LedgerCall(ledger.CALL_STATE_OPEN, held.reserve_time.ToMicroseconds(), tokens, tokens * 10)
    service.peer.ledger.of(tenant.tenant_id).calls[reservation_id.bytes] = call
    return reservation_id


async def settle(service: Service, tenant: AtService, reservation_id: UUID, tokens: int) -> None:
    """Settles a call at the ledger and delivers its commit."""
    epoch = service.peer.ledger.settle(tenant.tenant_id, reservation_id, tokens, tokens * 10)
    assert await tenant.settled(reservation_id, tokens, tokens * 10, epoch=epoch) == messages.COMMIT_OUTCOME_DONE


async def test_older_data_after_a_restart_is_rebuilt_from_the_ledger(durable: DurableRedis, service: Service) -> None:
    """A restart on an older file neither forgets what was settled since nor brings holds back that have ended."""
    tenant = service.tenant_with(**LIMITS)
    settled_later = await opened(service, tenant, 100)
    durable.remember()
    await settle(service, tenant, settled_later, 40)
    await settle(service, tenant, await opened(service, tenant, 50), 30)
    await opened(service, tenant, 7)
    before = await figures(tenant)
    await durable.restart(durable.put_back)
    assert (await tenant.reserve(5, 50)).epoch == 2
    assert before == [3, 77, 77, 770, 1]
    assert await figures(tenant) == [4, 82, 82, 820, 2]
    assert service.peer.ledger.epoch_count == 2


async def test_a_restart_on_intact_data_rebuilds_once_and_ends_equal(durable: DurableRedis, service: Service) -> None:
    """Nobody can tell an intact file from an older one: the ledger is asked once, whatever came first, and says the same."""
    tenant = service.tenant_with(**LIMITS)
    await settle(service, tenant, await opened(service, tenant, 100), 40)
    await opened(service, tenant, 7)
    before = await figures(tenant)
    await durable.restart()
    assert await figures(tenant) == before == [2, 47, 47, 470, 1]
    assert all(isinstance(answer, messages.ReserveResponse) for answer in await tenant.reserve_many(5, 1, 1))
    assert service.peer.ledger.epoch_count == 2


async def test_nothing_is_rebuilt_while_the_server_stays_the_same(service: Service) -> None:
    """New connections, forgotten scripts and a file written anew say nothing about the data."""
    tenant = service.tenant_with(**LIMITS)
    await tenant.reserve(5, 5)
    await service.link.send("SCRIPT", "FLUSH")
    await service.link.send("BGREWRITEAOF")
    await service.link.send("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
    await tenant.reserve(5, 5)
    await settle(service, tenant, await opened(service, tenant, 10), 4)
    assert await figures(tenant) == [3, 14, 14, 50, 2]
    assert service.peer.ledger.epoch_count == 1


async def test_leases_and_fences_of_older_data_are_void(durable: DurableRedis, tenant: AtStore) -> None:
    """Holds of before a restart can be neither prolonged, released nor fenced, and count for nothing."""
    hold = await tenant.held(10, 10)
    await durable.restart()
    kept = await tenant.dump()
    assert await tenant.store.renew([(tenant.tenant_id, hold)]) == [False]
    await tenant.store.release(tenant.tenant_id, hold, 1)
    assert await tenant.store.apply_fences([(tenant.tenant_id, 1, [(hold, FenceVerdict.VOID)])]) == [0]
    assert (await tenant.reserve())[1].verdict is Verdict.REBUILD
    assert await tenant.dump() == kept


async def test_the_sweep_forgets_data_of_before_a_restart(durable: DurableRedis, tenant: AtStore) -> None:
    """A tenant that never calls again leaves no hold behind that nothing would end."""
    await tenant.held(10, 10)
    await durable.restart()
    assert await tenant.store.tenants_with_leases() == [tenant.tenant_id]
    (holds,) = await tenant.store.expired([tenant.tenant_id], 10)
    assert (holds.epoch, holds.lease_count) == (None, 0)
    assert set(await tenant.dump()) == {None}


async def test_a_commit_to_older_data_is_done_and_left_to_the_snapshot(durable: DurableRedis, tenant: AtStore) -> None:
    """What a commit tells after a restart is in every snapshot asked for later, so it leaves the outbox and changes no counter."""
    hold = await tenant.held(10, 10)
    await durable.restart()
    assert await tenant.commit(hold, CommitKind.SETTLED, tokens=5)
    assert set(await tenant.dump()) == {None}
    tenant.epoch = 2
    await tenant.loaded(CountedCall(hold, CountedState.SETTLED, now_us(), 5, 0))
    assert (await tenant.used())[:2] == (1, 5)


async def test_a_request_for_a_snapshot_does_not_outlive_a_restart(durable: DurableRedis, tenant: AtStore) -> None:
    """The answer to a request of before the restart is not loaded, holds no commit up, and another may be asked for at once."""
    await tenant.lose()
    assert await tenant.begin("before") is Begin.BEGUN
    assert not await tenant.commit(ReservationId(new_uuid7()))
    await durable.restart()
    assert not await tenant.load("before", 1)
    assert await tenant.begin("after") is Begin.BEGUN
    assert not await tenant.load("before", 1)
    assert not await tenant.commit(ReservationId(new_uuid7()))
    assert await tenant.load("after", 2)
    await durable.restart()
    assert await tenant.commit(ReservationId(new_uuid7()))


async def test_a_server_that_leads_again_does_not_trust_what_it_got_meanwhile(tmp_path: Path) -> None:
    """Failed over to a lagging replica and back: the first server never stopped, nor did its connection, but its data went back."""
    password = secrets.token_hex(16)
    first, second = (redis_in(tmp_path / name, password, durable=False) for name in ("first", "second"))
    links: list[PipelinedLink] = []
    try:
        for server in (first, second):
            await server.start()
            links.append(PipelinedLink(server.url, connections=1, timeout_seconds=5.0))
            await links[-1].send("CONFIG", "SET", "masterauth", password)
            # Replicas are fed at once: the waiting for more of them is a delay of five seconds.
            await links[-1].send("CONFIG", "SET", "repl-diskless-sync", "yes")
            await links[-1].send("CONFIG", "SET", "repl-diskless-sync-delay", 0)
        await _follow(links[1], first)
        tenant = await AtStore(Stores(links[0]), links[0], standard_terms(**LIMITS)).loaded()
        hold = await tenant.held(100)
        assert await links[0].send("WAIT", 1, 4000) == 1
        run = await _server_run(links[0])
        await links[1].send("REPLICAOF", "NO", "ONE")
        assert await tenant.commit(hold, CommitKind.SETTLED, tokens=40)
        await _follow(links[0], second)
        await links[0].send("REPLICAOF", "NO", "ONE")
        assert await tenant.state(hold) == "held"
        assert await _server_run(links[0]) == run
        assert (await tenant.reserve())[1].verdict is Verdict.REBUILD
    finally:
        async with asyncio.TaskGroup() as group:
            for link in links:
                group.create_task(link.close())
        await first.stop()
        await second.stop()


async def _server_run(link: PipelinedLink) -> str:
    return str(await link.send("INFO", "server")).split("run_id:")[1][:40]


async def _follow(link: PipelinedLink, leader: EmbeddedRedis) -> None:
    await link.send("REPLICAOF", "127.0.0.1", leader.port)

    async def follows() -> bool:
        return "master_link_status:up" in str(await link.send("INFO", "replication"))

    await eventually(follows)
