"""A Redis that is gone, hangs, restarts or forgot its scripts: answered quickly, truthfully, and over as soon as it is back."""

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import uvloop

from devstack.ports import LOOPBACK
from mesh.ratelimit.v1 import rate_limit_service_pb2 as messages
from services.kernel.errors import MeshError, Unavailable
from services.kernel.ids import new_uuid7
from services.ratelimit.adapters.cluster_link import ClusterLink
from services.ratelimit.adapters.redis_link import Link, PipelinedLink
from services.ratelimit.circuit_breaker import CircuitBreaker
from tests.ratelimit.callers import AtService, eventually, running_service
from tests.ratelimit.resetting_redis import resetting_redis
from tests.ratelimit.scripted_peer import Peer, running_peer
from tests.support.steadiness import steadily
from tests.support.stores import RedisStore as RedisServer
from tests.support.stores import running_redis

# The promise is 50 ms. A machine that does other things only ever adds to it: the fastest of several calls must keep near the promise,
# and none may last as long as it would if nobody had given up on Redis.
QUICKLY_SECONDS = 0.25
AT_MOST_SECONDS = 2.0


@pytest.fixture
async def own_redis() -> AsyncIterator[RedisServer]:
    """A Redis that a test may stop."""
    async with running_redis() as server:
        yield server


@pytest.fixture
async def peer() -> AsyncIterator[Peer]:
    """The ledger and the tenant service."""
    async with running_peer() as running:
        yield running


async def refused_quickly(tenant: AtService, *, times: int) -> None:
    """Calls several times, and expects to be told soon that Redis does not answer."""
    took: list[float] = []
    for _ in range(times):
        started = time.monotonic()
        with pytest.raises(MeshError) as refused:
            await tenant.reserve()
        took.append(time.monotonic() - started)
        assert (refused.value.reason_name, refused.value.metadata["dependency"]) == ("DEPENDENCY_UNAVAILABLE", "redis")
        assert refused.value.retry_after_seconds is not None
    assert min(took) < QUICKLY_SECONDS
    assert max(took) < AT_MOST_SECONDS


async def admitted_again(tenant: AtService) -> None:
    """Calls until it is admitted, within a few seconds."""

    async def admitted() -> bool:
        try:
            await tenant.reserve()
        except MeshError as error:
            assert error.code.name == "UNAVAILABLE"
            return False
        return True

    await eventually(admitted)


@steadily
async def test_a_hanging_redis_is_answered_quickly(own_redis: RedisServer, peer: Peer) -> None:
    """A stopped process accepts connections and never replies: callers wait for none of it, and go on when it does."""
    async with running_service(own_redis.url, peer) as service:
        tenant = service.tenant_with(requests_per_minute=1000)
        await admitted_again(tenant)
        os.kill(own_redis.server.process.pid, signal.SIGSTOP)
        try:
            await refused_quickly(tenant, times=5)
            started = time.monotonic()
            answers = await tenant.reserve_many(32)
            assert time.monotonic() - started < AT_MOST_SECONDS
            assert all(isinstance(answer, MeshError) for answer in answers)
            commit = tenant.commit_message(new_uuid7(), messages.COMMIT_KIND_VOID)
            assert await tenant.commit(commit) == [messages.COMMIT_OUTCOME_RETRY]
        finally:
            os.kill(own_redis.server.process.pid, signal.SIGCONT)
        await admitted_again(tenant)


async def test_a_connection_that_falls_silent_keeps_nobody_from_the_other() -> None:
    """Whoever comes after it is answered over the other one, long before the first is given up."""
    opened = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal opened
        opened += 1
        is_silent = opened == 1
        while data := await reader.read(4096):
            if b"PING" not in data:
                # What the client says of itself as it connects.
                writer.write(b"+OK\r\n" * data.count(b"CLIENT"))
            elif not is_silent:
                writer.write(b"+PONG\r\n" * data.count(b"PING"))
        writer.close()

    server = await asyncio.start_server(serve, LOOPBACK, 0)
    link = PipelinedLink(f"redis://{LOOPBACK}:{server.sockets[0].getsockname()[1]}", timeout_seconds=4.0)
    async with server:
        silent = asyncio.ensure_future(link.send("PING"))
        await asyncio.sleep(0)
        for _ in range(10):
            assert await link.send("PING") in (b"PONG", True)
        assert not silent.done()
        with pytest.raises(Unavailable):
            await silent
        await link.close()


async def test_the_service_starts_and_refuses_while_redis_is_down(own_redis: RedisServer, peer: Peer) -> None:
    """Without its store the service is up, says so, and serves once the store is there."""
    await own_redis.server.stop()
    async with running_service(own_redis.url, peer) as service:
        tenant = service.tenant_with(requests_per_minute=1000)
        await refused_quickly(tenant, times=4)
        await own_redis.server.start()
        await admitted_again(tenant)


