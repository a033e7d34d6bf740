"""What a tenant reads of its invoices: every line's records, documents to print, pages of its own and of nobody else's."""

import csv
import io
import re
from datetime import UTC, timedelta

import orjson
import pytest

from mesh.metering.v1 import invoice_service_pb2 as pb
from services.kernel.errors import MeshError
from services.kernel.ids import new_uuid7
from tests.metering.billing import (
    USD,
    ask,
    close,
    ended,
    grant,
    noted,
    subscribe,
    use_tokens,
    use_units,
    used_starter,
)
from tests.metering.mesh import Mesh, Tenant

HOUR = timedelta(hours=1)


async def entries_of(mesh: Mesh, tenant: Tenant, invoice_id: str, line_number: int, size: int) -> list[pb.InvoiceLineEntry]:
    """Every record behind a line, page by page."""
    found: list[pb.InvoiceLineEntry] = []
    token = ""
    while True:
        request = pb.ListInvoiceLineEntriesRequest(invoice_id=invoice_id, line_number=line_number, page_size=size, page_token=token)
        page = await ask(mesh, tenant, "ListInvoiceLineEntries", request)
        found += page.entries
        token = page.next_page_token
        if not token:
            return found


async def test_every_line_of_usage_traces_to_its_records(mesh: Mesh) -> None:
    """Pages hold each record once; what they add up to is what the tiers of the line divide; a fee has none."""
    tenant = mesh.new_tenant()
    await subscribe(mesh, tenant, "starter", ended(3).start_time)
    await use_tokens(mesh, tenant, ended(2).start_time + HOUR, [1_000_000, *range(1, 8)])
    await use_units(mesh, tenant, ended(2).start_time + HOUR, quantity=5)
    first = await close(mesh, tenant, ended(2))
    await use_tokens(mesh, tenant, ended(2).start_time + HOUR, [40, 50])
    await use_tokens(mesh, tenant, ended(1).start_time + HOUR, [7])
    second = await close(mesh, tenant, ended(1))
    for invoice, name, is_late, count in (
        (first, "calls.tokens", False, 8),
        (first, "ai_interviews", False, 1),
        (second, "calls.tokens", True, 2),
        (second, "calls.tokens", False, 1),
        (second, "base", False, 0),
    ):
        lines = [line for line in invoice.content.lines if line.name == name and line.is_late == is_late]
        for line in lines:
            entries = await entries_of(mesh, tenant, invoice.invoice_id, line.line_number, 3)
            assert len({entry.usage_id for entry in entries}) == len(entries) == count
            if count:
                assert sum(entry.quantity for entry in entries) == sum(each.quantity for each in lines)
                source = pb.USAGE_SOURCE_CALL if name.startswith("calls.") else pb.USAGE_SOURCE_UNIT
                assert {entry.source for entry in entries} == {source}
                assert all(
                    line.span_start.ToNanoseconds() <= entry.use_time.ToNanoseconds() < line.span_end.ToNanoseconds() for entry in entries
                )
    with pytest.raises(MeshError) as refused:
        await entries_of(mesh, tenant, first.invoice_id, 99, 3)
    assert refused.value.metadata == {"resource": "invoice_line"}


