"""The chain of a tenant's audit records: the bytes a record's hash covers, and where a chain breaks. Pure; trusts no hash it is shown.

The database chains records when they are written; here the same is computed apart from it, so that neither can lie alone.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from uuid import UUID

from services.kernel.ids import TenantId

NO_HASH = bytes(32)
_VERSION = b"\x01"
_NULL = b"\xff\xff\xff\xff"
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)


@dataclass(frozen=True, slots=True)
class AuditRecord:
    """One record as it is kept."""

    tenant_id: TenantId
    sequence: int
    audit_id: UUID
    occur_time: datetime
    record_time: datetime
    action: str
    subject: str
    target: str
    reason: str
    peer_address: str
    occurrence_count: int
    source: str
    user: str
    call_id: UUID | None
    document_ids: tuple[UUID, ...]
    detail: str
    previous_hash: bytes
    record_hash: bytes

    def hash(self) -> bytes:
        """Computes SHA-256 over every field but the hash itself: a version byte, then each field behind its length."""
        fields = (
            self.tenant_id.bytes,
            _integer(self.sequence),
            self.audit_id.bytes,
            _moment(self.occur_time),
            _moment(self.record_time),
            self.action.encode(),
            self.subject.encode(),
            self.target.encode(),
            self.reason.encode(),
            self.peer_address.encode(),
            _integer(self.occurrence_count),
            self.source.encode(),
            self.user.encode(),
            None if self.call_id is None else self.call_id.bytes,
            b"".join([document_id.bytes for document_id in self.document_ids]),
            self.detail.encode(),
            self.previous_hash,
        )
        return hashlib.sha256(_VERSION + b"".join([_field(value) for value in fields])).digest()


@dataclass(frozen=True, slots=True)
class Link:
    """A place in a chain: how far it goes and the hash it has there. The empty chain is at 0."""

    sequence: int = 0
    record_hash: bytes = NO_HASH


@dataclass(frozen=True, slots=True)
class KeptRecord:
    """A record and the documents under which it can be found."""

    record: AuditRecord
    found_by: frozenset[UUID]


def follow(start: Link, records: Sequence[KeptRecord]) -> tuple[Link, int]:
    """Follows records in order from a place; returns how far they hold, and the first place where they do not, or 0."""
    link = start
    for kept in records:
        record, expected = kept.record, link.sequence + 1
        holds = (
            record.sequence == expected
            and record.previous_hash == link.record_hash
            and record.record_hash == record.hash()
            and kept.found_by == frozenset(record.document_ids)
        )
        if not holds:
            return link, expected
        link = Link(record.sequence, record.record_hash)
    return link, 0


def _field(value: bytes | None) -> bytes:
    return _NULL if value is None else len(value).to_bytes(4, "big") + value


def _integer(value: int) -> bytes:
    return value.to_bytes(8, "big", signed=True)


def _moment(value: datetime) -> bytes:
    return _integer((value - _EPOCH) // _MICROSECOND)
