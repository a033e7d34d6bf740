"""Kills parts of a running mesh with SIGKILL and starts each again, as its supervisor in a deployment does."""

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator

from devstack.managed_process import ManagedProcess, ProcessFailedError
from devstack.stack import Stack
from tests.chaos.chances import PARTS, Death

# A mesh of which more is down does nothing that could go wrong.
MOST_DOWN = 3
_RESTART_PAUSE_SECONDS = 0.2
_LOOK_SECONDS = 0.1


class Killer:
    """The deaths of one mesh, and what brings its parts back."""

    def __init__(self, stack: Stack) -> None:
        self._stack = stack
        self._forgets: set[str] = set()
        self._down: set[str] = set()
        # Killed, and not yet seen to be dead.
        self._dying: set[str] = set()
        self._all_up = asyncio.Event()
        self._all_up.set()
        self.kill_counts: Counter[str] = Counter()
        self.restart_count = 0

    @contextlib.asynccontextmanager
    async def keeping_up(self) -> AsyncIterator[None]:
        """Starts every part again that dies meanwhile."""
        async with asyncio.TaskGroup() as group:
            keepers = [group.create_task(self._keep_up(part)) for part in PARTS]
            try:
                yield
            finally:
                for keeper in keepers:
                    keeper.cancel()

    async def run(self, deaths: Iterator[Death], until: float) -> None:
        """Kills until then, on time.monotonic(). Where the machine is too slow to bring parts back in time, deaths come less often."""
        for death in deaths:
            if not self._may_kill(death):
                continue
            await asyncio.sleep(min(death.after_seconds, max(0.0, until - time.monotonic())))
            # Looked at, not waited for: the time that is left counts as well.
            while len(self._down) >= MOST_DOWN and time.monotonic() < until:  # noqa: ASYNC110
                await asyncio.sleep(_LOOK_SECONDS)
            if time.monotonic() >= until:
                return
            self._kill(death)

    async def all_up(self) -> None:
        """Returns once every part is ready."""
        await self._all_up.wait()

    def _may_kill(self, death: Death) -> bool:
        return death.early or death.part not in self._down

    def _kill(self, death: Death) -> None:
        process = self._stack.processes[death.part]
        if not _runs(process) or not self._may_kill(death):
            return
        # Known before the part is gone: whoever brings it back looks here.
        if death.forgets:
            self._forgets.add(death.part)
        self._dying.add(death.part)
        self._down.add(death.part)
        self._all_up.clear()
        self.kill_counts[death.part] += 1
        process.kill()

    async def _keep_up(self, part: str) -> None:
        while True:
            await self._stack.processes[part].wait()
            self._dying.discard(part)
            self._down.add(part)
            self._all_up.clear()
            await self._bring_back(part)
            self.restart_count += 1
            if part not in self._dying and self._stack.processes[part].exit_code is None:
                self._down.discard(part)
            if not self._down:
                self._all_up.set()

    async def _bring_back(self, part: str) -> None:
        while True:
            if part in self._forgets:
                self._forgets.discard(part)
                self._stack.redis.forget()
            try:
                await self._stack.start_again(part)
            except ProcessFailedError:
                # It died while it started, or what it needs is away: as after any other death.
                self._dying.discard(part)
                await asyncio.sleep(_RESTART_PAUSE_SECONDS)
            else:
                return


def _runs(process: ManagedProcess) -> bool:
    try:
        return process.pid > 0 and process.exit_code is None
    except ProcessFailedError:
        # It is only about to be started.
        return False
