"""Who saw what: documents a call is about to show are on record before they leave, and how each call ended follows. Records no texts.

A call whose documents cannot be recorded does not go on. What a call's end says is written right after it and never holds an answer up.
"""

import asyncio
import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Protocol
from uuid import UUID

import structlog

from services.inference.call import Attempt, Question, Ready
from services.inference.set_aside import EntryRefused, SetAside, SetAsideCount
from services.kernel.audit_client import AuditEntry
from services.kernel.batching import Batcher
from services.kernel.errors import MeshError
from services.kernel.halving import each_by_halves
from services.kernel.ids import new_uuid7
from services.kernel.request_context import current_peer_address

log = structlog.get_logger(__name__)

DOCUMENTS_READ = "DOCUMENTS_READ"
CALL_ENDED = "CALL_ENDED"
MAX_BATCH = 200
_GATHER_SECONDS = 0.02
_RETRY_SECONDS = 0.5
# More than any process has calls under way: reached only when the own database stays away, and then no call begins either.
_MAX_WAITING = 50_000


class AuditOutbox(Protocol):
    """Where records wait until the audit log has them."""

    async def add(self, entries: Sequence[AuditEntry]) -> None:
        """Writes entries of many tenants durably, in one round trip; repeatable by audit id.

        Raises: Unavailable; EntryRefused when one of them is not taken at any time, and then none is written.
        """
        ...

    async def set_aside(self, item: SetAside) -> None:
        """Keeps one refused entry apart, durably; repeatable. Raises: Unavailable."""
        ...


class CallAudit:
    """The records of one process's calls. `run` is a background loop of the app."""

    def __init__(self, outbox: AuditOutbox, set_aside: SetAsideCount) -> None:
        self._outbox = outbox
        self._set_aside = set_aside
        self._reads: Batcher[AuditEntry, None] = Batcher(self._add, max_batch=MAX_BATCH, max_in_flight=2)
        self._ended: list[AuditEntry] = []
        self._wake = asyncio.Event()
        self._flushing = asyncio.Lock()

    async def documents_read(self, question: Question, ready: Ready) -> None:
        """Returns once it is durable which documents the call is about to show. Raises: Unavailable, EntryRefused for this call alone."""
        documents = tuple({UUID(chunk.document_id): None for chunk in ready.prompt.chunks})
        if documents:
            detail = {"prompt_version": ready.prompt_version, "model": question.model.name}
            await self._reads.submit(_entry(question, DOCUMENTS_READ, detail, documents))

    def call_ended(self, attempt: Attempt, outcome: str, *, cost_nano_usd: int = 0, cause: str = "") -> None:
        """Notes how an attempt ended: settled, void or unresolved. Never waits, never fails."""
        question, usage = attempt.question, attempt.received.usage
        if len(self._ended) >= _MAX_WAITING:
            log.error("call_end_not_audited", call_id=str(question.call_id), outcome=outcome)
            return
        detail: dict[str, object] = {
            "outcome": outcome,
            "model": question.model.name,
            "reservation_id": str(attempt.ref.reservation_id),
            "input_tokens": usage.input_tokens + usage.cache_read_tokens + usage.cache_write_5m_tokens + usage.cache_write_1h_tokens,
            "output_tokens": usage.output_tokens,
            "cost_nano_usd": cost_nano_usd,
        }
        if cause:
            detail["cause"] = cause
        self._ended.append(_entry(question, CALL_ENDED, detail))
        self._wake.set()

    async def run(self) -> None:
        """Writes what ended, many calls at a time, until cancelled; while the database is away nothing is dropped."""
        while True:
            await self._wake.wait()
            await asyncio.sleep(_GATHER_SECONDS)
            try:
                await self.flush()
            except MeshError as error:
                log.warning("call_ends_wait", count=len(self._ended), reason=error.reason_name)
                await asyncio.sleep(_RETRY_SECONDS)

    async def flush(self) -> None:
        """Writes every end noted so far; one that is refused for good is set aside. Raises: MeshError, keeping what is not written."""
        async with self._flushing:
            while self._ended:
                batch = self._ended[:MAX_BATCH]
                for entry, refusal in zip(batch, await self._add(batch), strict=True):
                    if refusal is not None:
                        aside = SetAside(entry, str(refusal))
                        await self._outbox.set_aside(aside)
                        self._set_aside.tell([aside])
                del self._ended[: len(batch)]
            self._wake.clear()

    async def close(self) -> None:
        """Writes what is left, if the database is there."""
        await self._reads.close()
        try:
            await self.flush()
        except MeshError as error:
            log.error("call_ends_lost", count=len(self._ended), reason=error.reason_name)

    async def _add(self, entries: Sequence[AuditEntry]) -> Sequence[Exception | None]:
        async def add(part: Sequence[AuditEntry]) -> Sequence[None]:
            await self._outbox.add(part)
            return [None] * len(part)

        return await each_by_halves(entries, add, lambda error: isinstance(error, EntryRefused))


def _entry(question: Question, action: str, detail: Mapping[str, object], documents: tuple[UUID, ...] = ()) -> AuditEntry:
    return AuditEntry(
        tenant_id=question.tenant_id,
        audit_id=new_uuid7(),
        action=action,
        occur_time=datetime.now(UTC),
        context_token=question.tenant.token,
        user=question.user,
        call_id=question.call_id,
        document_ids=documents,
        detail=json.dumps(detail, separators=(",", ":")),
        peer_address=current_peer_address(),
    )
