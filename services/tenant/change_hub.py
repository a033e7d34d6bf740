"""The feed of changes, read once a process and told to every watcher. Vouches for nothing it has not just read.

A watcher is told every change after the one it names, or to forget everything when that cannot be promised. Who reads too slowly is cut.
"""

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from services.kernel.errors import Unavailable
from services.kernel.ids import TenantId

# The tenant of a change that concerns everybody.
POLL_SECONDS = 0.2
VOUCHED_SECONDS = 0.5
_FIRST_READ_SECONDS = 2.0
_TRIM_SECONDS = 300.0
_REMEMBERED = 10_000
_PAGE = 1_000
_QUEUE = 64


class ChangeKind(StrEnum):
    """What changed. A kind is only ever added: watchers of older versions take one they do not know for a change of everything."""

    KEY = "KEY"
    STATE = "STATE"
    CONFIG = "CONFIG"
    ISSUER = "ISSUER"
    DOMAIN = "DOMAIN"
    PLACEMENT = "PLACEMENT"
    FLAGS = "FLAGS"
    PLANS = "PLANS"
    DATA_KEY = "DATA_KEY"


@dataclass(frozen=True, slots=True)
class Change:
    """One row of the feed; `change_id` rises in the order of commits."""

    change_id: int
    tenant_id: TenantId
    kind: str


@dataclass(frozen=True, slots=True)
class Notice:
    """What one read found; `read_at` is when it began, on time.monotonic()."""

    change_id: int
    changes: Sequence[Change]
    read_at: float
    forget_everything: bool = False


class ChangeStore(Protocol):
    """Where changes are kept, for an hour at least."""

    async def read_newest(self, limit: int) -> Sequence[Change]:
        """Returns the newest changes, oldest first. Raises: Unavailable."""
        ...

    async def read_after(self, change_id: int, limit: int) -> Sequence[Change]:
        """Returns the oldest changes after one, oldest first. Raises: Unavailable."""
        ...

    async def trim(self) -> None:
        """Removes what need not be kept any longer. Raises: Unavailable."""
        ...


class _Watcher:
    """One stream's queue; `None` in it is the end."""

    def __init__(self) -> None:
        self.queue: asyncio.Queue[Notice | None] = asyncio.Queue(_QUEUE)
        self.failure: Unavailable | None = None
        self.is_cut = False

    def tell(self, notice: Notice) -> bool:
        """Queues a notice; False when the watcher is too slow for it."""
        if self.queue.full():
            return False
        self.queue.put_nowait(notice)
        return True

    def cut(self, failure: Unavailable | None) -> None:
        """Ends the stream with what it has not read yet thrown away: that would be late, and it will come back."""
        self.failure, self.is_cut = failure, True
        while not self.queue.empty():
            self.queue.get_nowait()
        self.queue.put_nowait(None)


class ChangeHub:
    """Reads the table every 200 ms, and at once when woken; remembers the newest 10,000 changes for watchers that come back."""

    def __init__(self, store: ChangeStore, *, monotonic: Callable[[], float] = time.monotonic, poll_seconds: float = POLL_SECONDS) -> None:
        self._store = store
        self._monotonic = monotonic
        self._poll_seconds = poll_seconds
        self._changes: deque[Change] = deque(maxlen=_REMEMBERED)
        # Every change after this id is in memory.
        self._floor = 0
        self._newest = 0
        self._read_at: float | None = None
        self._watchers: set[_Watcher] = set()
        self._woken = asyncio.Event()
        self._was_read = asyncio.Event()
        self._is_closed = False

    def wake(self) -> None:
        """Reads now: somebody heard that there is news."""
        self._woken.set()

    def close(self) -> None:
        """Ends every stream, and those that begin later at once: a server that stops must not wait for them."""
        self._is_closed = True
        self._cut_all(None)

    async def run(self) -> None:
        """Reads until cancelled."""
        while True:
            self._woken.clear()
            try:
                is_more = await self._read()
            except Unavailable as error:
                self._go_blind(error)
                is_more = False
            except Exception:
                self._go_blind(Unavailable("postgres"))
                raise
            if not is_more:
                await self._pause()

    async def run_trimmer(self) -> None:
        """Removes old changes until cancelled."""
        while True:
            await asyncio.sleep(_TRIM_SECONDS)
            try:
                await self._store.trim()
            except Unavailable:
                continue

    async def watch(self, after_change_id: int) -> AsyncGenerator[Notice, None]:
        """Yields one notice for each read, the first with all that was missed since `after_change_id`; ends when it is cut.

        Raises: Unavailable while the store cannot be read.
        """
        await self._first_read()
        with self._watching(after_change_id) as watcher:
            while (notice := await watcher.queue.get()) is not None:
                yield notice
            if watcher.failure is not None:
                raise watcher.failure

    @contextmanager
    def _watching(self, after_change_id: int) -> Iterator[_Watcher]:
        watcher = _Watcher()
        # Without an await between the two: no read can come between what is told first and what follows.
        watcher.tell(self._opening(after_change_id))
        self._watchers.add(watcher)
        if self._is_closed:
            watcher.cut(None)
        try:
            yield watcher
        finally:
            self._watchers.discard(watcher)

    def _opening(self, after_change_id: int) -> Notice:
        read_at = self._read_at
        if read_at is None:
            raise Unavailable("postgres")
        # An id from the future is of a database that has since gone back in time, or of a replica that is ahead of this one.
        if self._floor <= after_change_id <= self._newest:
            missed = [change for change in self._changes if change.change_id > after_change_id]
            if len(missed) <= _PAGE:
                return Notice(self._newest, missed, read_at)
        return Notice(self._newest, (), read_at, forget_everything=True)

    async def _first_read(self) -> None:
        if self._read_at is not None and self._monotonic() - self._read_at <= VOUCHED_SECONDS:
            return
        self._was_read.clear()
        self.wake()
        try:
            async with asyncio.timeout(_FIRST_READ_SECONDS):
                await self._was_read.wait()
        except TimeoutError:
            raise Unavailable("postgres") from None

    async def _read(self) -> bool:
        began = self._monotonic()
        if self._read_at is None:
            found = await self._store.read_newest(_REMEMBERED)
            self._changes.clear()
            self._changes.extend(found)
            self._newest = found[-1].change_id if found else 0
            # The oldest of all may be kept with others before it trimmed away: what came before it cannot be promised.
            self._floor = found[0].change_id - 1 if found else 0
            self._told(Notice(self._newest, (), began))
            return False
        found = await self._store.read_after(self._newest, _PAGE)
        for change in found:
            if len(self._changes) == _REMEMBERED:
                self._floor = self._changes[0].change_id
            self._changes.append(change)
        if found:
            self._newest = found[-1].change_id
        self._told(Notice(self._newest, found, began))
        return len(found) == _PAGE

    def _told(self, notice: Notice) -> None:
        self._read_at = notice.read_at
        self._was_read.set()
        for watcher in [watcher for watcher in self._watchers if not watcher.is_cut and not watcher.tell(notice)]:
            watcher.cut(None)

    def _go_blind(self, error: Unavailable) -> None:
        # From the beginning next time: another server may answer then, and what was trimmed meanwhile is missing in between.
        self._read_at = None
        self._cut_all(error)

    def _cut_all(self, failure: Unavailable | None) -> None:
        for watcher in self._watchers:
            if not watcher.is_cut:
                watcher.cut(failure)

    async def _pause(self) -> None:
        try:
            async with asyncio.timeout(self._poll_seconds):
                await self._woken.wait()
        except TimeoutError:
            return
