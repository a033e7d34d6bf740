"""Rating calls anew through the real service: exact, once, seen before it is done, and felt wherever cost is told."""

import asyncio
import random
from datetime import UTC, datetime, timedelta

import pytest

from mesh.metering.v1 import invoice_service_pb2 as invoice_pb
from mesh.metering.v1 import ledger_service_pb2 as ledger_pb
from mesh.ratelimit.v1 import rate_limit_service_pb2 as limits_pb
from services.kernel.errors import MeshError
from services.kernel.ids import new_uuid7
from services.metering import rerating as rerating_rules
from tests.metering.billing import USD, ask, close, ended, lines_of, recomputed, subscribe
from tests.metering.mesh import MODEL, VERSION, Mesh, Tenant, bill, period
from tests.metering.peers import OPERATOR
from tests.metering.rerating import (
    OPUS,
    OTHER,
    RIGHT,
    adjustments,
    agrees,
    as_operator,
    load_versions,
    order,
    previewed,
    rerated,
    seen,
    total,
    used,
)
from tests.metering.test_settling import reconcile, reconciled
from tests.metering.usage import ALL_NAMES, asking, balance, books, every_row, told
from tests.support.waiting import eventually

MILLION = 1_000_000
HOUR = timedelta(hours=1)
UNDER_WAY = "INSERT INTO metering.reratings VALUES ($1, $2, 1, now() - interval '1 h', now(), '{x}', 'y', now(), sha256(''), now())"


@pytest.fixture(autouse=True, scope="module")
async def versions(mesh: Mesh) -> None:
    """The price versions of these tests."""
    await load_versions(mesh)


def some_usages(count: int, seed: int = 1) -> list[dict[str, int]]:
    """Usages of every class, some of them nothing."""
    chance = random.Random(seed)
    names = ("input_tokens", "output_tokens", "cache_read_tokens", "cache_write_5m_tokens", "cache_write_1h_tokens")
    return [{name: chance.choice((0, chance.randint(1, 90_000))) for name in names} for _ in range(count)]


async def epoch_of(mesh: Mesh, tenant: Tenant) -> int:
    """The tenant's epoch."""
    return await mesh.admin.fetchval("SELECT coalesce(max(epoch), 0) FROM metering.tenant_epochs WHERE tenant_id = $1", tenant.id)


async def test_every_sum_is_as_if_the_right_price_had_been_there_from_the_start(mesh: Mesh) -> None:
    """Entries, calls, balance, sums of use and what the limits count agree with a tenant that was rated right at once."""
    tenant, twin = mesh.new_tenant(), mesh.new_tenant()
    usages = some_usages(60)
    await used(mesh, tenant, usages)
    await used(mesh, twin, usages, price_version=RIGHT)
    wanted = order()
    shown = await previewed(mesh, tenant, wanted)
    before = await total(mesh, tenant)
    assert await adjustments(mesh, tenant) == []
    answer = await rerated(mesh, tenant, wanted)
    assert await total(mesh, tenant) == await total(mesh, twin) == before + answer.difference.nano_usd != before
    assert (answer.call_count, answer.difference, list(answer.models)) == (60, shown.difference, list(shown.models))
    assert [(item.provider, item.model, item.call_count) for item in answer.models] == [("anthropic", MODEL, 60)]
    assert await agrees(mesh, tenant)
    assert (await balance(mesh, tenant)).cost == (await balance(mesh, twin)).cost
    for one in (tenant, twin):
        assert told(await every_row(mesh, one, asking(*ALL_NAMES))) == await books(mesh, one)
    now = datetime.now(UTC)
    counted = [period(3, scope, now - HOUR, now + HOUR) for scope in (1, 2)]
    snapshots = [await mesh.begin_epoch(one, periods=counted) for one in (tenant, twin)]
    assert [(item.period, item.user, item.amount) for item in snapshots[0].sums] == [
        (item.period, item.user, item.amount) for item in snapshots[1].sums
    ]
    assert snapshots[0].sums[0].amount == await total(mesh, twin)


