"""mesh.metering.v1.InvoiceService: drafts and closed invoices for tenants; closings, credits and plans for operators."""

from datetime import UTC, datetime
from uuid import UUID

import structlog
from google.protobuf.timestamp_pb2 import Timestamp

from mesh.metering.v1 import invoice_service_pb2 as pb
from mesh.metering.v1 import invoice_service_pb2_grpc
from services.kernel.errors import InvalidRequest, NotFound
from services.kernel.ids import TenantId, parse_uuid
from services.kernel.paging import cut_page, decode_page_token, encode_page_token, page_size, position_time, refused_page_token
from services.kernel.request_context import current_tenant, current_tenant_id, operator_reason, required_scope
from services.kernel.timestamps import parse_timestamp, to_timestamp
from services.metering.billing.books import (
    BillingBooks,
    CreditGrant,
    CreditPosition,
    EntryPosition,
    LineEntry,
    StoredInvoice,
    line_window,
    numbered_line,
)
from services.metering.billing.charges import LineKind
from services.metering.billing.desk import InvoiceDesk
from services.metering.billing.rendering import render_csv, render_html, render_json
from services.metering.servicers.invoice_messages import content_message, credit_message, invoice_message, positive, refuse_other_currency

log = structlog.get_logger(__name__)

_SINCE_EVER, _FOR_EVER = datetime(1970, 1, 1, tzinfo=UTC), datetime(9999, 1, 1, tzinfo=UTC)
_RENDERINGS = {
    pb.INVOICE_FORMAT_JSON: (render_json, "application/json"),
    pb.INVOICE_FORMAT_CSV: (render_csv, "text/csv; charset=utf-8"),
    pb.INVOICE_FORMAT_HTML: (render_html, "text/html; charset=utf-8"),
}


