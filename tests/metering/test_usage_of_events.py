"""Events of the product in questions about use: by the aggregation of their type, at once, each once, whatever is folded or taken back."""

import random
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

import grpc
import pytest

from mesh.metering.v1 import event_service_pb2 as events_pb
from mesh.metering.v1 import usage_service_pb2 as pb
from services.kernel.errors import MeshError
from tests.metering.events import event, record, register, reverse
from tests.metering.mesh import Mesh, Tenant
from tests.metering.test_lifecycle import erase
from tests.metering.usage import DAY, EVENT_TYPE, FEATURE, HOUR, MONTH, TENANT, UNIT, USER, asking, balance, fold, query, query_tenants

SUM, COUNT, MAX = events_pb.AGGREGATION_SUM, events_pb.AGGREGATION_COUNT, events_pb.AGGREGATION_MAX
NOON = datetime.now(UTC).replace(hour=12, minute=0, second=0, microsecond=0) - timedelta(days=3)
TYPES = {"page.scored": ("pages", SUM), "call.held": ("calls_held", COUNT), "seats.open": ("seats", MAX), "seats.booked": ("seats", MAX)}


async def registered(mesh: Mesh) -> None:
    """One type of each aggregation, and a second one of levels for the same unit."""
    for name, (unit, aggregation) in TYPES.items():
        await register(mesh, name, unit=unit, aggregation=aggregation)


async def quantities(mesh: Mesh, tenant: Tenant, *dimensions: int, **more: object) -> dict[tuple[str, ...], int]:
    """The quantity of each row by the names that were asked for."""
    names = {USER: "user", FEATURE: "feature", UNIT: "product_unit", EVENT_TYPE: "event_type"}
    rows = (await query(mesh, tenant, asking(*dimensions, **more))).rows
    return {tuple(getattr(row, names[dimension]) for dimension in dimensions): row.quantity for row in rows}


async def test_each_aggregation_counts_as_it_says(mesh: Mesh) -> None:
    """Quantities are added up, events are counted, the highest level stands; types are aggregated each by itself, a unit adds them up."""
    tenant = mesh.new_tenant()
    await registered(mesh)
    for name, quantity in (
        *(("page.scored", quantity) for quantity in (3, 4)),
        *(("call.held", quantity) for quantity in (50, 60, 70)),
        *(("seats.open", quantity) for quantity in (8, 12, 9)),
        ("seats.booked", 5),
    ):
        await record(mesh, tenant, [event(type=name, quantity=quantity)])
    assert await quantities(mesh, tenant, UNIT) == {("pages",): 7, ("calls_held",): 3, ("seats",): 12 + 5}
    assert await quantities(mesh, tenant, EVENT_TYPE) == {
        ("screening/page.scored",): 7,
        ("screening/call.held",): 3,
        ("screening/seats.open",): 12,
        ("screening/seats.booked",): 5,
    }
    assert {unit.product_unit: unit.quantity for unit in (await balance(mesh, tenant)).units} == {"pages": 7, "calls_held": 3, "seats": 17}
    (row,) = (await query_tenants(mesh, asking(TENANT, EVENT_TYPE, filter=pb.UsageFilter(product_units=["pages"])), tenant)).rows
    assert (row.tenant_id, row.event_type, row.quantity) == (str(tenant.id), "screening/page.scored", 7)


async def test_a_reversal_takes_back_what_its_event_counted(mesh: Mesh) -> None:
    """It goes off a sum, is one less of a count, and lets a level be forgotten that no other event holds; folded before or after."""
    await registered(mesh)
    for folded in (False, True):
        tenant = mesh.new_tenant()
        made = [event(type=name, quantity=quantity) for name, quantity in (("page.scored", 5), ("call.held", 9), ("seats.open", 30))]
        kept = [event(type=name, quantity=quantity) for name, quantity in (("page.scored", 2), ("call.held", 4), ("seats.open", 20))]
        await record(mesh, tenant, [*made, *kept, event(type="seats.open", quantity=30)])
        if folded:
            await fold(mesh)
        await reverse(mesh, tenant, *made)
        assert await quantities(mesh, tenant, UNIT) == {("pages",): 2, ("calls_held",): 1, ("seats",): 30}
        highest = event(type="seats.open", quantity=40)
        await record(mesh, tenant, [highest])
        assert (await quantities(mesh, tenant, UNIT))[("seats",)] == 40
        await reverse(mesh, tenant, highest, highest)
        assert (await quantities(mesh, tenant, UNIT))[("seats",)] == 30
        await reverse(mesh, tenant, *kept)
        assert await quantities(mesh, tenant, UNIT) == {("seats",): 30}


