"""Extending: a bound rises before more than the old one is used, only while its call is open and its epoch lasts."""

import asyncio
import random
from uuid import UUID

import grpc
import pytest

from mesh.metering.v1 import ledger_service_pb2 as pb
from services.kernel.errors import MeshError
from tests.metering.mesh import Mesh, bill, not_billed, ref, unknown

EXTENDED, NOT_OPEN = pb.EXTEND_OUTCOME_EXTENDED, pb.EXTEND_OUTCOME_NOT_OPEN


def wider(reference: pb.CallRef, tokens: int = 2_000, nano_usd: int = 9_000_000) -> pb.ExtendCall:
    """A bound to raise."""
    return pb.ExtendCall(ref=reference, bound_tokens=tokens, bound_nano_usd=nano_usd)


async def bounds(mesh: Mesh, reference: pb.CallRef) -> tuple[int, int]:
    """The bounds the ledger has of a call."""
    row = await mesh.row(reference)
    assert row is not None
    return row["bound_tokens"], row["bound_nano_usd"]


async def test_extended_call_is_counted_at_its_raised_bound(mesh: Mesh) -> None:
    """A snapshot while it runs, and one after its usage could not be learned, hold what it may use at most."""
    tenant = mesh.new_tenant()
    call = await mesh.opened(tenant)
    assert await mesh.extend(wider(call.ref)) == [EXTENDED]
    for state in (pb.CALL_STATE_OPEN, pb.CALL_STATE_UNRESOLVED):
        (counted,) = (await mesh.begin_epoch(tenant)).outstanding
        assert (counted.state, counted.tokens, counted.cost_nano_usd) == (state, 2_000, 9_000_000)
        await mesh.void(unknown(call.ref))


async def test_bound_only_rises(mesh: Mesh) -> None:
    """Repeated, late and smaller extensions are answered as done and lower nothing; each of the two bounds rises by itself."""
    call = await mesh.opened(mesh.new_tenant())
    for asked, expected in (
        ((2_000, 9_000_000), (2_000, 9_000_000)),
        ((2_000, 9_000_000), (2_000, 9_000_000)),
        ((1_500, 1_000), (2_000, 9_000_000)),
        ((0, 9_500_000), (2_000, 9_500_000)),
        ((3_000, 0), (3_000, 9_500_000)),
    ):
        assert await mesh.extend(wider(call.ref, *asked)) == [EXTENDED]
        assert await bounds(mesh, call.ref) == expected


async def test_extensions_of_one_call_in_one_batch_end_at_the_highest(mesh: Mesh) -> None:
    """Whatever their order, and beside calls that are not open; each item is answered in its place."""
    tenant = mesh.new_tenant()
    call, other = await mesh.opened(tenant), await mesh.opened(mesh.new_tenant())
    batch = (wider(call.ref, 1_100), wider(ref(tenant)), wider(call.ref, 3_000), wider(other.ref), wider(call.ref, 1_200))
    assert await mesh.extend(*batch) == [EXTENDED, NOT_OPEN, EXTENDED, EXTENDED, EXTENDED]
    assert await bounds(mesh, call.ref) == (3_000, 9_000_000)
    assert await bounds(mesh, other.ref) == (2_000, 9_000_000)


async def test_only_an_open_call_is_extended(mesh: Mesh) -> None:
    """Unknown, settled, void and unresolved calls, tombstones and uses of units answer NOT_OPEN and keep what they have."""
    tenant = mesh.new_tenant()
    settled, voided, pinned = [await mesh.opened(tenant) for _ in range(3)]
    tombstone, use = ref(tenant), mesh.use(tenant)
    await mesh.settle(bill(settled.ref))
    await mesh.void(not_billed(voided.ref), unknown(pinned.ref), not_billed(tombstone))
    await mesh.record(use)
    ended = [settled.ref, voided.ref, pinned.ref, tombstone, use.ref]
    before = [await mesh.row(reference) for reference in ended]
    # Also with bounds that are there already: nothing may be used any more.
    asked = [wider(reference, tokens) for reference in (*ended, ref(tenant)) for tokens in (2_000, 500)]
    assert await mesh.extend(*asked) == [NOT_OPEN] * 12
    assert [await mesh.row(reference) for reference in ended] == before


async def test_call_of_an_older_epoch_is_not_extended(mesh: Mesh) -> None:
    """Limits that began anew hold the old bound: a late extension is refused; one that was in their snapshot is answered as before."""
    tenant = mesh.new_tenant()
    late, known = await mesh.opened(tenant), await mesh.opened(tenant)
    assert await mesh.extend(wider(known.ref)) == [EXTENDED]
    await mesh.begin_epoch(tenant)
    assert await mesh.extend(wider(late.ref), wider(known.ref), wider(known.ref, 2_001)) == [NOT_OPEN, EXTENDED, NOT_OPEN]
    assert await bounds(mesh, late.ref) == (1_000, 5_000_000)
    assert await bounds(mesh, known.ref) == (2_000, 9_000_000)
    again = await mesh.opened(tenant, epoch=1)
    assert await mesh.extend(wider(again.ref)) == [EXTENDED]


