"""Loopback ports: whether one is free, and which one is."""

import itertools
import secrets
import socket

LOOPBACK = "127.0.0.1"
# Below the ports that systems give to outgoing connections: what is chosen, or listens no more for a moment, no connection takes.
LOWEST_PORT, PORT_COUNT = 10_000, 22_000
# A process never chooses the same one again soon, and two that choose at the same time hardly meet.
_walk = itertools.count(secrets.randbelow(PORT_COUNT))


def is_free(port: int) -> bool:
    """Tells whether nothing listens on the loopback port now."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, port))
        except OSError:
            return False
    return True


def free_port() -> int:
    """Returns a port that was free a moment ago, each time another one."""
    return next(port for step in _walk if is_free(port := LOWEST_PORT + step % PORT_COUNT))


def answers(port: int) -> bool:
    """Tells whether something accepts connections on the loopback port."""
    with socket.socket() as probe:
        probe.settimeout(0.2)
        return probe.connect_ex((LOOPBACK, port)) == 0
