"""Budgets and deliveries while several processes do the work and are killed: a threshold fires once, and no delivery is lost."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from mesh.metering.v1 import webhook_service_pb2 as pb
from mesh.metering.v1.ledger_service_pb2 import SettleCallsRequest
from tests.metering.budgets import (
    WAIT_SECONDS,
    alerts,
    deliveries,
    looked_at,
    new_tenant,
    put,
    receiver_at,
    stands,
    use,
    wait_delivered,
    wait_fired,
    wait_received,
)
from tests.metering.mesh import Mesh, bill, mesh_of_its_own
from tests.metering.peers import Peers
from tests.metering.replicas import running_replicas
from tests.support.stores import PostgresStore
from tests.support.waiting import eventually
from tests.tenant.receivers import running_receiver

NEVER = {"budget_poll_seconds": 3_600.0, "webhook_poll_seconds": 3_600.0}
ALWAYS = {"budget_poll_seconds": 0.02, "webhook_poll_seconds": 0.02}
CALLS = 40


@pytest.fixture(scope="module")
async def idle(postgres: PostgresStore, peers: Peers) -> AsyncIterator[Mesh]:
    """A service with a database of its own that answers and neither looks at budgets nor delivers: its replicas do."""
    async with mesh_of_its_own(postgres, peers, **NEVER) as running:
        yield running


async def test_two_processes_that_settle_at_once_fire_each_threshold_once(idle: Mesh, tmp_path: Path) -> None:
    """Calls of one tenant are settled through both while both look: each threshold has one alert and one delivery; the sum is exact."""
    tenant, thresholds = new_tenant(idle), list(range(5, 101, 5))
    async with running_receiver() as receiver, running_replicas(idle, tmp_path, 2, **ALWAYS) as replicas:
        await receiver_at(idle, tenant, receiver.url)
        await put(idle, tenant, amount=CALLS * 10, thresholds_percent=thresholds)
        calls = [idle.opening(tenant) for _ in range(CALLS)]
        await idle.open(*calls)

        async def settle(index: int) -> None:
            caller = replicas[index % 2].inference
            request = SettleCallsRequest(calls=[bill(calls[index].ref, input_tokens=10, output_tokens=0)])
            await caller.channel.unary(caller.ledger.SettleCalls, request, timeout_seconds=20)

        async with asyncio.TaskGroup() as group:
            for index in range(CALLS):
                group.create_task(settle(index))
        await wait_fired(idle, tenant, thresholds)
        await looked_at(idle, tenant)
        found = await wait_delivered(idle, tenant, len(thresholds))
        fired = await alerts(idle, tenant)
        assert sorted(each.event_id for each in found) == sorted(alert.alert_id for alert in fired)
        assert {headers["webhook-id"] for headers, _ in receiver.received} == {alert.alert_id for alert in fired}
        assert all(alert.used >= alert.amount * alert.threshold_percent / 100 for alert in fired)
        assert (await stands(idle, tenant)).used == CALLS * 10


async def test_a_delivery_outlives_whoever_was_sending_it(idle: Mesh, tmp_path: Path) -> None:
    """Killed while the receiver has not answered, or before anybody sent anything: the next process sends the same event."""
    tenant = new_tenant(idle)
    async with running_receiver() as receiver:
        receiver.delay_seconds = 60.0
        await receiver_at(idle, tenant, receiver.url)
        async with running_replicas(idle, tmp_path, 1, **ALWAYS) as [sending]:
            await put(idle, tenant, amount=100, thresholds_percent=[50, 100])
            await use(idle, tenant, 150)
            await wait_received(receiver, 1)
            await sending.kill()
        waiting = await deliveries(idle, tenant)
        assert [each.state for each in waiting] == [pb.DELIVERY_STATE_PENDING] * 2
        receiver.delay_seconds = 0.0
        # Its lease would end by itself, half a minute later.
        await idle.admin.execute("UPDATE metering.webhook_deliveries SET lease_end_time = now() WHERE tenant_id = $1", tenant.id)
        async with running_replicas(idle, tmp_path, 1, **ALWAYS):
            await wait_delivered(idle, tenant, 2)
    fired = {alert.alert_id for alert in await alerts(idle, tenant)}
    assert len(receiver.received) == 3
    assert {headers["webhook-id"] for headers, _ in receiver.received} == fired


async def test_marks_outlive_whoever_looked(idle: Mesh, tmp_path: Path) -> None:
    """Usage that nobody looked at when its process was killed is looked at by the next one: marks are on disk with what they mark."""
    tenant = new_tenant(idle)
    await put(idle, tenant, amount=100)
    async with running_replicas(idle, tmp_path, 1, **NEVER) as [settling]:
        call = await idle.opened(tenant)
        request = SettleCallsRequest(calls=[bill(call.ref, input_tokens=80, output_tokens=0)])
        await settling.inference.channel.unary(settling.inference.ledger.SettleCalls, request, timeout_seconds=20)
        await settling.kill()
    assert await alerts(idle, tenant) == []
    async with running_replicas(idle, tmp_path, 1, **ALWAYS):
        await wait_fired(idle, tenant, [50, 80])

        async def nothing_marked() -> bool:
            return await idle.admin.fetchval("SELECT count(*) FROM metering.budget_marks") == 0

        await eventually(nothing_marked, within_seconds=WAIT_SECONDS)
