"""What the limits must count at the beginning of an epoch: a snapshot of one tenant's ledger at one moment."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import IntEnum
from typing import Protocol

from services.kernel.ids import TenantId
from services.metering.call import CallState


class CountedUnit(IntEnum):
    """What is added up; the numbers are the contract's LimitUnit."""

    REQUESTS = 1
    TOKENS = 2
    COST_NANO_USD = 3
    RETRIES = 5
    PRODUCT = 6


class CountedScope(IntEnum):
    """Whose use is one sum; the numbers are the contract's LimitScope."""

    TENANT = 1
    USER = 2
    FEATURE = 3
    USER_FEATURE = 4


@dataclass(frozen=True, slots=True)
class CountedPeriod:
    """What to add up: a unit over what was reserved from `start_us` to before `end_us`, microseconds since 1970, UTC."""

    unit: CountedUnit
    product_unit: str
    scope: CountedScope
    start_us: int
    end_us: int


@dataclass(frozen=True, slots=True)
class CountedSum:
    """The settled use of a period, of one user and feature where its scope tells them apart; never 0."""

    period: int
    user: str
    feature: str
    amount: int


@dataclass(frozen=True, slots=True)
class CountedCall:
    """One call as the limits count it: settled at what was used, open and unresolved at its bound, void at 0.

    A use of units is one too: settled, with its unit and quantity, attempt 0 and neither tokens nor cost.
    """

    reservation_id: bytes
    state: CallState
    reserve_time: datetime
    tokens: int
    cost_nano_usd: int
    user: str
    feature: str
    attempt: int
    product_unit: str
    quantity: int


@dataclass(frozen=True, slots=True)
class EpochSnapshot:
    """The new epoch and all that counts in it."""

    epoch: int
    snapshot_time: datetime
    recent: Sequence[CountedCall]
    outstanding: Sequence[CountedCall]
    sums: Sequence[CountedSum]


class EpochStore(Protocol):
    """Where epochs are begun."""

    async def begin_epoch(self, tenant_id: TenantId, periods: Sequence[CountedPeriod], recent_seconds: int) -> EpochSnapshot:
        """Raises the tenant's epoch and reads the snapshot in one transaction."""
        ...


class WaitingEnds(Protocol):
    """Ends of calls that the limits could not take while they had no counters."""

    def rebuilt(self, tenant_id: bytes) -> None:
        """Has them told soon."""
        ...


class Epochs:
    """Begins epochs, and has the limits told what waits for one."""

    def __init__(self, store: EpochStore, waiting: WaitingEnds) -> None:
        self._store = store
        self._waiting = waiting

    async def begin_epoch(self, tenant_id: TenantId, periods: Sequence[CountedPeriod], recent_seconds: int) -> EpochSnapshot:
        """Raises the tenant's epoch and returns the snapshot. Raises: Unavailable."""
        snapshot = await self._store.begin_epoch(tenant_id, periods, recent_seconds)
        self._waiting.rebuilt(tenant_id.bytes)
        return snapshot
