"""Where invoicing reads and writes: the ports, and the values that only they exchange."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from datetime import datetime
from enum import IntEnum
from typing import Protocol
from uuid import UUID

from services.kernel.errors import NotFound
from services.kernel.ids import TenantId
from services.metering.billing.credits import Credit
from services.metering.billing.invoice import Closing, Invoice, InvoiceLine, Quantities
from services.metering.billing.periods import BillingPeriod
from services.metering.billing.proration import Plans, Span, Subscription


class CloseOutcome(IntEnum):
    """How closing a period went; the numbers are the database's."""

    CLOSED = 1
    NOT_ENDED = 2
    NOT_NEXT = 3
    SUBSCRIPTION_CHANGED = 4


@dataclass(frozen=True, slots=True)
class CloseAnswer:
    """The closing; or where the next period begins, of NOT_NEXT."""

    outcome: CloseOutcome
    closing: Closing | None
    next_start_time: datetime | None


@dataclass(frozen=True, slots=True)
class CreditGrant:
    """A credit to add."""

    credit_id: UUID
    amount_nano_usd: int
    priority: int
    effective_time: datetime
    expire_time: datetime | None
    reason: str


@dataclass(frozen=True, slots=True)
class CreditNote:
    """An amount that is not asked for after all, of a closed invoice."""

    credit_note_id: UUID
    number: int
    amount_nano_usd: int
    reason: str
    issue_time: datetime


@dataclass(frozen=True, slots=True)
class StoredInvoice:
    """An invoice as it was stored, with its digest and what was noted since."""

    invoice: Invoice
    digest: bytes
    notes: Sequence[CreditNote]


@dataclass(frozen=True, slots=True)
class LineEntry:
    """A record of usage behind a line, or the sum of `record_count` that are kept no longer. Sources are the contract's UsageSource."""

    source: int
    usage_id: UUID
    use_time: datetime
    record_time: datetime
    quantity: int
    record_count: int


@dataclass(frozen=True, slots=True)
class EntryWindow:
    """Which records a line is made of: used in a span, on a meter, recorded from (None: ever) to before."""

    start_time: datetime
    end_time: datetime
    meter: str
    recorded_from: datetime | None
    recorded_before: datetime


@dataclass(frozen=True, slots=True)
class EntryPosition:
    """The last record of the page before."""

    use_time: datetime
    source: int
    usage_id: UUID


@dataclass(frozen=True, slots=True)
class CreditPosition:
    """The last credit of the page before."""

    record_time: datetime
    credit_id: UUID


@dataclass(frozen=True, slots=True)
class DueTenant:
    """A tenant that may have a period to close. Before its first, billing starts with its first use or plan."""

    tenant_id: TenantId
    last_end_time: datetime | None
    first_time: datetime | None
    anchor_day: int
    is_subscribed: bool
    erase_time: datetime | None


class BillingReader(Protocol):
    """One tenant's books within one transaction. `recorded_before` is exclusive; None: all there is."""

    async def closings(self) -> Sequence[Closing]:
        """Returns the closed periods, first first."""
        ...

    async def unfinished(self) -> Sequence[Closing]:
        """Returns the closed periods without an invoice, first first: a crash came between."""
        ...

    async def subscriptions(self) -> Sequence[Subscription]:
        """Returns all subscriptions, by number."""
        ...

    async def plans(self) -> Plans:
        """Returns every version of every plan."""
        ...

    async def credits(self, recorded_before: datetime | None) -> Sequence[Credit]:
        """Returns the credits."""
        ...

    async def credits_page(self, after: CreditPosition | None, size: int) -> Sequence[tuple[Credit, int]]:
        """Returns up to `size` credits after a position, in the order they were granted, each with what invoices took of it."""
        ...

    async def credit_used(self, credit_id: UUID) -> int:
        """Returns what invoices took of a credit."""
        ...

    async def credits_used(self, before_number: int) -> Mapping[UUID, int]:
        """Returns what invoices before this one took of each credit."""
        ...

    async def carried_out(self, number: int) -> int:
        """Returns what an invoice carries to the next; 0 for one that is not there."""
        ...

    async def late_days(self, start: datetime, recorded_from: datetime | None, recorded_before: datetime | None) -> Sequence[datetime]:
        """Returns the days of use before `start` that was recorded in between; `recorded_from` is not before `start`, or None: ever."""
        ...

    async def sums(self, spans: Sequence[Span], recorded_before: datetime | None) -> Quantities:
        """Returns what was used in each span, by meter; at least of the meters that the spans' plans charge."""
        ...

    async def invoices(self, after_number: int, size: int) -> Sequence[StoredInvoice]:
        """Returns up to `size` invoices after a number, in order, with their lines."""
        ...

    async def invoice(self, invoice_id: UUID) -> StoredInvoice | None:
        """Returns an invoice; None when it is absent or another tenant's."""
        ...

    async def entries(self, window: EntryWindow, after: EntryPosition | None, size: int) -> Sequence[LineEntry]:
        """Returns up to `size` records after a position, by time of use."""
        ...