class InvoiceServicer(invoice_service_pb2_grpc.InvoiceServiceServicer):
    """Reads through the books, and writes through the desk and the books."""

    def __init__(self, books: BillingBooks, desk: InvoiceDesk) -> None:
        self._books = books
        self._desk = desk

    async def GetDraftInvoice(self, request: pb.GetDraftInvoiceRequest, context: object) -> pb.GetDraftInvoiceResponse:
        """Tells what an invoice would say now."""
        moment = _billable(request.at_time, "at_time") if request.HasField("at_time") else None
        period, content = await self._desk.draft(current_tenant_id(), moment, current_tenant().tier)
        return pb.GetDraftInvoiceResponse(content=content_message(period, content))

    async def CloseInvoice(self, request: pb.CloseInvoiceRequest, context: object) -> pb.CloseInvoiceResponse:
        """Closes a period."""
        tenant_id = _named_tenant()
        refuse_other_currency(request.currency)
        start = _billable(request.period_start, "period_start")
        stored = await self._desk.close(tenant_id, start, current_tenant().tier)
        return pb.CloseInvoiceResponse(invoice=invoice_message(stored))

    async def ListInvoices(self, request: pb.ListInvoicesRequest, context: object) -> pb.ListInvoicesResponse:
        """Lists invoices, first first."""
        tenant_id, listing = current_tenant_id(), f"invoices|{current_tenant_id()}"
        position = decode_page_token(request.page_token, listing, 1)
        size = page_size(request.page_size)
        async with self._books.reading(tenant_id) as reader:
            found = await reader.invoices(0 if position is None else _number(position[0]), size + 1)
        page, following = cut_page(found, size, lambda last: encode_page_token(listing, [str(last.invoice.closing.number)]))
        return pb.ListInvoicesResponse(invoices=[invoice_message(stored) for stored in page], next_page_token=following)

    async def GetInvoice(self, request: pb.GetInvoiceRequest, context: object) -> pb.GetInvoiceResponse:
        """Returns an invoice."""
        return pb.GetInvoiceResponse(invoice=invoice_message(await self._stored(request.invoice_id)))

    async def ListInvoiceLineEntries(self, request: pb.ListInvoiceLineEntriesRequest, context: object) -> pb.ListInvoiceLineEntriesResponse:
        """Lists what a line is made of."""
        invoice_id = UUID(int=parse_uuid(request.invoice_id, "invoice_id").int)
        listing = f"entries|{current_tenant_id()}|{invoice_id}|{request.line_number}"
        position, size = _entry_position(request.page_token, listing), page_size(request.page_size)
        async with self._books.reading(current_tenant_id()) as reader:
            stored = await reader.invoice(invoice_id)
            if stored is None:
                raise NotFound("invoice")
            line = numbered_line(stored, request.line_number)
            if line.line.key.kind is not LineKind.USAGE:
                return pb.ListInvoiceLineEntriesResponse()
            window = line_window(await reader.closings(), stored.invoice.closing, line)
            found = await reader.entries(window, position, size + 1)
        page, following = cut_page(
            found, size, lambda last: encode_page_token(listing, [last.use_time.isoformat(), str(last.source), str(last.usage_id)])
        )
        return pb.ListInvoiceLineEntriesResponse(entries=[_entry(entry) for entry in page], next_page_token=following)

    async def RenderInvoice(self, request: pb.RenderInvoiceRequest, context: object) -> pb.RenderInvoiceResponse:
        """Renders an invoice."""
        render, media_type = _RENDERINGS[request.format]
        return pb.RenderInvoiceResponse(document=render(await self._stored(request.invoice_id)), media_type=media_type)

    async def IssueCreditNote(self, request: pb.IssueCreditNoteRequest, context: object) -> pb.IssueCreditNoteResponse:
        """Takes back a part of an invoice."""
        tenant_id = _named_tenant()
        refuse_other_currency(request.currency)
        stored = await self._books.note(
            tenant_id,
            parse_uuid(request.invoice_id, "invoice_id"),
            parse_uuid(request.credit_note_id, "credit_note_id"),
            positive(request.amount),
            _printable(request.reason),
        )
        return pb.IssueCreditNoteResponse(invoice=invoice_message(stored))

    async def GrantCredit(self, request: pb.GrantCreditRequest, context: object) -> pb.GrantCreditResponse:
        """Grants a credit."""
        tenant_id = _named_tenant()
        refuse_other_currency(request.currency)
        effective = _billable(request.effective_time, "effective_time") if request.HasField("effective_time") else _SINCE_EVER
        expiry = _billable(request.expire_time, "expire_time") if request.HasField("expire_time") else None
        if expiry is not None and expiry <= effective:
            raise InvalidRequest("expire_time", "must be after effective_time")
        grant = CreditGrant(
            parse_uuid(request.credit_id, "credit_id"),
            positive(request.amount),
            request.priority,
            effective,
            expiry,
            _printable(request.reason),
        )
        credit = await self._books.grant(tenant_id, grant)
        async with self._books.reading(tenant_id) as reader:
            return pb.GrantCreditResponse(credit=credit_message(credit, await reader.credit_used(credit.credit_id)))

    async def ListCredits(self, request: pb.ListCreditsRequest, context: object) -> pb.ListCreditsResponse:
        """Lists credits, in the order they were granted."""
        listing = f"credits|{current_tenant_id()}"
        position = decode_page_token(request.page_token, listing, 2)
        size = page_size(request.page_size)
        after = None
        if position is not None:
            after = CreditPosition(position_time(position[0]), UUID(int=parse_uuid(position[1], "page_token").int))
        async with self._books.reading(current_tenant_id()) as reader:
            found = await reader.credits_page(after, size + 1)
        page, following = cut_page(
            found, size, lambda last: encode_page_token(listing, [last[0].record_time.isoformat(), str(last[0].credit_id)])
        )
        return pb.ListCreditsResponse(credits=[credit_message(credit, used) for credit, used in page], next_page_token=following)

    async def SetSubscription(self, request: pb.SetSubscriptionRequest, context: object) -> pb.SetSubscriptionResponse:
        """Adds a subscription."""
        tenant_id = _named_tenant()
        moment = _billable(request.effective_time, "effective_time") if request.HasField("effective_time") else None
        if moment is not None and (moment.microsecond or request.effective_time.nanos):
            raise InvalidRequest("effective_time", "must be a whole second: plans are prorated by seconds")
        added = await self._books.subscribe(
            tenant_id, parse_uuid(request.subscription_id, "subscription_id"), request.plan, moment, request.anchor_day
        )
        return pb.SetSubscriptionResponse(plan=added.plan, effective_time=to_timestamp(added.effective_time), anchor_day=added.anchor_day)

    async def _stored(self, invoice_id: str) -> StoredInvoice:
        async with self._books.reading(current_tenant_id()) as reader:
            stored = await reader.invoice(parse_uuid(invoice_id, "invoice_id"))
        if stored is None:
            raise NotFound("invoice")
        return stored


_ALL = 2_147_483_647


def _named_tenant() -> TenantId:
    context = current_tenant()
    if context.tenant_id is None:
        raise InvalidRequest("x-tenant-id", "must name the tenant whose books are changed")
    log.info("books_change_asked_for", method=required_scope().method, operator=context.subject, reason=operator_reason())
    return context.tenant_id


def _billable(stamp: Timestamp, field: str) -> datetime:
    moment = parse_timestamp(stamp, field)
    # The calendar needs a month on either side, and the database keeps its first and last moment as infinities.
    if not _SINCE_EVER <= moment < _FOR_EVER:
        raise InvalidRequest(field, "must be a moment from 1970 to 9998")
    return moment


def _number(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) > _ALL:
        raise refused_page_token()
    return int(text)


def _entry_position(token: str, listing: str) -> EntryPosition | None:
    position = decode_page_token(token, listing, 3)
    if position is None:
        return None
    source = _number(position[1])
    if source > 100:
        raise refused_page_token()
    return EntryPosition(position_time(position[0]), source, parse_uuid(position[2], "page_token"))


def _printable(text: str) -> str:
    if "\x00" in text:
        raise InvalidRequest("reason", "must not hold the character NUL")
    return text


def _entry(entry: LineEntry) -> pb.InvoiceLineEntry:
    return pb.InvoiceLineEntry(
        source=pb.UsageSource.ValueType(entry.source),
        usage_id=str(entry.usage_id),
        use_time=to_timestamp(entry.use_time),
        record_time=to_timestamp(entry.record_time),
        quantity=entry.quantity,
        record_count=entry.record_count,
    )
