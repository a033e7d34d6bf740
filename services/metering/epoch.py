"""What the limits must count at the beginning of an epoch: a snapshot of one tenant's ledger at one moment."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol

from services.kernel.ids import TenantId
from services.metering.call import CallState


@dataclass(frozen=True, slots=True)
class CountedCall:
    """One call as the limits count it: settled at what was used, open and unresolved at its bound, void at 0."""

    reservation_id: bytes
    state: CallState
    reserve_time: datetime
    tokens: int
    cost_nano_usd: int


@dataclass(frozen=True, slots=True)
class EpochSnapshot:
    """The new epoch and all that counts in it. Days and months are those of the reservation, in UTC."""

    epoch: int
    snapshot_time: datetime
    recent: Sequence[CountedCall]
    outstanding: Sequence[CountedCall]
    settled_tokens_by_day: Mapping[str, int]
    settled_nano_usd_by_month: Mapping[str, int]


class EpochStore(Protocol):
    """Where epochs are begun."""

    async def begin_epoch(self, tenant_id: TenantId) -> EpochSnapshot:
        """Raises the tenant's epoch and reads the snapshot in one transaction."""
        ...
