"""Races on one call: however its ends interleave, the ledger has one story of it."""

import asyncio
import random
from collections.abc import Awaitable, Callable

from mesh.metering.v1 import ledger_service_pb2 as pb
from services.metering.adapters.postgres_jobs import PostgresJobs
from tests.metering.mesh import Mesh, bill, not_billed, unknown

ROUNDS, AT_ONCE = 10, 20


async def test_settle_fence_sweep_and_void_on_one_call_agree_in_the_end(mesh: Mesh) -> None:
    """Two hundred interleavings of settle, fence, sweep and void: at most one entry, one state, no lease, and answers that fit."""
    randomness = random.Random(9)
    outcomes: set[int] = set()
    for _ in range(ROUNDS):
        async with asyncio.TaskGroup() as group:
            races = [group.create_task(race(mesh, random.Random(randomness.random()))) for _ in range(AT_ONCE)]
        outcomes.update(done.result() for done in races)
    assert outcomes == {pb.SETTLE_OUTCOME_SETTLED, pb.SETTLE_OUTCOME_NOT_OPEN}


async def test_call_renewed_while_the_sweep_was_under_way_stays_open(mesh: Mesh) -> None:
    """A lease that had lapsed when the sweep chose it and was renewed before the sweep reached it is left alone."""
    tenant = mesh.new_tenant()
    call = await mesh.opened(tenant)
    await mesh.lapse_leases(tenant)
    waiting = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"
    async with asyncio.timeout(10), asyncio.TaskGroup() as group, mesh.admin.acquire() as connection:
        async with connection.transaction():
            await connection.execute("SELECT pg_advisory_xact_lock(metering.tenant_lock($1))", tenant.id)
            sweeping = group.create_task(PostgresJobs(mesh.app.jobs).sweep(1_000))
            while not await mesh.admin.fetchval(waiting):  # noqa: ASYNC110 - a lock in the database has no event
                await asyncio.sleep(0.01)
            assert await mesh.renew([call.ref]) == []
        ends = await sweeping
    assert [end for end in ends if end.tenant_id == tenant.id.bytes] == []
    assert await mesh.state(call.ref) == pb.CALL_STATE_OPEN


async def race(mesh: Mesh, randomness: random.Random) -> int:
    """Lets everything happen to one call at once, checks what is left, and returns how the settlement went."""
    tenant = mesh.new_tenant()
    call = await mesh.opened(tenant)
    await mesh.lapse_leases(tenant)
    actions: list[Callable[[], Awaitable[object]]] = [
        lambda: mesh.fence(pb.FenceCall(ref=call.ref)),
        lambda: PostgresJobs(mesh.app.jobs).sweep(1_000),
        lambda: mesh.renew([call.ref]),
    ]
    if randomness.random() < 0.5:
        actions.append(lambda: mesh.void(unknown(call.ref)))
    if randomness.random() < 0.5:
        actions.append(lambda: mesh.void(not_billed(call.ref)))
    async with asyncio.TaskGroup() as group:
        for action in actions:
            group.create_task(after(randomness.uniform(0, 0.005), action))
        settling = group.create_task(after(randomness.uniform(0, 0.005), lambda: mesh.settle(bill(call.ref))))
    (settled,) = settling.result()
    counts = await mesh.admin.fetchrow(
        "SELECT (SELECT state FROM metering.calls WHERE tenant_id = $1), (SELECT count(*) FROM metering.entries WHERE tenant_id = $1), "
        "(SELECT count(*) FROM metering.call_leases WHERE tenant_id = $1)",
        tenant.id,
    )
    settled_well = settled.outcome == pb.SETTLE_OUTCOME_SETTLED
    assert settled_well or len(actions) > 3, "without a certain void the settlement always wins in the end"
    assert tuple(counts) == ((pb.CALL_STATE_SETTLED, 1, 0) if settled_well else (pb.CALL_STATE_VOID, 0, 0))
    return settled.outcome


async def after(pause: float, action: Callable[[], Awaitable[object]]):
    """Does something a little later."""
    await asyncio.sleep(pause)
    return await action()
