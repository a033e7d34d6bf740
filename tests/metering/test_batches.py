"""Batches: concurrent requests share transactions, one bad request fails alone, and contracts are kept at the door."""

import asyncio
from uuid import UUID

import asyncpg
import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.metering.v1 import ledger_service_pb2 as pb
from services.kernel.errors import MeshError
from services.metering.adapters.sorted_batch import slices_of
from services.metering.call import CallKey
from services.metering.group_commit import MAX_ITEMS, GroupCommit
from tests.metering.mesh import Mesh, bill, not_billed, ref


async def transactions(mesh: Mesh) -> int:
    """How many transactions the service role has committed for opens: distinct transaction ids that wrote calls."""
    return await mesh.admin.fetchval("SELECT count(DISTINCT xmin::text) FROM metering.calls")


async def test_concurrent_opens_share_transactions(mesh: Mesh) -> None:
    """Sixty-four concurrent single opens of many tenants need far fewer than sixty-four transactions."""
    tenants = [mesh.new_tenant() for _ in range(8)]
    before = await transactions(mesh)
    async with asyncio.TaskGroup() as group:
        for index in range(64):
            group.create_task(mesh.opened(tenants[index % 8]))
    assert await transactions(mesh) - before <= 16


async def test_concurrent_crossing_batches_do_not_block_each_other_for_ever(mesh: Mesh) -> None:
    """Batches over the same tenants and calls in opposite orders all come to an end, each call settled once."""
    tenants = [mesh.new_tenant() for _ in range(4)]
    calls = [mesh.opening(tenant) for tenant in tenants for _ in range(10)]
    await mesh.open(*calls)
    bills = [bill(call.ref) for call in calls]
    async with asyncio.timeout(20), asyncio.TaskGroup() as group:
        for order in (bills, bills[::-1], bills[5:] + bills[:5]):
            group.create_task(mesh.settle(*order))
            group.create_task(mesh.fence(*[pb.FenceCall(ref=item.ref) for item in reversed(order)]))
            group.create_task(mesh.renew([item.ref for item in order]))
    assert [await mesh.state(call.ref) for call in calls] == [pb.CALL_STATE_SETTLED] * 40


async def test_largest_batch_of_as_many_tenants_is_one_answer(mesh: Mesh) -> None:
    """A thousand items of a hundred tenants are opened, settled and renewed in their places."""
    tenants = [mesh.new_tenant() for _ in range(100)]
    calls = [mesh.opening(tenants[index % 100]) for index in range(1_000)]
    assert {result.outcome for result in await mesh.open(*calls)} == {pb.OPEN_OUTCOME_OPENED}
    assert await mesh.renew([call.ref for call in calls]) == []
    results = await mesh.settle(*[bill(call.ref, output_tokens=index) for index, call in enumerate(calls)])
    assert [result.cost_nano_usd for result in results] == [100_000 + 5_000 * index for index in range(1_000)]


@pytest.mark.parametrize(
    "damage",
    [
        {"bound_tokens": -1},
        {"bound_nano_usd": -1},
        {"attempt": 0},
        {"attempt": 101},
        {"epoch": -1},
        {"call_id": b"short"},
        {"model": ""},
        {"feature": "x" * 101},
        {"user": "nul\x00"},
    ],
)
async def test_open_that_breaks_its_contract_is_refused(mesh: Mesh, damage: dict[str, object]) -> None:
    """Negative amounts, short ids, texts too long or with NUL never reach the database."""
    with pytest.raises(MeshError) as refused:
        await mesh.open(mesh.opening(mesh.new_tenant(), **damage))
    assert refused.value.code is grpc.StatusCode.INVALID_ARGUMENT


async def test_open_without_ids_or_times_is_refused(mesh: Mesh) -> None:
    """A reference with a short tenant id and a reservation time before 1970 are INVALID_ARGUMENT."""
    short, early = mesh.opening(mesh.new_tenant()), mesh.opening(mesh.new_tenant())
    short.ref.tenant_id = b"x"
    early.reserve_time.seconds = -1
    for call in (short, early):
        with pytest.raises(MeshError) as refused:
            await mesh.open(call)
        assert refused.value.code is grpc.StatusCode.INVALID_ARGUMENT


