"""Invoices through the real service: exact, closed once, never changed; what comes late is on the next; everything can be made again."""

import asyncio
from datetime import timedelta
from uuid import UUID

import grpc
import pytest
from google.protobuf.timestamp_pb2 import Timestamp

from mesh.common.v1.money_pb2 import NanoUsd
from mesh.metering.v1 import invoice_service_pb2 as pb
from services.kernel.errors import MeshError
from services.kernel.ids import TenantId, new_uuid7
from services.kernel.rpc import metadata as keys
from services.kernel.rpc.wire_status import decode_rpc_error
from services.kernel.timestamps import to_timestamp
from services.metering.adapters.postgres_billing import PostgresBilling
from services.metering.adapters.postgres_closings import PostgresClosings
from services.metering.billing.periods import period_of
from services.metering.billing.proration import Span
from services.metering.billing.terms import BillingTerms, PlanVersion, UsageCharge
from services.metering.billing.tiers import PerUnit
from tests.metering.billing import (
    USD,
    ask,
    close,
    ended,
    grant,
    lines_of,
    recomputed,
    rows_of,
    subscribe,
    use_tokens,
    use_units,
    used_starter,
)
from tests.metering.mesh import Mesh, bill
from tests.metering.peers import OPERATOR
from tests.support.waiting import eventually

HOUR = timedelta(hours=1)
USE = """
INSERT INTO metering.unit_entries (tenant_id, reservation_id, entry_id, product_unit, quantity, reserve_time, record_time, epoch)
VALUES ($1, $2, $3, 'ai_interviews', 25, $4, clock_timestamp(), 0)
"""
YESTERDAY, TODAY = to_timestamp(ended(1).start_time), to_timestamp(ended(0).start_time)


async def test_closed_invoice_charges_the_plan_exactly(mesh: Mesh) -> None:
    """The fee, what is included, what goes beyond, to the nano-dollar; from the period's first microsecond to its last."""
    tenant = await used_starter(mesh)
    await use_units(mesh, tenant, ended(2).start_time - timedelta(microseconds=1), quantity=500)
    await use_units(mesh, tenant, ended(2).end_time, quantity=500)
    await close(mesh, tenant, ended(3))
    invoice = await close(mesh, tenant, ended(2))
    assert lines_of(invoice) == [
        ("base", 0, 1, 29 * USD),
        ("calls.tokens", 0, 1_000_000, 0),
        ("calls.tokens", 1, 600, 30_000_000),
        ("ai_interviews", 0, 20, 0),
        ("ai_interviews", 1, 3, 6 * USD),
    ]
    assert invoice.content.charges.nano_usd == invoice.content.due.nano_usd == 35 * USD + 30_000_000
    assert (invoice.number, invoice.content.currency, len(invoice.digest)) == (2, "USD", 64)
    assert await recomputed(mesh, tenant) == []


async def test_closing_again_answers_the_same_bits(mesh: Mesh) -> None:
    """A closed period is closed: usage that comes later, a repeat and a race of repeats change nothing of its invoice."""
    tenant = await used_starter(mesh)
    raced = await asyncio.gather(*[close(mesh, tenant, ended(2)) for _ in range(4)])
    await use_units(mesh, tenant, ended(2).start_time, quantity=7)
    again = await close(mesh, tenant, ended(2))
    read = (await ask(mesh, tenant, "GetInvoice", pb.GetInvoiceRequest(invoice_id=again.invoice_id))).invoice
    listed = (await ask(mesh, tenant, "ListInvoices", pb.ListInvoicesRequest())).invoices
    assert {item.SerializeToString(deterministic=True) for item in [*raced, again, read, *listed]} == {
        again.SerializeToString(deterministic=True)
    }


