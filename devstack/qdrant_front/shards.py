"""The open shards of the engine: opened on first use, closed least recently used first, one call at a time each.

Refuses nothing itself; whoever calls holds the collection's lock. The engine keeps Python's interpreter lock during a call,
so calls to different collections take turns rather than run side by side; the threads keep opening, closing and waiting off the loop.
"""

import asyncio
import contextlib
import shutil
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar
from weakref import WeakValueDictionary

from qdrant_edge import EdgeConfig, EdgeShard

from .catalog import sync_directory
from .failure import Failure, from_engine, internal

ENGINE_THREADS = 4

Result = TypeVar("Result")


class Shards:
    """Shards by collection name, each in its own directory under the root."""

    def __init__(self, root: Path, max_open: int) -> None:
        self._root = root
        self._max_open = max_open
        self._open: OrderedDict[str, EdgeShard] = OrderedDict()
        self._unflushed: set[str] = set()
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._pool = ThreadPoolExecutor(ENGINE_THREADS, thread_name_prefix="qdrant-engine")

    @property
    def open_count(self) -> int:
        """How many shards are open: at most the bound, or as many as have calls in flight if those are more."""
        return len(self._open)

    def lock(self, name: str) -> asyncio.Lock:
        """Return the lock of a collection: first come, first served, so its writes keep their order."""
        lock = self._locks.get(name)
        if lock is None:
            lock = self._locks[name] = asyncio.Lock()
        return lock

    def remove_leftovers(self, known: set[str]) -> None:
        """Remove the directories of collections that were being created or deleted when the last process ended."""
        self._root.mkdir(parents=True, exist_ok=True)
        for directory in self._root.iterdir():
            if directory.name not in known:
                shutil.rmtree(directory)
        sync_directory(self._root)

    async def create(self, name: str, config: EdgeConfig) -> None:
        """Create the shard afresh and leaves it open."""
        await self._make_room()

        def job() -> None:
            self._destroy(name)
            self._open[name] = EdgeShard.create(str(self._root / name), config)
            sync_directory(self._root)

        await self._in_thread(lambda: self._guarded(name, job))

    async def destroy(self, name: str) -> None:
        """Close the shard and removes its directory."""
        await self._in_thread(lambda: self._destroy(name))

    async def call(self, name: str, work: Callable[[EdgeShard], Result], *, writes: bool) -> Result:
        """Run the work on the shard, opening it if needed. A cancelled call still ends before its lock is given up."""
        if name not in self._open:
            await self._make_room()

        def job() -> Result:
            if name not in self._open:
                self._open[name] = EdgeShard.load(str(self._root / name))
            if writes:
                self._unflushed.add(name)
            return work(self._open[name])

        try:
            return await self._in_thread(lambda: self._guarded(name, job))
        finally:
            if name in self._open:
                self._open.move_to_end(name)

    async def flush(self) -> None:
        """Flush every shard written to since its last flush, so that its write-ahead log stays short."""
        for name in tuple(self._unflushed):
            async with self.lock(name):
                if name in self._open:
                    await self._in_thread(lambda flushed=name: self._guarded(flushed, lambda: self._flush(flushed)))  # type: ignore[misc]  # a default binds the loop's value

    async def close(self) -> None:
        """Flush and closes every shard; no call may follow."""
        for name in tuple(self._open):
            async with self.lock(name):
                await self._in_thread(lambda closed=name: self._close(closed))  # type: ignore[misc]  # as in flush
        self._pool.shutdown()

    async def _make_room(self) -> None:
        while len(self._open) >= self._max_open:
            victim = next((name for name in tuple(self._open) if not self.lock(name).locked()), None)
            if victim is None:
                return
            async with self.lock(victim):
                await self._in_thread(lambda closed=victim: self._close(closed))  # type: ignore[misc]  # as in flush

    def _guarded(self, name: str, job: Callable[[], Result]) -> Result:
        try:
            return job()
        except Failure:
            raise
        except Exception as error:
            # The engine raises plain Exception and the three conversions below; anything narrower is a fault of this server.
            if type(error) in (Exception, ValueError, TypeError, OverflowError):
                raise from_engine(error) from error
            raise
        except BaseException as panic:
            # A panic may leave the shard's memory wrong; its files and log are sound, so it is opened anew by the next call.
            self._abandon(name)
            raise internal(f"the engine panicked: {panic}") from panic

    def _flush(self, name: str) -> None:
        self._open[name].flush()
        self._unflushed.discard(name)

    def _close(self, name: str) -> None:
        shard = self._open.pop(name)
        try:
            if name in self._unflushed:
                shard.flush()
        finally:
            self._unflushed.discard(name)
            shard.close()

    def _destroy(self, name: str) -> None:
        self._abandon(name)
        shutil.rmtree(self._root / name, ignore_errors=True)
        sync_directory(self._root)

    def _abandon(self, name: str) -> None:
        shard = self._open.pop(name, None)
        self._unflushed.discard(name)
        if shard is not None:
            with contextlib.suppress(BaseException):
                shard.close()

    async def _in_thread(self, job: Callable[[], Result]) -> Result:
        future = asyncio.get_running_loop().run_in_executor(self._pool, job)
        cancelled: asyncio.CancelledError | None = None
        while not future.done():
            try:
                await asyncio.wait([future])
            except asyncio.CancelledError as error:
                cancelled = error
        if cancelled is not None:
            future.exception()
            raise cancelled
        return future.result()
