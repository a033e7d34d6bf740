"""Tells the limits of every end of a call, at least once: at once from memory, and from the outbox table whatever memory lost.

A row leaves the table only after the limits answered that it is done.
"""

import asyncio
import contextlib
import random
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Protocol

import structlog

from services.kernel.errors import MeshError

log = structlog.get_logger(__name__)

BATCH = 1_000
_MAX_WAITING = 20_000
_AWAY_SECONDS = 1.0
_DELETE_GATHER_SECONDS = 0.05
_MAX_BACKOFF_SECONDS = 2.0
# What the limits take to load the snapshot that they have just been sent.
_LOAD_SECONDS = 0.1


class EndKind(IntEnum):
    """What the ledger decided; the numbers are the contract's CommitKind."""

    SETTLED = 1
    VOID = 2
    PIN = 3


@dataclass(frozen=True, slots=True)
class CallEnd:
    """One row of the outbox: an end of a call, decided in an epoch; tokens and cost are 0 unless settled, `output_tokens` of the tokens."""

    tenant_id: bytes
    reservation_id: bytes
    kind: EndKind
    epoch: int
    tokens: int = 0
    cost_nano_usd: int = 0
    output_tokens: int = 0


class Limits(Protocol):
    """The limits, as the relay sees them."""

    async def commit(self, ends: Sequence[CallEnd]) -> Sequence[bool]:
        """Applies ends and answers for each whether it is done. Raises: MeshError when the limits do not answer."""
        ...


class OutboxStore(Protocol):
    """The outbox table, for all tenants."""

    async def delete(self, ends: Sequence[CallEnd]) -> None:
        """Removes ends that are done."""
        ...

    async def hasten(self, tenant_ids: Sequence[bytes]) -> None:
        """Makes what was put off for these tenants due now."""
        ...

    async def relay_due(self, most: int, send: Callable[[Sequence[CallEnd]], Awaitable[Sequence[bool]]]) -> tuple[int, int]:
        """Sends due rows nobody else is sending, deletes those done and puts off the others. Returns how many were sent and done."""
        ...


class OutboxRelay:
    """Three loops for `BackgroundTasks`: `run_sender`, `run_deleter` and `run_poller`."""

    def __init__(self, store: OutboxStore, limits: Limits, *, poll_seconds: float = 1.0) -> None:
        self._store = store
        self._limits = limits
        self._poll_seconds = poll_seconds
        self._waiting: deque[CallEnd] = deque()
        self._done: list[CallEnd] = []
        self._something_waits = asyncio.Event()
        self._something_done = asyncio.Event()
        # Tenants whose limits were rebuilt since the last look at the table.
        self._rebuilt: set[bytes] = set()
        self._something_rebuilt = asyncio.Event()
        self._away_until = 0.0
        self._taken = self._told = 0
        self._telling = asyncio.Condition()

    def send(self, ends: Iterable[CallEnd]) -> None:
        """Takes ends just committed to the table. May drop them (limits away, too many waiting): the poller finds them there."""
        if time.monotonic() < self._away_until or len(self._waiting) >= _MAX_WAITING:
            return
        before = len(self._waiting)
        self._waiting.extend(ends)
        self._taken += len(self._waiting) - before
        if self._waiting:
            self._something_waits.set()

    def rebuilt(self, tenant_id: bytes) -> None:
        """Has the limits told soon what they could not take while they had no counters of the tenant: they are being sent a snapshot."""
        self._rebuilt.add(tenant_id)
        self._something_rebuilt.set()

    async def told(self, *, within_seconds: float) -> None:
        """Returns when the limits answered all that was taken so far, or could not be told, or the time is over."""
        ticket = self._taken
        if self._told >= ticket:
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(within_seconds), self._telling:
                await self._telling.wait_for(lambda: self._told >= ticket)

    async def run_sender(self) -> None:
        """Sends what `send` took, in batches, as soon as it comes."""
        while True:
            await self._something_waits.wait()
            self._something_waits.clear()
            while self._waiting:
                batch = [self._waiting.popleft() for _ in range(min(BATCH, len(self._waiting)))]
                await self._send_now(batch)
                async with self._telling:
                    self._told = self._taken - len(self._waiting)
                    self._telling.notify_all()

    async def run_deleter(self) -> None:
        """Deletes what is done, many at a time: nothing waits for it, and repeating an end is harmless."""
        while True:
            await self._something_done.wait()
            await asyncio.sleep(_DELETE_GATHER_SECONDS)
            self._something_done.clear()
            done, self._done = self._done, []
            try:
                await self._store.delete(done)
            except MeshError as error:
                log.warning("outbox_delete_failed", rows=len(done), reason=error.reason_name)

    async def run_poller(self) -> None:
        """Sends what is left in the table, backing off while the limits do not answer."""
        pause = self._poll_seconds
        while True:
            await self._rest(pause * random.uniform(0.8, 1.2))  # noqa: S311 - jitter
            try:
                await self._hasten()
                sent, done = await self._store.relay_due(BATCH, self._limits.commit)
            except MeshError as error:
                pause = min(max(pause, self._poll_seconds) * 2, _MAX_BACKOFF_SECONDS)
                log.warning("outbox_relay_failed", reason=error.reason_name, retry_seconds=round(pause, 3))
                continue
            # A full batch means more is waiting; one that got nowhere must not spin.
            pause = 0.0 if sent == BATCH and done else self._poll_seconds

    async def _rest(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._something_rebuilt.wait()
                await asyncio.sleep(_LOAD_SECONDS)
        self._something_rebuilt.clear()

    async def _hasten(self) -> None:
        if tenant_ids := tuple(self._rebuilt):
            await self._store.hasten(tenant_ids)
            # Only now: what failed is asked for again at the next look.
            self._rebuilt.difference_update(tenant_ids)

    async def _send_now(self, batch: list[CallEnd]) -> None:
        try:
            answers = await self._limits.commit(batch)
        except MeshError as error:
            self._away_until = time.monotonic() + _AWAY_SECONDS
            self._waiting.clear()
            log.warning("limits_do_not_answer", reason=error.reason_name, left_in_outbox=len(batch))
            return
        self._done.extend(end for end, done in zip(batch, answers, strict=True) if done)
        if self._done:
            self._something_done.set()
