"""Starts replicas as forks of a process that has imported everything: a start costs next to nothing, so that one can be killed each second.

Each is a process and a session of its own. An order is a line of JSON on standard input, its answer the new process's id.
"""

import ctypes
import gc
import json
import os
import runpy
import signal
import sys
from pathlib import Path
from typing import TypedDict

import services.kernel.command
import services.ratelimit.app  # noqa: F401 - what takes so long
from devstack import FORKS_SAFELY

_SET_PARENT_DEATH_SIGNAL = 1


class Order(TypedDict):
    """What is to be started."""

    module: str
    log_path: str
    environment: dict[str, str]


def main() -> None:
    """Starts what it is told until its input ends, and with it whatever still runs."""
    # Nobody waits for those who were killed.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    gc.freeze()
    for line in sys.stdin:
        order: Order = json.loads(line)
        pid = os.fork()
        if not pid:
            _live(order)
        print(pid, flush=True)  # noqa: T201 - the answer


def _live(order: Order) -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.setsid()
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(_SET_PARENT_DEATH_SIGNAL, int(signal.SIGKILL))
    with Path(order["log_path"]).open("ab") as log, Path(os.devnull).open("rb") as nothing:
        os.dup2(nothing.fileno(), 0)
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    os.environ.update(order["environment"])
    if not FORKS_SAFELY:
        os.execv(sys.executable, [sys.executable, "-m", order["module"]])  # noqa: S606 - the same, slowly
    sys.argv = [order["module"]]
    try:
        runpy.run_module(order["module"], run_name="__main__", alter_sys=True)
    finally:
        os._exit(1)


if __name__ == "__main__":
    main()
