"""AuditService on the wire."""

import hashlib
import json
from datetime import datetime
from uuid import UUID

from google.protobuf.message import Message

from mesh.tenant.v1 import audit_service_pb2 as messages
from mesh.tenant.v1 import audit_service_pb2_grpc
from services.kernel.errors import InvalidRequest
from services.kernel.ids import TenantId, parse_uuid
from services.kernel.paging import cut_page, decode_page_token, encode_page_token, page_size, position_time, refused_page_token
from services.kernel.request_context import current_caller, current_tenant_id
from services.kernel.timestamps import parse_timestamp, to_timestamp
from services.tenant.audit_chain import AuditRecord, Link
from services.tenant.audit_head import AuditHead
from services.tenant.audit_log import AuditFilter, AuditLog, EarlierHead, Witnessed

_EARLIER = {
    EarlierHead.NOT_GIVEN: messages.EARLIER_HEAD_UNSPECIFIED,
    EarlierHead.IN_CHAIN: messages.EARLIER_HEAD_IN_CHAIN,
    EarlierHead.MISSING: messages.EARLIER_HEAD_MISSING,
    EarlierHead.NOT_SIGNED_HERE: messages.EARLIER_HEAD_NOT_SIGNED_HERE,
}


class AuditServicer(audit_service_pb2_grpc.AuditServiceServicer):
    """The audit log of the call's tenant, and the way in for what services witness."""

    def __init__(self, log: AuditLog) -> None:
        self._log = log

    async def QueryAudit(self, request: messages.QueryAuditRequest, context: object) -> messages.QueryAuditResponse:
        """Returns a page of records, newest first."""
        tenant_id, size, listing = current_tenant_id(), page_size(request.page_size), _listing(request)
        found = await self._log.query(tenant_id, _filter(request), _position(request.page_token, listing), size + 1)
        page, following = cut_page(found, size, lambda last: encode_page_token(listing, [last.occur_time.isoformat(), str(last.sequence)]))
        head = await self._log.head(tenant_id)
        return messages.QueryAuditResponse(records=[_record(record) for record in page], next_page_token=following, head=_head(head))

    async def VerifyAuditChain(self, request: messages.VerifyAuditChainRequest, context: object) -> messages.VerifyAuditChainResponse:
        """Computes the chain anew."""
        earlier = _read_head(request.earlier_head) if request.HasField("earlier_head") else None
        verdict = await self._log.verify(current_tenant_id(), earlier)
        return messages.VerifyAuditChainResponse(
            record_count=verdict.record_count,
            first_broken_sequence=verdict.first_broken_sequence,
            earlier_head=_EARLIER[verdict.earlier_head],
            head=_head(verdict.head),
        )

    async def GetAuditHead(self, request: messages.GetAuditHeadRequest, context: object) -> messages.GetAuditHeadResponse:
        """Signs the newest place."""
        return messages.GetAuditHeadResponse(head=_head(await self._log.head(current_tenant_id())))

    async def RecordAudit(self, request: messages.RecordAuditRequest, context: object) -> messages.RecordAuditResponse:
        """Adds what a service witnessed."""
        items = [_witnessed(item, index) for index, item in enumerate(request.items)]
        recorded = await self._log.record(current_caller(), items)
        yes, no = messages.AUDIT_OUTCOME_RECORDED, messages.AUDIT_OUTCOME_TENANT_NOT_PROVEN
        return messages.RecordAuditResponse(outcomes=[yes if done else no for done in recorded])


def _listing(request: messages.QueryAuditRequest) -> str:
    plain: Message = messages.QueryAuditRequest()
    plain.CopyFrom(request)
    for field in ("page_size", "page_token"):
        plain.ClearField(field)
    # A token goes on in the same list of the same tenant alone: a changed filter is another list.
    return f"audit:{current_tenant_id()}:{hashlib.sha256(plain.SerializeToString(deterministic=True)).hexdigest()}"


def _position(token: str, listing: str) -> tuple[datetime, int] | None:
    position = decode_page_token(token, listing, 2)
    if position is None:
        return None
    if not position[1].isdecimal():
        raise refused_page_token()
    return position_time(position[0]), int(position[1])


def _filter(request: messages.QueryAuditRequest) -> AuditFilter:
    start_time = parse_timestamp(request.start_time, "start_time") if request.HasField("start_time") else None
    end_time = parse_timestamp(request.end_time, "end_time") if request.HasField("end_time") else None
    if start_time is not None and end_time is not None and end_time < start_time:
        raise InvalidRequest("end_time", "is before start_time, so that no record fits; swap the two or leave one out")
    return AuditFilter(
        start_time=start_time,
        end_time=end_time,
        subject=request.subject,
        action=request.action,
        document_id=parse_uuid(request.document_id, "document_id") if request.document_id else None,
        call_id=parse_uuid(request.call_id, "call_id") if request.call_id else None,
        user=request.user,
    )


def _witnessed(item: messages.AuditItem, index: int) -> Witnessed:
    return Witnessed(
        tenant_id=TenantId(UUID(bytes=item.tenant_id)),
        audit_id=UUID(bytes=item.audit_id),
        context_token=item.context_token,
        occur_time=parse_timestamp(item.occur_time, f"items[{index}].occur_time"),
        action=item.action,
        target=item.target,
        user=item.user,
        call_id=UUID(bytes=item.call_id) if item.call_id else None,
        document_ids=tuple([UUID(bytes=document_id) for document_id in item.document_ids]),
        detail=_object(item.detail_json, f"items[{index}].detail_json"),
        peer_address=item.peer_address,
    )


def _object(text: str, field: str) -> str:
    # As written: the chain's hash is over the text.
    try:
        fits = not text or isinstance(json.loads(text, parse_constant=_refuse_constant), dict)
    except (ValueError, RecursionError):
        fits = False
    if not fits:
        raise InvalidRequest(field, "must be a JSON object, or empty")
    return text


def _refuse_constant(name: str) -> None:
    # Python reads NaN and Infinity, JSON has none.
    raise ValueError(name)


def _record(record: AuditRecord) -> messages.AuditRecord:
    return messages.AuditRecord(
        sequence=record.sequence,
        audit_id=str(record.audit_id),
        occur_time=to_timestamp(record.occur_time),
        record_time=to_timestamp(record.record_time),
        action=record.action,
        subject=record.subject,
        target=record.target,
        reason=record.reason,
        peer_address=record.peer_address,
        occurrence_count=record.occurrence_count,
        source=record.source,
        user=record.user,
        call_id="" if record.call_id is None else str(record.call_id),
        document_ids=[str(document_id) for document_id in record.document_ids],
        detail_json=record.detail,
        previous_hash=record.previous_hash,
        record_hash=record.record_hash,
    )


def _head(head: AuditHead) -> messages.AuditHead:
    return messages.AuditHead(
        tenant_id=head.tenant_id.bytes,
        sequence=head.link.sequence,
        record_hash=head.link.record_hash,
        sign_time=to_timestamp(head.sign_time),
        key_id=head.key_id,
        signature=head.signature,
    )


def _read_head(head: messages.AuditHead) -> AuditHead:
    link = Link(head.sequence, head.record_hash)
    moment = parse_timestamp(head.sign_time, "earlier_head.sign_time")
    return AuditHead(TenantId(UUID(bytes=head.tenant_id)), link, moment, head.key_id, head.signature)