async def test_no_extension_slips_between_an_epoch_and_its_snapshot(mesh: Mesh) -> None:
    """An extension racing with a new epoch is in its snapshot, or is refused and never happens."""
    randomness, outcomes = random.Random(12), set[int]()
    for round_number in range(200):
        # Both sides of the race must have been seen, however busy the machine is: the pauses grow until they are.
        if round_number >= 40 and outcomes == {EXTENDED, NOT_OPEN}:
            break
        longest_seconds = 0.004 + 0.0005 * round_number
        tenant = mesh.new_tenant()
        calls = [await mesh.opened(tenant) for _ in range(4)]
        answers: dict[bytes, int] = {}

        async def extend(call: pb.OpenCall, pause: float, answers=answers) -> None:
            await asyncio.sleep(pause)
            (answers[call.ref.reservation_id],) = await mesh.extend(wider(call.ref))

        async def begin(pause: float, tenant=tenant) -> pb.BeginEpochResponse:
            await asyncio.sleep(pause)
            return await mesh.begin_epoch(tenant)

        async with asyncio.TaskGroup() as group:
            beginning = group.create_task(begin(randomness.uniform(0, longest_seconds)))
            for call in calls:
                group.create_task(extend(call, randomness.uniform(0, longest_seconds)))
        counted = {found.reservation_id: found.tokens for found in beginning.result().outstanding}
        assert counted == {key: 2_000 if answer == EXTENDED else 1_000 for key, answer in answers.items()}
        assert {key: (await bounds(mesh, pb.CallRef(tenant_id=tenant.id.bytes, reservation_id=key)))[0] for key in counted} == counted
        outcomes.update(answers.values())
    assert outcomes == {EXTENDED, NOT_OPEN}


async def test_extending_does_not_delay_or_change_the_settlement(mesh: Mesh) -> None:
    """An extended call is settled once, with what it used, and its end is told with that."""
    tenant = mesh.new_tenant()
    call = await mesh.opened(tenant)
    await mesh.extend(wider(call.ref))
    (settled,) = await mesh.settle(bill(call.ref, input_tokens=1_500, output_tokens=0))
    assert (settled.outcome, settled.cost_nano_usd) == (pb.SETTLE_OUTCOME_SETTLED, 1_500_000)
    (commit,) = await mesh.limits.wait_for(tenant.id, 1)
    assert (commit.actual.tokens, commit.actual.cost_nano_usd) == (1_500, 1_500_000)


async def test_concurrent_extensions_share_transactions(mesh: Mesh) -> None:
    """Sixty-four concurrent extensions need far fewer than sixty-four transactions."""
    tenants = [mesh.new_tenant() for _ in range(8)]
    calls = [mesh.opening(tenants[index % 8]) for index in range(64)]
    await mesh.open(*calls)
    async with asyncio.TaskGroup() as group:
        answers = [group.create_task(mesh.extend(wider(call.ref))) for call in calls]
    assert [answer.result() for answer in answers] == [[EXTENDED]] * 64
    ids = [UUID(bytes=call.ref.reservation_id) for call in calls]
    assert await mesh.admin.fetchval("SELECT count(DISTINCT xmin::text) FROM metering.calls WHERE reservation_id = ANY ($1)", ids) <= 40


async def test_extension_that_breaks_its_contract_is_refused(mesh: Mesh) -> None:
    """Negative and absurd bounds, empty and oversize batches are INVALID_ARGUMENT; only inference may extend."""
    call = await mesh.opened(mesh.new_tenant())
    batches = ([wider(call.ref, -1)], [wider(call.ref, 10_000_001)], [wider(call.ref, 1, 10**15 + 1)], [], [wider(call.ref)] * 1_001)
    for batch in batches:
        with pytest.raises(MeshError) as refused:
            await mesh.extend(*batch)
        assert refused.value.code is grpc.StatusCode.INVALID_ARGUMENT
    request = pb.ExtendCallsRequest(calls=[wider(call.ref)])
    with pytest.raises(MeshError) as refused:
        await mesh.ratelimit.channel.unary(mesh.ratelimit.ledger.ExtendCalls, request, timeout_seconds=5)
    assert refused.value.reason_name == "CALLER_NOT_ALLOWED"
    assert await bounds(mesh, call.ref) == (1_000, 5_000_000)


async def test_what_changes_while_a_call_runs_and_ends_is_in_no_index(mesh: Mesh) -> None:
    """Extending and settling rewrite one row and no index: only what is written once, and what ends unresolved, may be indexed."""
    indexed = await mesh.admin.fetch(
        "SELECT DISTINCT a.attname FROM pg_index x JOIN pg_attribute a ON a.attrelid = x.indexrelid "
        "WHERE x.indrelid = 'metering.calls'::regclass"
    )
    changing = {row["attname"] for row in indexed} & {"state", "bound_tokens", "bound_nano_usd", "cost_nano_usd", "end_time", "entry_id"}
    assert changing == set()
    conditions = (
        "SELECT coalesce(string_agg(pg_get_expr(indpred, indrelid), ' '), '') FROM pg_index WHERE indrelid = 'metering.calls'::regclass"
    )
    assert "bound" not in await mesh.admin.fetchval(conditions)
