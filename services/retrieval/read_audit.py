"""What callers from outside read of a tenant's documents, recorded before it is answered. A call's own searches are recorded by the call.

Without the record there is no answer: the audit log lives where credentials are judged, so a caller that could be let in can be recorded.
"""

import json
from collections.abc import Awaitable, Callable, Iterable, Sequence
from datetime import UTC, datetime
from uuid import UUID

import structlog

from mesh.common.v1 import error_reason_pb2
from services.kernel.audit_client import AuditEntry
from services.kernel.batching import Batcher
from services.kernel.errors import MeshError, Unavailable
from services.kernel.halving import each_by_halves
from services.kernel.ids import new_uuid7
from services.kernel.request_context import (
    EXTERNAL,
    client_call_id,
    current_caller,
    current_peer_address,
    current_tenant,
    current_tenant_id,
)

log = structlog.get_logger(__name__)

DOCUMENTS_READ = "DOCUMENTS_READ"
_MAX_BATCH = 200
_REFUSALS = frozenset({error_reason_pb2.ERROR_REASON_INVALID_REQUEST, error_reason_pb2.ERROR_REASON_CALLER_NOT_ALLOWED})


class ReadAudit:
    """Records reads, many callers' at a time. `record` is the audit log's own answer, one an entry."""

    def __init__(self, record: Callable[[Sequence[AuditEntry]], Awaitable[Sequence[bool]]]) -> None:
        self._record = record
        self._batcher: Batcher[AuditEntry, bool] = Batcher(self._flush, max_batch=_MAX_BATCH, max_in_flight=2)

    async def documents_read(self, method: str, document_ids: Iterable[UUID]) -> None:
        """Returns once it is durable that the caller at hand was shown these documents. Raises: Unavailable."""
        documents = tuple(dict.fromkeys(document_ids))
        if not documents or current_caller() != EXTERNAL:
            return
        tenant = current_tenant()
        entry = AuditEntry(
            tenant_id=current_tenant_id(),
            audit_id=new_uuid7(),
            action=DOCUMENTS_READ,
            occur_time=datetime.now(UTC),
            context_token=tenant.token,
            call_id=client_call_id(),
            document_ids=documents,
            detail=json.dumps({"method": method}, separators=(",", ":")),
            peer_address=current_peer_address(),
        )
        if not await self._batcher.submit(entry):
            raise Unavailable("tenant", "what you read could not be recorded; try again shortly")

    async def _flush(self, entries: list[AuditEntry]) -> Sequence[bool | Exception]:
        # Many callers' entries: one that is refused is that caller's alone, and its refusal is between the services.
        answers = await each_by_halves(entries, self._record, _is_refusal)
        for answer in answers:
            if isinstance(answer, MeshError):
                log.error("read_not_recorded", reason=answer.reason_name, field=answer.metadata.get("field", ""))
        return [answer is True for answer in answers]

    async def close(self) -> None:
        """Waits for what is under way."""
        await self._batcher.close()


def _is_refusal(error: Exception) -> bool:
    return isinstance(error, MeshError) and error.reason in _REFUSALS