async def test_a_second_time_nothing_changes(mesh: Mesh) -> None:
    """By the same id the same answer; by a new one nothing is left to do; by the id with other content a conflict with both digests."""
    tenant = mesh.new_tenant()
    await used(mesh, tenant, some_usages(5))
    ready = await seen(mesh, tenant, order())
    first = await as_operator(mesh, tenant, "RerateUsage", ready)
    written = await adjustments(mesh, tenant)
    assert (first.is_done, len(written)) == (True, 5)
    # One that changes no amount is written too: it says what the call is rated by from then on.
    assert [(number, version) for number, version, _ in written] == [(3, RIGHT)] * 5
    assert await as_operator(mesh, tenant, "RerateUsage", ready) == first
    assert (await rerated(mesh, tenant, order())).call_count == 0
    ready.right_version = OTHER
    with pytest.raises(MeshError) as refused:
        await as_operator(mesh, tenant, "RerateUsage", ready)
    assert refused.value.reason_name == "CONTENT_CONFLICT"
    assert refused.value.metadata["stored_digest"] != refused.value.metadata["request_digest"]
    assert await adjustments(mesh, tenant) == written


async def test_corrected_again_a_call_is_rated_by_the_last_version(mesh: Mesh) -> None:
    """From the first version nothing is left; from the second to the third each call gets one more entry, and back again another."""
    tenant = mesh.new_tenant()
    await used(mesh, tenant, [{"input_tokens": MILLION, "output_tokens": 0}])
    for versions, right in (((VERSION,), RIGHT), ((VERSION,), OTHER), ((RIGHT, "2026-01"), OTHER), ((OTHER,), VERSION)):
        await rerated(mesh, tenant, order(versions, right))
    assert await adjustments(mesh, tenant) == [
        (3, RIGHT, 700_000_100 - USD),
        (4, OTHER, 2 * USD - 700_000_100),
        (5, VERSION, -USD),
    ]
    assert await total(mesh, tenant) == USD
    assert await agrees(mesh, tenant)


async def test_only_what_was_ordered_is_rated_anew(mesh: Mesh) -> None:
    """Not before the period nor from its end on, not by other versions, not another tenant's, not what was recorded after the look."""
    tenant, other = mesh.new_tenant(), mesh.new_tenant()
    start, end = datetime.now(UTC) - 3 * HOUR, datetime.now(UTC) - 2 * HOUR
    one = [{"input_tokens": MILLION}]
    (inside,) = await used(mesh, tenant, one, reserve_time=start)
    for outside in (start - timedelta(microseconds=1), end):
        await used(mesh, tenant, one, reserve_time=outside)
    await used(mesh, tenant, one, reserve_time=start, price_version=OTHER)
    await used(mesh, other, one, reserve_time=start)
    open_call = await mesh.opened(tenant, reserve_time=start)
    wanted = order(start=start, end=end)
    shown = await previewed(mesh, tenant, wanted)
    assert (shown.is_done, shown.call_count, shown.outstanding_count) == (False, 1, 1)
    ready = await seen(mesh, tenant, wanted)
    await mesh.settle(bill(open_call.ref))
    answer = await as_operator(mesh, tenant, "RerateUsage", ready)
    rows = await mesh.admin.fetch("SELECT * FROM metering.entries WHERE tenant_id = ANY($1) AND kind = 3", [tenant.id, other.id])
    assert (answer.is_done, answer.call_count, [row["reservation_id"] for row in rows]) == (True, 1, [inside])
    # The call that settled meanwhile is found by the next one.
    assert (await rerated(mesh, tenant, order(start=start, end=end))).call_count == 1


