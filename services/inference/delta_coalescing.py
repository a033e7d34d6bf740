"""Gathers pieces of text into few messages: the first goes at once, later ones every 25 ms or 2 KB, whichever is first.

One task a stream and one timer a message, never one a token. Keeps at most the rest of the answer for a slow reader.
"""

import asyncio
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Self

FLUSH_SECONDS = 0.025
FLUSH_BYTES = 2048


class DeltaForwarder:
    """Takes text without waiting and writes it on; as a context manager it writes the rest at the end of the block, even a failed one."""

    def __init__(self, write: Callable[[str], Awaitable[None]]) -> None:
        self._write = write
        self._parts: list[str] = []
        self._size = 0
        self._ended = False
        self._wake: asyncio.Future[None] | None = None
        self._wake_size = 1
        self._task: asyncio.Task[None] | None = None

    def add(self, text: str) -> None:
        """Takes the next piece of text."""
        self._parts.append(text)
        self._size += len(text)
        if self._size >= self._wake_size:
            self._signal()

    async def __aenter__(self) -> Self:
        # Owned here: awaited or cancelled by __aexit__, always.
        self._task = asyncio.get_running_loop().create_task(self._forward(), name="delta_forwarder")
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._task is None:
            return
        if isinstance(error, asyncio.CancelledError):
            self._task.cancel()
            await asyncio.wait([self._task])
            _ = self._task.cancelled() or self._task.exception()
            return
        self._ended = True
        self._signal()
        try:
            await self._task
        except asyncio.CancelledError:
            self._task.cancel()
            raise

    async def _forward(self) -> None:
        while True:
            await self._until(1)
            if not self._parts:
                return
            text, self._parts, self._size = "".join(self._parts), [], 0
            await self._write(text)
            await self._until(FLUSH_BYTES, FLUSH_SECONDS)

    async def _until(self, size: int, limit_seconds: float | None = None) -> None:
        if self._ended or self._size >= size:
            return
        loop = asyncio.get_running_loop()
        self._wake, self._wake_size = loop.create_future(), size
        timer = loop.call_later(limit_seconds, self._signal) if limit_seconds is not None else None
        try:
            await self._wake
        finally:
            self._wake = None
            if timer is not None:
                timer.cancel()

    def _signal(self) -> None:
        if self._wake is not None and not self._wake.done():
            self._wake.set_result(None)
