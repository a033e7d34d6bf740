"""Prepaid credits and credit notes through the real service: once for their id, in their order, never more than there is."""

from datetime import UTC, datetime
from uuid import UUID

import grpc
import pytest
from google.protobuf.timestamp_pb2 import Timestamp

from mesh.metering.v1 import invoice_service_pb2 as pb
from services.kernel.errors import MeshError
from services.kernel.ids import TenantId, new_uuid7
from services.kernel.timestamps import to_timestamp
from services.metering.adapters.postgres_billing_reader import SELECT_NEXT_CREDITS
from tests.metering.billing import (
    USD,
    ask,
    close,
    ended,
    grant,
    noted,
    recomputed,
    rows_of,
    subscribe,
)
from tests.metering.mesh import Mesh


async def test_credits_pay_by_priority_until_they_are_used_up(mesh: Mesh) -> None:
    """Lower priority first, what is left stays for the next invoice, an expired credit pays nothing, and the list tells what remains."""
    tenant = mesh.new_tenant()
    await subscribe(mesh, tenant, "starter", ended(3).start_time)
    later = await grant(mesh, tenant, 30 * USD, priority=2)
    sooner = await grant(mesh, tenant, 10 * USD, priority=1)
    expired = await grant(mesh, tenant, 99 * USD, expire_time=to_timestamp(ended(2).start_time))
    first = await close(mesh, tenant, ended(2))
    second = await close(mesh, tenant, ended(1))
    paid = [[(use.credit_id, use.amount.nano_usd) for use in invoice.content.credit_uses] for invoice in (first, second)]
    assert paid == [[(sooner.credit_id, 10 * USD), (later.credit_id, 19 * USD)], [(later.credit_id, 11 * USD)]]
    assert [invoice.content.due.nano_usd for invoice in (first, second)] == [0, 18 * USD]
    listed, token = [], ""
    while True:
        page = await ask(mesh, tenant, "ListCredits", pb.ListCreditsRequest(page_size=2, page_token=token))
        listed += [(credit.credit_id, credit.remaining.nano_usd) for credit in page.credits]
        token = page.next_page_token
        if not token:
            break
    assert listed == [(later.credit_id, 0), (sooner.credit_id, 0), (expired.credit_id, 99 * USD)]
    assert await recomputed(mesh, tenant) == []


async def test_a_page_of_credits_reads_that_page(mesh: Mesh) -> None:
    """Of many credits a page fetches its own and one more, from the index; together the pages are all, in the order they were granted."""
    tenant = mesh.new_tenant()
    granted = [(await grant(mesh, tenant, USD + number)).credit_id for number in range(9)]
    async with mesh.app.database.transaction(TenantId(tenant.id)) as connection:
        await connection.execute("SET LOCAL enable_seqscan = off; SET LOCAL enable_sort = off; SET LOCAL enable_bitmapscan = off")
        plan = await connection.fetch(f"EXPLAIN {SELECT_NEXT_CREDITS}", tenant.id, 3, datetime.now(UTC), UUID(int=0))
    assert any("credits_by_record_time" in row[0] and "Index" in row[0] for row in plan) and not any("Sort" in row[0] for row in plan)
    listed, token = [], ""
    while True:
        page = await ask(mesh, tenant, "ListCredits", pb.ListCreditsRequest(page_size=2, page_token=token))
        assert len(page.credits) <= 2
        listed += [credit.credit_id for credit in page.credits]
        token = page.next_page_token
        if not token:
            break
    assert listed == granted


async def test_a_credit_is_granted_once_for_its_id(mesh: Mesh) -> None:
    """A repeat answers the first; the same id with another amount is a conflict with both digests."""
    tenant, credit_id = mesh.new_tenant(), str(new_uuid7())
    first = await grant(mesh, tenant, USD, credit_id=credit_id)
    assert await grant(mesh, tenant, USD, credit_id=credit_id) == first
    with pytest.raises(MeshError) as refused:
        await grant(mesh, tenant, 2 * USD, credit_id=credit_id)
    assert (refused.value.code, refused.value.reason_name) == (grpc.StatusCode.ALREADY_EXISTS, "CONTENT_CONFLICT")
    assert len({refused.value.metadata["stored_digest"], refused.value.metadata["request_digest"]}) == 2
    assert (await rows_of(mesh, tenant))[1] == 1


async def test_credit_notes_stand_beside_an_invoice_and_never_pass_it(mesh: Mesh) -> None:
    """The invoice stays bit for bit; notes are issued once for their id and together take back at most what was due."""
    tenant, note_id = mesh.new_tenant(), str(new_uuid7())
    await subscribe(mesh, tenant, "starter", ended(3).start_time)
    invoice = await close(mesh, tenant, ended(2))
    for _ in range(2):
        found = await noted(mesh, tenant, invoice.invoice_id, 20 * USD, note_id)
    assert (found.content, found.digest) == (invoice.content, invoice.digest)
    assert [note.amount.nano_usd for note in found.credit_notes] == [20 * USD]
    for amount, known, reason in ((10 * USD, "", "INVALID_REQUEST"), (1, note_id, "CONTENT_CONFLICT")):
        with pytest.raises(MeshError) as refused:
            await noted(mesh, tenant, invoice.invoice_id, amount, known)
        assert refused.value.reason_name == reason
    found = await noted(mesh, tenant, invoice.invoice_id, 9 * USD)
    assert sum(note.amount.nano_usd for note in found.credit_notes) == 29 * USD
    assert await recomputed(mesh, tenant) == []


@pytest.mark.parametrize("field", ["effective_time", "expire_time"])
async def test_a_credit_at_the_ends_of_the_calendar_is_refused(mesh: Mesh, field: str) -> None:
    """The database keeps them as infinities, which no period compares with: the tenant's periods could never be closed again."""
    tenant = mesh.new_tenant()
    await subscribe(mesh, tenant, "starter", ended(1).start_time)
    moment = Timestamp(seconds=-62_135_596_800) if field == "effective_time" else Timestamp(seconds=253_402_300_799, nanos=999_999_000)
    with pytest.raises(MeshError) as refused:
        await grant(mesh, tenant, USD, **{field: moment})
    assert (refused.value.reason_name, refused.value.metadata["field"]) == ("INVALID_REQUEST", field)
    assert (await close(mesh, tenant, ended(1))).content.due.nano_usd == 29 * USD