@pytest.mark.parametrize(
    ("changes", "reason", "metadata"),
    [
        ({"right": "never-loaded"}, "NOT_FOUND", {"resource": "price_version"}),
        ({"versions": ("never-loaded",)}, "NOT_FOUND", {"resource": "price_version"}),
        ({"right": VERSION}, "INVALID_REQUEST", {"field": "right_version"}),
        ({"end": datetime(2020, 1, 1, tzinfo=UTC)}, "INVALID_REQUEST", {"field": "end_time"}),
        ({"start": datetime(1969, 1, 1, tzinfo=UTC)}, "INVALID_REQUEST", {"field": "start_time"}),
        ({"right": OTHER}, "PRICE_MISSING", {"version": OTHER, "provider": "anthropic", "model": OPUS}),
    ],
)
async def test_doubtful_order_is_refused_and_nothing_is_written(
    mesh: Mesh, changes: dict[str, object], reason: str, metadata: dict[str, str]
) -> None:
    """Seen before and done alike: unknown versions, a period that is none, a model the right version has no price for."""
    tenant = mesh.new_tenant()
    await used(mesh, tenant, [{"input_tokens": 5}])
    await used(mesh, tenant, [{"input_tokens": 5}], model=OPUS)
    ready = order(**changes)  # type: ignore[arg-type] # its own arguments
    ready.rerating_id = str(new_uuid7())
    ready.cutoff_time.GetCurrentTime()
    for validate_only in (True, False):
        ready.validate_only = validate_only
        with pytest.raises(MeshError) as refused:
            await as_operator(mesh, tenant, "RerateUsage", ready)
        assert (refused.value.reason_name, dict(refused.value.metadata)) == (reason, metadata)
    assert await adjustments(mesh, tenant) == []
    assert await mesh.admin.fetchval("SELECT count(*) FROM metering.reratings WHERE tenant_id = $1", tenant.id) == 0


async def test_missing_price_that_no_call_needs_stops_nothing(mesh: Mesh) -> None:
    """A model that the right version lacks and the period did not use is no gap."""
    tenant = mesh.new_tenant()
    await used(mesh, tenant, [{"input_tokens": 5}])
    assert (await rerated(mesh, tenant, order(right=OTHER))).call_count == 1


async def test_nothing_is_done_unseen_or_before_its_time_or_beside_another(mesh: Mesh) -> None:
    """Without an id, a tenant, a look's cutoff, or with one to come, it is refused; so is a second one while the first is under way."""
    tenant = mesh.new_tenant()
    await used(mesh, tenant, [{"input_tokens": 5}])
    ready = await seen(mesh, tenant, order())
    later = datetime.now(UTC) + HOUR
    for field, change in (("cutoff_time", None), ("rerating_id", None), ("cutoff_time", later)):
        asked = type(ready)()
        asked.CopyFrom(ready)
        asked.ClearField(field)
        if change is not None:
            asked.cutoff_time.FromDatetime(change)
        with pytest.raises(MeshError) as refused:
            await as_operator(mesh, tenant, "RerateUsage", asked)
        assert refused.value.metadata == {"field": field}
    with pytest.raises(MeshError) as refused:
        await as_operator(mesh, None, "RerateUsage", ready)
    assert refused.value.metadata == {"field": "x-tenant-id"}
    await mesh.admin.execute(UNDER_WAY, tenant.id, new_uuid7())
    with pytest.raises(MeshError) as refused:
        await as_operator(mesh, tenant, "RerateUsage", ready)
    assert (refused.value.reason_name, refused.value.metadata["state"]) == ("WRONG_STATE", "UNDER_WAY")
    assert await adjustments(mesh, tenant) == []


async def test_who_is_no_operator_or_gives_no_reason_rates_nothing(mesh: Mesh) -> None:
    """A tenant's own key and an operator without a reason are refused before anything is looked at."""
    tenant = mesh.new_tenant()
    for credential, reason, refusal in ((f"key-{tenant.id}", "mine", "CALLER_NOT_ALLOWED"), (OPERATOR, "", "OPERATOR_REASON_MISSING")):
        with pytest.raises(MeshError) as refused:
            await as_operator(mesh, tenant, "RerateUsage", order(validate_only=True), reason=reason, credential=credential)
        assert refused.value.reason_name == refusal


async def test_cost_that_the_providers_bill_told_is_kept_until_the_call_settles(mesh: Mesh) -> None:
    """A reconciled call keeps its cost, and is counted as such; settled late it is rated like any other, and then rated anew."""
    tenant = mesh.new_tenant()
    call = await reconciled(mesh, tenant, input_tokens=60, cost=12_345)
    shown = await previewed(mesh, tenant, order())
    assert (shown.call_count, shown.told_count) == (0, 1)
    assert (await rerated(mesh, tenant, order())).call_count == 0
    assert await total(mesh, tenant) == 12_345
    await mesh.settle(bill(call.ref, input_tokens=MILLION, output_tokens=0))
    assert await total(mesh, tenant) == USD
    assert (await rerated(mesh, tenant, order())).call_count == 1
    assert await total(mesh, tenant) == 700_000_100
    assert [number for number, _, _ in await adjustments(mesh, tenant)] == [2, 3]
    assert await agrees(mesh, tenant)


