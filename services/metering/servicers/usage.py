"""mesh.metering.v1.UsageService: what the call's own tenant used; for operators, what tenants did."""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from uuid import UUID

from google.protobuf.timestamp_pb2 import Timestamp

from mesh.common.v1.money_pb2 import NanoUsd
from mesh.metering.v1 import usage_service_pb2 as pb
from mesh.metering.v1 import usage_service_pb2_grpc
from services.kernel.errors import InvalidRequest, NotFound
from services.kernel.ids import parse_uuid
from services.kernel.paging import cut_page, page_size
from services.kernel.request_context import current_tenant, current_tenant_id
from services.kernel.timestamps import parse_timestamp, to_timestamp
from services.metering.call import CallState
from services.metering.call_record import CallRecord, UsageStore, page_position, page_token
from services.metering.servicers import usage_query_messages as messages
from services.metering.servicers.ledger_messages import state, usage_message
from services.metering.usage_calendar import Calendars, TenantCalendar, cycle, zone_of
from services.metering.usage_query import GroupUse, RowPosition, UsageQueries, UsageQuery
from services.metering.usage_report import UsageLine, build_report


class UsageServicer(usage_service_pb2_grpc.UsageServiceServicer):
    """Reads the ledger for one tenant, and sums of use for operators."""

    def __init__(self, store: UsageStore, queries: UsageQueries, calendars: Calendars) -> None:
        self._store = store
        self._queries = queries
        self._calendars = calendars

    async def GetUsageReport(self, request: pb.GetUsageReportRequest, context: object) -> pb.GetUsageReportResponse:
        """Sums a period."""
        start = _bound(request.start_time, "start_time") if request.HasField("start_time") else None
        end = _bound(request.end_time, "end_time") if request.HasField("end_time") else None
        sums = await self._store.period(current_tenant_id(), start, end)
        report = build_report(sums.start_time, sums.end_time, sums.groups)
        return pb.GetUsageReportResponse(
            start_time=to_timestamp(report.start_time),
            end_time=to_timestamp(report.end_time),
            lines=[_line(line) for line in report.lines],
            total_cost=NanoUsd(nano_usd=report.total_nano_usd),
            settled_count=report.settled_count,
            void_count=report.void_count,
            open_count=report.open_count,
            unresolved_count=report.unresolved_count,
            outstanding_bound=NanoUsd(nano_usd=report.outstanding_bound_nano_usd),
        )

    async def ListCalls(self, request: pb.ListCallsRequest, context: object) -> pb.ListCallsResponse:
        """Lists calls, newest first."""
        tenant_id = current_tenant_id()
        states = _states(request)
        after = page_position(request.page_token, tenant_id, states)
        size = page_size(request.page_size)
        found = await self._store.page(tenant_id, states, after, size + 1)
        page, following = cut_page(found, size, lambda last: page_token(last, tenant_id, states))
        return pb.ListCallsResponse(calls=[_record(call) for call in page], next_page_token=following)

    async def GetCall(self, request: pb.GetCallRequest, context: object) -> pb.GetCallResponse:
        """Returns one call with its attempts."""
        attempts = await self._store.attempts(current_tenant_id(), UUID(int=parse_uuid(request.call_id, "call_id").int))
        if not attempts:
            raise NotFound("call")
        return pb.GetCallResponse(attempts=[_record(call) for call in attempts])

    async def QueryUsage(self, request: pb.QueryUsageRequest, context: object) -> pb.QueryUsageResponse:
        """Adds up the tenant's use."""
        asked, tenant_id = request.query, current_tenant_id()
        if pb.USAGE_DIMENSION_TENANT in asked.group_by:
            raise InvalidRequest("query.group_by", "a tenant's use has no TENANT dimension: it is all of one tenant")
        calendar = _calendar(asked.time_zone) if asked.time_zone else await self._calendars.of(current_tenant())
        found = await _answered(asked, str(tenant_id), calendar, partial(self._queries.of_tenant, tenant_id))
        return pb.QueryUsageResponse(
            start_time=found.start_time,
            end_time=found.end_time,
            time_zone=calendar.zone_name or "UTC",
            rows=found.rows,
            next_page_token=found.next_page_token,
        )

    async def QueryUsageOfTenants(self, request: pb.QueryUsageOfTenantsRequest, context: object) -> pb.QueryUsageOfTenantsResponse:
        """Adds up tenants' use, for operators."""
        asked, named = request.query, current_tenant().tenant_id
        if pb.USAGE_DIMENSION_USER in asked.group_by or asked.filter.users:
            raise InvalidRequest("query.group_by", "users are told to whom acts for their tenant: ask QueryUsage, naming the tenant")
        tenant_ids = {parse_uuid(text, f"tenant_ids[{index}]") for index, text in enumerate(request.tenant_ids)}
        wanted = sorted(tenant_ids) if named is None else [named]
        calendar = _calendar(asked.time_zone)
        found = await _answered(asked, ",".join(map(str, wanted)), calendar, partial(self._queries.of_tenants, wanted))
        return pb.QueryUsageOfTenantsResponse(
            start_time=found.start_time,
            end_time=found.end_time,
            time_zone=calendar.zone_name or "UTC",
            rows=found.rows,
            next_page_token=found.next_page_token,
        )

    async def GetBalance(self, request: pb.GetBalanceRequest, context: object) -> pb.GetBalanceResponse:
        """Returns what was used of the current cycle."""
        calendar = await self._calendars.of(current_tenant())
        start, end = cycle(datetime.now(UTC), calendar.zone, calendar.anchor_day)
        return messages.balance_response(start, end, await self._queries.balance(current_tenant_id(), start, end))


