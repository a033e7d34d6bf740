"""The holds that lie ahead of calls of one kind, and how fast such calls come. Reads no clock; asks nobody."""

import math
from collections import deque
from dataclasses import dataclass, field

from services.inference.call import Lease, LimitLeft, Reservation
from services.inference.worst_case import Hold
from services.kernel.tenant_context import TenantContext

# Over how long calls are counted, and for how long they must have come at their pace: what comes all at once is no pace.
RATE_SECONDS = 1.0
_IDLE_SECONDS = 1.0
# How much of the demand a full bundle covers. Calls come in bursts, as their answers do; what is left over grows too old to be used.
COVERED_SECONDS = 0.7
# Fewer than this at once save nothing.
LEAST_HOLDS = 4


class CallRate:
    """Calls a second, each counting the less the longer ago it came."""

    __slots__ = ("_began_at", "_per_second", "_seen_at")

    def __init__(self, now: float) -> None:
        self._per_second = 0.0
        self._seen_at = self._began_at = now

    def seen(self, now: float) -> None:
        """Counts a call."""
        if now - self._seen_at > _IDLE_SECONDS:
            self._began_at = now
        self._per_second = self._faded(now) + 1 / RATE_SECONDS
        self._seen_at = now

    def lasting(self, now: float) -> float:
        """Returns the calls a second; 0 while they have not come for long enough to tell."""
        return self._faded(now) if now - self._began_at >= RATE_SECONDS else 0.0

    def _faded(self, now: float) -> float:
        return self._per_second * math.exp((self._seen_at - now) / RATE_SECONDS)


@dataclass(frozen=True, slots=True)
class HoldAhead:
    """A hold whose call has not come yet; a call may take it until `usable_until`."""

    tenant: TenantContext
    hold: Hold
    reservation: Reservation
    lease: Lease
    usable_until: float


@dataclass(slots=True)
class Bundle:
    """Holds of one size, oldest first. `asked` are on their way; `limits` are as the newest answer told them, None before one.

    `is_over` once nobody is to use it any more; what is on its way then is let go as it comes.
    """

    hold: Hold
    rate: CallRate
    holds: deque[HoldAhead] = field(default_factory=deque)
    asked: int = 0
    limits: tuple[LimitLeft, ...] | None = None
    is_over: bool = False

    @property
    def lying(self) -> int:
        """How many are held, or may be."""
        return len(self.holds) + self.asked

    def take(self, now: float) -> HoldAhead | None:
        """Takes one out for good, for the one call that opens it; None when there is none to use."""
        for place, held in enumerate(self.holds):
            if held.usable_until > now and not held.lease.lost:
                del self.holds[place]
                return held
        return None

    def take_old(self, now: float) -> list[HoldAhead]:
        """Takes out those that no call may use any more."""
        old = [held for held in self.holds if held.usable_until <= now or held.lease.lost]
        if old:
            self.holds = deque(held for held in self.holds if held.usable_until > now and not held.lease.lost)
        return old

    def take_all(self) -> list[HoldAhead]:
        """Takes out all of them."""
        everything = list(self.holds)
        self.holds.clear()
        return everything

    def lacks(self, now: float, hot_calls_per_second: float) -> int:
        """Returns how many more it should have; 0 while calls come slowly, while it has enough, or while some are on their way."""
        rate = self.rate.lasting(now)
        if self.asked or rate < hot_calls_per_second:
            return 0
        full = math.ceil(rate * COVERED_SECONDS)
        return full - len(self.holds) if 2 * len(self.holds) <= full else 0
