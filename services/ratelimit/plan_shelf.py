"""What is made of each user of every tenant and kept for the next call: so many bytes by one set of rules, and so many of all."""

from collections import deque
from collections.abc import Hashable
from typing import Generic, TypeVar

# Of the tenants that share their rules, who choose how many users they have and how long their names are; and of all tenants.
_MOST_OF_ONE = 32 * 1024 * 1024
_MOST_OF_ALL = 128 * 1024 * 1024

V = TypeVar("V")


class PlanShelf(Generic[V]):
    """Bounds what all sets of rules keep together. The oldest go first, whosever they are: whoever is still here has his made again."""

    def __init__(self, *, most_bytes: int = _MOST_OF_ALL) -> None:
        self._most_bytes = most_bytes
        self._bytes = 0
        self._kept: deque[tuple[ShelfPart[V], Hashable, V, int]] = deque()

    def keep(self, part: "ShelfPart[V]", key: Hashable, value: V, size_bytes: int) -> None:
        """Counts what one of them has added, and drops the oldest for it."""
        self._kept.append((part, key, value, size_bytes))
        self._bytes += size_bytes
        while self._bytes > self._most_bytes:
            owner, old_key, old, old_bytes = self._kept.popleft()
            self._bytes -= old_bytes
            owner.drop(old_key, old)


class ShelfPart(Generic[V]):
    """What is kept by one set of rules."""

    def __init__(self, shelf: PlanShelf[V] | None = None, *, most_bytes: int = _MOST_OF_ONE) -> None:
        self._shelf: PlanShelf[V] = shelf or PlanShelf()
        self._most_bytes = most_bytes
        self._bytes = 0
        self._values: dict[Hashable, tuple[V, int]] = {}

    def get(self, key: Hashable) -> V | None:
        """Returns what is kept under the key."""
        found = self._values.get(key)
        return found and found[0]

    def add(self, key: Hashable, value: V, size_bytes: int) -> None:
        """Keeps a value. Its own oldest go for it, and then the oldest of all."""
        self._values[key] = (value, size_bytes)
        self._bytes += size_bytes
        while self._bytes > self._most_bytes:
            oldest = next(iter(self._values))
            self.drop(oldest, self._values[oldest][0])
        self._shelf.keep(self, key, value, size_bytes)

    def drop(self, key: Hashable, value: V) -> None:
        """Forgets that value, and not one that was made after it."""
        found = self._values.get(key)
        if found is not None and found[0] is value:
            self._bytes -= self._values.pop(key)[1]
