"""How a demand stands in line, and whether it is worth staying there. Waits for nothing itself."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Stand:
    """How a demand that may wait is asked for: `keep` its place if it is not admitted. `since_us`: since when it waits, 0 at first."""

    keep: bool = False
    since_us: int = 0


@dataclass(frozen=True, slots=True)
class Place:
    """Where one stands that was not admitted, by the store's clock.

    `since_us`: 0 without a place. `ahead`: those before it who wait for what it needs. `returns_us`: when a hold that runs could end by
    itself; 0 when nothing runs that could come back. `line`: whose line it is, a provider account's; empty: the tenant's own.
    """

    now_us: int
    since_us: int
    ahead: int
    returns_us: int
    expired_holds: int = 0
    line: str = ""


@dataclass(frozen=True, slots=True)
class Queued:
    """It would fit, but others wait before it."""

    place: Place


@dataclass(frozen=True, slots=True)
class Pause:
    """Until when to wait unless woken; None: only for being woken."""

    seconds: float | None
