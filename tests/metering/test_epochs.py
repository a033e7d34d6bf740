"""Epochs: a snapshot of everything that counts, and no call between two of them."""

import asyncio
import random
from datetime import UTC, datetime, timedelta

from mesh.common.v1 import limit_rule_pb2 as rule
from mesh.metering.v1 import ledger_service_pb2 as pb
from tests.metering.mesh import Mesh, bill, not_billed, period, ref, unknown


def counted(calls: list[pb.CountedCall]) -> dict[bytes, tuple[int, int, int]]:
    """State, tokens and cost by reservation."""
    return {call.reservation_id: (call.state, call.tokens, call.cost_nano_usd) for call in calls}


async def test_snapshot_counts_every_call_as_the_limits_must(mesh: Mesh) -> None:
    """Settled calls count what was used, void ones nothing, open and unresolved ones their bound; tombstones are not there."""
    tenant = mesh.new_tenant()
    settled, voided, pinned, running = [await mesh.opened(tenant) for _ in range(4)]
    await mesh.settle(bill(settled.ref))
    await mesh.void(not_billed(voided.ref), unknown(pinned.ref), not_billed(ref(tenant)))
    snapshot = await mesh.begin_epoch(tenant, nonce="nonce-7")
    assert (snapshot.nonce, snapshot.epoch) == ("nonce-7", 1)
    assert counted(list(snapshot.recent)) == {
        settled.ref.reservation_id: (pb.CALL_STATE_SETTLED, 150, 350_000),
        voided.ref.reservation_id: (pb.CALL_STATE_VOID, 0, 0),
    }
    assert counted(list(snapshot.outstanding)) == {
        pinned.ref.reservation_id: (pb.CALL_STATE_UNRESOLVED, 1_000, 5_000_000),
        running.ref.reservation_id: (pb.CALL_STATE_OPEN, 1_000, 5_000_000),
    }
    assert abs(snapshot.snapshot_time.ToDatetime(tzinfo=UTC) - datetime.now(UTC)) < timedelta(seconds=5)


async def test_outstanding_calls_count_however_old_they_are(mesh: Mesh) -> None:
    """An unresolved call reserved long ago still holds its bound."""
    tenant = mesh.new_tenant()
    call = await mesh.opened(tenant, reserve_time=datetime.now(UTC) - timedelta(days=90))
    await mesh.void(unknown(call.ref))
    snapshot = await mesh.begin_epoch(tenant)
    assert [found.reservation_id for found in snapshot.outstanding] == [call.ref.reservation_id]


async def test_each_request_begins_another_epoch_of_its_own_tenant(mesh: Mesh) -> None:
    """Epochs rise by one and belong to one tenant."""
    one, other = mesh.new_tenant(), mesh.new_tenant()
    assert [(await mesh.begin_epoch(one)).epoch for _ in range(3)] == [1, 2, 3]
    assert (await mesh.begin_epoch(other)).epoch == 1


async def test_no_call_opens_between_an_epoch_and_its_snapshot(mesh: Mesh) -> None:
    """Opens racing with a new epoch are in its snapshot or are refused as stale; none is open and uncounted."""
    randomness = random.Random(7)
    for _ in range(40):
        tenant = mesh.new_tenant()
        calls = [mesh.opening(tenant, epoch=0) for _ in range(6)]
        snapshots: list[pb.BeginEpochResponse] = []
        outcomes: dict[bytes, int] = {}

        async def begin(pause: float, tenant=tenant, snapshots=snapshots) -> None:
            await asyncio.sleep(pause)
            snapshots.append(await mesh.begin_epoch(tenant))

        async def open_one(call: pb.OpenCall, pause: float, outcomes=outcomes) -> None:
            await asyncio.sleep(pause)
            (result,) = await mesh.open(call)
            outcomes[call.ref.reservation_id] = result.outcome

        async with asyncio.TaskGroup() as group:
            group.create_task(begin(randomness.uniform(0, 0.006)))
            for call in calls:
                group.create_task(open_one(call, randomness.uniform(0, 0.006)))
        held = set(counted(list(snapshots[0].outstanding)))
        opened = {reservation for reservation, outcome in outcomes.items() if outcome == pb.OPEN_OUTCOME_OPENED}
        assert opened == held
        assert set(outcomes.values()) <= {pb.OPEN_OUTCOME_OPENED, pb.OPEN_OUTCOME_STALE_EPOCH}


async def test_no_settlement_is_counted_twice_or_not_at_all_around_an_epoch(mesh: Mesh) -> None:
    """A settlement racing with a new epoch is in the snapshot's sums with the old epoch, or outside of them with the new one."""
    randomness = random.Random(8)
    for _ in range(25):
        tenant = mesh.new_tenant()
        calls = [await mesh.opened(tenant) for _ in range(3)]
        snapshots: list[pb.BeginEpochResponse] = []
        now = datetime.now(UTC)
        tokens = period(rule.LIMIT_UNIT_TOKENS, rule.LIMIT_SCOPE_TENANT, now - timedelta(hours=1), now + timedelta(hours=1))

        async def begin(pause: float, tenant=tenant, snapshots=snapshots, tokens=tokens) -> None:
            await asyncio.sleep(pause)
            snapshots.append(await mesh.begin_epoch(tenant, periods=[tokens]))

        async def settle_one(call: pb.OpenCall, pause: float) -> None:
            await asyncio.sleep(pause)
            await mesh.settle(bill(call.ref))

        async with asyncio.TaskGroup() as group:
            group.create_task(begin(randomness.uniform(0, 0.005)))
            for call in calls:
                group.create_task(settle_one(call, randomness.uniform(0, 0.005)))
        rows = await mesh.admin.fetch("SELECT epoch, total_tokens FROM metering.entries WHERE tenant_id = $1", tenant.id)
        before = sum(row["total_tokens"] for row in rows if row["epoch"] == 0)
        assert sum(found.amount for found in snapshots[0].sums) == before
        assert len(snapshots[0].outstanding) == sum(1 for row in rows if row["epoch"] == 1)
