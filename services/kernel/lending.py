"""A bounded number of open things (pools, channels), lent to whoever needs one; the one unused for longest makes room, one in use never."""

import asyncio
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Hashable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Generic, TypeVar

from services.kernel.errors import Unavailable
from services.kernel.request_context import remaining_seconds

Key = TypeVar("Key", bound=Hashable)
Thing = TypeVar("Thing")

_WAIT_SECONDS = 2.0


@dataclass(slots=True)
class _Lent(Generic[Thing]):
    thing: Thing
    users: int = 0


class Lending(Generic[Key, Thing]):
    """At most `limit` things, one a key. `dependency` names them to a caller who got none."""

    def __init__(
        self, limit: int, open_one: Callable[[Key], Awaitable[Thing]], close_one: Callable[[Thing], Awaitable[None]], *, dependency: str
    ) -> None:
        self._limit = limit
        self._open_one = open_one
        self._close_one = close_one
        self._dependency = dependency
        self._open: OrderedDict[Key, _Lent[Thing]] = OrderedDict()
        self._freed = asyncio.Condition()

    def __len__(self) -> int:
        return len(self._open)

    @asynccontextmanager
    async def lend(self, key: Key) -> AsyncIterator[Thing]:
        """Yields the thing of a key, opening it when need be. Raises: Unavailable when every one stays in use."""
        lent = await self._take(key)
        try:
            yield lent.thing
        finally:
            lent.users -= 1
            if lent.users == 0:
                async with self._freed:
                    self._freed.notify_all()

    async def close(self) -> None:
        """Closes everything."""
        while self._open:
            _, lent = self._open.popitem()
            await self._close_one(lent.thing)

    async def _take(self, key: Key) -> _Lent[Thing]:
        async with self._freed:
            if key not in self._open:
                await self._make_room()
                # Others waited for room here as well, and one of them may have opened this very one.
                if key not in self._open:
                    self._open[key] = _Lent(await self._open_one(key))
            self._open.move_to_end(key)
            self._open[key].users += 1
            return self._open[key]

    async def _make_room(self) -> None:
        try:
            async with asyncio.timeout(min(_WAIT_SECONDS, remaining_seconds(_WAIT_SECONDS))):
                await self._freed.wait_for(lambda: len(self._open) < self._limit or self._idle() is not None)
        except TimeoutError:
            raise Unavailable(self._dependency, "every dedicated store of this process is in use; try again shortly") from None
        if len(self._open) >= self._limit and (idle := self._idle()) is not None:
            await self._close_one(self._open.pop(idle).thing)

    def _idle(self) -> Key | None:
        return next((key for key, lent in self._open.items() if lent.users == 0), None)
