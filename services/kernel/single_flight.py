"""A bounded cache whose misses are fetched once for all who wait.

A failed fetch is not remembered: the next caller tries again. Cancelling one waiter leaves the fetch to the others.
"""

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

from services.kernel.telemetry.shared_work import context_under, span_parent

Key = TypeVar("Key")
Value = TypeVar("Value")


class SingleFlightCache(Generic[Key, Value]):
    """Remembers the `capacity` most recently used values."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._known: OrderedDict[Key, Value] = OrderedDict()
        self._fetching: dict[Key, asyncio.Future[Value]] = {}

    def peek(self, key: Key) -> Value | None:
        """Returns the remembered value, or None, without fetching."""
        value = self._known.get(key)
        if value is not None:
            self._known.move_to_end(key)
        return value

    async def get(self, key: Key, fetch: Callable[[], Awaitable[Value]]) -> Value:
        """Returns the remembered value, or the answer of one shared `fetch`.

        Raises: whatever `fetch` raises, to every waiter.
        """
        known = self.peek(key)
        if known is not None:
            return known
        under_way = self._fetching.get(key)
        if under_way is None:
            # In a context of its own: one caller's deadline must not reach the others who wait.
            under_way = asyncio.get_running_loop().create_task(self._fetch(key, fetch), context=context_under(span_parent()))
            # When all who waited were cancelled, its failure is nobody's, and no fault that went unheard.
            under_way.add_done_callback(_heard)
            self._fetching[key] = under_way
        return await asyncio.shield(under_way)

    def forget(self, key: Key | None) -> None:
        """Forgets one value, or all for None. A fetch under way is not remembered when it ends."""
        if key is None:
            self._known.clear()
            self._fetching.clear()
        else:
            self._known.pop(key, None)
            self._fetching.pop(key, None)

    def forget_where(self, is_meant: Callable[[Key], bool]) -> None:
        """Forgets every value whose key is meant. It looks at all keys: for what happens seldom."""
        for key in [key for key in (*self._known, *self._fetching) if is_meant(key)]:
            self.forget(key)

    async def _fetch(self, key: Key, fetch: Callable[[], Awaitable[Value]]) -> Value:
        own = asyncio.current_task()
        try:
            value = await fetch()
        finally:
            wanted = self._fetching.get(key) is own
            if wanted:
                del self._fetching[key]
        if not wanted:
            return value
        self._known[key] = value
        if len(self._known) > self._capacity:
            self._known.popitem(last=False)
        return value


def _heard(fetched: asyncio.Future[Value]) -> None:
    if not fetched.cancelled():
        fetched.exception()