async def test_settlement_and_void_that_break_their_contract_are_refused(mesh: Mesh) -> None:
    """Negative and absurd usage, a void without a kind, empty and oversize batches are INVALID_ARGUMENT."""
    tenant = mesh.new_tenant()
    attempts = (
        mesh.settle(bill(ref(tenant), input_tokens=-1)),
        mesh.settle(bill(ref(tenant), input_tokens=100_000_001)),
        mesh.settle(),
        mesh.settle(*[bill(ref(tenant)) for _ in range(1_001)]),
        mesh.void(pb.VoidCall(ref=ref(tenant), cause="x")),
        mesh.void(not_billed(ref(tenant), "\x00")),
    )
    for attempt in attempts:
        with pytest.raises(MeshError) as refused:
            await attempt
        assert refused.value.code is grpc.StatusCode.INVALID_ARGUMENT


async def test_only_the_named_services_may_write_the_ledger(mesh: Mesh) -> None:
    """Inference cannot fence or begin epochs, the limits cannot settle, and a tenant's key can do neither."""
    tenant = mesh.new_tenant()
    wrong = (
        mesh.inference.channel.unary(
            mesh.inference.ledger.FenceCalls, pb.FenceCallsRequest(calls=[pb.FenceCall(ref=ref(tenant))]), timeout_seconds=5
        ),
        mesh.ratelimit.channel.unary(
            mesh.ratelimit.ledger.SettleCalls, pb.SettleCallsRequest(calls=[bill(ref(tenant))]), timeout_seconds=5
        ),
    )
    for attempt in wrong:
        with pytest.raises(MeshError) as refused:
            await attempt
        assert refused.value.reason_name == "CALLER_NOT_ALLOWED"


async def test_group_commit_splits_by_items_and_fails_a_group_alone() -> None:
    """No transaction is larger than its bound; a request whose transaction failed does not fail those of another."""
    sizes: list[int] = []
    release = asyncio.Event()

    async def commit(items: list[int]) -> list[int]:
        sizes.append(len(items))
        await release.wait()
        if 13 in items:
            raise asyncpg.PostgresError("broken")
        return [item * 2 for item in items]

    commits: GroupCommit[int, int] = GroupCommit(commit)
    requests = [[1], [2], [3] * 700, [4] * 700, [13], [5] * MAX_ITEMS]
    tasks = [asyncio.ensure_future(commits.submit(request)) for request in requests]
    await asyncio.sleep(0)
    release.set()
    await asyncio.wait(tasks)
    assert [task.exception() is None for task in tasks] == [True, True, True, False, False, True]
    assert tasks[5].result() == [10] * MAX_ITEMS
    assert sizes == [1, 701, 701, MAX_ITEMS]


@given(st.lists(st.integers(0, 9), min_size=1))
def test_each_tenant_of_a_sorted_batch_has_its_own_part(numbers: list[int]) -> None:
    """From its first item to its last, one tenant's part after the other's."""
    batch = sorted(number.to_bytes(16, "big") for number in numbers)
    tenants, first, last = slices_of(batch)
    assert [(str(tenant), last - first + 1) for tenant, first, last in zip(tenants, first, last, strict=True)] == [
        (str(UUID(bytes=tenant_id)), batch.count(tenant_id)) for tenant_id in sorted(set(batch))
    ]
    assert first == [1, *(position + 1 for position in last[:-1])]


async def test_answers_keep_the_order_of_their_items(mesh: Mesh) -> None:
    """However a batch is sorted for the database, its answers come back in the order the items were sent."""
    tenants = [mesh.new_tenant() for _ in range(3)]
    calls = [await mesh.opened(tenants[index % 3]) for index in range(9)]
    unknown_ones = [ref(tenant) for tenant in tenants]
    keys = [CallKey(item.tenant_id, item.reservation_id) for item in (unknown_ones[0], calls[4].ref, unknown_ones[2], calls[0].ref)]
    assert await mesh.app.ledger.renew(keys) == [keys[0], keys[2]]


@pytest.mark.parametrize("causes", [("provider_529", "cancelled"), ("cancelled", "provider_529")])
async def test_of_two_ends_of_one_call_the_first_is_written(mesh: Mesh, causes: tuple[str, str]) -> None:
    """Neither says what was billed, so the call is unresolved, for the cause that was told first."""
    call = await mesh.opened(mesh.new_tenant())
    states = await mesh.void(*(pb.VoidCall(ref=call.ref, kind=pb.VOID_KIND_UNKNOWN, cause=cause) for cause in causes))
    assert states == [pb.CALL_STATE_UNRESOLVED] * 2
    found = await mesh.admin.fetchval(
        "SELECT end_cause FROM metering.calls WHERE reservation_id = $1", UUID(bytes=bytes(call.ref.reservation_id))
    )
    assert found == causes[0]
