"""The specification of a sliding window's log, kept compact: the scripts do exactly this.

Entries are (time, amount), rising in time. Up to `MOST_ENTRIES` the log is exact. Beyond, an entry that falls in the same quantum as the
one before or after it is merged with it at the later time: it may be counted too long, by less than a quantum, and never too short.
"""

from bisect import bisect_left
from dataclasses import dataclass, field

MOST_ENTRIES = 128


@dataclass(slots=True)
class SlidingWindow:
    """The entries of one counter. Every method is told the time: microseconds of the store's clock."""

    window_us: int
    times: list[int] = field(default_factory=list)
    amounts: list[int] = field(default_factory=list)

    def used(self, now_us: int) -> int:
        """What was used in (now - window, now]."""
        self._evict(now_us)
        return sum(self.amounts)

    def add(self, now_us: int, amount: int) -> None:
        """Counts an amount from now on."""
        if not amount:
            return
        self._evict(now_us)
        if self.times and self.times[-1] >= now_us:
            # The same microsecond, or a clock that stepped back.
            self.amounts[-1] += amount
        elif self.times and self._joins(len(self.times) - 1, now_us):
            self.times[-1] = now_us
            self.amounts[-1] += amount
        else:
            self.times.append(now_us)
            self.amounts.append(amount)

    def adjust(self, reserve_us: int, now_us: int, difference: int) -> None:
        """Corrects what was added at `reserve_us`. What has left the window by then is not corrected: nothing counts it any more."""
        self._evict(now_us)
        if not difference or reserve_us <= now_us - self.window_us:
            return
        place = bisect_left(self.times, reserve_us)
        if difference < 0:
            self._take(place, -difference)
        elif place < len(self.times) and (self.times[place] == reserve_us or self._joins(place, reserve_us)):
            self.amounts[place] += difference
        elif place and self._joins(place - 1, reserve_us):
            self.times[place - 1] = reserve_us
            self.amounts[place - 1] += difference
        else:
            self.times.insert(place, reserve_us)
            self.amounts.insert(place, difference)

    def frees_us(self, now_us: int, excess: int) -> int:
        """When as much as `excess` has left the window; 0 when that much never does."""
        self._evict(now_us)
        for time_us, amount in zip(self.times, self.amounts, strict=True):
            excess -= amount
            if excess <= 0:
                return time_us + self.window_us
        return 0

    def _take(self, place: int, amount: int) -> None:
        # Its own entry comes first among those not earlier; the next ones give the rest if a merge or a stepping clock moved it there.
        while amount and place < len(self.times):
            taken = min(amount, self.amounts[place])
            amount -= taken
            self.amounts[place] -= taken
            if self.amounts[place]:
                place += 1
            else:
                del self.times[place], self.amounts[place]

    def _evict(self, now_us: int) -> None:
        start = now_us - self.window_us
        gone = 0
        while gone < len(self.times) and self.times[gone] <= start:
            gone += 1
        del self.times[:gone], self.amounts[:gone]

    def _joins(self, place: int, us: int) -> bool:
        """Whether what comes at a time is merged with that entry."""
        return len(self.times) >= MOST_ENTRIES and self._quantum(self.times[place]) == self._quantum(us)

    def _quantum(self, us: int) -> int:
        return us * MOST_ENTRIES // self.window_us
