"""Questions about use as values, answers as messages, and the tokens of their pages."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

from google.protobuf.timestamp_pb2 import Timestamp

from mesh.common.v1.money_pb2 import NanoUsd
from mesh.metering.v1 import usage_service_pb2 as pb
from services.kernel.errors import InvalidRequest
from services.kernel.paging import decode_page_token, encode_page_token, position_time, refused_page_token
from services.kernel.timestamps import parse_timestamp, to_timestamp
from services.metering.call import TokenUsage
from services.metering.usage_calendar import Bucket, TenantCalendar
from services.metering.usage_query import (
    Balance,
    Dimension,
    Failures,
    GroupKey,
    GroupUse,
    Latency,
    Measure,
    RowPosition,
    UsageFilter,
    UsageQuery,
    period,
)

_NAME_COUNT = len(Dimension) - 1
# What the database keeps them in.
_MOST_BUCKETS, _MOST_RANK = 2**31 - 1, 2**63 - 1


@dataclass(frozen=True, slots=True)
class Page:
    """Where a page starts: the period of the first one, and the row it goes on after; None on the first."""

    start: datetime
    end: datetime
    after: RowPosition | None


def listing_of(whose: str, message: pb.UsageQuery) -> str:
    """Names the list that page tokens belong to: whose it is and what was asked, pages aside."""
    asked = pb.UsageQuery()
    asked.CopyFrom(message)
    asked.ClearField("page_size")
    asked.ClearField("page_token")
    return f"usage|{whose}|{hashlib.sha256(asked.SerializeToString(deterministic=True)).hexdigest()}"


def page_of(message: pb.UsageQuery, listing: str, calendar: TenantCalendar, now: datetime) -> Page:
    """Reads where the page starts. Raises: InvalidRequest."""
    position = decode_page_token(message.page_token, listing, 5 + _NAME_COUNT)
    if position is None:
        start = parse_timestamp(message.start_time, "query.start_time") if message.HasField("start_time") else None
        end = parse_timestamp(message.end_time, "query.end_time") if message.HasField("end_time") else None
        return Page(*period(start, end, Bucket(message.bucket), calendar.zone, now), after=None)
    start_text, end_text, rank, bucket, tenant, *names = position
    try:
        key = GroupKey(_bounded(bucket, _MOST_BUCKETS), UUID(tenant), tuple(names))
        after = RowPosition(_bounded(rank, _MOST_RANK), key)
        # A token is no signature: whoever computes one gets no longer period by it.
        start, end = period(position_time(start_text), position_time(end_text), Bucket(message.bucket), calendar.zone, now)
    except (ValueError, InvalidRequest):
        raise refused_page_token() from None
    return Page(start, end, after)


def _bounded(text: str, most: int) -> int:
    number = int(text)
    if abs(number) > most:
        raise refused_page_token()
    return number


def page_token(listing: str, page: Page, last: GroupUse) -> str:
    """Returns the token of the page after a row."""
    key = last.key
    fixed = [page.start.isoformat(), page.end.isoformat(), str(last.rank), str(key.bucket), str(key.tenant_id)]
    return encode_page_token(listing, [*fixed, *key.names])


def usage_query(message: pb.UsageQuery, page: Page, calendar: TenantCalendar) -> UsageQuery:
    """Reads what is asked. Raises: InvalidRequest."""
    wanted = message.filter
    lists = (
        wanted.users,
        wanted.features,
        wanted.models,
        wanted.prompt_versions,
        wanted.providers,
        wanted.tiers,
        wanted.product_units,
        wanted.event_types,
        wanted.refusal_reasons,
        wanted.refusal_rules,
    )
    if any("\x00" in name for names in lists for name in names):
        raise InvalidRequest("query.filter", "names must not contain the NUL character")
    return UsageQuery(
        start=page.start,
        end=page.end,
        zone=calendar.zone,
        bucket=Bucket(message.bucket),
        group_by=frozenset(Dimension(value) for value in message.group_by),
        filter=UsageFilter(*(tuple(names) for names in lists)),
        order_by=Measure(message.order_by),
        ascending=message.ascending,
        with_latencies=message.with_latencies,
    )


def usage_rows(query: UsageQuery, groups: Sequence[GroupUse]) -> list[pb.UsageRow]:
    """Writes groups."""
    starts = [to_timestamp(start) for start in query.bucket_starts()]
    of_tenants = Dimension.TENANT in query.group_by
    return [_row(group, starts[group.key.bucket], of_tenants=of_tenants) for group in groups]


def balance_response(start: datetime, end: datetime, balance: Balance) -> pb.GetBalanceResponse:
    """Writes a balance."""
    return pb.GetBalanceResponse(
        start_time=to_timestamp(start),
        end_time=to_timestamp(end),
        read_time=to_timestamp(balance.read_time),
        cost=NanoUsd(nano_usd=balance.cost_nano_usd),
        settled_count=balance.settled_count,
        tokens=tokens_message(balance.usage),
        units=[pb.UnitBalance(product_unit=unit.product_unit, quantity=unit.quantity) for unit in balance.units],
        outstanding_count=balance.outstanding_count,
        outstanding_bound=NanoUsd(nano_usd=balance.outstanding_nano_usd),
    )


def _row(group: GroupUse, start: Timestamp, *, of_tenants: bool) -> pb.UsageRow:
    user, feature, model, prompt_version, provider, tier, product_unit, event_type, reason, rule = group.key.names
    return pb.UsageRow(
        bucket_start_time=start,
        tenant_id=str(group.key.tenant_id) if of_tenants else "",
        user=user,
        feature=feature,
        model=model,
        prompt_version=prompt_version,
        provider=provider,
        tier=tier,
        product_unit=product_unit,
        event_type=event_type,
        refusal_reason=reason,
        refusal_rule=rule,
        refusal_count=group.refusals,
        settled_count=group.settled,
        void_count=group.void,
        unresolved_count=group.unresolved,
        reconciled_count=group.reconciled,
        retry_count=group.retries,
        failures=_failures(group.failures),
        tokens=tokens_message(group.usage),
        cost=NanoUsd(nano_usd=group.cost_nano_usd),
        quantity=group.quantity,
        is_quantity_cut=group.is_quantity_cut,
        cache_hit_share=group.cache_hit_share,
        first_token=_latency(group.first_token),
        total=_latency(group.total),
    )


def _failures(failures: Failures) -> pb.UsageFailures:
    return pb.UsageFailures(
        refused_count=failures.refused,
        overloaded_count=failures.overloaded,
        provider_failed_count=failures.provider_failed,
        cancelled_count=failures.cancelled,
        deadline_count=failures.deadline,
        lost_count=failures.lost,
        other_count=failures.other,
    )


def tokens_message(usage: TokenUsage) -> pb.UsageTokens:
    """Writes tokens by class."""
    return pb.UsageTokens(
        input_tokens=usage.input,
        output_tokens=usage.output,
        cache_read_tokens=usage.cache_read,
        cache_write_5m_tokens=usage.cache_write_5m,
        cache_write_1h_tokens=usage.cache_write_1h,
    )


def _latency(latency: Latency | None) -> pb.UsageLatency | None:
    if latency is None:
        return None
    return pb.UsageLatency(count=latency.count, p50_ms=latency.p50_ms, p95_ms=latency.p95_ms, p99_ms=latency.p99_ms)