async def test_late_usage_is_on_the_next_invoice_and_the_sum_is_as_if_it_had_not_been_late(mesh: Mesh) -> None:
    """Lines of their own name the period they belong to; allowances and tiers count on, so lateness changes no total."""
    late, timely = mesh.new_tenant(), mesh.new_tenant()
    for tenant in (late, timely):
        await subscribe(mesh, tenant, "professional", ended(3).start_time)
        await use_units(mesh, tenant, ended(3).start_time + HOUR, quantity=290)
    await use_units(mesh, timely, ended(3).start_time + HOUR, quantity=30)
    first = [await close(mesh, tenant, ended(3)) for tenant in (late, timely)]
    await use_units(mesh, late, ended(3).start_time + HOUR, quantity=30)
    second = [await close(mesh, tenant, ended(2)) for tenant in (late, timely)]
    assert [lines_of(invoice)[2:] for invoice in second] == [
        [("ai_interviews", 1, 10, 15 * USD), ("ai_interviews", 2, 20, 24 * USD)],
        [],
    ]
    (line, _) = (line for line in second[0].content.lines if line.is_late)
    assert (line.period_start, line.period_end) == (to_timestamp(ended(3).start_time), to_timestamp(ended(3).end_time))
    assert "late usage of" in line.description
    sums = [a.content.charges.nano_usd + b.content.charges.nano_usd for a, b in zip(first, second, strict=True)]
    assert sums[0] == sums[1]
    for tenant in (late, timely):
        assert await recomputed(mesh, tenant) == []


@pytest.mark.parametrize("before_end", [timedelta(microseconds=1), timedelta(minutes=15), timedelta(minutes=15, microseconds=1), 20 * HOUR])
async def test_late_usage_is_found_however_long_before_the_end_it_was(mesh: Mesh, before_end: timedelta) -> None:
    """A single late use, in the last minutes of a closed period or long before, is on the next invoice and on no other."""
    tenant = mesh.new_tenant()
    await subscribe(mesh, tenant, "starter", ended(4).start_time)
    await close(mesh, tenant, ended(3))
    await use_units(mesh, tenant, ended(3).end_time - before_end, quantity=2)
    invoices = [await close(mesh, tenant, ended(ago)) for ago in (2, 1)]
    assert [lines_of(invoice)[1:] for invoice in invoices] == [[("ai_interviews", 0, 2, 0)], []]


