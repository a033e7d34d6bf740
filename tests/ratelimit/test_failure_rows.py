"""A store that fails, however it does: closed rules say so soon, open ones admit a little, and all of it is counted afterwards."""

import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from mesh.metering.v1 import ledger_service_pb2 as ledger
from services.kernel.errors import MeshError
from services.kernel.ids import new_uuid7
from tests.ratelimit.callers import AtService, Service, eventually, running_service
from tests.ratelimit.rules import OPEN, rule
from tests.ratelimit.scripted_peer import LedgerCall, running_peer
from tests.ratelimit.test_redis_failure import refused_quickly
from tests.support.stores import RedisStore, running_redis

Step = Callable[[RedisStore], Awaitable[None]]


@pytest.fixture
async def own_redis() -> AsyncIterator[RedisStore]:
    """A Redis that a test may stop."""
    async with running_redis() as server:
        yield server


@pytest.fixture
async def service(own_redis: RedisStore) -> AsyncIterator[Service]:
    """The service as it is deployed, its time to wait for Redis included."""
    async with running_peer() as peer, running_service(own_redis.url, peer) as running:
        yield running


async def hang(server: RedisStore) -> None:
    """Stops it as a machine that is out of breath does: connections stay, answers do not come."""
    os.kill(server.server.process.pid, signal.SIGSTOP)


async def go_on(server: RedisStore) -> None:
    """Lets it go on."""
    os.kill(server.server.process.pid, signal.SIGCONT)


async def stop(server: RedisStore) -> None:
    """Ends it."""
    await server.server.stop()


async def start_empty(server: RedisStore) -> None:
    """Starts it again; it keeps no file, so it knows nothing."""
    await server.server.start()


async def opened(service: Service, tenant: AtService) -> bool:
    """Reserves and opens the call in the ledger; whether it was admitted from the local allowance."""
    held = await tenant.reserve(1)
    call = LedgerCall(ledger.CALL_STATE_OPEN, held.reserve_time.ToMicroseconds(), tokens=1, epoch=held.epoch)
    service.peer.ledger.of(tenant.tenant_id).calls[new_uuid7().bytes] = call
    return held.degraded


@pytest.mark.parametrize(("fail", "recover"), [(hang, go_on), (stop, start_empty)], ids=["hangs", "gone"])
async def test_a_store_that_fails_and_returns(own_redis: RedisStore, service: Service, fail: Step, recover: Step) -> None:
    """Closed: UNAVAILABLE with a time to try again. Open: a quarter, marked. After: both count exactly what was opened."""
    closed = service.tenant_with(rule("tokens", "tokens", "day", 100))
    open_ = service.tenant_with(rule("tokens", "tokens", 60, 40, on_store_failure=OPEN))
    for tenant in (closed, open_):
        await eventually(lambda tenant=tenant: _is_up(service, tenant))  # type: ignore[misc] # bound now
    await fail(own_redis)
    try:
        await refused_quickly(closed, times=5)
        admitted = 0
        with pytest.raises(MeshError) as caught:
            while await opened(service, open_):
                admitted += 1
        assert admitted == 10
        assert caught.value.retry_after_seconds is not None
    finally:
        await recover(own_redis)
    for tenant, count in ((closed, 1), (open_, 11)):
        await eventually(lambda tenant=tenant, count=count: _counts(tenant, count))  # type: ignore[misc] # bound now
        assert not await opened(service, tenant)


async def test_a_store_that_restarts_empty_admits_nothing_before_the_ledger_has_spoken(own_redis: RedisStore, service: Service) -> None:
    """Between the restart and the ledger's answer a closed rule refuses with LIMITS_REBUILDING; then it counts what was before."""
    tenant = service.tenant_with(rule("tokens", "tokens", "day", 2))
    await eventually(lambda: _is_up(service, tenant))
    await own_redis.restart()
    service.peer.ledger.silent = True
    reasons = set[str]()

    async def rebuilding() -> bool:
        with pytest.raises(MeshError) as caught:
            await tenant.reserve(1)
        reasons.add(caught.value.reason_name)
        assert caught.value.retry_after_seconds is not None
        return "LIMITS_REBUILDING" in reasons

    await eventually(rebuilding)
    assert reasons <= {"LIMITS_REBUILDING", "DEPENDENCY_UNAVAILABLE"}
    service.peer.ledger.silent = False
    await eventually(lambda: _counts(tenant, 1))
    await opened(service, tenant)
    with pytest.raises(MeshError) as caught:
        await tenant.reserve(1)
    assert (caught.value.reason_name, caught.value.metadata["used"]) == ("PLAN_LIMIT", "2")


async def _is_up(service: Service, tenant: AtService) -> bool:
    try:
        await opened(service, tenant)
    except MeshError:
        return False
    return True


async def _counts(tenant: AtService, count: int) -> bool:
    try:
        return (await tenant.limits())["tokens"].used == count
    except MeshError:
        return False
