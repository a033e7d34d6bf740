"""What is made of each user of every tenant and kept for the next call: so many bytes in all."""

from collections.abc import Hashable
from typing import Generic, TypeVar
from weakref import WeakSet

_MOST_BYTES = 128 * 1024 * 1024
# Bytes are added up this often, so that it costs nothing.
_PARTS_OF_MOST = 64
# Of what is kept by one set of rules, so much goes at once.
_PART_THAT_GOES = 10

V = TypeVar("V")


class PlanShelf(Generic[V]):
    """Bounds what all sets of rules keep together. The largest gives for it, its oldest first: a crowd pushes out its own."""

    def __init__(self, *, most_bytes: int = _MOST_BYTES) -> None:
        self._most_bytes = most_bytes
        self._parts: WeakSet[ShelfPart[V]] = WeakSet()
        self._added_bytes = 0

    def join(self, part: "ShelfPart[V]") -> None:
        """Counts what is kept by one more set of rules, as long as it is there."""
        self._parts.add(part)

    def added(self, size_bytes: int) -> None:
        """Makes room for what was added."""
        self._added_bytes += size_bytes
        if self._added_bytes < self._most_bytes // _PARTS_OF_MOST:
            return
        self._added_bytes = 0
        kept = sum(part.kept_bytes for part in self._parts)
        while kept > self._most_bytes:
            kept -= max(self._parts, key=lambda part: part.kept_bytes).shrink()


class ShelfPart(Generic[V]):
    """What is kept by one set of rules."""

    def __init__(self, shelf: PlanShelf[V] | None = None) -> None:
        self._shelf: PlanShelf[V] = shelf or PlanShelf()
        self._values: dict[Hashable, tuple[V, int]] = {}
        self.kept_bytes = 0
        self._shelf.join(self)

    def get(self, key: Hashable) -> V | None:
        """Returns what is kept under the key."""
        found = self._values.get(key)
        return found and found[0]

    def add(self, key: Hashable, value: V, size_bytes: int) -> None:
        """Keeps a value under a key that has none."""
        self._values[key] = (value, size_bytes)
        self.kept_bytes += size_bytes
        self._shelf.added(size_bytes)

    def shrink(self) -> int:
        """Forgets the oldest tenth, at least one. Returns how many bytes that gave."""
        before = self.kept_bytes
        for key in list(self._values)[: len(self._values) // _PART_THAT_GOES + 1]:
            self.kept_bytes -= self._values.pop(key)[1]
        return before - self.kept_bytes
