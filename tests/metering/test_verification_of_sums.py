"""Events, levels, refusals, weeks and corrected prices in verified books: nothing differs by itself, and whatever was changed is told."""

from datetime import UTC, datetime, timedelta

import pytest

from mesh.metering.v1 import verification_service_pb2 as pb
from mesh.metering.v1.event_service_pb2 import AGGREGATION_COUNT, AGGREGATION_MAX
from tests.metering import events
from tests.metering.mesh import Mesh, Tenant, bill
from tests.metering.rerating import load_versions, order, rerated
from tests.metering.test_lifecycle import erase
from tests.metering.usage import fold
from tests.metering.verifying import differences, spoil, verified

SUM, BALANCE = pb.LEDGER_CHECK_USAGE_SUM, pb.LEDGER_CHECK_BALANCE
# A Wednesday of weeks ago: its week begins two days earlier, and is of no other use.
LONG_AGO = (datetime.now(UTC) - timedelta(days=28)).replace(hour=10, minute=7)
LONG_AGO += timedelta(days=2 - LONG_AGO.weekday())
PRODUCT = "verifying"


async def counting_tenant(mesh: Mesh, *, folded: bool = True) -> Tenant:
    """A tenant whose events of each kind, of now and of long ago, and whose refusals are counted, beside a call."""
    tenant = mesh.new_tenant()
    await mesh.settle(bill((await mesh.opened(tenant)).ref))
    for name, changes in (("sum", {}), ("count", {"aggregation": AGGREGATION_COUNT}), ("max", {"aggregation": AGGREGATION_MAX})):
        await events.register(mesh, name, product=PRODUCT, unit=f"verified_{name}", **changes)
    for time in (None, LONG_AGO, LONG_AGO + timedelta(days=1)):
        made = [
            events.event(product=PRODUCT, type=name, quantity=quantity, time=time, subject=user)
            for name in ("sum", "count", "max")
            for quantity, user in ((5, "ada"), (3, "ben"), (9, "ada"))
        ]
        await events.record(mesh, tenant, made)
        await events.reverse(mesh, tenant, made[0], made[3], made[8])
    await mesh.refuse(mesh.refusals(tenant, 4), mesh.refusals(tenant, 2, reason="BURST_LIMIT", user="user-2"))
    await mesh.refuse(mesh.refusals(tenant, 7))
    if folded:
        await fold(mesh)
    return tenant


async def test_events_refusals_and_weeks_agree_however_far_they_are_folded(mesh: Mesh) -> None:
    """Sums, counts and levels, with what was taken back, before and after they are folded, half and half, and when the tenant is erased."""
    tenant = await counting_tenant(mesh, folded=False)
    assert await differences(mesh, tenant) == []
    await fold(mesh)
    await events.record(mesh, tenant, [events.event(product=PRODUCT, type="max", quantity=9), events.event(product=PRODUCT, type="sum")])
    await mesh.refuse(mesh.refusals(tenant, 1, rule="another"))
    assert await differences(mesh, tenant) == []
    await fold(mesh)
    assert await differences(mesh, tenant) == []
    await erase(mesh, tenant)
    assert await differences(mesh, tenant) == []


async def test_quantities_beyond_64_bits_are_compared(mesh: Mesh) -> None:
    """Sums of a day are what they are, however large."""
    tenant = await counting_tenant(mesh)
    huge = "UPDATE metering.usage_rollups SET quantity = 10::numeric ^ 25 WHERE tenant_id = $1 AND grain = 4 AND start_time > $2"
    await spoil(mesh, huge, tenant.id, LONG_AGO + timedelta(days=7))
    assert str(10**25) in {stored for _, _, _, stored, _ in await differences(mesh, tenant)}


async def test_a_corrected_price_leaves_the_books_in_agreement(mesh: Mesh) -> None:
    """Calls, sums, weeks and balances have the adjustment, folded or not."""
    await load_versions(mesh)
    tenant = await counting_tenant(mesh)
    assert (await rerated(mesh, tenant, order())).call_count == 1
    assert await differences(mesh, tenant) == []
    await fold(mesh)
    assert await differences(mesh, tenant) == []