async def test_usage_of_before_the_first_invoice_is_on_it_once(mesh: Mesh) -> None:
    """Use of months that never had an invoice is on the first as late usage, without fees of those months; later still, on the next."""
    tenant, minimal = mesh.new_tenant(), mesh.new_tenant()
    await subscribe(mesh, tenant, "starter")
    await use_units(mesh, tenant, ended(5).start_time + HOUR, quantity=21)
    first = await close(mesh, tenant, ended(2))
    await use_units(mesh, tenant, ended(5).start_time + 2 * HOUR, quantity=2)
    second = await close(mesh, tenant, ended(1))
    assert lines_of(first) == [("base", 0, 1, 29 * USD), ("ai_interviews", 0, 20, 0), ("ai_interviews", 1, 1, 2 * USD)]
    assert lines_of(second) == [("base", 0, 1, 29 * USD), ("ai_interviews", 1, 2, 4 * USD)]
    assert await recomputed(mesh, tenant) == []
    # Of a plan with a minimum: it was never asked for then, so nothing of it is given back.
    await subscribe(mesh, minimal, "enterprise")
    await use_units(mesh, minimal, ended(5).start_time + HOUR, quantity=100)
    only = await close(mesh, minimal, ended(2))
    assert lines_of(only) == [
        ("minimum", 0, 1, 2_000 * USD),
        ("ai_interviews", 1, 100, 110 * USD),
        ("committed", 0, 1, -11 * USD // 2),
    ]


async def test_calls_that_settle_while_a_period_is_closed_are_each_on_one_invoice(mesh: Mesh) -> None:
    """Whatever commits before the close is on its invoice, whatever after on the next: none on both, none on neither."""
    tenant, closed, settled = mesh.new_tenant(), asyncio.Event(), 0
    await subscribe(mesh, tenant, "enterprise", ended(2).start_time)

    async def settle() -> None:
        nonlocal settled
        left = 5
        while left:
            left -= closed.is_set()
            call = await mesh.opened(tenant, reserve_time=ended(2).start_time + HOUR)
            await mesh.settle(bill(call.ref, input_tokens=0, output_tokens=1))
            settled += 1

    async def has_settled() -> bool:
        return settled >= 5

    async with asyncio.TaskGroup() as group:
        group.create_task(settle())
        await eventually(has_settled, within_seconds=30.0)
        first = await close(mesh, tenant, ended(2))
        closed.set()
    second = await close(mesh, tenant, ended(1))
    costs = [sum(line.quantity for line in invoice.content.lines if line.name == "calls.cost_nano_usd") for invoice in (first, second)]
    assert sum(costs) == settled * 5_000
    assert min(costs) >= 5 * 5_000
    assert await recomputed(mesh, tenant) == []


async def test_a_close_waits_for_who_is_writing(mesh: Mesh) -> None:
    """A use that is recorded and not yet committed when the close begins is on the invoice: the close waits for it."""
    tenant = mesh.new_tenant()
    await subscribe(mesh, tenant, "starter", ended(2).start_time)

    async def is_waiting() -> bool:
        waiting = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted AND mode = 'ExclusiveLock'"
        return await mesh.admin.fetchval(waiting) > 0

    async with asyncio.TaskGroup() as group, mesh.app.database.transaction(TenantId(tenant.id)) as writer:
        await writer.execute("SELECT pg_advisory_xact_lock_shared(metering.tenant_lock($1))", tenant.id)
        await writer.execute(USE, tenant.id, new_uuid7(), new_uuid7(), ended(2).start_time)
        closing = group.create_task(close(mesh, tenant, ended(2)))
        await eventually(is_waiting, within_seconds=30.0)
    assert lines_of(closing.result())[1:] == [("ai_interviews", 0, 20, 0), ("ai_interviews", 1, 5, 10 * USD)]
    assert await recomputed(mesh, tenant) == []


async def test_billing_reads_its_own_tenants_rows_through_indexes(mesh: Mesh) -> None:
    """Among many rows of others no table is scanned, and of the tenant's own only what the period or the lateness asks for is read."""
    tenant, other, rows = mesh.new_tenant(), mesh.new_tenant(), 40
    for each, count in ((tenant, rows), (other, 600)):
        await mesh.record(*[mesh.use(each, reserve_time=ended(2).start_time + HOUR) for _ in range(count)])
        await use_tokens(mesh, each, ended(2).start_time + HOUR, [1] * count)
    await mesh.admin.execute("ANALYZE metering.entries, metering.unit_entries")
    read = """
    SELECT relname, coalesce(seq_tup_read, 0) AS scanned, coalesce(idx_tup_fetch, 0) AS fetched
    FROM pg_stat_xact_user_tables WHERE relname IN ('entries', 'unit_entries')
    """
    charges = tuple(UsageCharge(meter, 0, PerUnit(1)) for meter in ("ai_interviews", "calls.tokens"))
    version = PlanVersion("p", "1", ended(2).start_time, BillingTerms((), charges))
    span = Span(ended(2), ended(2).start_time, ended(2).end_time, version)
    for books in (PostgresBilling(mesh.app.database), PostgresClosings(mesh.app.jobs)):
        async with books.reading(TenantId(tenant.id)) as reader:
            # What this connection counted in transactions before and has not reported yet is counted with this one's.
            before = {row["relname"]: row for row in await reader._connection.fetch(read)}
            sums = await reader.sums([span], None)
            days = await reader.late_days(ended(1).start_time, ended(1).start_time, None)
            after = {row["relname"]: row for row in await reader._connection.fetch(read)}
        assert (sums[span.start_time]["ai_interviews"], sums[span.start_time]["calls.tokens"]) == (rows, rows)
        assert len(days) == 1
        read_now = {name: [row[what] - before[name][what] for what in ("scanned", "fetched")] for name, row in after.items()}
        assert {name: (scanned, fetched <= 3 * rows) for name, (scanned, fetched) in read_now.items()} == {
            "entries": (0, True),
            "unit_entries": (0, True),
        }


async def test_a_change_of_plan_is_prorated_by_seconds(mesh: Mesh) -> None:
    """Each plan's fee and allowance count for its part of the period; usage is priced by the plan of its time."""
    tenant, period = mesh.new_tenant(), ended(1)
    half = period.start_time + timedelta(seconds=period.seconds // 2)
    await subscribe(mesh, tenant, "starter", period.start_time)
    await subscribe(mesh, tenant, "professional", half)
    await use_units(mesh, tenant, half - HOUR, quantity=15)
    await use_units(mesh, tenant, half, quantity=51)
    invoice = await close(mesh, tenant, period)
    assert [(line.plan, line.name, line.tier, line.quantity, line.amount.nano_usd) for line in invoice.content.lines] == [
        ("starter", "base", 0, 1, 29 * USD // 2),
        ("starter", "ai_interviews", 0, 10, 0),
        ("starter", "ai_interviews", 1, 5, 10 * USD),
        ("professional", "base", 0, 1, 199 * USD // 2),
        ("professional", "advanced_analytics", 0, 1, 25 * USD),
        ("professional", "ai_interviews", 0, 50, 0),
        ("professional", "ai_interviews", 1, 1, 3 * USD // 2),
    ]
    assert await recomputed(mesh, tenant) == []


async def test_a_tenant_without_a_subscription_is_on_the_plan_of_its_tier(mesh: Mesh) -> None:
    """What the tier was at the close is written down with it: a tier or a plan of later changes no closed invoice."""
    tenant = mesh.new_tenant()
    mesh.peers.tenants.tiers[tenant.id] = "enterprise"
    first = await close(mesh, tenant, ended(3))
    assert lines_of(first) == [("minimum", 0, 1, 2_000 * USD)]
    mesh.peers.tenants.tiers[tenant.id] = "free"
    await use_units(mesh, tenant, ended(3).start_time, quantity=1)
    await subscribe(mesh, tenant, "starter", ended(2).start_time)
    second = await close(mesh, tenant, ended(2))
    # Late usage of the period under the minimum: priced by the plan of then, taken off what the minimum had asked for.
    late = [(line.plan, line.name, line.amount.nano_usd) for line in second.content.lines if line.is_late]
    assert late == [
        ("enterprise", "ai_interviews", 1_100_000_000),
        ("enterprise", "committed", -55_000_000),
        ("enterprise", "minimum", -1_045_000_000),
    ]
    assert await recomputed(mesh, tenant) == []


async def test_a_tenant_of_a_tier_is_not_billed_for_what_ended_before_its_first_use(mesh: Mesh) -> None:
    """Without a subscription a mistyped year would be years of fees as well; nothing is closed, and its first period can be."""
    tenant = mesh.new_tenant()
    mesh.peers.tenants.tiers[tenant.id] = "starter"
    await use_units(mesh, tenant, ended(1).start_time, quantity=1)
    for early in (ended(600), ended(2)):
        with pytest.raises(MeshError) as refused:
            await close(mesh, tenant, early)
        assert (refused.value.reason_name, refused.value.metadata["state"]) == ("WRONG_STATE", "NOT_NEXT")
    assert (await close(mesh, tenant, ended(1))).number == 1


async def test_draft_says_what_the_invoice_will(mesh: Mesh) -> None:
    """At any moment; a draft writes nothing, and of a closed period there is none."""
    tenant = await used_starter(mesh)
    await close(mesh, tenant, ended(3))
    await grant(mesh, tenant, 4 * USD)
    before = await rows_of(mesh, tenant)
    request = pb.GetDraftInvoiceRequest(at_time=to_timestamp(ended(2).start_time + HOUR))
    draft = (await ask(mesh, tenant, "GetDraftInvoice", request)).content
    assert await rows_of(mesh, tenant) == before
    assert draft == (await close(mesh, tenant, ended(2))).content
    assert draft.credit_uses[0].amount.nano_usd == 4 * USD
    current = (await ask(mesh, tenant, "GetDraftInvoice", pb.GetDraftInvoiceRequest())).content
    assert current.period_start == to_timestamp(ended(0).start_time)
    with pytest.raises(MeshError) as refused:
        await ask(mesh, tenant, "GetDraftInvoice", request)
    assert (refused.value.reason_name, refused.value.metadata["state"]) == ("WRONG_STATE", "CLOSED")


async def test_what_cannot_be_closed_is_refused_and_nothing_is_written(mesh: Mesh) -> None:
    """A period that has not ended, no period at all, not the next one, another currency, a plan without terms: typed, without a trace."""
    tenant, planless = mesh.new_tenant(), mesh.new_tenant()
    mesh.peers.tenants.tiers[planless.id] = "unheard-of"
    await subscribe(mesh, tenant, "starter", ended(5).start_time)
    await close(mesh, tenant, ended(3))
    before = await rows_of(mesh, tenant)
    for asked, period, currency, reason, value in (
        (tenant, ended(0), "", "WRONG_STATE", "OPEN"),
        (tenant, ended(1), "", "WRONG_STATE", "NOT_NEXT"),
        (tenant, ended(4), "", "WRONG_STATE", "NOT_NEXT"),
        (tenant, ended(2, 17), "", "INVALID_REQUEST", "period_start"),
        (tenant, ended(2), "EUR", "INVALID_REQUEST", "currency"),
        (planless, ended(2), "", "NOT_FOUND", "billing_plan"),
    ):
        request = pb.CloseInvoiceRequest(period_start=to_timestamp(period.start_time), currency=currency)
        with pytest.raises(MeshError) as refused:
            await ask(mesh, asked, "CloseInvoice", request, operator=True)
        assert refused.value.reason_name == reason, refused.value
        assert value in refused.value.metadata.values()
    with pytest.raises(MeshError):
        await ask(mesh, planless, "GetDraftInvoice", pb.GetDraftInvoiceRequest())
    assert (await rows_of(mesh, tenant), await rows_of(mesh, planless)) == (before, [0] * 7)


async def test_no_period_before_the_first_use_and_the_first_plan_is_closed(mesh: Mesh) -> None:
    """A mistyped year would be years of fees that nobody can take back; the period of the first use or of the first plan is the first."""
    new, old = mesh.new_tenant(), mesh.new_tenant()
    for tenant in (new, old):
        await subscribe(mesh, tenant, "starter", ended(1).start_time)
    await use_units(mesh, old, ended(2).start_time)
    for tenant, first in ((new, 1), (old, 2)):
        before = await rows_of(mesh, tenant)
        with pytest.raises(MeshError) as refused:
            await close(mesh, tenant, ended(first + 1))
        assert (refused.value.reason_name, refused.value.metadata["state"]) == ("WRONG_STATE", "NOT_NEXT")
        assert await rows_of(mesh, tenant) == before
        assert (await close(mesh, tenant, ended(first))).number == 1


async def test_an_idle_tenants_first_period_is_one_of_the_last_months(mesh: Mesh) -> None:
    """Who used nothing and has no plan begins with a period that ended in the last 92 days: an older one is a mistyped year."""
    tenant = mesh.new_tenant()
    mistyped = period_of(ended(1).start_time - timedelta(days=360), 1)
    for period in (ended(5), mistyped):
        with pytest.raises(MeshError) as refused:
            await close(mesh, tenant, period)
        assert (refused.value.reason_name, refused.value.metadata["state"]) == ("WRONG_STATE", "NOT_NEXT")
        assert "92 days" in refused.value.message
    assert await rows_of(mesh, tenant) == [0] * 7
    assert (await close(mesh, tenant, ended(2))).number == 1


@pytest.mark.parametrize(
    ("method", "change", "reason", "value"),
    [
        ("GrantCredit", {"amount": NanoUsd(nano_usd=-1)}, "INVALID_REQUEST", "amount"),
        ("GrantCredit", {"amount": NanoUsd()}, "INVALID_REQUEST", "amount"),
        ("GrantCredit", {"currency": "EUR"}, "INVALID_REQUEST", "currency"),
        ("GrantCredit", {"expire_time": YESTERDAY, "effective_time": TODAY}, "INVALID_REQUEST", "expire_time"),
        ("GrantCredit", {"priority": -1}, "INVALID_REQUEST", "priority"),
        ("GrantCredit", {"reason": "a\x00b"}, "INVALID_REQUEST", "reason"),
        ("IssueCreditNote", {"amount": NanoUsd(nano_usd=-1)}, "INVALID_REQUEST", "amount"),
        ("IssueCreditNote", {"currency": "EUR"}, "INVALID_REQUEST", "currency"),
        ("IssueCreditNote", {}, "NOT_FOUND", "invoice"),
        ("SetSubscription", {"plan": "unheard-of"}, "NOT_FOUND", "billing_plan"),
        ("SetSubscription", {"plan": "A"}, "INVALID_REQUEST", "plan"),
        ("SetSubscription", {"anchor_day": 32}, "INVALID_REQUEST", "anchor_day"),
        ("SetSubscription", {"effective_time": Timestamp(seconds=-62_135_596_800)}, "INVALID_REQUEST", "effective_time"),
        ("CloseInvoice", {"period_start": Timestamp(seconds=-62_135_596_800)}, "INVALID_REQUEST", "period_start"),
        ("CloseInvoice", {"period_start": Timestamp(seconds=253_402_300_799)}, "INVALID_REQUEST", "period_start"),
        ("CloseInvoice", {"period_start": Timestamp(seconds=253_402_300_800)}, "INVALID_REQUEST", "period_start"),
        ("SetSubscription", {"effective_time": Timestamp(seconds=1_800_000_000, nanos=1_000)}, "INVALID_REQUEST", "effective_time"),
    ],
)  # fmt: skip
async def test_senseless_credits_notes_and_plans_are_refused(
    mesh: Mesh, method: str, change: dict[str, object], reason: str, value: str
) -> None:
    """Nothing negative, nothing in another currency, nothing unknown: typed, and nothing is written."""
    fields: dict[str, dict[str, object]] = {
        "GrantCredit": {"credit_id": str(new_uuid7()), "amount": NanoUsd(nano_usd=1)},
        "IssueCreditNote": {
            "credit_note_id": str(new_uuid7()), "invoice_id": str(new_uuid7()), "amount": NanoUsd(nano_usd=1), "reason": "wrong",
        },
        "SetSubscription": {"subscription_id": str(new_uuid7()), "plan": "free"},
        "CloseInvoice": {},
    }  # fmt: skip
    tenant = mesh.new_tenant()
    with pytest.raises(MeshError) as refused:
        await ask(mesh, tenant, method, getattr(pb, f"{method}Request")(**fields[method] | change), operator=True)
    assert refused.value.reason_name == reason
    assert value in str(dict(refused.value.metadata))
    assert await rows_of(mesh, tenant) == [0] * 7


async def test_a_subscription_never_changes_what_was_closed(mesh: Mesh) -> None:
    """No plan and no other anchor day in a closed period; an id means one subscription for ever."""
    tenant, first = mesh.new_tenant(), str(new_uuid7())
    await subscribe(mesh, tenant, "starter", ended(3).start_time, subscription_id=first)
    await close(mesh, tenant, ended(2))
    await subscribe(mesh, tenant, "starter", ended(3).start_time, subscription_id=first)
    for plan, time, anchor, known, reason in (
        ("free", ended(2).start_time, 0, "", "WRONG_STATE"),
        ("free", ended(0).start_time, 2, "", "WRONG_STATE"),
        ("free", ended(3).start_time, 0, first, "CONTENT_CONFLICT"),
    ):
        with pytest.raises(MeshError) as refused:
            await subscribe(mesh, tenant, plan, time, anchor, known)
        assert refused.value.reason_name == reason
    assert {"stored_digest", "request_digest"} <= set(refused.value.metadata)
    assert (await rows_of(mesh, tenant))[0] == 1
    assert await recomputed(mesh, tenant) == []


async def test_periods_begin_on_the_tenants_day(mesh: Mesh) -> None:
    """With an anchor day the period runs from that day to the next month's."""
    tenant = mesh.new_tenant()
    await subscribe(mesh, tenant, "starter", ended(3, 17).start_time, anchor_day=17)
    invoice = await close(mesh, tenant, ended(2, 17))
    assert invoice.content.period_start.ToDatetime().day == invoice.content.period_end.ToDatetime().day == 17
    assert lines_of(invoice) == [("base", 0, 1, 29 * USD)]


@pytest.mark.parametrize("method", ["CloseInvoice", "IssueCreditNote", "GrantCredit", "SetSubscription"])
async def test_only_operators_change_the_books(mesh: Mesh, method: str) -> None:
    """A tenant's own key is refused whatever it asks for."""
    with pytest.raises(MeshError) as refused:
        await ask(mesh, mesh.new_tenant(), method, getattr(pb, f"{method}Request")())
    assert refused.value.reason_name == "CALLER_NOT_ALLOWED"


async def test_a_closing_whose_invoice_a_crash_left_out_is_finished_by_the_next(mesh: Mesh) -> None:
    """The moment of the close stands; the invoice made later says what one made at once would have said."""
    tenant = await used_starter(mesh)
    books, invoice_id = PostgresClosings(mesh.app.jobs), new_uuid7()
    await books.close(TenantId(tenant.id), invoice_id, ended(2), "", 1)
    await use_units(mesh, tenant, ended(2).start_time, quantity=100)
    assert not (await ask(mesh, tenant, "ListInvoices", pb.ListInvoicesRequest())).invoices
    second = await close(mesh, tenant, ended(1))
    first = await close(mesh, tenant, ended(2))
    assert (first.number, second.number, first.invoice_id) == (1, 2, str(invoice_id))
    assert ("ai_interviews", 1, 3, 6 * USD) in lines_of(first)
    assert ("ai_interviews", 1, 100, 200 * USD) in lines_of(second)
    assert await recomputed(mesh, tenant) == []


async def test_making_invoices_again_finds_what_was_tampered_with(mesh: Mesh) -> None:
    """A changed line, a changed sum and a changed digest are each found; nothing else is."""
    tenant = await used_starter(mesh)
    await close(mesh, tenant, ended(3))
    invoice = await close(mesh, tenant, ended(2))
    assert await recomputed(mesh, tenant) == []
    for change, back in (
        ("invoice_lines SET amount_nano_usd = amount_nano_usd + 1", "invoice_lines SET amount_nano_usd = amount_nano_usd - 1"),
        (
            "invoices SET digest = set_byte(digest, 0, get_byte(digest, 0) # 1)",
            "invoices SET digest = set_byte(digest, 0, get_byte(digest, 0) # 1)",
        ),
    ):
        for statement, count in ((change, 1), (back, 0)):
            async with mesh.admin.acquire() as connection, connection.transaction():
                await connection.execute("SET LOCAL session_replication_role = replica")
                where = "number = 2" + (" AND line_number = 1" if "lines" in statement else "")
                await connection.execute(f"UPDATE metering.{statement} WHERE tenant_id = $1 AND {where}", UUID(int=tenant.id.int))
            found = await recomputed(mesh, tenant)
            assert [str(mismatch.closing.invoice_id) for mismatch in found] == [invoice.invoice_id] * count


def test_the_period_of_now_is_not_over() -> None:
    """What the tests above call an ended period has ended."""
    assert ended(1).end_time == ended(0).start_time == period_of(ended(0).start_time, 1).start_time


@pytest.mark.parametrize("method", ["CloseInvoice", "IssueCreditNote", "GrantCredit", "SetSubscription"])
async def test_an_operator_names_the_tenant(mesh: Mesh, method: str) -> None:
    """Nobody's books are changed by a call that names nobody."""
    fields = {
        "CloseInvoice": {"period_start": YESTERDAY},
        "IssueCreditNote": {
            "credit_note_id": str(new_uuid7()), "invoice_id": str(new_uuid7()), "amount": NanoUsd(nano_usd=1), "reason": "wrong",
        },
        "GrantCredit": {"credit_id": str(new_uuid7()), "amount": NanoUsd(nano_usd=1)},
        "SetSubscription": {"subscription_id": str(new_uuid7()), "plan": "free"},
    }  # fmt: skip
    metadata = ((keys.AUTHORIZATION, f"Bearer {OPERATOR}"), (keys.OPERATOR_REASON, "billing"))
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await getattr(mesh.outside.invoices, method)(getattr(pb, f"{method}Request")(**fields[method]), metadata=metadata, timeout=10)
    told = decode_rpc_error(refused.value, "metering")
    assert (told.reason_name, told.metadata["field"]) == ("INVALID_REQUEST", "x-tenant-id")
