"""How grpc wakes the event loop: by a byte in a pair of sockets for each of its events, of which a call has four.

grpc reads one byte a turn and handles every event there is, so what it leaves in the socket wakes the loop again for nothing. The socket
it gets here gives up all it holds at once. An event whose byte comes later is seen by that byte.
"""

import socket
from collections.abc import Iterator
from contextlib import contextmanager
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
