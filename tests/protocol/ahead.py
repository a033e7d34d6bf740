"""Explorations that take long, begun with the first test and run beside the others, in a process that gives way to them."""

from __future__ import annotations

import gc
import multiprocessing
import os
from collections.abc import Iterable
from concurrent.futures import Future, ProcessPoolExecutor

from tests.protocol.explore import Found, explore_large
from tests.protocol.world import Protocol


class Ahead:
    """Explores large worlds one after the other, in the order they were begun in; whoever asks for one waits until it is explored."""

    def __init__(self) -> None:
        # Spawned: a fork would copy the threads of gRPC in the middle of what they do.
        self._pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"), initializer=_give_way)
        self._found: dict[Protocol, Future[Found]] = {}

    def begin(self, worlds: Iterable[Protocol]) -> None:
        """Begins with worlds that will be asked for."""
        for world in worlds:
            self._found.setdefault(world, self._pool.submit(explore_large, world))

    def explored(self, world: Protocol) -> Found:
        """What the exploration of a world found."""
        self.begin([world])
        return self._found[world].result()

    def close(self) -> None:
        """Ends with what is begun; drops the rest."""
        self._pool.shutdown(wait=True, cancel_futures=True)


def _give_way() -> None:
    os.nice(10)
    gc.disable()