async def test_late_settlement_of_a_call_that_was_rated_anew_is_not_lost(mesh: Mesh) -> None:
    """Reconciled at what its price makes, rated anew, then settled: it costs what it was settled with; the next one finds it."""
    tenant = mesh.new_tenant()
    call = await mesh.opened(tenant, dispatch_deadline=datetime.now(UTC) - timedelta(minutes=2))
    await mesh.void(ledger_pb.VoidCall(ref=call.ref, kind=ledger_pb.VOID_KIND_UNKNOWN, cause="cut"))
    await reconcile(mesh, call, 60, 60_000)
    assert (await rerated(mesh, tenant, order())).call_count == 1
    (settled,) = await mesh.settle(bill(call.ref, input_tokens=MILLION, output_tokens=0))
    assert (settled.outcome, await total(mesh, tenant)) == (ledger_pb.SETTLE_OUTCOME_ADJUSTED, USD)
    assert (await rerated(mesh, tenant, order())).call_count == 1
    assert await total(mesh, tenant) == 700_000_100
    assert await agrees(mesh, tenant)


async def test_repeated_settlement_of_a_rerated_call_answers_what_it_costs_now(mesh: Mesh) -> None:
    """The same usage is no conflict; its entry is still the settlement's."""
    tenant = mesh.new_tenant()
    call = await mesh.opened(tenant)
    (first,) = await mesh.settle(bill(call.ref, input_tokens=MILLION, output_tokens=0))
    await rerated(mesh, tenant, order())
    (again,) = await mesh.settle(bill(call.ref, input_tokens=MILLION, output_tokens=0))
    assert (again.outcome, again.entry_id, again.cost_nano_usd) == (first.outcome, first.entry_id, 700_000_100)


async def test_limits_are_told_to_count_anew_when_a_running_period_changed(mesh: Mesh) -> None:
    """The epoch rises and an end of that epoch reaches the limits; what is long past, or changes no amount, leaves them alone."""
    tenant, past, same = mesh.new_tenant(), mesh.new_tenant(), mesh.new_tenant()
    await used(mesh, tenant, [{"input_tokens": MILLION}])
    await used(mesh, past, [{"input_tokens": MILLION}], reserve_time=datetime.now(UTC) - timedelta(days=33))
    await used(mesh, same, [{"input_tokens": 0, "output_tokens": 0}])
    for one in (tenant, past, same):
        await mesh.limits.wait_for(one.id, 1)
        assert (await rerated(mesh, one, order())).call_count == 1
    _, told_anew = await mesh.limits.wait_for(tenant.id, 2)
    assert (told_anew.epoch, told_anew.kind) == (1, limits_pb.COMMIT_KIND_VOID)
    assert [await epoch_of(mesh, one) for one in (tenant, past, same)] == [1, 0, 0]
    assert [len(mesh.limits.of(one.id)) for one in (past, same)] == [1, 1]


async def test_corrections_of_a_closed_period_are_late_lines_and_the_sum_is_right(mesh: Mesh) -> None:
    """A plan that charges what the provider does: the next invoice has the difference, named by its period; the sum is the twin's."""
    tenant, twin = mesh.new_tenant(), mesh.new_tenant()
    usages = [{"input_tokens": 90 * MILLION, "output_tokens": 99 * MILLION} for _ in range(3)]
    for one, version in ((tenant, VERSION), (twin, RIGHT)):
        await subscribe(mesh, one, "enterprise", ended(3).start_time)
        await used(mesh, one, usages, reserve_time=ended(3).start_time + HOUR, price_version=version)
    first = [await close(mesh, one, ended(3)) for one in (tenant, twin)]
    as_closed = await stored(mesh, tenant, first[0])
    await rerated(mesh, tenant, order())
    second = [await close(mesh, one, ended(2)) for one in (tenant, twin)]
    late = [line for line in second[0].content.lines if line.is_late]
    assert {(line.name, line.period_start.ToDatetime(tzinfo=UTC)) for line in late if line.kind == 2} == {
        ("calls.cost_nano_usd", ended(3).start_time)
    }
    assert not [line for line in second[1].content.lines if line.is_late]
    charged = [a.content.charges.nano_usd + b.content.charges.nano_usd for a, b in zip(first, second, strict=True)]
    assert charged[0] == charged[1]
    assert lines_of(first[0]) != lines_of(first[1])
    assert await stored(mesh, tenant, first[0]) == as_closed
    assert [await recomputed(mesh, one) for one in (tenant, twin)] == [[], []]


