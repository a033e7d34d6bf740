"""Brings what calls left in the outbox to the audit log, at least once. A row goes only after the log answered that it has it."""

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol

import structlog

from services.kernel.audit_client import AuditEntry
from services.kernel.errors import MeshError

log = structlog.get_logger(__name__)

BATCH = 200
POLL_SECONDS = 0.5
_MAX_BACKOFF_SECONDS = 10.0

Send = Callable[[Sequence[AuditEntry]], Awaitable[Sequence[bool]]]


class RelayStore(Protocol):
    """The outbox over all tenants."""

    async def relay_due(self, most: int, send: Send) -> tuple[int, int]:
        """Sends due rows nobody else is sending, deletes those done and puts off the others. Returns how many were sent and done."""
        ...


class AuditRelay:
    """One loop; any number of replicas may run it."""

    def __init__(self, store: RelayStore, send: Send, *, poll_seconds: float = POLL_SECONDS) -> None:
        self._store = store
        self._send = send
        self._poll_seconds = poll_seconds

    async def run(self) -> None:
        """Relays until cancelled, backing off while the log or the database does not answer."""
        pause = self._poll_seconds
        while True:
            await asyncio.sleep(pause * random.uniform(0.8, 1.2))  # noqa: S311 - jitter
            try:
                sent, done = await self._store.relay_due(BATCH, self._send)
            except MeshError as error:
                pause = min(max(pause, self._poll_seconds) * 2, _MAX_BACKOFF_SECONDS)
                log.warning("audit_relay_waits", reason=error.reason_name, retry_seconds=round(pause, 3))
                continue
            if sent > done:
                # The log does not believe the token: a forged row, or a signing key that is no longer published. Kept, never dropped.
                log.error("audit_not_proven", security_event=True, rows=sent - done)
            # A full batch means more is waiting; one that got nowhere must not spin.
            pause = 0.0 if sent == BATCH and done else self._poll_seconds
