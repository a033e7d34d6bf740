"""mesh.metering.v1.VerificationService: pages of the walk through the books."""

from datetime import datetime
from uuid import UUID

import structlog

from mesh.metering.v1 import verification_service_pb2 as pb
from mesh.metering.v1 import verification_service_pb2_grpc
from services.kernel.ids import TenantId
from services.kernel.paging import decode_page_token, encode_page_token, refused_page_token
from services.kernel.request_context import current_tenant, operator_reason
from services.metering.verification import Difference, Position, Section, Verifier

log = structlog.get_logger(__name__)

_MOST_NUMBER = 2_147_483_647


class VerificationServicer(verification_service_pb2_grpc.VerificationServiceServicer):
    """Answers a page at a time."""

    def __init__(self, verifier: Verifier) -> None:
        self._verifier = verifier

    async def VerifyLedger(self, request: pb.VerifyLedgerRequest, context: object) -> pb.VerifyLedgerResponse:
        """Compares a part of the books."""
        only = current_tenant().tenant_id
        listing = f"verify|{only or ''}"
        page = await self._verifier.page(only, _position(request.page_token, listing, only))
        if page.part.differences:
            log.error(
                "ledger_differs",
                books_of=str(page.tenant_id),
                differences=len(page.part.differences) + page.part.untold,
                operator=current_tenant().subject,
                reason=operator_reason(),
            )
        at = page.following
        return pb.VerifyLedgerResponse(
            tenant_id="" if page.tenant_id is None else str(page.tenant_id),
            compared_count=page.part.compared,
            differences=[_difference(item) for item in page.part.differences],
            untold_count=page.part.untold,
            summed_months=page.part.summed_months,
            next_page_token="" if at is None else encode_page_token(listing, [str(at.tenant_id), str(int(at.section)), at.after]),
        )


def _position(token: str, listing: str, only: TenantId | None) -> Position | None:
    fields = decode_page_token(token, listing, 3)
    if fields is None:
        return None
    try:
        tenant_id, section = TenantId(UUID(fields[0])), Section(int(fields[1]))
        _refuse_bad_place(section, fields[2])
    except (ValueError, OverflowError):
        raise refused_page_token() from None
    if only is not None and tenant_id != only:
        raise refused_page_token()
    return Position(tenant_id, section, fields[2])


def _refuse_bad_place(section: Section, after: str) -> None:
    match section:
        case Section.CALLS:
            UUID(after)
        case Section.USE:
            moment = datetime.fromisoformat(after)
            # The database keeps the calendar's first and last moment as infinities.
            if moment.tzinfo is None or not 1970 <= moment.year <= 9998:
                raise refused_page_token()
        case Section.INVOICES:
            if not 0 <= int(after) <= _MOST_NUMBER:
                raise refused_page_token()


def _difference(item: Difference) -> pb.LedgerDifference:
    return pb.LedgerDifference(
        check=pb.LedgerCheck.ValueType(int(item.check)),
        subject=item.subject,
        figure=item.figure,
        stored=item.stored,
        recomputed=item.recomputed,
    )
