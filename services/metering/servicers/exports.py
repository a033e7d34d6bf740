"""mesh.metering.v1.ExportService: pages of rows as messages, each with the cursor after it."""

from collections.abc import AsyncIterator, Sequence
from datetime import UTC, datetime, timedelta
from uuid import UUID

from google.protobuf.timestamp_pb2 import Timestamp

from mesh.common.v1.money_pb2 import NanoUsd
from mesh.metering.v1 import export_service_pb2 as pb
from mesh.metering.v1 import export_service_pb2_grpc, invoice_service_pb2
from services.kernel.errors import InvalidRequest
from services.kernel.ids import TenantId
from services.kernel.paging import decode_page_token, encode_page_token, page_size, position_time, refused_page_token
from services.kernel.request_context import current_tenant_id
from services.kernel.timestamps import parse_timestamp, to_timestamp
from services.metering.event import LedgerEvent
from services.metering.servicers.usage_query_messages import tokens_message, usage_rows
from services.metering.usage_calendar import month_start
from services.metering.usage_export import (
    BEFORE_ALL,
    ExportedBooks,
    ExportedEntry,
    ExportKind,
    ExportSpan,
    RowKey,
    day_query,
    place_of_entry,
    place_of_event,
    place_of_use,
    use_position,
)
from services.metering.usage_query import Dimension, UsageQueries
from services.metering.usage_report import refuse_bad_period

_SINCE_EVER, _FOR_EVER = datetime(1970, 1, 1, tzinfo=UTC), datetime(9999, 1, 1, tzinfo=UTC)
# What a position of each kind holds after the span's three moments; of use a bucket, and all names but the tenant's.
_LENGTHS = {ExportKind.ENTRIES: 2, ExportKind.EVENTS: 2, ExportKind.USAGE: len(Dimension)}
_MOST_BUCKETS = 2**31 - 1
# A thousand events whose metadata is as long as may be do not fit a message.
_MOST_METADATA_CHARACTERS = 500_000

Place = Sequence[str]


class ExportServicer(export_service_pb2_grpc.ExportServiceServicer):
    """Streams pages until there are no more."""

    def __init__(self, books: ExportedBooks, queries: UsageQueries) -> None:
        self._books = books
        self._queries = queries

    async def ExportUsage(self, request: pb.ExportUsageRequest, context: object) -> AsyncIterator[pb.ExportUsageResponse]:
        """Streams the tenant's rows."""
        tenant_id, kind, size = current_tenant_id(), ExportKind(request.kind), page_size(request.page_size)
        listing = f"export|{tenant_id}|{int(kind)}|{request.start_time.ToNanoseconds()}|{request.end_time.ToNanoseconds()}"
        span, place = await self._begun(tenant_id, kind, request, listing)
        while True:
            page, following = await self._page(tenant_id, kind, span, place, size)
            if following:
                moments = [moment.isoformat() for moment in (span.start, span.end, span.as_of)]
                page.cursor = encode_page_token(listing, [*moments, *following])
            page.as_of_time.CopyFrom(to_timestamp(span.as_of))
            yield page
            if not following:
                return
            place = following

    async def _begun(self, tenant_id: TenantId, kind: ExportKind, request: pb.ExportUsageRequest, listing: str) -> tuple[ExportSpan, Place]:
        position = decode_page_token(request.cursor, listing, 3 + _LENGTHS[kind])
        if position is not None:
            span = ExportSpan(*(_kept(position_time(text)) for text in position[:3]))
            return span, position[3:]
        now = datetime.now(UTC)
        start = _bound(request.start_time, "start_time") if request.HasField("start_time") else month_start(now, UTC)
        end = _bound(request.end_time, "end_time") if request.HasField("end_time") else _end_of_day(now)
        refuse_bad_period(start, end)
        return ExportSpan(start, end, await self._books.moment(tenant_id)), ()

    async def _page(
        self, tenant_id: TenantId, kind: ExportKind, span: ExportSpan, place: Place, size: int
    ) -> tuple[pb.ExportUsageResponse, Place]:
        match kind:
            case ExportKind.ENTRIES:
                entries = await self._books.entries(tenant_id, span, _key(place, span.start), size)
                following = place_of_entry(entries[-1]) if len(entries) == size else ()
                return pb.ExportUsageResponse(entries=[_entry(entry) for entry in entries]), following
            case ExportKind.EVENTS:
                found = await self._books.events(tenant_id, span, _key(place, _SINCE_EVER), size)
                events = _fitting(found)
                following = place_of_event(events[-1]) if len(found) == size or len(events) < len(found) else ()
                return pb.ExportUsageResponse(events=[_event(event) for event in events]), following
            case ExportKind.USAGE:
                query = day_query(span)
                after = use_position(_bucket(place[0]), place[1:]) if place else None
                groups = await self._queries.of_tenant(tenant_id, query, after, size)
                rest = place_of_use(groups[-1]) if len(groups) == size else ()
                return pb.ExportUsageResponse(uses=usage_rows(query, groups)), rest


def _fitting(events: Sequence[LedgerEvent]) -> Sequence[LedgerEvent]:
    characters = 0
    for count, event in enumerate(events):
        characters += len(event.metadata or "")
        if characters > _MOST_METADATA_CHARACTERS:
            return events[: max(1, count)]
    return events


def _bound(stamp: Timestamp, field: str) -> datetime:
    moment = parse_timestamp(stamp, field)
    # The database keeps the calendar's first and last moment as infinities.
    if not _SINCE_EVER <= moment < _FOR_EVER:
        raise InvalidRequest(field, "must be a moment from 1970 to 9998")
    return moment


def _kept(moment: datetime) -> datetime:
    if not _SINCE_EVER <= moment < _FOR_EVER:
        raise refused_page_token()
    return moment


def _end_of_day(now: datetime) -> datetime:
    return now.replace(hour=0, minute=0, second=0, microsecond=0) + timedelta(days=1)


def _key(place: Place, beginning: datetime) -> RowKey:
    if not place:
        return RowKey(beginning, BEFORE_ALL)
    try:
        return RowKey(_kept(position_time(place[0])), UUID(place[1]))
    except ValueError:
        raise refused_page_token() from None


def _bucket(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) > _MOST_BUCKETS:
        raise refused_page_token()
    return int(text)


def _entry(entry: ExportedEntry) -> pb.ExportedEntry:
    return pb.ExportedEntry(
        entry_id=str(entry.entry_id),
        source=invoice_service_pb2.UsageSource.ValueType(entry.source),
        reservation_id=str(entry.reservation_id),
        call_id="" if entry.call_id is None else str(entry.call_id),
        number=entry.number,
        use_time=to_timestamp(entry.use_time),
        record_time=to_timestamp(entry.record_time),
        provider=entry.provider,
        model=entry.model,
        price_version=entry.price_version,
        feature=entry.feature,
        user=entry.user,
        prompt_version=entry.prompt_version,
        tier=entry.tier,
        tokens=tokens_message(entry.usage),
        cost=NanoUsd(nano_usd=entry.cost_nano_usd),
        product_unit=entry.product_unit,
        quantity=entry.quantity,
    )


def _event(event: LedgerEvent) -> pb.ExportedEvent:
    return pb.ExportedEvent(
        event_id=str(event.event_id),
        id=event.id,
        source=event.source,
        product=event.product,
        type=event.event_type,
        user=event.user,
        feature=event.feature,
        quantity=event.quantity,
        use_time=to_timestamp(event.occurred_at),
        record_time=to_timestamp(event.record_time),
        reverses="" if event.reverses is None else str(event.reverses),
        metadata_json=event.metadata or "",
    )
