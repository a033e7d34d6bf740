"""Latencies of a closed loop: a fixed number of workers, each making its next call when the last one ended."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

Call = Callable[[int], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Latencies:
    """What a loop measured: milliseconds of each call, sorted, and the loop's own duration in seconds."""

    milliseconds: Sequence[float]
    duration_seconds: float

    def percentile(self, share: float) -> float:
        """Returns the latency that the given share (0–1) of the calls did not exceed."""
        if not self.milliseconds:
            return 0.0
        return self.milliseconds[min(len(self.milliseconds) - 1, int(share * len(self.milliseconds)))]

    @property
    def calls_per_second(self) -> float:
        """Calls ended a second."""
        return len(self.milliseconds) / self.duration_seconds


async def closed_loop(call: Call, *, concurrency: int, seconds: float) -> Latencies:
    """Keeps `concurrency` calls under way for a time; `call` gets a running number. A failed call ends the measurement."""
    milliseconds: list[float] = []
    begin = time.monotonic()
    end = begin + seconds
    number = 0

    async def work() -> None:
        nonlocal number
        while time.monotonic() < end:
            number += 1
            started = time.perf_counter()
            await call(number)
            milliseconds.append((time.perf_counter() - started) * 1000)

    async with asyncio.TaskGroup() as group:
        for _ in range(concurrency):
            group.create_task(work())
    return Latencies(sorted(milliseconds), time.monotonic() - begin)
