"""Brings what calls left in the outbox to the audit log, at least once. A row goes only after the log answered that it has it.

One that the log refuses for what it says is set aside, so that those behind it go on.
"""

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence
from enum import Enum, auto
from typing import Protocol

import structlog

from services.inference.set_aside import SetAside, SetAsideCount, is_about_an_item, may_be_one_item
from services.kernel.audit_client import AuditEntry
from services.kernel.errors import MeshError
from services.kernel.halving import each_by_halves

log = structlog.get_logger(__name__)

BATCH = 200
POLL_SECONDS = 0.5
_MAX_BACKOFF_SECONDS = 10.0

Record = Callable[[Sequence[AuditEntry]], Awaitable[Sequence[bool]]]


class Delivery(Enum):
    """What became of an entry that is not set aside."""

    RECORDED = auto()
    PUT_OFF = auto()


Send = Callable[[Sequence[AuditEntry]], Awaitable[Sequence[Delivery | SetAside]]]


class RelayStore(Protocol):
    """The outbox over all tenants."""

    async def relay_due(self, most: int, send: Send) -> tuple[int, int]:
        """Sends due rows nobody else is sending, deletes those done, sets aside those refused and puts off the others.

        Returns how many were sent and how many of them are gone.
        """
        ...


class AuditRelay:
    """One loop; any number of replicas may run it."""

    def __init__(self, store: RelayStore, record: Record, set_aside: SetAsideCount, *, poll_seconds: float = POLL_SECONDS) -> None:
        self._store = store
        self._record = record
        self._set_aside = set_aside
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
                # A forged row, a signing key that is no longer published, or the log failed at this row alone. Kept, never dropped.
                log.error("audit_not_proven", security_event=True, rows=sent - done)
            # A full batch means more is waiting; one that got nowhere must not spin.
            pause = 0.0 if sent == BATCH and done else self._poll_seconds

    async def _send(self, entries: Sequence[AuditEntry]) -> Sequence[Delivery | SetAside]:
        answers = await each_by_halves(entries, self._record, may_be_one_item)
        sent = [_delivery(entry, answer) for entry, answer in zip(entries, answers, strict=True)]
        self._set_aside.tell([item for item in sent if isinstance(item, SetAside)])
        return sent


def _delivery(entry: AuditEntry, answer: bool | Exception) -> Delivery | SetAside:
    if isinstance(answer, Exception) and is_about_an_item(answer):
        return SetAside(entry, str(answer))
    return Delivery.RECORDED if answer is True else Delivery.PUT_OFF