async def test_two_who_do_the_same_at_once_write_each_adjustment_once(mesh: Mesh) -> None:
    """Repeats that race wait for each other's calls and find them done; settlements beside them stay whole."""
    tenant = mesh.new_tenant()
    await used(mesh, tenant, some_usages(700))
    ready = await seen(mesh, tenant, order())
    racing = [finished(mesh, tenant, ready) for _ in range(3)]
    first, *_ = await asyncio.gather(*racing, used(mesh, tenant, some_usages(40, seed=2)))
    assert (first.is_done, len(await adjustments(mesh, tenant))) == (True, 700)
    assert await agrees(mesh, tenant)


async def test_a_call_of_the_rpc_does_a_bounded_part(mesh: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each answer tells how far it is, until it is done; another one may begin only then."""
    monkeypatch.setattr(rerating_rules, "BATCH", 3)
    monkeypatch.setattr(rerating_rules, "BATCHES_A_CALL", 1)
    monkeypatch.setattr(rerating_rules, "SCAN", 2)
    tenant = mesh.new_tenant()
    await used(mesh, tenant, some_usages(7))
    ready = await seen(mesh, tenant, order())
    answers = [await as_operator(mesh, tenant, "RerateUsage", ready) for _ in range(4)]
    assert [(answer.is_done, answer.call_count) for answer in answers] == [(False, 3), (False, 6), (True, 7), (True, 7)]
    assert (await previewed(mesh, tenant, order((RIGHT,), VERSION))).call_count == 7
    assert await agrees(mesh, tenant)


async def test_of_two_that_begin_at_the_same_moment_one_is_refused(mesh: Mesh) -> None:
    """Both saw that nothing was under way: the one that is written down second writes nothing."""
    tenant = mesh.new_tenant()
    await used(mesh, tenant, some_usages(1))
    ready = await seen(mesh, tenant, order())
    waits = "SELECT count(*) FROM pg_locks WHERE relation = 'metering.reratings'::regclass AND NOT granted"

    async def is_held_up() -> bool:
        return await mesh.admin.fetchval(waits) > 0

    async with mesh.admin.acquire() as holder, holder.transaction():
        await holder.execute("LOCK TABLE metering.reratings IN SHARE ROW EXCLUSIVE MODE")
        asked = asyncio.create_task(as_operator(mesh, tenant, "RerateUsage", ready))
        await eventually(is_held_up, within_seconds=20.0)
        await holder.execute(UNDER_WAY, tenant.id, new_uuid7())
    with pytest.raises(MeshError) as refused:
        await asked
    assert (refused.value.reason_name, refused.value.metadata["state"]) == ("WRONG_STATE", "CHANGED")
    assert await adjustments(mesh, tenant) == []


async def finished(mesh: Mesh, tenant: Tenant, ready):
    """Repeats a re-rating until it is done, also where another began it at the same moment."""
    while True:
        try:
            answer = await as_operator(mesh, tenant, "RerateUsage", ready)
        except MeshError as error:
            assert error.metadata == {"resource": "rerating", "state": "CHANGED"}
            continue
        if answer.is_done:
            return answer


async def stored(mesh: Mesh, tenant: Tenant, invoice: invoice_pb.Invoice) -> invoice_pb.Invoice:
    """An invoice as it is told now."""
    return (await ask(mesh, tenant, "GetInvoice", invoice_pb.GetInvoiceRequest(invoice_id=invoice.invoice_id))).invoice
