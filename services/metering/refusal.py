"""What the limits refused, as whoever asked them tells it: counts of a minute so far, which no repeat makes more."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from enum import IntEnum
from typing import Protocol, Self

from services.metering.tenant_proof import TenantProof

# What is added up at one replica's time is refused at another's well before.
_MARGIN = timedelta(days=1)


class RecordRefusalsOutcome(IntEnum):
    """What came of one count; the numbers are the contract's."""

    RECORDED = 1
    TENANT_NOT_PROVEN = 2
    TOO_OLD = 3


@dataclass(frozen=True, slots=True)
class RefusalCount:
    """How many calls of these names one replica saw refused in a minute, microseconds since 1970, so far."""

    tenant_id: bytes
    context_token: str
    minute_us: int
    reason: str
    rule: str
    model: str
    feature: str
    user: str
    count: int
    tier: str = ""

    def in_tier(self, tier: str) -> Self:
        """Returns the same count of a tenant in that tier."""
        return replace(self, tier=tier)


class RefusalStore(Protocol):
    """Where counts are kept."""

    async def record(self, replica_id: bytes, counts: Sequence[RefusalCount]) -> None:
        """Keeps the highest count of each name, minute and replica, in one transaction."""
        ...


class RefusalBook:
    """Counts for callers of many tenants each."""

    def __init__(self, store: RefusalStore, proof: TenantProof, *, retention_days: int, clock: Callable[[], datetime]) -> None:
        """Counts are told apart by replica for `retention_days`."""
        self._store = store
        self._proof = proof
        self._retention = timedelta(days=retention_days)
        self._clock = clock

    async def record(self, replica_id: bytes, counts: Sequence[RefusalCount]) -> list[RecordRefusalsOutcome]:
        """Keeps counts whose context token proves their tenant and whose minute is not long over; the others leave no trace."""
        earliest_us = int((self._clock() - self._retention + _MARGIN).timestamp() * 1_000_000)
        outcomes, kept = list[RecordRefusalsOutcome](), list[RefusalCount]()
        for count in counts:
            tier = await self._proof.tier_of(count.context_token, count.tenant_id)
            if tier is None:
                outcomes.append(RecordRefusalsOutcome.TENANT_NOT_PROVEN)
            elif count.minute_us < earliest_us:
                outcomes.append(RecordRefusalsOutcome.TOO_OLD)
            else:
                outcomes.append(RecordRefusalsOutcome.RECORDED)
                kept.append(count.in_tier(tier))
        if kept:
            await self._store.record(replica_id, kept)
        return outcomes
