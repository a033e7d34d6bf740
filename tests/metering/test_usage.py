"""What a tenant reads of its own calls: exact reports, pages, single calls, and nothing of anybody else."""

import base64
from datetime import UTC, datetime, timedelta
from uuid import UUID

import grpc
import pytest

from mesh.metering.v1 import ledger_service_pb2 as ledger_pb
from mesh.metering.v1 import usage_service_pb2 as pb
from services.kernel.errors import MeshError
from services.kernel.ids import new_uuid7
from services.kernel.rpc import metadata as keys
from services.kernel.rpc.wire_status import decode_rpc_error
from tests.metering.mesh import Mesh, Tenant, bill, not_billed, ref, unknown


async def ask(mesh: Mesh, tenant: Tenant, method: str, request: object):
    """Calls UsageService as the tenant's own application does: from outside, with its key."""
    call = getattr(mesh.outside.usage, method)
    try:
        return await call(request, metadata=((keys.AUTHORIZATION, f"Bearer key-{tenant.id}"),), timeout=10)
    except grpc.aio.AioRpcError as error:
        raise decode_rpc_error(error, "metering") from None


async def test_report_sums_exactly_by_model_feature_and_price_version(mesh: Mesh) -> None:
    """Lines by cost, highest first; the total is the sum of the lines and of the entries, to the nano-dollar."""
    tenant = mesh.new_tenant()
    shapes = [
        ("claude-haiku-4-5", "chat", 7),
        ("claude-haiku-4-5", "chat", 13),
        ("claude-opus-4-6", "chat", 11),
        ("claude-opus-4-6", "", 1),
    ]
    for model, feature, tokens in shapes:
        call = await mesh.opened(tenant, model=model, feature=feature)
        await mesh.settle(bill(call.ref, input_tokens=tokens, output_tokens=3, cache_read_tokens=1))
    report = await ask(mesh, tenant, "GetUsageReport", pb.GetUsageReportRequest())
    assert [(line.model, line.feature, line.call_count, line.usage.input_tokens, line.cost.nano_usd) for line in report.lines] == [
        ("claude-opus-4-6", "chat", 1, 11, 11 * 5_000 + 3 * 25_000 + 500),
        ("claude-opus-4-6", "", 1, 1, 1 * 5_000 + 3 * 25_000 + 500),
        ("claude-haiku-4-5", "chat", 2, 20, 20 * 1_000 + 6 * 5_000 + 200),
    ]
    entries = await mesh.admin.fetchval("SELECT sum(cost_nano_usd)::bigint FROM metering.entries WHERE tenant_id = $1", tenant.id)
    assert report.total_cost.nano_usd == sum(line.cost.nano_usd for line in report.lines) == entries
    assert report.settled_count == 4


async def test_report_counts_open_void_and_unresolved_calls(mesh: Mesh) -> None:
    """Calls without a bill are counted by state, tombstones not at all; what may still come is the bound of the open and unresolved."""
    tenant = mesh.new_tenant()
    voided, pinned, _running = [await mesh.opened(tenant) for _ in range(3)]
    await mesh.void(not_billed(voided.ref), unknown(pinned.ref, ledger_pb.TokenUsage(input_tokens=5)), not_billed(ref(tenant)))
    report = await ask(mesh, tenant, "GetUsageReport", pb.GetUsageReportRequest())
    assert (report.settled_count, report.void_count, report.open_count, report.unresolved_count) == (0, 1, 1, 1)
    assert (report.outstanding_bound.nano_usd, report.total_cost.nano_usd, len(report.lines)) == (10_000_000, 0, 0)