OF_UNIT = "product_unit = 'verified_sum'"
SPOILT = {
    "an event's sum of a day": (
        f"UPDATE metering.usage_rollups SET quantity = quantity + 1 WHERE tenant_id = $1 AND grain = 2 AND {OF_UNIT}",
        {(SUM, "quantity"), (BALANCE, "quantity")},
    ),
    "an event's sum of an hour": (
        f"UPDATE metering.usage_rollups SET quantity = quantity + 1 WHERE tenant_id = $1 AND grain = 1 AND {OF_UNIT}",
        {(SUM, "quantity")},
    ),
    "the hour of the tenant": (
        "UPDATE metering.usage_rollups SET refusals = 99 WHERE tenant_id = $1 AND grain = 9",
        {(SUM, "refusals")},
    ),
    "a level": ("UPDATE metering.usage_levels SET level = 1000 WHERE tenant_id = $1 AND grain = 1 AND level = 3", {(SUM, "events")}),
    "a level of a day": ("UPDATE metering.usage_levels SET events = 2 WHERE tenant_id = $1 AND grain = 2 AND level = 3", {(SUM, "events")}),
    "a user's level": ("DELETE FROM metering.usage_levels WHERE tenant_id = $1 AND grain = 3 AND level = 3", {(SUM, "events")}),
    "a count of refusals": ("UPDATE metering.refusals SET refusals = 70 WHERE tenant_id = $1 AND refusals = 7", {(SUM, "refusals")}),
    "refusals' sum of a day": (
        "UPDATE metering.usage_rollups SET refusals = 1 WHERE tenant_id = $1 AND grain = 2 AND refusal_reason = 'BURST_LIMIT'",
        {(SUM, "refusals")},
    ),
    "whom a rule refused": (
        "UPDATE metering.usage_rollups SET refusal_rule = 'other' WHERE tenant_id = $1 AND grain = 3 AND refusal_reason = 'BURST_LIMIT'",
        {(SUM, "refusals")},
    ),
    "a week": (
        f"UPDATE metering.usage_rollups SET quantity = quantity - 1 WHERE tenant_id = $1 AND grain = 6 AND {OF_UNIT}",
        {(SUM, "quantity")},
    ),
    "a user's week": ("UPDATE metering.usage_rollups SET settled_calls = 5 WHERE tenant_id = $1 AND grain = 7", {(SUM, "settled_calls")}),
    "the tenant's weeks": (
        "DELETE FROM metering.usage_rollups WHERE tenant_id = $1 AND grain = 8 AND refusals = 0",
        {(SUM, "quantity")},
    ),
    "a week of nothing": (
        "INSERT INTO metering.usage_rollups SELECT (jsonb_populate_record(u, '{\"start_time\": \"2020-02-03T00:00:00Z\"}')).* "
        "FROM metering.usage_rollups u WHERE tenant_id = $1 AND grain = 8 AND refusals = 0",
        {(SUM, "quantity")},
    ),
    "what an event says": ("UPDATE metering.events SET quantity = 50 WHERE tenant_id = $1 AND event_type = 'sum' AND quantity = 9",
                           {(SUM, "quantity"), (BALANCE, "quantity")}),
    "what a level says": ("UPDATE metering.events SET quantity = 50 WHERE tenant_id = $1 AND event_type = 'max' AND quantity = 3",
                          {(SUM, "events")}),
    "all sums of a day of events": (
        "DELETE FROM metering.usage_rollups WHERE tenant_id = $1 AND grain IN (1, 2, 3, 4, 5, 9) AND refusal_reason = '' "
        "AND start_time < now() - interval '7 days'",
        {(SUM, "quantity"), (BALANCE, "quantity")},
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", SPOILT)
async def test_what_was_changed_by_hand_is_found(mesh: Mesh, what: str) -> None:
    """Past policies and triggers somebody changes one figure: it is told, with what is stored and what it should be, and once."""
    tenant = await counting_tenant(mesh)
    sql, expected = SPOILT[what]
    await spoil(mesh, sql, tenant.id)
    found = await differences(mesh, tenant)
    assert {(check, figure) for check, _, figure, _, _ in found} == expected
    assert all(stored != recomputed and subject for _, subject, _, stored, recomputed in found)


async def test_a_week_is_told_once_however_its_walk_is_cut(mesh: Mesh) -> None:
    """On the first of its days that has any use; a page asked again tells the same."""
    tenant = await counting_tenant(mesh)
    await spoil(
        mesh, "UPDATE metering.usage_rollups SET retries = 1 WHERE tenant_id = $1 AND grain = 8 AND start_time < $2", tenant.id, LONG_AGO
    )
    pages = await verified(mesh, tenant)
    told = [number for number, page in enumerate(pages) for item in page.differences if item.figure == "retries"]
    assert len(told) == 1
    again = await verified(mesh, tenant, token=pages[told[0] - 1].next_page_token)
    assert again == pages[told[0] :]
