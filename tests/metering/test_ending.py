"""Ends without a bill: void, unresolved, tombstones, leases, fences and the sweep."""

from datetime import timedelta
from uuid import UUID

import pytest

from mesh.metering.v1 import ledger_service_pb2 as pb
from mesh.ratelimit.v1 import rate_limit_service_pb2 as limits_pb
from services.metering.adapters.postgres_jobs import PostgresJobs
from tests.metering.mesh import Mesh, Tenant, bill, not_billed, ref, unknown

OPEN, SETTLED, VOID, UNRESOLVED = pb.CALL_STATE_OPEN, pb.CALL_STATE_SETTLED, pb.CALL_STATE_VOID, pb.CALL_STATE_UNRESOLVED


async def in_state(mesh: Mesh, tenant: Tenant, state: int) -> pb.CallRef:
    """A call in a state; 0 is one nobody spoke of."""
    if state == 0:
        return ref(tenant)
    call = await mesh.opened(tenant)
    if state == SETTLED:
        await mesh.settle(bill(call.ref))
    elif state == VOID:
        await mesh.void(not_billed(call.ref))
    elif state == UNRESOLVED:
        await mesh.void(unknown(call.ref))
    return call.ref


@pytest.mark.parametrize(("before", "after"), [(0, VOID), (OPEN, VOID), (UNRESOLVED, VOID), (VOID, VOID), (SETTLED, SETTLED)])
async def test_call_that_was_not_billed_becomes_void_unless_settled(mesh: Mesh, before: int, after: int) -> None:
    """NOT_BILLED voids every call but a settled one, leaves a tombstone for an unknown one, and repeats its answer."""
    tenant = mesh.new_tenant()
    call = await in_state(mesh, tenant, before)
    assert await mesh.void(not_billed(call)) == [after]
    assert await mesh.void(not_billed(call)) == [after]
    assert await mesh.state(call) == after


@pytest.mark.parametrize(("before", "after"), [(0, 0), (OPEN, UNRESOLVED), (UNRESOLVED, UNRESOLVED), (VOID, VOID), (SETTLED, SETTLED)])
async def test_unknown_bill_leaves_only_open_calls_unresolved(mesh: Mesh, before: int, after: int) -> None:
    """UNKNOWN moves open calls alone: a call that may have been billed is never voided by it, and none is made up."""
    tenant = mesh.new_tenant()
    call = await in_state(mesh, tenant, before)
    assert await mesh.void(unknown(call)) == [after]
    assert await mesh.state(call) == after


async def test_each_end_is_told_once_with_its_kind(mesh: Mesh) -> None:
    """An unresolved call is pinned at the limits, a void one released; repeating adds nothing."""
    tenant = mesh.new_tenant()
    call = await mesh.opened(tenant)
    for _ in range(2):
        await mesh.void(unknown(call.ref))
    for _ in range(2):
        await mesh.void(not_billed(call.ref))
    commits = await mesh.limits.wait_for(tenant.id, 2)
    assert [commit.kind for commit in commits] == [limits_pb.COMMIT_KIND_PIN, limits_pb.COMMIT_KIND_VOID]
    assert [commit.actual.tokens for commit in commits] == [0, 0]


async def test_tombstone_is_told_to_the_limits(mesh: Mesh) -> None:
    """Voiding a call that was never opened lets its hold go, too."""
    tenant = mesh.new_tenant()
    await mesh.void(not_billed(ref(tenant)))
    (commit,) = await mesh.limits.wait_for(tenant.id, 1)
    assert commit.kind == limits_pb.COMMIT_KIND_VOID


async def test_received_usage_is_kept_and_not_billed(mesh: Mesh) -> None:
    """What had been received before a cut stays with the unresolved call; the first report of it counts, also after a sweep."""
    tenant = mesh.new_tenant()
    call = await mesh.opened(tenant)
    await mesh.lapse_leases(tenant)
    await PostgresJobs(mesh.app.jobs).sweep(1_000)
    await mesh.void(unknown(call.ref, pb.TokenUsage(input_tokens=9, output_tokens=4)))
    await mesh.void(unknown(call.ref, pb.TokenUsage(input_tokens=9, output_tokens=5)))
    row = await mesh.row(call.ref)
    assert row is not None
    assert (row["state"], row["output_tokens"], row["cost_nano_usd"]) == (UNRESOLVED, 4, None)


async def test_void_and_unknown_of_one_call_in_one_batch_ends_void(mesh: Mesh) -> None:
    """Certainty wins over doubt within a batch."""
    call = await mesh.opened(mesh.new_tenant())
    assert await mesh.void(unknown(call.ref), not_billed(call.ref)) == [VOID, VOID]


async def test_of_two_ends_of_one_call_in_one_batch_the_first_is_written(mesh: Mesh) -> None:
    """The cause and the usage received that came first stand, wherever the batch has others between them."""
    tenant = mesh.new_tenant()
    voided, unresolved = await mesh.opened(tenant), await mesh.opened(tenant)
    others = [not_billed((await mesh.opened(tenant)).ref) for _ in range(3)]
    first, second = not_billed(voided.ref), not_billed(voided.ref)
    first.cause, second.cause = "first", "second"
    early, late = unknown(unresolved.ref), unknown(unresolved.ref)
    early.received.CopyFrom(pb.TokenUsage(input_tokens=1))
    late.received.CopyFrom(pb.TokenUsage(input_tokens=2))
    assert await mesh.void(first, early, *others, second, late) == [VOID, UNRESOLVED, VOID, VOID, VOID, VOID, UNRESOLVED]
    causes = "SELECT end_cause FROM metering.calls WHERE tenant_id = $1 AND reservation_id = $2"
    received = "SELECT input_tokens FROM metering.calls WHERE tenant_id = $1 AND reservation_id = $2"
    assert await mesh.admin.fetchval(causes, tenant.id, UUID(bytes=voided.ref.reservation_id)) == "first"
    assert await mesh.admin.fetchval(received, tenant.id, UUID(bytes=unresolved.ref.reservation_id)) == 1


