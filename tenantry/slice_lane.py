"""What one client holds of one unit for one user and feature: uses it up, measures the demand, knows how much it should hold next.

Pure: it is told the answers of the service and reads one clock. A slice is over here before it is over at the service, which counts
its lease from the request's arrival and this from before its departure.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from uuid import UUID

# Below this many uses a second a slice saves less than it keeps from others.
HOT_USES_PER_SECOND = 20.0
# How much of the demand one slice is to cover, and for how long a demand must be absent to be none.
SLICE_SECONDS = 0.4
IDLE_SECONDS = 0.2
FORGOTTEN_SECONDS = 2.0
LARGEST_SLICE = 1_000_000_000
_SMOOTHING_SECONDS = 0.3
_SHORTEST_LOOK_SECONDS = 0.02
# A clock that runs slower than the service's by this part still ends a lease in time.
_CLOCK_RATE = 0.99
# Of a grant this far below what was wanted there is little left: each use by itself is fairer to others then.
_MEAGRE_PART, _MEAGRE_PAUSE_SECONDS = 8, 0.25

# One that goes on while the machine sleeps, where there is one: a lease must not outlive a sleep.
CLOCK: Callable[[], float] = partial(time.clock_gettime, time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic


@dataclass(slots=True)
class HeldSlice:
    """One slice. `ends_at` on this process's clock; `largest_use` 0: any."""

    slice_id: UUID
    epoch: int
    granted: int
    ends_at: float
    largest_use: int = 0

    @classmethod
    def from_lease(cls, slice_id: UUID, epoch: int, granted: int, largest_use: int, asked_at: float, lease_seconds: float) -> "HeldSlice":
        """A slice whose lease counts from before it was asked for."""
        return cls(slice_id, epoch, granted, asked_at + lease_seconds * _CLOCK_RATE, largest_use)


@dataclass(frozen=True, slots=True)
class FinishedSlice:
    """A slice that is used no more, and how much was used of it."""

    slice_id: UUID
    epoch: int
    used: int


class Lane:
    """The slice in use, the one after it, and the demand for both."""

    __slots__ = (
        "_clock",
        "_current",
        "_demand",
        "_ends_at",
        "_following",
        "_largest",
        "_lease_seconds",
        "_looked_at",
        "_low",
        "_paused_until",
        "_room",
        "_units_per_second",
        "_used_at",
        "_uses",
        "_uses_per_second",
        "finished",
        "is_asking",
        "lacks",
    )

    def __init__(self, lacks: Callable[["Lane"], None], clock: Callable[[], float] = CLOCK) -> None:
        self._clock = clock
        # Told, at most once a slice, that the next one should be asked for.
        self.lacks = lacks
        self.is_asking = False
        self.finished: list[FinishedSlice] = []
        self._current: HeldSlice | None = None
        self._following: HeldSlice | None = None
        self._room = self._largest = 0
        self._low = -1
        self._ends_at = 0.0
        self._lease_seconds = SLICE_SECONDS
        self._uses = self._demand = 0
        self._uses_per_second = self._units_per_second = 0.0
        self._looked_at = self._used_at = clock()
        self._paused_until = 0.0

    def use(self, quantity: int) -> bool:
        """Uses so many units of the slice in hand, or of the one after it; False when neither has them."""
        self._uses += 1
        self._demand += quantity
        if 0 < quantity <= self._room and quantity <= self._largest and self._clock() < self._ends_at:
            self._room -= quantity
            if self._room <= self._low:
                self._low = -1
                self.lacks(self)
            return True
        return self._use_following(quantity)

    def use_again(self, quantity: int) -> bool:
        """The same for a use that was counted before."""
        self._uses -= 1
        self._demand -= quantity
        return self.use(quantity)

    def take(self, held: HeldSlice, wanted: int, lease_seconds: float) -> None:
        """Takes what the service granted of `wanted`."""
        self._lease_seconds = lease_seconds
        if held.granted * _MEAGRE_PART < wanted:
            self.pause(_MEAGRE_PAUSE_SECONDS)
        if self._current is None:
            self._begin(held)
        else:
            self._finish(self._following)
            self._following = held

    def pause(self, seconds: float) -> None:
        """Asks for no slice for so long: each use is asked by itself."""
        self._paused_until = max(self._paused_until, self._clock() + seconds)

    def look(self) -> None:
        """Measures the demand, and ends what is over or no longer in demand. To be called some twenty times a second."""
        now = self._clock()
        if now - self._looked_at >= _SHORTEST_LOOK_SECONDS:
            self._measure(now, now - self._looked_at)
        if now - self._used_at > IDLE_SECONDS:
            self.finish()
        if self._following is not None and now >= self._following.ends_at:
            self._finish(self._following)
            self._following = None
        if self._current is not None and now >= self._ends_at:
            self._advance()

    def wanted(self) -> int:
        """How many units the next slice should have; 0 for none."""
        now = self._clock()
        if self.is_asking or self._following is not None or now < self._paused_until or now - self._used_at > IDLE_SECONDS:
            return 0
        if self._uses_per_second < HOT_USES_PER_SECOND:
            return 0
        if self._current is not None and self._room > self._current.granted // 2 and self._ends_at - now > self._lease_seconds / 2:
            return 0
        covered = min(SLICE_SECONDS, self._lease_seconds)
        return min(LARGEST_SLICE, max(1, math.ceil(self._units_per_second * covered)))

    def finish(self) -> None:
        """Ends both slices: what is left of them can be given back."""
        self._finish(self._following)
        self._following = None
        self._advance()

    @property
    def is_forgotten(self) -> bool:
        """Whether nobody has used it for a while, and nothing of it is held."""
        held = self._current is not None or bool(self.finished) or self.is_asking
        return not held and self._clock() - self._used_at > FORGOTTEN_SECONDS

    def _measure(self, now: float, elapsed: float) -> None:
        if self._uses:
            self._used_at = now
        kept = math.exp(-elapsed / _SMOOTHING_SECONDS)
        self._uses_per_second = kept * self._uses_per_second + (1 - kept) * self._uses / elapsed
        smooth = kept * self._units_per_second + (1 - kept) * self._demand / elapsed
        # What has just come is met at once; what fades is given up slowly.
        self._units_per_second = max(smooth, self._demand / elapsed)
        self._uses = self._demand = 0
        self._looked_at = now

    def _use_following(self, quantity: int) -> bool:
        if quantity < 1:
            msg = "quantity must be at least 1"
            raise ValueError(msg)
        following, now = self._following, self._clock()
        if following is None or now >= following.ends_at or quantity > following.granted or quantity > (following.largest_use or quantity):
            return False
        self._advance()
        self._room -= quantity
        self.lacks(self)
        return True

    def _advance(self) -> None:
        self._finish(self._current, self._room)
        following, self._following, self._current = self._following, None, None
        self._room, self._low, self._ends_at = 0, -1, 0.0
        if following is not None:
            self._begin(following)

    def _begin(self, held: HeldSlice) -> None:
        self._current = held
        self._room, self._ends_at = held.granted, held.ends_at
        self._largest = held.largest_use or held.granted
        self._low = held.granted // 2

    def _finish(self, held: HeldSlice | None, left: int | None = None) -> None:
        if held is not None:
            used = held.granted - left if left is not None else 0
            self.finished.append(FinishedSlice(held.slice_id, held.epoch, used))
