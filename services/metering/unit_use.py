"""Uses of the product's own units, as values. A use is settled from its beginning; its id stands where a call has its reservation."""

from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Self


class RecordUnitsOutcome(IntEnum):
    """What came of one use; the numbers are the contract's and the database's."""

    RECORDED = 1
    STALE_EPOCH = 2
    ENDED = 3
    CONFLICT = 4
    TENANT_NOT_PROVEN = 5


@dataclass(frozen=True, slots=True)
class UnitUse:
    """A use to record. Its time, microseconds since 1970, says when it counts and is no part of what it is: a repeat may tell another."""

    tenant_id: bytes
    reservation_id: bytes
    context_token: str
    entry_id: bytes
    epoch: int
    reserve_us: int
    product_unit: str
    quantity: int
    user: str
    feature: str
    tier: str = ""

    def in_tier(self, tier: str) -> Self:
        """Returns the same use by a tenant in that tier."""
        return replace(self, tier=tier)


@dataclass(frozen=True, slots=True)
class Recorded:
    """How one record went; `told_epoch` is the tenant's epoch when this very item was written, None when it was there or was refused."""

    outcome: RecordUnitsOutcome
    told_epoch: int | None
