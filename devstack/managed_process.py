"""A child process with a name, a log file and a clear end.

Children get their own session, so that Ctrl-C reaches only the supervisor, which stops them in order. Where the system can (Linux), a
child is told to stop when its supervisor dies without a word, so that even kill -9 leaves nothing running.
"""

import asyncio
import ctypes
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from devstack import FORKS_SAFELY

READY_POLL_SECONDS = 0.05
_SET_PARENT_DEATH_SIGNAL = 1


class ProcessFailedError(Exception):
    """A child that died or did not become ready; its text is one sentence for people."""


@dataclass(frozen=True, slots=True)
class UnprivilegedUser:
    """Whom a child runs as that refuses to be root; it keeps none of root's groups."""

    uid: int
    gid: int


class ManagedProcess:
    """One child: started, watched, stopped with a signal and, past its grace time, killed."""

    def __init__(
        self,
        name: str,
        argv: Sequence[str],
        *,
        log_path: Path,
        env: Mapping[str, str] | None = None,
        user: UnprivilegedUser | None = None,
        stop_signal: signal.Signals = signal.SIGTERM,
    ) -> None:
        self.name = name
        self.log_path = log_path
        self._argv = list(argv)
        self._env = dict(env) if env is not None else None
        self._user = user
        self._stop_signal = stop_signal
        self._process: asyncio.subprocess.Process | None = None

    @property
    def pid(self) -> int:
        """The child's process id. Raises ProcessFailedError before `start`."""
        if self._process is None:
            raise ProcessFailedError(f"{self.name} was not started")
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """The exit code, negative for a signal; None while it runs or before it started."""
        return self._process.returncode if self._process else None

    async def start(self) -> None:
        """Starts the child; its output is appended to the log file."""
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        with self.log_path.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *self._argv,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self._env,
                user=self._user.uid if self._user else None,
                group=self._user.gid if self._user else None,
                extra_groups=[] if self._user else None,
                start_new_session=True,
                preexec_fn=_stop_with_parent(self._stop_signal),
            )

    async def wait_ready(self, is_ready: Callable[[], Awaitable[bool]], *, timeout_seconds: float) -> None:
        """Waits until `is_ready` answers True.

        Raises: ProcessFailedError when the child dies first or the time passes; the sentence ends with the log's last line.
        """
        deadline = asyncio.get_running_loop().time() + timeout_seconds
        while not await is_ready():
            if self.exit_code is not None:
                raise ProcessFailedError(self.how_it_ended())
            if asyncio.get_running_loop().time() > deadline:
                raise ProcessFailedError(
                    f"{self.name} was not ready within {timeout_seconds:.0f} s: {self.last_log_line()} (log: {self.log_path})"
                )
            await asyncio.sleep(READY_POLL_SECONDS)

    async def wait(self) -> int:
        """Waits for the child's end and returns its exit code."""
        if self._process is None:
            raise ProcessFailedError(f"{self.name} was not started")
        return await self._process.wait()

    async def stop(self, *, grace_seconds: float = 10.0) -> None:
        """Ends the child: its stop signal, then SIGKILL for its whole session once the grace time passed. Safe to repeat."""
        if self._process is None or self._process.returncode is not None:
            return
        self._process.send_signal(self._stop_signal)
        try:
            await asyncio.wait_for(self._process.wait(), grace_seconds)
        except TimeoutError:
            self.kill()
            await self._process.wait()

    def kill(self) -> None:
        """Ends the child and what it started with SIGKILL, as a crash would."""
        if self._process is not None and self._process.returncode is None:
            os.killpg(self._process.pid, signal.SIGKILL)

    def how_it_ended(self) -> str:
        """A sentence on the child's end: the signal that killed it, or its exit code and last words."""
        code = self.exit_code or 0
        if code < 0:
            return f"{self.name} was killed by signal {-code} ({signal.Signals(-code).name}) (log: {self.log_path})"
        return f"{self.name} stopped with exit code {code}: {self.last_log_line()} (log: {self.log_path})"

    def last_log_line(self) -> str:
        """The last line the child wrote, or a sentence that says it wrote none."""
        try:
            lines = self.log_path.read_text(errors="replace").strip().splitlines()
        except FileNotFoundError:
            lines = []
        return lines[-1][:500] if lines else "it wrote nothing"


def _stop_with_parent(stop_signal: signal.Signals) -> Callable[[], None] | None:
    if not sys.platform.startswith("linux") or not FORKS_SAFELY:
        return None
    # Looked up before the fork: between fork and exec a child of a threaded process may do next to nothing.
    prctl = ctypes.CDLL(None).prctl
    number = int(stop_signal)

    def set_death_signal() -> None:
        prctl(_SET_PARENT_DEATH_SIGNAL, number)

    return set_death_signal
