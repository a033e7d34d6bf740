"""One attempt as the ledger has it, for people and reports; and the port that reads a tenant's own calls."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol
from uuid import UUID

from services.kernel.ids import TenantId
from services.metering.call import CallState, TokenUsage
from services.metering.page_token import PagePosition
from services.metering.usage_report import UsageGroup


@dataclass(frozen=True, slots=True)
class CallRecord:
    """An attempt that was opened; tombstones have no record. `usage` is what was used, or of an unresolved call what was received."""

    call_id: UUID
    reservation_id: UUID
    attempt: int
    state: CallState
    open_time: datetime
    end_time: datetime | None
    provider: str
    model: str
    feature: str
    user: str
    prompt_version: str
    price_version: str
    usage: TokenUsage | None
    cost_nano_usd: int | None
    bound_nano_usd: int
    entry_id: UUID | None
    end_cause: str
    first_token_ms: int
    total_ms: int


@dataclass(frozen=True, slots=True)
class PeriodSums:
    """A period as the store understood it, with its groups."""

    start_time: datetime
    end_time: datetime
    groups: Sequence[UsageGroup]


class UsageStore(Protocol):
    """A tenant's own calls, read only."""

    async def period(self, tenant_id: TenantId, start: datetime | None, end: datetime | None) -> PeriodSums:
        """Sums the calls opened from `start` (default: this UTC month's) to before `end` (default: now).

        Raises: InvalidRequest for a period out of bounds.
        """
        ...

    async def page(self, tenant_id: TenantId, states: Sequence[CallState], after: PagePosition | None, size: int) -> Sequence[CallRecord]:
        """Returns up to `size` calls, newest first, opened before the position."""
        ...

    async def attempts(self, tenant_id: TenantId, call_id: UUID) -> Sequence[CallRecord]:
        """Returns the attempts of a call, first first; none when it is absent or another tenant's."""
        ...