async def test_a_restarted_redis_costs_no_call(own_redis: RedisServer, peer: Peer) -> None:
    """A connection that died while idle is replaced, scripts are sent again, lost counters are rebuilt: the caller sees nothing."""
    async with running_service(own_redis.url, peer, redis_timeout_seconds=2.0) as service:
        tenant = service.tenant_with(requests_per_minute=1000)
        assert (await tenant.reserve()).epoch == 1
        await own_redis.restart()
        assert (await tenant.reserve()).epoch == 2


async def test_what_failed_in_the_background_costs_no_call_once_the_store_is_back(own_redis: RedisServer, peer: Peer) -> None:
    """Commits and sweeps that found no store put off themselves alone: a call that finds it there has its counters made at once."""
    async with running_service(own_redis.url, peer, redis_timeout_seconds=2.0) as service:
        tenant = service.tenant_with(requests_per_minute=1000)
        assert (await tenant.reserve()).epoch == 1
        commit = tenant.commit_message(new_uuid7(), messages.COMMIT_KIND_VOID)
        for restarts in range(1, 4):
            await own_redis.server.stop()
            outcomes = [await tenant.commit(commit) for _ in range(2)]
            assert outcomes == [[messages.COMMIT_OUTCOME_RETRY]] * 2
            await own_redis.server.start()
            assert (await tenant.reserve()).epoch == 1 + restarts


async def test_a_way_that_failed_is_open_when_another_was_answered(own_redis: RedisServer) -> None:
    """Two links to one store: what the one learnt of it the other need not wait for."""
    decisions = PipelinedLink(own_redis.url, timeout_seconds=2.0, breaker=CircuitBreaker())
    bulk = PipelinedLink(own_redis.url, timeout_seconds=2.0, breaker=CircuitBreaker(open_seconds=1000.0, beside=decisions.breaker))
    await own_redis.server.stop()
    for _ in range(2):
        with pytest.raises(Unavailable):
            await bulk.send("PING")
    await own_redis.server.start()
    with pytest.raises(Unavailable):
        await bulk.send("PING")
    assert [await link.send("PING") for link in (decisions, bulk)] == [b"PONG", b"PONG"]
    for link in (decisions, bulk):
        await link.close()


async def test_a_store_that_forgot_the_scripts_is_told_again(own_redis: RedisServer, peer: Peer) -> None:
    """Scripts are not data: losing them loses nothing."""
    async with running_service(own_redis.url, peer, redis_timeout_seconds=2.0) as service:
        tenant = service.tenant_with(requests_per_minute=1000)
        await tenant.reserve()
        await service.link.send("SCRIPT", "FLUSH")
        answers = await tenant.reserve_many(8)
        assert {answer.epoch for answer in answers if isinstance(answer, messages.ReserveResponse)} == {1}


async def test_a_dead_store_is_not_asked_again_before_its_pause_is_over(own_redis: RedisServer) -> None:
    """After a failure callers are refused without an attempt; the first attempt after the pause finds the store back."""
    now = 100.0
    breaker = CircuitBreaker(failure_threshold=1, open_seconds=1.0, clock=lambda: now)
    link = PipelinedLink(own_redis.url, timeout_seconds=2.0, breaker=breaker)
    await own_redis.server.stop()
    with pytest.raises(Unavailable):
        await link.send("PING")
    await own_redis.server.start()
    with pytest.raises(Unavailable):
        await link.send("PING")
    now += 1.0
    assert await link.send("PING") == b"PONG"
    await link.close()


async def test_one_wrong_command_fails_alone(own_redis: RedisServer) -> None:
    """Commands that share a pipeline do not share their faults."""
    link = PipelinedLink(own_redis.url, connections=1, timeout_seconds=2.0)
    async with asyncio.TaskGroup() as group:
        good = [group.create_task(link.send("ECHO", str(number))) for number in range(10)]
        bad = group.create_task(_fault_of(link, "NOSUCHCOMMAND"))
    await link.close()
    assert [task.result() for task in good] == [str(number).encode() for number in range(10)]
    assert "unknown command" in bad.result()


async def _fault_of(link: PipelinedLink, *command: str) -> str:
    with pytest.raises(Exception, match="unknown") as fault:
        await link.send(*command)
    return str(fault.value)


@pytest.mark.parametrize("link_to", [PipelinedLink, ClusterLink])
def test_a_connection_that_the_server_reset_is_no_fault_of_the_caller(link_to: Callable[..., Link]) -> None:
    """On the services' own event loop a write to it fails in other words; nobody hears them, and the next one is answered."""

    async def ask_again() -> None:
        async with resetting_redis() as redis:
            link = link_to(redis.url, timeout_seconds=5.0)
            assert await link.send("HGET", "{a}", "1") == b"OK"
            await redis.reset()
            with contextlib.suppress(Unavailable):
                await link.send("HGET", "{a}", "2")
            assert await link.send("HGET", "{a}", "3") == b"OK"
            await redis.reset()
            assert await link.send_all([("HGET", "{a}", str(number)) for number in range(3)]) == [b"OK"] * 3
            await link.close()

    with ThreadPoolExecutor(1) as aside:
        aside.submit(uvloop.run, ask_again()).result(timeout=30)
