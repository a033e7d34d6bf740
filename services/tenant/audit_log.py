"""A tenant's audit log as it is read, proven and added to. Refuses records whose tenant no token proves, of foreign kinds and times."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import Enum, auto
from typing import Protocol
from uuid import UUID

from services.kernel.errors import Unauthenticated
from services.kernel.ids import TenantId
from services.kernel.tenant_context import TenantContext
from services.tenant.audit_chain import AuditRecord, KeptRecord, Link, follow
from services.tenant.audit_head import AuditHead, HeadSigner
from services.tenant.witness import refuse_action, refuse_moment

_VERIFY_PAGE = 500


@dataclass(frozen=True, slots=True)
class AuditFilter:
    """Which records; what is None or empty does not filter. The end is exclusive."""

    start_time: datetime | None = None
    end_time: datetime | None = None
    subject: str = ""
    action: str = ""
    document_id: UUID | None = None
    call_id: UUID | None = None
    user: str = ""


@dataclass(frozen=True, slots=True)
class Witnessed:
    """Something a service saw happen, and the token of the context it happened in."""

    tenant_id: TenantId
    audit_id: UUID
    context_token: str
    occur_time: datetime
    action: str
    target: str
    user: str
    call_id: UUID | None
    document_ids: tuple[UUID, ...]
    detail: str
    peer_address: str


@dataclass(frozen=True, slots=True)
class ProvenRecord:
    """What was witnessed, with the subject that the token proves."""

    witnessed: Witnessed
    subject: str
    source: str


class EarlierHead(Enum):
    """What an earlier head proved."""

    NOT_GIVEN = auto()
    IN_CHAIN = auto()
    MISSING = auto()
    NOT_SIGNED_HERE = auto()


@dataclass(frozen=True, slots=True)
class Verdict:
    """How a chain was found; `first_broken_sequence` is 0 when it holds."""

    record_count: int
    first_broken_sequence: int
    earlier_head: EarlierHead
    head: AuditHead


class AuditStore(Protocol):
    """Where the records are."""

    async def newest(self, tenant_id: TenantId) -> Link:
        """Returns the place of the newest record."""
        ...

    async def hash_at(self, tenant_id: TenantId, sequence: int) -> bytes | None:
        """Returns the hash of one record; None when it is not there."""
        ...

    async def chain_page(self, tenant_id: TenantId, after: int, until: int, limit: int) -> Sequence[KeptRecord]:
        """Returns records by their place, after one and up to another."""
        ...

    async def query(
        self, tenant_id: TenantId, wanted: AuditFilter, before: tuple[datetime, int] | None, limit: int
    ) -> Sequence[AuditRecord]:
        """Returns records older than the position, newest first."""
        ...

    async def record(self, records: Sequence[ProvenRecord]) -> None:
        """Adds records of many tenants durably; those that are there already are left alone."""
        ...


class AuditLog:
    """The log of every tenant. `prove` returns what a token proved at a moment, or raises Unauthenticated."""

    def __init__(
        self,
        store: AuditStore,
        signer: HeadSigner,
        prove: Callable[[str, datetime], Awaitable[TenantContext]],
        clock: Callable[[], datetime],
    ) -> None:
        self._clock = clock
        self._store = store
        self._signer = signer
        self._prove = prove

    async def head(self, tenant_id: TenantId) -> AuditHead:
        """Returns the chain's newest place, signed."""
        return self._signer.sign(tenant_id, await self._store.newest(tenant_id))

    async def query(
        self, tenant_id: TenantId, wanted: AuditFilter, before: tuple[datetime, int] | None, limit: int
    ) -> Sequence[AuditRecord]:
        """Returns records older than the position, newest first."""
        return await self._store.query(tenant_id, wanted, before, limit)

    async def verify(self, tenant_id: TenantId, earlier: AuditHead | None) -> Verdict:
        """Computes the chain anew, page by page, up to where it ended when this was asked."""
        newest = await self._store.newest(tenant_id)
        link, broken = Link(), 0
        while not broken and link.sequence < newest.sequence:
            page = await self._store.chain_page(tenant_id, link.sequence, newest.sequence, _VERIFY_PAGE)
            if not page:
                broken = link.sequence + 1
                break
            link, broken = follow(link, page)
            # Hashing a page takes milliseconds; other calls get their turn between two.
            await asyncio.sleep(0)
        proof = await self._check(tenant_id, earlier)
        return Verdict(link.sequence, broken, proof, self._signer.sign(tenant_id, newest))

    async def _check(self, tenant_id: TenantId, earlier: AuditHead | None) -> EarlierHead:
        if earlier is None:
            return EarlierHead.NOT_GIVEN
        if earlier.tenant_id != tenant_id or not self._signer.vouches_for(earlier):
            return EarlierHead.NOT_SIGNED_HERE
        if earlier.link == Link():
            return EarlierHead.IN_CHAIN
        kept = await self._store.hash_at(tenant_id, earlier.link.sequence)
        return EarlierHead.IN_CHAIN if kept == earlier.link.record_hash else EarlierHead.MISSING

    async def record(self, source: str, items: Sequence[Witnessed]) -> Sequence[bool]:
        """Adds what a service witnessed and answers for each item whether its tenant was proven, and so whether it is in the chain.

        Raises: Forbidden(CALLER_NOT_ALLOWED) for an action that is not the source's to record, InvalidRequest for a time in the future or
        too long ago; nothing of the batch is recorded then.
        """
        now = self._clock()
        for index, item in enumerate(items):
            refuse_action(source, item.action, f"items[{index}].action")
            refuse_moment(item.occur_time, now, f"items[{index}].occur_time")
        proven = [await self._proven(source, item) for item in items]
        records = [record for record in proven if record is not None]
        if records:
            await self._store.record(records)
        return [record is not None for record in proven]

    async def _proven(self, source: str, item: Witnessed) -> ProvenRecord | None:
        try:
            context = await self._prove(item.context_token, item.occur_time)
        except Unauthenticated:
            return None
        return ProvenRecord(item, context.subject, source) if context.tenant_id == item.tenant_id else None
