"""Uses of the product's units: recorded once for ever, told to the limits, and met by whoever fences, voids or opens their ids."""

import asyncio
import random
from datetime import UTC, datetime, timedelta
from uuid import UUID

import asyncpg
import grpc
import pytest

from mesh.metering.v1 import ledger_service_pb2 as pb
from mesh.metering.v1 import usage_service_pb2 as usage_pb
from mesh.ratelimit.v1 import rate_limit_service_pb2 as limits_pb
from services.kernel.errors import MeshError
from services.kernel.ids import TenantId
from tests.metering.mesh import Mesh, Tenant, bill, not_billed

RECORDED, STALE, ENDED = pb.RECORD_UNITS_OUTCOME_RECORDED, pb.RECORD_UNITS_OUTCOME_STALE_EPOCH, pb.RECORD_UNITS_OUTCOME_ENDED
CONFLICT, NOT_PROVEN = pb.RECORD_UNITS_OUTCOME_CONFLICT, pb.RECORD_UNITS_OUTCOME_TENANT_NOT_PROVEN


async def entries(mesh: Mesh, tenant: Tenant) -> list[tuple[str, int, int]]:
    """Unit, quantity and epoch of everything that was recorded."""
    rows = await mesh.admin.fetch(
        "SELECT product_unit, quantity, epoch FROM metering.unit_entries WHERE tenant_id = $1 ORDER BY record_time, reservation_id",
        tenant.id,
    )
    return [tuple(row) for row in rows]


async def test_use_is_recorded_with_its_entry_and_told_to_the_limits(mesh: Mesh) -> None:
    """One row in the books, without a name in it, and one SETTLED without amounts: the hold knows how much."""
    tenant, time = mesh.new_tenant(), datetime(2026, 3, 1, 12, tzinfo=UTC)
    use = mesh.use(tenant, quantity=3, reserve_time=time)
    assert await mesh.record(use) == [RECORDED]
    entry = await mesh.admin.fetchrow("SELECT * FROM metering.unit_entries WHERE tenant_id = $1", tenant.id)
    assert (entry["product_unit"], entry["quantity"], entry["reserve_time"], entry["epoch"]) == ("ai_interviews", 3, time, 0)
    assert entry["reservation_id"].bytes == use.ref.reservation_id
    assert "user-1" not in str(tuple(entry))
    (commit,) = await mesh.limits.wait_for(tenant.id, 1)
    assert (commit.kind, commit.reservation.reservation_id, commit.epoch) == (limits_pb.COMMIT_KIND_SETTLED, use.ref.reservation_id, 0)
    assert (commit.actual.tokens, commit.actual.cost_nano_usd) == (0, 0)


async def test_use_is_recorded_once_for_ever(mesh: Mesh) -> None:
    """A repeat, at another time and in a later epoch, is answered as the first, counts nothing and tells nobody again."""
    tenant = mesh.new_tenant()
    use = mesh.use(tenant)
    assert await mesh.record(use) == [RECORDED]
    await mesh.limits.wait_for(tenant.id, 1)
    use.reserve_time.FromDatetime(datetime.now(UTC) + timedelta(days=1))
    assert await mesh.record(use, use) == [RECORDED, RECORDED]
    await mesh.begin_epoch(tenant)
    assert await mesh.record(use) == [RECORDED]
    use.epoch = 1
    assert await mesh.record(use) == [RECORDED]
    assert await entries(mesh, tenant) == [("ai_interviews", 1, 0)]
    assert len(mesh.limits.of(tenant.id)) == 1
    assert await mesh.outbox_kinds(tenant) in ([], [1])


@pytest.mark.parametrize("change", [{"quantity": 2}, {"product_unit": "audio_seconds"}, {"user": "user-2"}, {"feature": "chat"}])
async def test_other_content_under_a_used_id_is_a_conflict(mesh: Mesh, change: dict[str, object]) -> None:
    """Another unit, quantity, user or feature changes nothing, in the same batch and in a later one."""
    tenant = mesh.new_tenant()
    use = mesh.use(tenant)
    other = mesh.use(tenant, UUID(bytes=use.ref.reservation_id), **change)
    assert await mesh.record(use, other) == [RECORDED, CONFLICT]
    assert await mesh.record(other, use) == [CONFLICT, RECORDED]
    assert await entries(mesh, tenant) == [("ai_interviews", 1, 0)]