async def test_call_belongs_to_the_period_it_was_opened_in(mesh: Mesh) -> None:
    """The start is inclusive and the end exclusive; when a call was settled does not matter."""
    tenant = mesh.new_tenant()
    call = await mesh.opened(tenant)
    await mesh.settle(bill(call.ref))
    row = await mesh.row(call.ref)
    assert row is not None
    opened = row["open_time"]
    for start, end, count in (
        (opened, opened + timedelta(microseconds=1), 1),
        (opened - timedelta(hours=1), opened, 0),
        (opened + timedelta(microseconds=1), opened + timedelta(hours=1), 0),
    ):
        request = pb.GetUsageReportRequest()
        request.start_time.FromDatetime(start)
        request.end_time.FromDatetime(end)
        assert (await ask(mesh, tenant, "GetUsageReport", request)).settled_count == count


@pytest.mark.parametrize(("days", "field"), [(-1, "end_time"), (401, "start_time")])
async def test_impossible_period_is_refused(mesh: Mesh, days: int, field: str) -> None:
    """A period that ends before it starts, or is longer than 400 days, is INVALID_ARGUMENT."""
    request = pb.GetUsageReportRequest()
    request.start_time.FromDatetime(datetime(2026, 1, 1, tzinfo=UTC))
    request.end_time.FromDatetime(datetime(2026, 1, 1, tzinfo=UTC) + timedelta(days=days))
    with pytest.raises(MeshError) as refused:
        await ask(mesh, mesh.new_tenant(), "GetUsageReport", request)
    assert (refused.value.code, refused.value.metadata["field"]) == (grpc.StatusCode.INVALID_ARGUMENT, field)


@pytest.mark.parametrize(("field", "year"), [("start_time", 1), ("end_time", 9999)])
async def test_a_report_of_the_ends_of_the_calendar_is_refused(mesh: Mesh, field: str, year: int) -> None:
    """Its first and last moment are infinities to the database: INVALID_ARGUMENT, naming the field."""
    request = pb.GetUsageReportRequest()
    edge = datetime(1, 1, 1, tzinfo=UTC) if year == 1 else datetime(9999, 12, 31, 23, 59, 59, 999_999, tzinfo=UTC)
    request.start_time.FromDatetime(edge if year == 1 else datetime(2026, 1, 1, tzinfo=UTC))
    request.end_time.FromDatetime(datetime(2026, 1, 1, tzinfo=UTC) if year == 1 else edge)
    with pytest.raises(MeshError) as refused:
        await ask(mesh, mesh.new_tenant(), "GetUsageReport", request)
    assert (refused.value.code, refused.value.metadata["field"]) == (grpc.StatusCode.INVALID_ARGUMENT, field)


async def test_default_period_is_the_current_month(mesh: Mesh) -> None:
    """Without a period the report starts with the UTC month and ends now."""
    report = await ask(mesh, mesh.new_tenant(), "GetUsageReport", pb.GetUsageReportRequest())
    now = datetime.now(UTC)
    assert report.start_time.ToDatetime(tzinfo=UTC) == now.replace(day=1, hour=0, minute=0, second=0, microsecond=0)
    assert abs(report.end_time.ToDatetime(tzinfo=UTC) - now) < timedelta(seconds=10)


async def test_pages_hold_every_call_once_newest_first(mesh: Mesh) -> None:
    """Walking the pages gives each call once, newest first, without tombstones, and ends with an empty token."""
    tenant = mesh.new_tenant()
    calls = [mesh.opening(tenant) for _ in range(25)]
    await mesh.open(*calls)
    await mesh.void(not_billed(ref(tenant)))
    seen: list[pb.CallRecord] = []
    token = ""
    while True:
        page = await ask(mesh, tenant, "ListCalls", pb.ListCallsRequest(page_size=10, page_token=token))
        seen.extend(page.calls)
        token = page.next_page_token
        if not token:
            break
    assert {call.reservation_id for call in seen} == {str(UUID(bytes=call.ref.reservation_id)) for call in calls}
    assert len(seen) == 25
    order = [(call.open_time.ToNanoseconds(), call.reservation_id) for call in seen]
    assert order == sorted(order, reverse=True)