async def test_renewal_prolongs_open_calls_and_names_the_others(mesh: Mesh) -> None:
    """Only open calls have leases; every other one is answered as lost, of whatever tenant."""
    one, other = mesh.new_tenant(), mesh.new_tenant()
    alive = [await in_state(mesh, tenant, OPEN) for tenant in (one, other)]
    gone = [await in_state(mesh, tenant, state) for tenant in (one, other) for state in (0, VOID, UNRESOLVED, SETTLED)]
    await mesh.lapse_leases(one)
    lost = await mesh.renew([gone[0], alive[0], *gone[1:6], alive[1], *gone[6:]])
    assert lost == gone
    until = await mesh.admin.fetchval("SELECT min(lease_until) - now() FROM metering.call_leases WHERE tenant_id = $1", one.id)
    assert until > timedelta(seconds=50)
    assert await mesh.renew([]) == []


async def test_lapsed_lease_leaves_the_call_unresolved_and_pinned(mesh: Mesh) -> None:
    """The sweep ends lapsed leases and only those; the limits are told to pin."""
    tenant = mesh.new_tenant()
    lapsed = [await in_state(mesh, tenant, OPEN) for _ in range(3)]
    await mesh.lapse_leases(tenant)
    alive = await in_state(mesh, tenant, OPEN)
    ends = await PostgresJobs(mesh.app.jobs).sweep(1_000)
    assert {end.reservation_id for end in ends if end.tenant_id == tenant.id.bytes} == {call.reservation_id for call in lapsed}
    assert [await mesh.state(call) for call in (*lapsed, alive)] == [UNRESOLVED] * 3 + [OPEN]
    commits = await mesh.limits.wait_for(tenant.id, 3)
    assert {commit.kind for commit in commits} == {limits_pb.COMMIT_KIND_PIN}


@pytest.mark.parametrize(
    ("before", "outcome", "after"),
    [
        (0, pb.FENCE_OUTCOME_VOID, VOID),
        (OPEN, pb.FENCE_OUTCOME_UNRESOLVED, UNRESOLVED),
        (UNRESOLVED, pb.FENCE_OUTCOME_UNRESOLVED, UNRESOLVED),
        (VOID, pb.FENCE_OUTCOME_VOID, VOID),
        (SETTLED, pb.FENCE_OUTCOME_SETTLED, SETTLED),
    ],
)
async def test_fence_decides_what_becomes_of_a_hold(mesh: Mesh, before: int, outcome: int, after: int) -> None:
    """An unknown call gets a tombstone, an open one becomes unresolved, an ended one keeps its end; asking again answers the same."""
    call = await in_state(mesh, mesh.new_tenant(), before)
    assert await mesh.fence(pb.FenceCall(ref=call), pb.FenceCall(ref=call)) == [outcome] * 2
    assert await mesh.fence(pb.FenceCall(ref=call)) == [outcome]
    assert await mesh.state(call) == after


async def test_fence_dates_a_settlement_before_the_limits_epoch(mesh: Mesh) -> None:
    """A settlement the rebuild has counted is told apart from one whose commit is still to come."""
    tenant = mesh.new_tenant()
    before, during = await mesh.opened(tenant), await mesh.opened(tenant)
    await mesh.settle(bill(before.ref))
    await mesh.begin_epoch(tenant)
    await mesh.settle(bill(during.ref))
    fences = [pb.FenceCall(ref=call.ref, epoch=1) for call in (before, during)]
    assert await mesh.fence(*fences) == [pb.FENCE_OUTCOME_SETTLED_BEFORE, pb.FENCE_OUTCOME_SETTLED]


async def test_fence_of_an_open_call_pins_and_a_tombstone_says_nothing(mesh: Mesh) -> None:
    """The fence's answer lets the hold of an unknown call go by itself; an open one is pinned through the outbox as well."""
    tenant = mesh.new_tenant()
    call = await mesh.opened(tenant)
    await mesh.fence(pb.FenceCall(ref=ref(tenant)), pb.FenceCall(ref=call.ref))
    commits = await mesh.limits.wait_for(tenant.id, 1)
    assert [(commit.kind, commit.reservation.reservation_id) for commit in commits] == [
        (limits_pb.COMMIT_KIND_PIN, call.ref.reservation_id)
    ]


async def test_late_open_cannot_follow_a_tombstone(mesh: Mesh) -> None:
    """An open that was under way while its hold was let go is refused."""
    tenant = mesh.new_tenant()
    call = mesh.opening(tenant)
    await mesh.fence(pb.FenceCall(ref=call.ref))
    (result,) = await mesh.open(call)
    assert (result.outcome, result.state) == (pb.OPEN_OUTCOME_ENDED, VOID)
