"""Long-running loops with an owner: named, logged, restarted with backoff when they crash, stopped in order on close."""

import asyncio
import contextvars
import random
import time
from collections.abc import Awaitable, Callable

import structlog

log = structlog.get_logger(__name__)

_FIRST_BACKOFF_SECONDS = 0.1
_MAX_BACKOFF_SECONDS = 30.0
_HEALTHY_SECONDS = 60.0


class BackgroundTasks:
    """Owns every loop of a service. A loop is an async function that runs until cancelled; returning ends it for good."""

    def __init__(self) -> None:
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._closed = False

    def start(self, name: str, loop: Callable[[], Awaitable[None]]) -> None:
        """Starts a loop under a name. Raises: RuntimeError when the name is taken or the owner is closed."""
        if self._closed or name in self._tasks:
            msg = f"background loop {name} cannot start: the name is taken or the owner is closed"
            raise RuntimeError(msg)
        # A context of its own: a loop started during a call must not act for that call's tenant ever after.
        context = contextvars.Context()
        self._tasks[name] = asyncio.get_running_loop().create_task(self._supervise(name, loop), name=name, context=context)

    def running(self) -> tuple[str, ...]:
        """Returns the names of the loops that have not ended."""
        return tuple(name for name, task in self._tasks.items() if not task.done())

    async def close(self, timeout_seconds: float = 5.0) -> None:
        """Stops the loops one after the other, last started first; a loop that ignores its cancellation is left after the timeout."""
        self._closed = True
        for name, task in reversed(self._tasks.items()):
            task.cancel()
            done, _ = await asyncio.wait([task], timeout=timeout_seconds)
            if not done:
                log.error("background_loop_ignored_cancellation", loop=name)

    async def _supervise(self, name: str, loop: Callable[[], Awaitable[None]]) -> None:
        backoff = _FIRST_BACKOFF_SECONDS
        while True:
            started = time.monotonic()
            try:
                await loop()
            except asyncio.CancelledError:
                raise
            except Exception:
                if time.monotonic() - started >= _HEALTHY_SECONDS:
                    backoff = _FIRST_BACKOFF_SECONDS
                log.exception("background_loop_crashed", loop=name, restart_seconds=round(backoff, 3))
            else:
                return
            await asyncio.sleep(backoff * random.uniform(0.8, 1.2))  # noqa: S311 - jitter
            backoff = min(backoff * 2, _MAX_BACKOFF_SECONDS)
