"""A bounded cache whose answers are trusted for a limited time, are fetched once for all who wait, and can be forgotten at once."""

import asyncio
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from services.kernel.telemetry.shared_work import context_under, span_parent

Key = TypeVar("Key")
Value = TypeVar("Value")


@dataclass(frozen=True, slots=True)
class _Known(Generic[Value]):
    value: Value
    asked_at: float


class TimedCache(Generic[Key, Value]):
    """Remembers the `capacity` most recently used answers, each for `trusted_seconds` from the moment it was asked for."""

    def __init__(self, capacity: int, trusted_seconds: float, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._capacity = capacity
        self._trusted_seconds = trusted_seconds
        self._monotonic = monotonic
        self._known: OrderedDict[Key, _Known[Value]] = OrderedDict()
        self._fetching: dict[Key, asyncio.Task[Value]] = {}

    def peek(self, key: Key) -> Value | None:
        """Returns the answer while it is trusted, or None, without fetching."""
        known = self._known.get(key)
        if known is None:
            return None
        if self._monotonic() - known.asked_at >= self._trusted_seconds:
            del self._known[key]
            return None
        self._known.move_to_end(key)
        return known.value

    async def get(self, key: Key, fetch: Callable[[], Awaitable[Value]]) -> Value:
        """Returns the trusted answer, or that of one shared `fetch`. Raises: whatever `fetch` raises, to every waiter; not remembered."""
        known = self.peek(key)
        if known is not None:
            return known
        task = self._fetching.get(key)
        if task is None:
            # In a context of its own: one caller's deadline must not reach the others who wait.
            task = asyncio.get_running_loop().create_task(self._fetch(key, fetch), context=context_under(span_parent()))
            self._fetching[key] = task
            task.add_done_callback(lambda done: self._end(key, done))
        return await asyncio.shield(task)

    def forget(self, key: Key | None) -> None:
        """Drops an answer, and one under way with it: who asks from now on is told anew. None drops all."""
        if key is None:
            self._known.clear()
            self._fetching.clear()
        else:
            self._known.pop(key, None)
            self._fetching.pop(key, None)

    async def _fetch(self, key: Key, fetch: Callable[[], Awaitable[Value]]) -> Value:
        # Stamped before asking: an answer may be as old as its question.
        asked_at, me = self._monotonic(), asyncio.current_task()
        value = await fetch()
        if self._fetching.get(key) is me:
            self._known[key] = _Known(value, asked_at)
            self._known.move_to_end(key)
            while len(self._known) > self._capacity:
                self._known.popitem(last=False)
        return value

    def _end(self, key: Key, task: "asyncio.Task[Value]") -> None:
        if self._fetching.get(key) is task:
            del self._fetching[key]
        if not task.cancelled():
            # Read, so that a question all askers gave up on is not reported as a forgotten exception.
            task.exception()