@dataclass(frozen=True, slots=True)
class _Answered:
    start_time: Timestamp
    end_time: Timestamp
    rows: Sequence[pb.UsageRow]
    next_page_token: str


async def _answered(
    asked: pb.UsageQuery,
    whose: str,
    calendar: TenantCalendar,
    find: Callable[[UsageQuery, RowPosition | None, int], Awaitable[Sequence[GroupUse]]],
) -> _Answered:
    listing = messages.listing_of(whose, asked)
    page = messages.page_of(asked, listing, calendar, datetime.now(UTC))
    query, size = messages.usage_query(asked, page, calendar), page_size(asked.page_size)
    found = await find(query, page.after, size + 1)
    groups, following = cut_page(found, size, lambda last: messages.page_token(listing, page, last))
    return _Answered(to_timestamp(page.start), to_timestamp(page.end), messages.usage_rows(query, groups), following)


def _bound(stamp: Timestamp, field: str) -> datetime:
    moment = parse_timestamp(stamp, field)
    # The database keeps the calendar's first and last moment as infinities.
    if not 1970 <= moment.year <= 9998:
        raise InvalidRequest(field, "must be a moment from 1970 to 9998")
    return moment


def _calendar(zone_name: str) -> TenantCalendar:
    return TenantCalendar(zone_name, zone_of(zone_name, "query.time_zone"), 1)


def _states(request: pb.ListCallsRequest) -> list[CallState]:
    for index, value in enumerate(request.states):
        if value == 0:
            raise InvalidRequest(f"states[{index}]", "must name a state; leave the list empty for all")
    return [CallState(value) for value in request.states]


def _line(line: UsageLine) -> pb.UsageLine:
    return pb.UsageLine(
        model=line.model,
        feature=line.feature,
        price_version=line.price_version,
        call_count=line.call_count,
        usage=usage_message(line.usage),
        cost=NanoUsd(nano_usd=line.cost_nano_usd),
    )


def _record(call: CallRecord) -> pb.CallRecord:
    return pb.CallRecord(
        call_id=str(call.call_id),
        reservation_id=str(call.reservation_id),
        attempt=call.attempt,
        state=state(call.state),
        open_time=to_timestamp(call.open_time),
        end_time=to_timestamp(call.end_time),
        provider=call.provider,
        model=call.model,
        feature=call.feature,
        user=call.user,
        prompt_version=call.prompt_version,
        price_version=call.price_version,
        usage=None if call.usage is None else usage_message(call.usage),
        cost=None if call.cost_nano_usd is None else NanoUsd(nano_usd=call.cost_nano_usd),
        bound=NanoUsd(nano_usd=call.bound_nano_usd),
        entry_id="" if call.entry_id is None else str(call.entry_id),
        end_cause=call.end_cause,
        first_token_ms=call.first_token_ms,
        total_ms=call.total_ms,
    )
