"""One attempt as the ledger has it, for people and reports; and the port that reads a tenant's own calls."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol
from uuid import UUID

from services.kernel.ids import TenantId, parse_uuid
from services.kernel.paging import decode_page_token, encode_page_token, position_time
from services.metering.call import CallState, TokenUsage
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


@dataclass(frozen=True, slots=True)
class PagePosition:
    """The last call of the page before: the next page holds calls opened before it."""

    open_time: datetime
    reservation_id: UUID


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


def page_token(last: CallRecord, tenant_id: TenantId, states: Sequence[CallState]) -> str:
    """Returns the token of the page after a call."""
    return encode_page_token(_listing(tenant_id, states), [last.open_time.isoformat(), str(last.reservation_id)])


def page_position(token: str, tenant_id: TenantId, states: Sequence[CallState]) -> PagePosition | None:
    """Reads a token; None for the first page. Raises: InvalidRequest(page_token) for one of another tenant, filter or making."""
    position = decode_page_token(token, _listing(tenant_id, states), 2)
    return None if position is None else PagePosition(position_time(position[0]), parse_uuid(position[1], "page_token"))


def _listing(tenant_id: TenantId, states: Sequence[CallState]) -> str:
    # A page of another filter would go on at the right place of the wrong list, and nobody would notice the calls it leaves out.
    return "|".join(["calls", str(tenant_id), *(str(int(state)) for state in sorted(set(states)))])
