"""Who is next: start-time fair queueing over tenants. Pure; knows nothing of time, tasks or capacity.

Source: Goyal, Vin, Cheng: Start-time Fair Queueing, SIGCOMM 1996.
"""

import heapq
from collections.abc import Hashable
from typing import Generic, TypeVar

T = TypeVar("T", bound=Hashable)
_SCALE = 1_000_000


class FairQueue(Generic[T]):
    """Items of many tenants, handed out so that each backlogged tenant gets service in proportion to its weight."""

    def __init__(self) -> None:
        self._virtual_time = 0
        self._finish_tags: dict[Hashable, int] = {}
        self._heap: list[tuple[int, int, T]] = []
        self._waiting: set[T] = set()
        self._pushed = 0

    def __len__(self) -> int:
        return len(self._waiting)

    def push(self, item: T, tenant: Hashable, *, cost: int, weight: int) -> None:
        """Adds an item whose service is expected to cost this much; a weight below 1 counts as 1."""
        start = max(self._virtual_time, self._finish_tags.get(tenant, 0))
        self._finish_tags[tenant] = start + max(cost, 1) * _SCALE // max(weight, 1)
        self._pushed += 1
        heapq.heappush(self._heap, (start, self._pushed, item))
        self._waiting.add(item)

    def pop(self) -> T | None:
        """Takes the next item; None when nothing waits."""
        while self._heap:
            start, _, item = heapq.heappop(self._heap)
            if item in self._waiting:
                self._waiting.remove(item)
                self._virtual_time = start
                self._forget_the_served()
                return item
        return None

    def remove(self, item: T) -> None:
        """Takes an item out that will not be served; absent items are ignored."""
        self._waiting.discard(item)
        # Removed items stay in the heap until popped; rebuilt before they outnumber the rest.
        if len(self._heap) > 2 * len(self._waiting) + 64:
            self._heap = [entry for entry in self._heap if entry[2] in self._waiting]
            heapq.heapify(self._heap)

    def _forget_the_served(self) -> None:
        if not self._waiting:
            # An idle queue owes nobody anything: the next busy period starts level.
            self._virtual_time = max(self._finish_tags.values(), default=self._virtual_time)
            self._finish_tags.clear()
            self._heap.clear()
        elif len(self._finish_tags) > 4 * len(self._waiting) + 256:
            self._finish_tags = {tenant: tag for tenant, tag in self._finish_tags.items() if tag > self._virtual_time}
