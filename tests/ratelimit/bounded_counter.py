"""What a rule has counted, from all that is known: exact, or between two bounds where an answer was lost. Rounds nothing."""

from collections import deque
from uuid import UUID

from services.ratelimit.sliding_window import MOST_ENTRIES


class BoundedCounter:
    """One counter. `window_us` is 0 where nothing leaves by itself."""

    def __init__(self, window_us: int) -> None:
        self.window_us = window_us
        self.low = self.high = 0
        # As if every entry left one quantum of the window late: the most that a compact log may count too long.
        self.late_high = 0
        self._entries: dict[UUID, tuple[int, int, int]] = {}
        self._exact: deque[UUID] = deque()
        self._late: deque[UUID] = deque()
        self._in_window = 0
        self._full_us = -1
        self._least: dict[tuple[UUID, str], int] = {}

    def watch(self, watcher: tuple[UUID, str], now_us: int) -> None:
        """From now on remembers the least that `low` was."""
        self.pass_to(now_us)
        self._least[watcher] = self.low

    def least(self, watcher: tuple[UUID, str], now_us: int) -> int:
        """The least that `low` was since it is watched, until now; it is watched no more."""
        self.pass_to(now_us)
        return self._least.pop(watcher)

    def put(self, id: UUID, now_us: int, low: int, high: int) -> None:
        """Counts a new entry, or corrects one; what has left the window is not corrected."""
        self.pass_to(now_us)
        known = self._entries.get(id)
        if known is None:
            self._entries[id] = (now_us, low, high)
            self.low, self.high, self.late_high = self.low + low, self.high + high, self.late_high + high
            self._in_window += 1
            if self.window_us:
                self._exact.append(id)
                self._late.append(id)
        else:
            time_us, old_low, old_high = known
            if not self._is_out(time_us, now_us, 0):
                self._entries[id] = (time_us, low, high)
                self.low, self.high = self.low + low - old_low, self.high + high - old_high
                self.late_high += high - old_high
        if self._in_window >= MOST_ENTRIES:
            self._full_us = now_us
        self._lowered()

    def correct(self, id: UUID, now_us: int, low: int | None, high: int | None) -> None:
        """Corrects one or both bounds of an entry, if it is there."""
        self.pass_to(now_us)
        known = self._entries.get(id)
        if known is not None:
            self.put(id, now_us, known[1] if low is None else low, known[2] if high is None else high)

    def pass_to(self, now_us: int) -> None:
        """Lets time pass: entries leave the window."""
        while self._exact and self._is_out(self._entries[self._exact[0]][0], now_us, 0):
            _, low, high = self._entries[self._exact.popleft()]
            self.low, self.high, self._in_window = self.low - low, self.high - high, self._in_window - 1
        while self._late and self._is_out(self._entries[self._late[0]][0], now_us, self._quantum_us):
            self.late_high -= self._entries.pop(self._late.popleft())[2]
        self._lowered()

    def _lowered(self) -> None:
        for watcher, least in self._least.items():
            self._least[watcher] = min(least, self.low)

    def most(self, now_us: int) -> int:
        """The most that a compact log may tell: exact as long as it never was full since the oldest of its entries."""
        rounded = self.window_us and self._full_us >= 0 and self._full_us + self.window_us + self._quantum_us > now_us
        return self.late_high if rounded else self.high

    @property
    def _quantum_us(self) -> int:
        return self.window_us // MOST_ENTRIES + 1

    def _is_out(self, time_us: int, now_us: int, later_us: int) -> bool:
        return bool(self.window_us) and time_us <= now_us - self.window_us - later_us