async def test_an_event_is_in_the_very_next_answer_and_once(mesh: Mesh) -> None:
    """A balance asked for after an answer has the event in it; repeats and conflicts add nothing."""
    tenant = mesh.new_tenant()
    await registered(mesh)
    for count in range(1, 6):
        one = event(f"page-{count}", type="page.scored", quantity=10)
        await record(mesh, tenant, [one])
        (unit,) = (await balance(mesh, tenant)).units
        assert (unit.product_unit, unit.quantity) == ("pages", 10 * count)
        one.data.quantity += count % 2
        await record(mesh, tenant, [one, one])
        await fold(mesh)
        assert (await balance(mesh, tenant)).units[0].quantity == 10 * count


async def test_use_at_the_limits_and_events_of_one_unit_stand_side_by_side(mesh: Mesh) -> None:
    """Both are in the unit's quantity; the type tells them apart."""
    tenant = mesh.new_tenant()
    await register(mesh)
    await mesh.record(mesh.use(tenant, quantity=2, product_unit="ai_interviews"))
    await record(mesh, tenant, [event(quantity=3)])
    assert await quantities(mesh, tenant, UNIT) == {("ai_interviews",): 5}
    assert await quantities(mesh, tenant, EVENT_TYPE) == {("",): 2, ("screening/interview.completed",): 3}
    only = pb.UsageFilter(event_types=["screening/interview.completed"])
    assert await quantities(mesh, tenant, UNIT, filter=only) == {("ai_interviews",): 3}


class Model:
    """What events amount to, worked out from a list of them."""

    def __init__(self, standing: Sequence[events_pb.Event]) -> None:
        self._standing = standing

    def quantity(self, start: datetime, end: datetime, **names: str) -> int:
        """Adds up what happened from start to before end, of these names."""
        amounts: Counter[str] = Counter()
        for one in self._standing:
            time = one.time.ToDatetime(tzinfo=UTC)
            if start <= time < end and all(getattr(one, name) == value for name, value in names.items()):
                aggregation = TYPES[one.type][1]
                if aggregation == MAX:
                    amounts[one.type] = max(amounts[one.type], one.data.quantity)
                else:
                    amounts[one.type] += one.data.quantity if aggregation == SUM else 1
        return sum(amounts.values())


async def test_any_period_bucket_and_name_is_answered_as_the_events_say(mesh: Mesh) -> None:
    """To the microsecond, of late and early events, some taken back, in zones of half hours, for users and features."""
    chance, tenant, tick = random.Random(7), mesh.new_tenant(), timedelta(microseconds=1)
    await registered(mesh)
    moments = [NOON, NOON - tick, NOON + timedelta(hours=1), NOON + timedelta(hours=1) - tick, NOON - timedelta(days=40)]
    made = [
        event(
            type=chance.choice(list(TYPES)),
            quantity=chance.randint(1, 50),
            time=chance.choice(moments) if chance.random() < 0.4 else NOON - timedelta(minutes=chance.randint(0, 12_000)),
            subject=f"user-{chance.randint(1, 3)}",
            feature=chance.choice(("hiring", "")),
        )
        for _ in range(160)
    ]
    await record(mesh, tenant, made[:100])
    await fold(mesh)
    taken_back = chance.sample(made[:100], 30)
    await reverse(mesh, tenant, *taken_back)
    await record(mesh, tenant, made[100:])
    model = Model([one for one in made if one not in taken_back])
    for start, end in (
        (NOON, NOON + timedelta(hours=1)),
        (NOON - tick, NOON + tick),
        (NOON - timedelta(days=45), NOON + timedelta(days=2)),
    ):
        for dimensions, name, field in (((), "", ""), ((USER,), "user", "subject"), ((FEATURE,), "feature", "feature")):
            rows = (await query(mesh, tenant, asking(*dimensions, start=start, end=end))).rows
            found = {getattr(row, name, ""): row.quantity for row in rows}
            wanted = {value: model.quantity(start, end, **({field: value} if field else {})) for value in found}
            assert found == wanted
            assert sum(found.values()) >= model.quantity(start, end)
    for bucket, zone in ((HOUR, "Asia/Kolkata"), (DAY, "Europe/Berlin"), (DAY, "UTC"), (MONTH, "Asia/Kathmandu")):
        start, end = NOON - timedelta(days=9, minutes=13), NOON + timedelta(days=1)
        answer = await query(mesh, tenant, asking(EVENT_TYPE, start=start, end=end, bucket=bucket, time_zone=zone, page_size=1_000))
        starts = sorted({row.bucket_start_time.ToDatetime(tzinfo=UTC) for row in answer.rows})
        step = {HOUR: timedelta(hours=1), DAY: timedelta(days=1), MONTH: timedelta(days=31)}[bucket]
        for row in answer.rows:
            first = row.bucket_start_time.ToDatetime(tzinfo=UTC)
            later = next((moment for moment in starts if moment > first), end)
            assert row.quantity == model.quantity(first, min(later, end, first + step), type=row.event_type.removeprefix("screening/"))


