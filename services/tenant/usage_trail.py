"""Uses of keys and refusals, gathered in memory and written in the background: at most one write a key and kind a minute.

Bounded: a flood of refused calls costs one row a minute with its count, not one row a call. Refuses to grow; what does not fit is logged.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol

import structlog

from services.kernel.errors import MeshError
from services.kernel.ids import TenantId
from services.tenant.authentication import AuditAction

log = structlog.get_logger(__name__)

WRITE_SECONDS = 1.0
SAME_EVENT_SECONDS = 60.0
EVENTS_AT_ONCE = 500
_MAX_ENTRIES = 50_000


@dataclass(frozen=True, slots=True)
class KeyUse:
    """A key was used at this time."""

    tenant_id: TenantId
    key_id: str
    use_time: datetime


@dataclass(frozen=True, slots=True)
class AuditEvent:
    """Something that concerns a tenant."""

    tenant_id: TenantId
    action: AuditAction
    subject: str
    target: str
    peer_address: str


class TrailStore(Protocol):
    """Where the trail ends. Each method is one round trip."""

    async def record_last_uses(self, uses: Sequence[KeyUse]) -> None:
        """Writes the last use of each key."""
        ...

    async def append_audit(self, events: Sequence[tuple[AuditEvent, int]]) -> None:
        """Appends each event with how often it happened."""
        ...


class UsageTrailBuffer:
    """The trail of one process. `run` writes it until cancelled; `flush` writes what is due now."""

    def __init__(self, store: TrailStore, *, monotonic: Callable[[], float] = time.monotonic, write_seconds: float = WRITE_SECONDS) -> None:
        self._store = store
        self._write_seconds = write_seconds
        self._monotonic = monotonic
        self._uses: dict[str, KeyUse] = {}
        self._use_noted_at: dict[str, float] = {}
        self._events: dict[AuditEvent, int] = {}
        self._event_written_at: dict[AuditEvent, float] = {}
        self._wake = asyncio.Event()

    def key_used(self, tenant_id: TenantId, key_id: str, now: datetime) -> None:
        """Notes a use of a key, once a minute."""
        at = self._monotonic()
        noted_at = self._use_noted_at.get(key_id)
        if (noted_at is not None and at - noted_at < SAME_EVENT_SECONDS) or len(self._use_noted_at) >= _MAX_ENTRIES:
            return
        self._use_noted_at[key_id] = at
        self._uses[key_id] = KeyUse(tenant_id, key_id, now)
        self._wake.set()

    def audit(self, tenant_id: TenantId, action: AuditAction, subject: str, target: str, peer_address: str) -> None:
        """Notes a refusal; the same one within a minute is counted, not repeated."""
        event = AuditEvent(tenant_id, action, subject, target, peer_address)
        if event not in self._events and len(self._events) >= _MAX_ENTRIES:
            log.warning("audit_trail_full", tenant_id=str(tenant_id), action=action, subject=subject)
            return
        self._events[event] = self._events.get(event, 0) + 1
        self._wake.set()

    async def run(self) -> None:
        """Writes what is due about once a second, until cancelled; a store that is away is tried again."""
        while True:
            await self._wake.wait()
            await asyncio.sleep(self._write_seconds)
            try:
                await self.flush()
            except MeshError as error:
                log.warning("usage_trail_waits", reason=error.reason_name)

    async def flush(self, *, everything: bool = False) -> None:
        """Writes what is due; with `everything` also counts that would wait for their minute. Raises: Unavailable, keeping all."""
        now = self._monotonic()
        self._forget_old(now)
        await self._flush_uses()
        await self._flush_events(now, everything=everything)
        if not self._uses and not self._events:
            self._wake.clear()

    async def _flush_uses(self) -> None:
        uses, self._uses = self._uses, {}
        if not uses:
            return
        try:
            await self._store.record_last_uses(list(uses.values()))
        except BaseException:
            self._uses = {**uses, **self._uses}
            raise

    async def _flush_events(self, now: float, *, everything: bool) -> None:
        due = [event for event in self._events if everything or event not in self._event_written_at]
        # In pieces, a tenant's together: a flood of one tenant's must not make a statement too long to end, nor hold up others' records.
        due.sort(key=lambda event: event.tenant_id)
        for start in range(0, len(due), EVENTS_AT_ONCE):
            await self._write_events(due[start : start + EVENTS_AT_ONCE], now)

    async def _write_events(self, due: Sequence[AuditEvent], now: float) -> None:
        taken = [(event, self._events.pop(event)) for event in due]
        try:
            await self._store.append_audit(taken)
        except BaseException:
            for event, count in taken:
                self._events[event] = self._events.get(event, 0) + count
            raise
        self._event_written_at.update((event, now) for event, _ in taken)

    def _forget_old(self, now: float) -> None:
        self._use_noted_at = {key: at for key, at in self._use_noted_at.items() if now - at < SAME_EVENT_SECONDS}
        self._event_written_at = {event: at for event, at in self._event_written_at.items() if now - at < SAME_EVENT_SECONDS}
