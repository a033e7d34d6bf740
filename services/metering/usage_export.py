"""Exports the books of a period as pages of rows, in an order and of a moment that stay the same however often an export is begun again."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from enum import IntEnum
from typing import Protocol
from uuid import UUID

from services.kernel.ids import TenantId
from services.metering.call import TokenUsage
from services.metering.event import LedgerEvent
from services.metering.usage_calendar import Bucket
from services.metering.usage_query import Dimension, GroupKey, GroupUse, RowPosition, UsageQuery

BEFORE_ALL = UUID(int=0)
_ALL_NAMES = frozenset(Dimension) - {Dimension.TENANT}


class ExportKind(IntEnum):
    """What rows are of; the numbers are the contract's."""

    ENTRIES = 1
    EVENTS = 2
    USAGE = 3


@dataclass(frozen=True, slots=True)
class ExportSpan:
    """What was used from `start` to before `end`, and recorded before `as_of`."""

    start: datetime
    end: datetime
    as_of: datetime


@dataclass(frozen=True, slots=True)
class RowKey:
    """The last row of the page before: the time that rows are ordered by, and its id."""

    time: datetime
    row_id: UUID


@dataclass(frozen=True, slots=True)
class ExportedEntry:
    """An entry of a call or of units, with the names that stand in `calls`. Sources are the contract's UsageSource."""

    source: int
    entry_id: UUID
    reservation_id: UUID
    call_id: UUID | None
    number: int
    use_time: datetime
    record_time: datetime
    provider: str
    model: str
    price_version: str
    feature: str
    user: str
    prompt_version: str
    tier: str
    usage: TokenUsage = field(default_factory=TokenUsage)
    cost_nano_usd: int = 0
    product_unit: str = ""
    quantity: int = 0


class ExportedBooks(Protocol):
    """Reads pages, each in one snapshot."""

    async def moment(self, tenant_id: TenantId) -> datetime:
        """Returns a moment such that whatever was recorded before it is committed."""
        ...

    async def entries(self, tenant_id: TenantId, span: ExportSpan, after: RowKey, size: int) -> Sequence[ExportedEntry]:
        """Returns up to `size` entries after a position, by time of use."""
        ...

    async def events(self, tenant_id: TenantId, span: ExportSpan, after: RowKey, size: int) -> Sequence[LedgerEvent]:
        """Returns up to `size` events after a position, by time of record."""
        ...


def day_query(span: ExportSpan) -> UsageQuery:
    """Asks for sums of every day and every set of names there is."""
    return UsageQuery(span.start, span.end, bucket=Bucket.DAY, group_by=_ALL_NAMES)


def use_position(bucket: int, names: Sequence[str]) -> RowPosition:
    """Returns the place of a row of sums, in the order of days and names."""
    return RowPosition(0, GroupKey(bucket, BEFORE_ALL, tuple(names)))


def place_of_entry(entry: ExportedEntry) -> tuple[str, str]:
    """Where an export goes on after an entry."""
    return entry.use_time.isoformat(), str(entry.entry_id)


def place_of_event(event: LedgerEvent) -> tuple[str, str]:
    """Where an export goes on after an event."""
    return event.record_time.isoformat(), str(event.event_id)


def place_of_use(group: GroupUse) -> tuple[str, ...]:
    """Where an export goes on after a row of sums."""
    return str(group.key.bucket), *group.key.names