async def test_use_reserved_before_a_rebuild_is_refused(mesh: Mesh) -> None:
    """A hold of an older epoch is gone: nothing is recorded; the same id with a hold of the new epoch is."""
    tenant = mesh.new_tenant()
    use = mesh.use(tenant)
    await mesh.begin_epoch(tenant)
    assert await mesh.record(use) == [STALE]
    assert await entries(mesh, tenant) == []
    use.epoch = 1
    assert await mesh.record(use) == [RECORDED]
    assert await entries(mesh, tenant) == [("ai_interviews", 1, 1)]


async def test_fence_on_a_use_decides_it_for_ever(mesh: Mesh) -> None:
    """Fenced first, it ends and never is; recorded first, its fence says settled, and settled before once a new epoch counted it."""
    tenant = mesh.new_tenant()
    fenced, recorded = mesh.use(tenant), mesh.use(tenant)
    assert await mesh.fence(pb.FenceCall(ref=fenced.ref)) == [pb.FENCE_OUTCOME_VOID]
    assert await mesh.record(fenced, recorded) == [ENDED, RECORDED]
    assert await mesh.fence(pb.FenceCall(ref=recorded.ref)) == [pb.FENCE_OUTCOME_SETTLED]
    await mesh.begin_epoch(tenant)
    later = [pb.FenceCall(ref=use.ref, epoch=1) for use in (fenced, recorded)]
    assert await mesh.fence(*later) == [pb.FENCE_OUTCOME_VOID, pb.FENCE_OUTCOME_SETTLED_BEFORE]
    assert await mesh.record(fenced) == [ENDED]
    assert await entries(mesh, tenant) == [("ai_interviews", 1, 0)]


async def test_fence_void_and_record_of_one_id_agree(mesh: Mesh) -> None:
    """However they race, the use is recorded and every fence says settled, or it is not and every fence says void."""
    randomness, stories = random.Random(13), set[tuple[int, int, int]]()
    for _ in range(60):
        tenant = mesh.new_tenant()
        use = mesh.use(tenant)

        async def fence(pause: float, use=use) -> int:
            await asyncio.sleep(pause)
            return (await mesh.fence(pb.FenceCall(ref=use.ref)))[0]

        async def record(pause: float, use=use) -> int:
            await asyncio.sleep(pause)
            return (await mesh.record(use))[0]

        async with asyncio.TaskGroup() as group:
            fencing = group.create_task(fence(randomness.uniform(0, 0.004)))
            recording = group.create_task(record(randomness.uniform(0, 0.004)))
        stories.add((recording.result(), fencing.result(), len(await entries(mesh, tenant))))
    assert stories == {(RECORDED, pb.FENCE_OUTCOME_SETTLED, 1), (ENDED, pb.FENCE_OUTCOME_VOID, 0)}


async def test_no_use_slips_between_an_epoch_and_its_snapshot(mesh: Mesh) -> None:
    """A use racing with a new epoch is in its snapshot, or is refused as stale."""
    randomness, outcomes = random.Random(14), set[int]()
    for round_number in range(200):
        # Both sides of the race must have been seen, however busy the machine is: the pauses grow until they are.
        if round_number >= 30 and outcomes == {RECORDED, STALE}:
            break
        longest_seconds = 0.004 + 0.0005 * round_number
        tenant = mesh.new_tenant()
        uses, answers = [mesh.use(tenant) for _ in range(5)], dict[bytes, int]()

        async def record(use: pb.RecordUnits, pause: float, answers=answers) -> None:
            await asyncio.sleep(pause)
            (answers[use.ref.reservation_id],) = await mesh.record(use)

        async def begin(pause: float, tenant=tenant) -> pb.BeginEpochResponse:
            await asyncio.sleep(pause)
            return await mesh.begin_epoch(tenant)

        async with asyncio.TaskGroup() as group:
            beginning = group.create_task(begin(randomness.uniform(0, longest_seconds)))
            for use in uses:
                group.create_task(record(use, randomness.uniform(0, longest_seconds)))
        told = {found.reservation_id for found in beginning.result().recent}
        assert told == {key for key, answer in answers.items() if answer == RECORDED}
        outcomes.update(answers.values())
    assert outcomes == {RECORDED, STALE}


