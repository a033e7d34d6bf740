"""The provider's own record of what it bills: JSON lines, append-only, group-committed.

A line is on disk when `durable` returns; one fsync serves every call that waits for it.
Never rewrites a line: the last one of a request counts.
"""

import asyncio
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import orjson

# Flushes the data and the length that finds it; what else fsync flushes (times) bills nobody.
_flush: Callable[[int], None] = getattr(os, "fdatasync", os.fsync)


@dataclass(frozen=True, slots=True)
class Entry:
    """One line: a call as billed so far."""

    request_id: str
    call_id: str | None
    api_key_hash: str
    model: str
    input_tokens: int
    output_tokens: int
    cache_creation_5m: int
    cache_creation_1h: int
    cache_read: int
    outcome: str
    started_at: str
    ended_at: str | None


class Ledger:
    """An open ledger file; lines are written in the order they were recorded."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
        self._end_torn_line()
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="ledger")
        self._lines: list[bytes] = []
        self._waiters: list[asyncio.Future[None]] = []
        self._commit: asyncio.Future[None] | None = None
        self._failure: BaseException | None = None

    def record(self, entry: Entry) -> None:
        """Take a line into the next commit, which happens whether or not anyone waits for it."""
        self._lines.append(orjson.dumps(entry, option=orjson.OPT_APPEND_NEWLINE))
        if self._commit is None:
            # Not now but after this turn of the loop: the calls that arrived together share the fsync.
            asyncio.get_running_loop().call_soon(self._start_commit)

    async def durable(self) -> None:
        """Return when every line recorded so far is on disk. Raises: OSError when it cannot be written."""
        waiter = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        if self._commit is None:
            asyncio.get_running_loop().call_soon(self._start_commit)
        await waiter

    async def folded(self) -> list[dict[str, object]]:
        """Return the last line of each request, in the order the requests began."""
        await self.durable()
        return await asyncio.get_running_loop().run_in_executor(None, fold, self.path)

    async def close(self) -> None:
        """Write what is recorded, then closes the file."""
        try:
            await self.durable()
        finally:
            self._writer.shutdown()
            os.close(self._file)

    def _start_commit(self) -> None:
        if self._commit is not None or not (self._lines or self._waiters):
            return
        batch, self._lines = b"".join(self._lines), []
        waiters, self._waiters = self._waiters, []
        self._commit = asyncio.get_running_loop().run_in_executor(self._writer, self._write, batch)
        self._commit.add_done_callback(lambda commit: self._committed(commit, waiters))

    def _committed(self, commit: asyncio.Future[None], waiters: list[asyncio.Future[None]]) -> None:
        self._commit = None
        # A lost line is never made up for: from here on every call is refused rather than given away.
        self._failure = self._failure or commit.exception()
        for waiter in waiters:
            if waiter.done():
                continue
            if self._failure is None:
                waiter.set_result(None)
            else:
                waiter.set_exception(self._failure)
        self._start_commit()

    def _write(self, batch: bytes) -> None:
        if not batch:
            return
        remaining = memoryview(batch)
        while remaining:
            remaining = remaining[os.write(self._file, remaining) :]
        _flush(self._file)

    def _end_torn_line(self) -> None:
        size = os.fstat(self._file).st_size
        if size and os.pread(self._file, 1, size - 1) != b"\n":
            os.write(self._file, b"\n")


def fold(path: Path) -> list[dict[str, object]]:
    """Return the last line of each request of a ledger file, in the order the requests began; a torn line is passed over."""
    last: dict[str, dict[str, object]] = {}
    with path.open("rb") as lines:
        for line in lines:
            try:
                entry = orjson.loads(line)
            except orjson.JSONDecodeError:
                continue
            last[entry["request_id"]] = entry
    return list(last.values())
