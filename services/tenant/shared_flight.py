"""One run for all who ask for the same thing at the same time. Refuses to remember: who asks later runs again."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

Key = TypeVar("Key")
Value = TypeVar("Value")


@dataclass(frozen=True, slots=True)
class _Landed(Generic[Value]):
    value: Value


class SharedFlight(Generic[Key, Value]):
    """The first caller runs the work in its own task, so that its deadline and cancellation reach it; others wait for the answer.

    When the first fails or is cancelled, the next one runs: a failure is told to the caller whose run it was and to nobody else.
    """

    def __init__(self) -> None:
        self._flights: dict[Key, asyncio.Future[_Landed[Value] | None]] = {}

    async def run(self, key: Key, work: Callable[[], Awaitable[Value]]) -> Value:
        """Returns the answer of the run under way, or of an own one. Raises: what the own run raises."""
        while (flight := self._flights.get(key)) is not None:
            # Shielded: a waiter that gives up must not take the answer from the others.
            landed = await asyncio.shield(flight)
            if landed is not None:
                return landed.value
        flight = self._flights[key] = asyncio.get_running_loop().create_future()
        landed = None
        try:
            landed = _Landed(await work())
            return landed.value
        finally:
            del self._flights[key]
            flight.set_result(landed)