async def test_pages_filter_by_state(mesh: Mesh) -> None:
    """Only calls in the states asked for are listed."""
    tenant = mesh.new_tenant()
    settled, voided, _ = [await mesh.opened(tenant) for _ in range(3)]
    await mesh.settle(bill(settled.ref))
    await mesh.void(not_billed(voided.ref))
    wanted = [ledger_pb.CALL_STATE_SETTLED, ledger_pb.CALL_STATE_VOID]
    page = await ask(mesh, tenant, "ListCalls", pb.ListCallsRequest(states=wanted))
    assert [call.state for call in page.calls] == [ledger_pb.CALL_STATE_VOID, ledger_pb.CALL_STATE_SETTLED]


async def test_page_tokens_of_other_making_are_refused(mesh: Mesh) -> None:
    """A token of another tenant or filter, an altered one and noise are INVALID_ARGUMENT."""
    one, other = mesh.new_tenant(), mesh.new_tenant()
    await mesh.open(*[mesh.opening(one) for _ in range(3)])
    token = (await ask(mesh, one, "ListCalls", pb.ListCallsRequest(page_size=1))).next_page_token
    raw = bytearray(base64.urlsafe_b64decode(token + "=" * (-len(token) % 4)))
    raw[3] ^= 1
    altered = base64.urlsafe_b64encode(bytes(raw)).rstrip(b"=").decode()
    for tenant, request in (
        (other, pb.ListCallsRequest(page_token=token)),
        (one, pb.ListCallsRequest(page_token=token, states=[ledger_pb.CALL_STATE_OPEN])),
        (one, pb.ListCallsRequest(page_token=altered)),
        (one, pb.ListCallsRequest(page_token="noise")),
        (one, pb.ListCallsRequest(page_token="é")),
        (one, pb.ListCallsRequest(states=[ledger_pb.CALL_STATE_UNSPECIFIED])),
        (one, pb.ListCallsRequest(page_size=1_001)),
    ):
        with pytest.raises(MeshError) as refused:
            await ask(mesh, tenant, "ListCalls", request)
        assert refused.value.code is grpc.StatusCode.INVALID_ARGUMENT


async def test_call_is_shown_with_its_attempts(mesh: Mesh) -> None:
    """Attempts come first first, each with its state, usage, cost, bound and entry."""
    tenant = mesh.new_tenant()
    first = await mesh.opened(tenant)
    second = await mesh.opened(tenant, call_id=first.call_id, attempt=2)
    await mesh.void(not_billed(first.ref, "provider_529"))
    (settled,) = await mesh.settle(bill(second.ref))
    found = await ask(mesh, tenant, "GetCall", pb.GetCallRequest(call_id=str(UUID(bytes=first.call_id))))
    one, two = found.attempts
    assert (one.attempt, one.state, one.end_cause, one.HasField("cost"), one.HasField("usage")) == (
        1,
        ledger_pb.CALL_STATE_VOID,
        "provider_529",
        False,
        False,
    )
    assert (two.attempt, two.cost.nano_usd, two.usage.output_tokens, two.bound.nano_usd) == (2, 350_000, 50, 5_000_000)
    assert two.entry_id == str(UUID(bytes=settled.entry_id))
    assert (two.end_cause, two.first_token_ms, two.total_ms, two.user, two.prompt_version) == ("end_turn", 5, 9, "user-1", "default@1")
    assert two.HasField("end_time")


async def test_foreign_and_absent_calls_look_alike(mesh: Mesh) -> None:
    """Another tenant's call id is answered exactly as one that never was."""
    one, other = mesh.new_tenant(), mesh.new_tenant()
    call = await mesh.opened(one)
    answers = []
    for call_id in (str(UUID(bytes=call.call_id)), str(new_uuid7())):
        with pytest.raises(MeshError) as refused:
            await ask(mesh, other, "GetCall", pb.GetCallRequest(call_id=call_id))
        answers.append((refused.value.code, refused.value.message, refused.value.metadata))
    assert answers[0] == answers[1]
    assert answers[0][0] is grpc.StatusCode.NOT_FOUND
    assert len((await ask(mesh, other, "ListCalls", pb.ListCallsRequest())).calls) == 0