class BillingBooks(Protocol):
    """The books as a tenant's own service sees them, and what it may add to them."""

    def reading(self, tenant_id: TenantId) -> AbstractAsyncContextManager[BillingReader]:
        """Begins a transaction of one snapshot."""
        ...

    async def subscribe(
        self, tenant_id: TenantId, subscription_id: UUID, plan: str, effective_time: datetime | None, anchor_day: int
    ) -> Subscription:
        """Adds a subscription, once for its id. Raises: NotFound, WrongState, ContentConflict."""
        ...

    async def grant(self, tenant_id: TenantId, grant: CreditGrant) -> Credit:
        """Adds a credit, once for its id; returns what is stored. Raises: ContentConflict."""
        ...

    async def note(self, tenant_id: TenantId, invoice_id: UUID, credit_note_id: UUID, amount: int, reason: str) -> StoredInvoice:
        """Adds a credit note, once for its id. Raises: NotFound, WrongState, ContentConflict."""
        ...


class ClosingBooks(Protocol):
    """The books as the jobs role sees them: it alone writes invoices."""

    def reading(self, tenant_id: TenantId) -> AbstractAsyncContextManager[BillingReader]:
        """Begins a transaction."""
        ...

    async def close(
        self, tenant_id: TenantId, invoice_id: UUID, period: BillingPeriod, tier_plan: str, subscription_number: int
    ) -> CloseAnswer:
        """Closes a period, once."""
        ...

    async def store(self, tenant_id: TenantId, invoice: Invoice) -> None:
        """Writes what the invoice of a closing says, unless it is there."""
        ...

    async def due(self, after: TenantId | None, end_before: datetime, size: int) -> Sequence[DueTenant]:
        """Returns up to `size` tenants after one, by id, whose next period may end at or before the moment."""
        ...

    async def unfinished(self, size: int) -> Sequence[TenantId]:
        """Returns up to `size` tenants with a closed period that has no invoice yet."""
        ...


class TierDirectory(Protocol):
    """Who knows the tiers of tenants."""

    async def tier(self, tenant_id: TenantId) -> str:
        """Returns the tenant's tier now; empty when it has none any more. Raises: MeshError when nobody answers."""
        ...


def numbered_line(stored: StoredInvoice, line_number: int) -> InvoiceLine:
    """Returns a line of an invoice, counted from 1. Raises: NotFound."""
    lines = stored.invoice.content.lines
    if not 1 <= line_number <= len(lines):
        raise NotFound("invoice_line")
    return lines[line_number - 1]


def line_window(closings: Sequence[Closing], closing: Closing, line: InvoiceLine) -> EntryWindow:
    """Returns which records a line of a closing is made of."""
    before = next((item for item in closings if item.number == closing.number - 1), None)
    key = line.line.key
    return EntryWindow(
        key.start_time, key.end_time, key.name, before.close_time if line.is_late and before is not None else None, closing.close_time
    )
