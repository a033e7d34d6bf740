"""Waiting for something another process does: bounded, and said in one line."""

import asyncio
from collections.abc import Awaitable, Callable

POLL_SECONDS = 0.05


async def eventually(is_true: Callable[[], Awaitable[bool]], *, within_seconds: float) -> None:
    """Returns as soon as `is_true` answers True. Raises TimeoutError when it does not in time."""
    async with asyncio.timeout(within_seconds):
        # Another process decides when this becomes true: there is no event of ours to wait for.
        while not await is_true():  # noqa: ASYNC110
            await asyncio.sleep(POLL_SECONDS)