async def test_id_of_a_use_is_no_call(mesh: Mesh) -> None:
    """Opened, settled, voided or renewed as if it were a call, it stays what it is; a call's id takes no use."""
    tenant = mesh.new_tenant()
    use, call = mesh.use(tenant), await mesh.opened(tenant)
    await mesh.record(use)
    consumption = UUID(bytes=use.ref.reservation_id)
    (opened,) = await mesh.open(mesh.opening(tenant, consumption))
    assert (opened.outcome, opened.state) == (pb.OPEN_OUTCOME_ENDED, pb.CALL_STATE_SETTLED)
    (settled,) = await mesh.settle(bill(use.ref))
    assert settled.outcome == pb.SETTLE_OUTCOME_CONFLICT
    assert await mesh.void(not_billed(use.ref)) == [pb.CALL_STATE_SETTLED]
    assert await mesh.renew([use.ref]) == [use.ref]
    assert await mesh.record(mesh.use(tenant, UUID(bytes=call.ref.reservation_id))) == [CONFLICT]
    assert await entries(mesh, tenant) == [("ai_interviews", 1, 0)]
    assert await mesh.state(call.ref) == pb.CALL_STATE_OPEN


async def test_only_what_its_own_token_proves_is_recorded(mesh: Mesh) -> None:
    """An item whose token is another tenant's, forged or absent leaves no trace; its neighbours are recorded."""
    tenant, other = mesh.new_tenant(), mesh.new_tenant()
    good, stolen = mesh.use(tenant), mesh.use(other, context_token=tenant.context.token)
    absent, damaged = mesh.use(tenant, context_token=""), mesh.use(tenant, context_token=tenant.context.token[:-4] + "AAAA")
    assert await mesh.record(stolen, good, absent, damaged) == [NOT_PROVEN, RECORDED, NOT_PROVEN, NOT_PROVEN]
    assert (len(await entries(mesh, tenant)), await entries(mesh, other)) == (1, [])
    assert await mesh.admin.fetchval("SELECT count(*) FROM metering.calls WHERE tenant_id = ANY ($1)", [tenant.id, other.id]) == 1


async def test_usage_reports_and_lists_of_calls_tell_calls_alone(mesh: Mesh) -> None:
    """Units have no model, no price and no tokens: the report and the list are the same with and without them."""
    tenant = mesh.new_tenant()
    await mesh.settle(bill((await mesh.opened(tenant)).ref))
    metadata = [("authorization", f"Bearer key-{tenant.id}")]

    request = usage_pb.GetUsageReportRequest()
    request.start_time.FromDatetime(datetime.now(UTC) - timedelta(hours=1))
    request.end_time.FromDatetime(datetime.now(UTC) + timedelta(hours=1))

    async def reports() -> tuple[usage_pb.GetUsageReportResponse, usage_pb.ListCallsResponse]:
        report = await mesh.outside.usage.GetUsageReport(request, metadata=metadata)
        return report, await mesh.outside.usage.ListCalls(usage_pb.ListCallsRequest(), metadata=metadata)

    before = await reports()
    assert before[0].settled_count == 1
    await mesh.record(mesh.use(tenant), mesh.use(tenant))
    assert await reports() == before


