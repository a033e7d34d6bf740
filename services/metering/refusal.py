"""What the limits refused, as whoever asked them tells it: counts of a minute so far, which no repeat makes more."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Protocol, Self

from services.metering.tenant_proof import TenantProof


class RecordRefusalsOutcome(IntEnum):
    """What came of one count; the numbers are the contract's."""

    RECORDED = 1
    TENANT_NOT_PROVEN = 2


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

    def __init__(self, store: RefusalStore, proof: TenantProof) -> None:
        self._store = store
        self._proof = proof

    async def record(self, replica_id: bytes, counts: Sequence[RefusalCount]) -> list[RecordRefusalsOutcome]:
        """Keeps counts whose context token proves their tenant; the others leave no trace."""
        tiers = [await self._proof.tier_of(count.context_token, count.tenant_id) for count in counts]
        proven = [count.in_tier(tier) for count, tier in zip(counts, tiers, strict=True) if tier is not None]
        if proven:
            await self._store.record(replica_id, proven)
        return [RecordRefusalsOutcome.TENANT_NOT_PROVEN if tier is None else RecordRefusalsOutcome.RECORDED for tier in tiers]