@pytest.mark.parametrize("hours", [-30, -20, 20], ids=["long ago", "recorded within a day", "to come"])
async def test_an_event_is_found_by_its_time_whenever_it_was_recorded(mesh: Mesh, hours: int) -> None:
    """In a period that no sum fits, too: late by more than a day, by less, or a day early."""
    tenant, time = mesh.new_tenant(), datetime.now(UTC) + timedelta(hours=hours)
    await registered(mesh)
    await record(mesh, tenant, [event(type=name, quantity=7, time=time) for name in TYPES])
    found = await quantities(mesh, tenant, UNIT, start=time, end=time + timedelta(seconds=1))
    assert found == {("pages",): 7, ("calls_held",): 1, ("seats",): 14}
    assert await quantities(mesh, tenant, UNIT, start=time + timedelta(microseconds=1), end=time + timedelta(seconds=1)) == {}


async def test_a_sum_beyond_an_int64_is_refused_and_never_wrong(mesh: Mesh) -> None:
    """Sums are exact inside; what no answer can hold is OUT_OF_RANGE with what to ask for instead, and what it can hold is answered."""
    tenant = mesh.new_tenant()
    await registered(mesh)
    await record(mesh, tenant, [event(type="page.scored", quantity=10**12, subject=f"user-{number}") for number in range(2)])
    # Nine million events more, as the log would hold them.
    await mesh.admin.execute(
        "UPDATE metering.usage_pending SET quantity = 5000000000000000000 WHERE tenant_id = $1 AND quantity = 1000000000000", tenant.id
    )
    try:
        assert await quantities(mesh, tenant, USER) == {("user-0",): 5 * 10**18, ("user-1",): 5 * 10**18}
        for asked in (asking(), asking(UNIT, order_by=pb.USAGE_MEASURE_QUANTITY)):
            with pytest.raises(MeshError) as refused:
                await query(mesh, tenant, asked)
            assert (refused.value.code, refused.value.reason_name) == (grpc.StatusCode.OUT_OF_RANGE, "SUM_OUT_OF_RANGE")
            assert "shorter period" in refused.value.message
        other = mesh.new_tenant()
        await record(mesh, other, [event(type="page.scored", quantity=3)])
        for folded in (False, True):
            if folded:
                await fold(mesh)
            asked = asking(TENANT, order_by=pb.USAGE_MEASURE_QUANTITY)
            rows = (await query_tenants(mesh, asked, tenant, other)).rows
            told = [(row.tenant_id, row.quantity, row.is_quantity_cut) for row in rows]
            assert told == [(str(tenant.id), 2**63 - 1, True), (str(other.id), 3, False)], "one tenant's keeps nobody from the others'"
            everyone = await query_tenants(mesh, asked)
            assert {row.tenant_id for row in everyone.rows if row.is_quantity_cut} == {str(tenant.id)}
        with pytest.raises(MeshError, match="SUM_OUT_OF_RANGE"):
            await balance(mesh, tenant)
        calls_alone = asking(TENANT, filter=pb.UsageFilter(product_units=[""]))
        assert list((await query_tenants(mesh, calls_alone, tenant)).rows) == [], "who asks for other units is answered"
    finally:
        # Other tests ask about all tenants.
        await mesh.admin.execute("DELETE FROM metering.usage_rollups WHERE tenant_id = $1", tenant.id)


async def test_an_erased_tenants_events_are_counted_without_names(mesh: Mesh) -> None:
    """Sums and levels lose users and features, folded or not, and keep every amount; what comes later has no names either."""
    tenant = mesh.new_tenant()
    await registered(mesh)
    await record(mesh, tenant, [event(type=name, quantity=quantity) for name in TYPES for quantity in (6, 7)])
    await fold(mesh)
    await record(mesh, tenant, [event(type=name, quantity=8) for name in TYPES])
    before = await quantities(mesh, tenant, UNIT)
    await erase(mesh, tenant)
    assert await quantities(mesh, tenant, UNIT) == before
    await record(mesh, tenant, [event(type="seats.open", quantity=100)])
    assert await quantities(mesh, tenant, USER, FEATURE, UNIT) == {
        ("", "", unit): quantity for (unit,), quantity in (before | {("seats",): 108}).items()
    }
    for table in ("usage_pending", "usage_rollups", "usage_levels"):
        rows = await mesh.admin.fetch(f"SELECT to_jsonb(t)::text AS row FROM metering.{table} t WHERE tenant_id = $1", tenant.id)
        assert not any(word in row["row"] for row in rows for word in ("user-1", "hiring"))