async def test_a_thousand_uses_of_a_hundred_tenants_are_one_answer(mesh: Mesh) -> None:
    """The largest batch is recorded in few transactions, each item answered in its place."""
    tenants = [mesh.new_tenant() for _ in range(100)]
    uses = [mesh.use(tenants[index % 100], quantity=index + 1) for index in range(1_000)]
    assert await mesh.record(*uses) == [RECORDED] * 1_000
    wrong = [mesh.use(tenants[index % 100], UUID(bytes=use.ref.reservation_id), quantity=7) for index, use in enumerate(uses)]
    assert await mesh.record(*wrong) == [RECORDED if index == 6 else CONFLICT for index in range(1_000)]
    assert sum(quantity for _, quantity, _ in await entries(mesh, tenants[3])) == sum(range(4, 1_001, 100))


@pytest.mark.parametrize(
    "damage",
    [
        {"quantity": 0},
        {"quantity": 1_000_000_001},
        {"product_unit": ""},
        {"product_unit": "Interviews"},
        {"epoch": -1},
        {"user": "u" * 201},
        {"feature": "nul\x00"},
    ],
)
async def test_use_that_breaks_its_contract_is_refused(mesh: Mesh, damage: dict[str, object]) -> None:
    """Nothing, too much, units without a good name and bad texts never reach the database."""
    with pytest.raises(MeshError) as refused:
        await mesh.record(mesh.use(mesh.new_tenant(), **damage))
    assert refused.value.code is grpc.StatusCode.INVALID_ARGUMENT


async def test_only_the_limits_may_record_units(mesh: Mesh) -> None:
    """Inference consumes through the limits, never around them."""
    request = pb.RecordUnitsRequest(items=[mesh.use(mesh.new_tenant())])
    with pytest.raises(MeshError) as refused:
        await mesh.inference.channel.unary(mesh.inference.ledger.RecordUnits, request, timeout_seconds=5)
    assert refused.value.reason_name == "CALLER_NOT_ALLOWED"


@pytest.mark.parametrize(
    "change",
    [
        "state = 1, end_time = NULL",
        "state = 3, live = false",
        "quantity = NULL",
        "quantity = -1",
        "product_unit = NULL",
        "product_unit = 'No'",
        "attempt = 1",
        "model = 'm'",
        "input_tokens = 5",
        "cost_nano_usd = 5",
        "reserve_time = NULL",
        "open_time = now()",
    ],
)
async def test_no_statement_can_bring_a_use_into_an_impossible_shape(mesh: Mesh, change: str) -> None:
    """Constraints hold whatever code runs: a use is settled, whole, and no call."""
    use = mesh.use(mesh.new_tenant())
    await mesh.record(use)
    with pytest.raises(asyncpg.CheckViolationError):
        await mesh.admin.execute(
            f"UPDATE metering.calls SET {change} WHERE tenant_id = $1 AND reservation_id = $2",
            UUID(bytes=use.ref.tenant_id),
            UUID(bytes=use.ref.reservation_id),
        )


@pytest.mark.parametrize("change", ["product_unit = 'ai_interviews'", "quantity = 1", "product_unit = 'ai_interviews', quantity = 1"])
async def test_no_statement_can_make_a_use_of_a_call(mesh: Mesh, change: str) -> None:
    """A call has no unit and no quantity, open or settled."""
    tenant = mesh.new_tenant()
    running, settled = await mesh.opened(tenant), await mesh.opened(tenant)
    await mesh.settle(bill(settled.ref))
    for call in (running, settled):
        with pytest.raises(asyncpg.CheckViolationError):
            await mesh.admin.execute(
                f"UPDATE metering.calls SET {change} WHERE tenant_id = $1 AND reservation_id = $2",
                UUID(bytes=call.ref.tenant_id),
                UUID(bytes=call.ref.reservation_id),
            )


async def test_key_refuses_a_second_count_of_one_use(mesh: Mesh) -> None:
    """An entry of units exists once for each id, whoever inserts."""
    tenant = mesh.new_tenant()
    await mesh.record(mesh.use(tenant))
    with pytest.raises(asyncpg.UniqueViolationError):
        async with mesh.app.database.transaction(TenantId(tenant.id)) as connection:
            await connection.execute(
                "INSERT INTO metering.unit_entries SELECT * FROM metering.unit_entries WHERE tenant_id = $1", tenant.id
            )