async def test_invoice_is_rendered_as_json_csv_and_a_page_that_escapes_everything(mesh: Mesh) -> None:
    """Each form holds every line and the exact sums; the page has neither script nor address, and no text becomes markup."""
    tenant = await used_starter(mesh)
    invoice = await close(mesh, tenant, ended(2))
    await noted(mesh, tenant, invoice.invoice_id, USD, reason='<script>alert("1")</script> & more')
    documents = {
        form: (await ask(mesh, tenant, "RenderInvoice", pb.RenderInvoiceRequest(invoice_id=invoice.invoice_id, format=form)))
        for form in (pb.INVOICE_FORMAT_JSON, pb.INVOICE_FORMAT_CSV, pb.INVOICE_FORMAT_HTML)
    }
    read = orjson.loads(documents[pb.INVOICE_FORMAT_JSON].document)
    assert [line["amount_nano_usd"] for line in read["lines"]] == [line.amount.nano_usd for line in invoice.content.lines]
    assert (read["due_nano_usd"], read["digest"]) == (invoice.content.due.nano_usd, invoice.digest)
    assert read["payable_nano_usd"] == read["due_nano_usd"] - USD
    rows = list(csv.DictReader(io.StringIO(documents[pb.INVOICE_FORMAT_CSV].document.decode())))
    assert sum(int(row["amount_nano_usd"]) for row in rows if row["line_number"]) == invoice.content.charges.nano_usd
    assert (rows[-1]["description"], rows[-1]["amount_usd"]) == ("Due", "34.03")
    told = [(row["name"], row["is_late"], row["period_start"]) for row in rows if row["line_number"]]
    assert told == [(line.name, "false", line.period_start.ToDatetime(UTC).isoformat()) for line in invoice.content.lines]
    page = documents[pb.INVOICE_FORMAT_HTML].document.decode()
    assert "&lt;script&gt;alert(&quot;1&quot;)&lt;/script&gt; &amp; more" in page
    assert not re.search(r"<script|https?:|src=|@import|url\(|<link", page, re.IGNORECASE)
    assert "@media print" in page
    assert page.count("<tr><td>") == len(invoice.content.lines) + 1
    assert documents[pb.INVOICE_FORMAT_HTML].media_type == "text/html; charset=utf-8"


async def test_another_tenants_invoice_is_not_there(mesh: Mesh) -> None:
    """Reading, rendering, tracing and crediting a foreign invoice answer as one that never was; lists are each tenant's own."""
    owner, stranger = await used_starter(mesh), mesh.new_tenant()
    invoice_id = (await close(mesh, owner, ended(2))).invoice_id
    await grant(mesh, owner, USD)
    token = (await ask(mesh, owner, "ListInvoices", pb.ListInvoicesRequest(page_size=1))).next_page_token
    assert token == ""
    for found in (invoice_id, str(new_uuid7())):
        for method, request in (
            ("GetInvoice", pb.GetInvoiceRequest(invoice_id=found)),
            ("RenderInvoice", pb.RenderInvoiceRequest(invoice_id=found, format=pb.INVOICE_FORMAT_CSV)),
            ("ListInvoiceLineEntries", pb.ListInvoiceLineEntriesRequest(invoice_id=found, line_number=1)),
        ):
            with pytest.raises(MeshError) as refused:
                await ask(mesh, stranger, method, request)
            assert (refused.value.reason_name, refused.value.metadata) == ("NOT_FOUND", {"resource": "invoice"})
        with pytest.raises(MeshError) as refused:
            await noted(mesh, stranger, found, 1)
        assert refused.value.reason_name == "NOT_FOUND"
    assert not (await ask(mesh, stranger, "ListInvoices", pb.ListInvoicesRequest())).invoices
    assert not (await ask(mesh, stranger, "ListCredits", pb.ListCreditsRequest())).credits


async def test_invoices_are_listed_page_by_page(mesh: Mesh) -> None:
    """First first, each once; a token of another making is refused."""
    tenant = mesh.new_tenant()
    await subscribe(mesh, tenant, "starter", ended(5).start_time)
    for ago in (4, 3, 2):
        await close(mesh, tenant, ended(ago))
    first = await ask(mesh, tenant, "ListInvoices", pb.ListInvoicesRequest(page_size=2))
    rest = await ask(mesh, tenant, "ListInvoices", pb.ListInvoicesRequest(page_size=2, page_token=first.next_page_token))
    assert [[invoice.number for invoice in page.invoices] for page in (first, rest)] == [[1, 2], [3]]
    assert rest.next_page_token == ""
    with pytest.raises(MeshError) as refused:
        await ask(mesh, tenant, "ListCredits", pb.ListCreditsRequest(page_token=first.next_page_token))
    assert refused.value.metadata["field"] == "page_token"
