"""Children of the supervisor end with it, whatever ends it."""

import asyncio
import os
import signal
import sys
from pathlib import Path

import pytest

from devstack.managed_process import ManagedProcess, ProcessFailedError
from tests.support.waiting import eventually

SUPERVISOR = """
import asyncio, pathlib, sys
from devstack.managed_process import ManagedProcess
async def main():
    child = ManagedProcess("child", [sys.executable, "-c", "import time; time.sleep(60)"], log_path=pathlib.Path(sys.argv[1]))
    await child.start()
    print(child.pid, flush=True)
    await asyncio.sleep(60)
asyncio.run(main())
"""


def is_running(pid: int) -> bool:
    """Whether a process is there and not merely waiting to be buried."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux tells a child of its parent's death")
async def test_a_killed_supervisor_leaves_no_child(tmp_path: Path) -> None:
    """A supervisor that is killed takes its children along."""
    supervisor = await asyncio.create_subprocess_exec(
        sys.executable, "-c", SUPERVISOR, str(tmp_path / "log"), stdout=asyncio.subprocess.PIPE
    )
    assert supervisor.stdout is not None
    child = int(await supervisor.stdout.readline())
    assert is_running(child)
    os.kill(supervisor.pid, signal.SIGKILL)
    await supervisor.wait()

    async def is_gone() -> bool:
        return not is_running(child)

    await eventually(is_gone, within_seconds=5)


async def test_a_child_that_dies_is_one_sentence(tmp_path: Path) -> None:
    """A child that ends before it is ready is told with its name, its exit code and its last words."""
    child = ManagedProcess("clumsy", [sys.executable, "-c", "import sys; sys.exit('I fell')"], log_path=tmp_path / "log")

    async def never() -> bool:
        return False

    await child.start()
    with pytest.raises(ProcessFailedError, match="clumsy stopped with exit code 1: I fell"):
        await child.wait_ready(never, timeout_seconds=10)


async def test_a_child_that_will_not_stop_is_killed(tmp_path: Path) -> None:
    """Past its grace time a child is killed."""
    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); time.sleep(60)"
    child = ManagedProcess("deaf", [sys.executable, "-c", deaf], log_path=tmp_path / "log")
    await child.start()

    async def is_deaf() -> bool:
        return child.last_log_line() == "deaf"

    await child.wait_ready(is_deaf, timeout_seconds=10)
    await child.stop(grace_seconds=0.2)
    assert child.exit_code == -signal.SIGKILL
