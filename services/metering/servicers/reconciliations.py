"""mesh.metering.v1.ReconciliationService: the ledger beside the provider's own account of usage, for operators."""

import time
from datetime import UTC, datetime

import structlog
from google.protobuf.timestamp_pb2 import Timestamp

from mesh.common.v1.money_pb2 import NanoUsd
from mesh.metering.v1 import reconciliation_service_pb2 as pb
from mesh.metering.v1 import reconciliation_service_pb2_grpc
from services.kernel.errors import InvalidRequest, WrongState
from services.kernel.paging import cut_page, decode_page_token, encode_page_token, page_size, position_time
from services.kernel.request_context import current_tenant, operator_reason, remaining_seconds
from services.kernel.timestamps import parse_timestamp, to_timestamp
from services.metering.reconciliation.bucket import Bucket, BucketWidth, bucket_count, buckets
from services.metering.reconciliation.ledger_call import ReportPosition, ReportStore
from services.metering.reconciliation.reconciler import Reconciler
from services.metering.reconciliation.report import Report
from services.metering.servicers.ledger_messages import usage_message

log = structlog.get_logger(__name__)

MOST_BUCKETS = 1_000
_DEFAULT_SECONDS = 30.0
# Left of the call's deadline for the bucket that was begun last.
_RESERVE = 0.5


class ReconciliationServicer(reconciliation_service_pb2_grpc.ReconciliationServiceServicer):
    """Runs the reconciler, where a feed is configured, and reads its reports."""

    def __init__(self, reports: ReportStore, reconciler: Reconciler | None, width: BucketWidth) -> None:
        self._reports = reports
        self._reconciler = reconciler
        self._width = width

    async def ReconcileProvider(self, request: pb.ReconcileProviderRequest, context: object) -> pb.ReconcileProviderResponse:
        """Reconciles the buckets of a stretch of time."""
        if self._reconciler is None:
            raise WrongState("usage_feed", "NOT_CONFIGURED", "there is no usage feed to compare with: set TENANTRY_RECONCILIATION_FEED")
        start = _moment(request.start_time, "start_time")
        end = _moment(request.end_time, "end_time") if request.HasField("end_time") else datetime.now(UTC)
        if end <= start:
            raise InvalidRequest("end_time", "must be after start_time")
        if bucket_count(start, end, self._width) > MOST_BUCKETS:
            raise InvalidRequest("start_time", f"is more than {MOST_BUCKETS} buckets of {self._width} before end_time: ask for parts")
        now = datetime.now(UTC)
        if start > now:
            raise InvalidRequest("start_time", "is in the future: nothing was billed there yet")
        log.info("reconciliation_asked_for", operator=current_tenant().subject, reason=operator_reason(), start_time=start.isoformat())
        until = time.monotonic() + remaining_seconds(_DEFAULT_SECONDS) * _RESERVE
        done = await self._reconciler.run(buckets(start, min(end, now), self._width), until=until)
        return pb.ReconcileProviderResponse(
            bucket_count=done.bucket_count,
            reconciled_count=done.closed_count,
            drifting_count=done.drifting_count,
            next_start_time=to_timestamp(done.next_start),
            set_aside_count=done.set_aside_count,
            future_bucket_count=bucket_count(start, end, self._width) - bucket_count(start, min(end, now), self._width),
        )

    async def ListReconciliations(self, request: pb.ListReconciliationsRequest, context: object) -> pb.ListReconciliationsResponse:
        """Lists reports, last bucket first."""
        listing, size = f"reconciliations|{request.drifting_only}", page_size(request.page_size)
        after = _position(request.page_token, listing)
        found = await self._reports.page(after, size + 1, drifting_only=request.drifting_only)
        page, following = cut_page(found, size, lambda last: encode_page_token(listing, _place(last)))
        return pb.ListReconciliationsResponse(reconciliations=[_message(report) for report in page], next_page_token=following)


def _moment(stamp: Timestamp, field: str) -> datetime:
    moment = parse_timestamp(stamp, field)
    # The database keeps the calendar's first and last moment as infinities.
    if not 1970 <= moment.year <= 9998:
        raise InvalidRequest(field, "must be a moment from 1970 to 9998")
    return moment


def _place(report: Report) -> list[str]:
    return [report.bucket.start.isoformat(), report.bucket.end.isoformat(), report.provider, report.account]


def _position(token: str, listing: str) -> ReportPosition | None:
    position = decode_page_token(token, listing, 4)
    if position is None:
        return None
    return ReportPosition(Bucket(position_time(position[0]), position_time(position[1])), position[2], position[3])


def _message(report: Report) -> pb.Reconciliation:
    counts = report.counts
    return pb.Reconciliation(
        provider=report.provider,
        account=report.account,
        start_time=to_timestamp(report.bucket.start),
        end_time=to_timestamp(report.bucket.end),
        kind=pb.ReconciliationKind.ValueType(report.kind),
        is_complete=report.is_complete,
        run_time=to_timestamp(report.run_time),
        settled=NanoUsd(nano_usd=report.settled_nano_usd),
        unresolved=NanoUsd(nano_usd=report.unresolved_nano_usd),
        feed=NanoUsd(nano_usd=report.feed_nano_usd),
        drift=NanoUsd(nano_usd=report.drift_nano_usd),
        is_drifting=report.is_drifting,
        reconciled_count=counts.reconciled,
        unresolved_count=counts.unresolved,
        unfinished_count=counts.unfinished,
        ambiguous_count=counts.ambiguous,
        unknown_count=counts.unknown,
        missing_count=counts.missing,
        differing_count=counts.differing,
        set_aside_count=report.set_aside_count,
        lines=[
            pb.ReconciliationLine(model=line.model, settled=usage_message(line.settled), feed=usage_message(line.feed))
            for line in report.lines
        ],
    )
