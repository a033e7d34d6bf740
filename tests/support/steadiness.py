"""Timed tests on a machine that may stand still: what was measured meanwhile says nothing of what is tested."""

import asyncio
import functools
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import ParamSpec

import pytest
import structlog

P = ParamSpec("P")

TRIES = 6
# A tick that is so late was not late by the work of a test.
STOOD_STILL_SECONDS = 0.1
_TICK_SECONDS = 0.01

log = structlog.get_logger()


class Pace:
    """How late this process was, at most, while somebody looked."""

    def __init__(self) -> None:
        self.late_seconds = 0.0

    async def look(self) -> None:
        """Ticks until cancelled."""
        while True:
            began = time.monotonic()
            await asyncio.sleep(_TICK_SECONDS)
            self.late_seconds = max(self.late_seconds, time.monotonic() - began - _TICK_SECONDS)


@asynccontextmanager
async def watched_pace() -> AsyncIterator[Pace]:
    """The pace of this process's loop."""
    pace = Pace()
    looking = asyncio.create_task(pace.look())
    try:
        await asyncio.sleep(0)
        yield pace
        # A stall that has just ended is seen by the tick that it kept back.
        await asyncio.sleep(2 * _TICK_SECONDS)
    finally:
        looking.cancel()


def steadily(test: Callable[P, Awaitable[None]]) -> Callable[P, Awaitable[None]]:
    """Repeats a test that fails while the machine stands still; a failure at a steady pace is one.

    For tests that say how soon something happens and leave nothing behind that their repetition would meet.
    """

    @functools.wraps(test)
    async def repeated(*args: P.args, **kwargs: P.kwargs) -> None:
        for left in reversed(range(TRIES)):
            failed: BaseException
            async with watched_pace() as pace:
                try:
                    return await test(*args, **kwargs)
                except (Exception, pytest.fail.Exception) as error:
                    failed = error
            if not left or pace.late_seconds < STOOD_STILL_SECONDS:
                raise failed
            log.warning("test_repeated", late_seconds=round(pace.late_seconds, 3), failed=repr(failed)[:200])

    return repeated
