"""What a service saw happen in a tenant's name, and the way to its audit log. Refuses nothing: the log judges the proof."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from uuid import UUID

from mesh.tenant.v1 import audit_service_pb2, audit_service_pb2_grpc
from services.kernel.ids import TenantId
from services.kernel.rpc.channel import MeshChannel
from services.kernel.timestamps import to_timestamp

RECORD_TIMEOUT_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class AuditEntry:
    """Something that happened. `detail` is a JSON object as text or empty; the token proves tenant and subject."""

    tenant_id: TenantId
    audit_id: UUID
    action: str
    occur_time: datetime
    context_token: str = field(repr=False)
    user: str = ""
    call_id: UUID | None = None
    document_ids: tuple[UUID, ...] = ()
    detail: str = ""
    peer_address: str = ""
    target: str = ""


class AuditClient:
    """`mesh.tenant.v1.AuditService.RecordAudit`."""

    def __init__(self, channel: MeshChannel) -> None:
        self._channel = channel
        self._stub = audit_service_pb2_grpc.AuditServiceStub(channel.channel)

    async def record(self, entries: Sequence[AuditEntry]) -> Sequence[bool]:
        """Adds entries of many tenants, at most 500, and answers for each whether it is in the log durably.

        Repeatable by audit id. False: its token does not prove its tenant. Raises: MeshError when the log does not answer.
        """
        request = audit_service_pb2.RecordAuditRequest(items=[_item(entry) for entry in entries])
        response = await self._channel.unary(self._stub.RecordAudit, request, timeout_seconds=RECORD_TIMEOUT_SECONDS, idempotent=True)
        return [outcome == audit_service_pb2.AUDIT_OUTCOME_RECORDED for outcome in response.outcomes]


def _item(entry: AuditEntry) -> audit_service_pb2.AuditItem:
    return audit_service_pb2.AuditItem(
        tenant_id=entry.tenant_id.bytes,
        audit_id=entry.audit_id.bytes,
        context_token=entry.context_token,
        occur_time=to_timestamp(entry.occur_time),
        action=entry.action,
        target=entry.target,
        user=entry.user,
        call_id=b"" if entry.call_id is None else entry.call_id.bytes,
        document_ids=[document_id.bytes for document_id in entry.document_ids],
        detail_json=entry.detail,
        peer_address=entry.peer_address,
    )
