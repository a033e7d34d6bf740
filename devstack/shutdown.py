"""Ctrl-C, a closed terminal and SIGTERM: the first stops everything in order, the second at once. Neither leaves anything running."""

import asyncio
import signal
from collections.abc import Awaitable, Callable

from devstack.managed_process import ManagedProcess

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Shutdown:
    """Turns signals into the end of one task and of the children it started."""

    def __init__(self, announce: Callable[[str], None]) -> None:
        self.children: dict[str, ManagedProcess] = {}
        self._announce = announce
        self._asked = False
        self._task: asyncio.Future[object] | None = None

    async def guard(self, work: Awaitable[object]) -> bool:
        """Runs the work until it ends or a signal comes; True when it ended by itself.

        Raises: what the work raises, unless a signal ended it.
        """
        self._task = asyncio.ensure_future(work)
        loop = asyncio.get_running_loop()
        for number in SIGNALS:
            loop.add_signal_handler(number, self._on_signal)
        try:
            await self._task
        except asyncio.CancelledError:
            if not self._asked:
                raise
            return False
        return True

    def _on_signal(self) -> None:
        if not self._asked:
            self._asked = True
            self._announce("stopping; calls under way get a few seconds to end (Ctrl-C again to kill)")
            if self._task is not None:
                self._task.cancel()
            return
        # Never a second cancel: it would cut short the stopping itself and leave children behind.
        self._announce("killing what is left")
        for child in self.children.values():
            child.kill()
