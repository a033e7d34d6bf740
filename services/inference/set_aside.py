"""Records that nobody will take: kept apart with the refusal, counted and logged. They hold up nobody and are not lost in silence."""

import json
from collections.abc import Sequence
from dataclasses import dataclass

import structlog

from mesh.common.v1 import error_reason_pb2
from services.kernel.audit_client import AuditEntry
from services.kernel.errors import MeshError

log = structlog.get_logger(__name__)

_ITEMS = "items["
_ABOUT_ITEMS = frozenset({error_reason_pb2.ERROR_REASON_INVALID_REQUEST, error_reason_pb2.ERROR_REASON_CALLER_NOT_ALLOWED})
MAX_CAUSE_LENGTH = 500


class EntryRefused(Exception):
    """The store takes this entry at no time; alone among others it makes the store refuse them all. The message is the store's rule."""


@dataclass(frozen=True, slots=True)
class SetAside:
    """An entry and why it is kept apart."""

    entry: AuditEntry
    cause: str


class SetAsideCount:
    """How many entries this process has set aside; each is told at error, without its texts."""

    def __init__(self) -> None:
        self.total = 0

    def tell(self, entries: Sequence[SetAside]) -> None:
        """Logs what was set aside."""
        for item in entries:
            self.total += 1
            log.error(
                "audit_entry_set_aside",
                tenant_id=str(item.entry.tenant_id),
                audit_id=str(item.entry.audit_id),
                action=item.entry.action,
                cause=item.cause,
                total=self.total,
            )


def is_about_an_item(error: Exception) -> bool:
    """Tells whether the audit log refused an item by its place, for what it says: the same item is refused at any time."""
    return isinstance(error, MeshError) and error.reason in _ABOUT_ITEMS and error.metadata.get("field", "").startswith(_ITEMS)


def may_be_one_item(error: Exception) -> bool:
    """Tells whether one item among others may be why the log failed: it is looked for, and kept apart from them if it stands alone."""
    return is_about_an_item(error) or (isinstance(error, MeshError) and error.reason == error_reason_pb2.ERROR_REASON_INTERNAL)


def as_json(entry: AuditEntry) -> bytes:
    """Returns the whole entry as JSON in ASCII: whatever its texts hold, a store takes it."""
    plain: dict[str, object] = {
        "tenant_id": str(entry.tenant_id),
        "audit_id": str(entry.audit_id),
        "action": entry.action,
        "occur_time": entry.occur_time.isoformat(),
        "context_token": entry.context_token,
        "user": entry.user,
        "call_id": None if entry.call_id is None else str(entry.call_id),
        "document_ids": [str(document_id) for document_id in entry.document_ids],
        "detail": entry.detail,
        "peer_address": entry.peer_address,
        "target": entry.target,
    }
    return json.dumps(plain).encode("ascii")
