"""How grpc wakes the event loop: by a byte in a pair of sockets for each of its events, of which a call has four.

grpc reads one byte a turn and handles every event there is, so what it leaves in the socket wakes the loop again for nothing. The socket
it gets here gives up all it holds at once. An event whose byte comes later is seen by that byte.
"""

import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import grpc

_MOST_BYTES = 4096


class _EmptiedSocket(socket.socket):
    """Reads all there is, however little is asked for."""

    __slots__ = ()

    def recv(self, bufsize: int, flags: int = 0) -> bytes:
        return super().recv(max(bufsize, _MOST_BYTES), flags)


@contextmanager
def woken_once() -> Iterator[None]:
    """Runs grpc.aio on the running loop, for the length of the block. Servers and channels made in it are woken so."""
    with _emptied_pairs():
        grpc.aio.init_grpc_aio()
    try:
        yield
    finally:
        grpc.aio.shutdown_grpc_aio()


def wake_behind_the_loop() -> None:
    """Makes every thread there is but the calling one batch work, and with them what they begin: Linux lets those interrupt nobody.

    grpc's threads wake for each event, five times a call. While the loop has the core they need, they took it from it each time, and
    gave back one event; now they come when it pauses or its turn ends, and give back many. Where a core is idle they run as before.
    """
    if not hasattr(os, "SCHED_BATCH"):
        return
    own = threading.get_native_id()
    # A sandbox may hide the threads, or forbid it: then they run as any other.
    with suppress(OSError):
        for thread_id in map(int, os.listdir("/proc/self/task")):
            # One that has ended meanwhile is no reason to leave the others.
            with suppress(ProcessLookupError):
                if thread_id != own:
                    os.sched_setscheduler(thread_id, os.SCHED_BATCH, os.sched_param(0))


@contextmanager
def _emptied_pairs() -> Iterator[None]:
    # grpc takes its pair from here, keeps it to itself, and makes it when the engine begins.
    make_pair = socket.socketpair

    def pair(*arguments: Any, **named: Any) -> tuple[socket.socket, socket.socket]:
        reader, writer = make_pair(*arguments, **named)
        return _EmptiedSocket(fileno=reader.detach()), writer

    socket.socketpair = pair
    try:
        yield
    finally:
        socket.socketpair = make_pair
