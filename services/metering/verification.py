"""Walks the books of tenants part by part, and tells where stored figures are not what the rows behind them make. Changes nothing."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import IntEnum
from typing import Protocol
from uuid import UUID

from services.kernel.ids import TenantId
from services.metering.billing.books import StoredInvoice
from services.metering.billing.invoice import Closing, Invoice, digest

# One answer tells at most this many differences.
MOST_TOLD = 200
# An empty part costs next to nothing: one page passes over so many of them.
_MOST_EMPTY_PARTS = 50
_BEFORE_ALL = UUID(int=0)
_AMOUNTS = ("charges_nano_usd", "carried_in_nano_usd", "credits_nano_usd", "due_nano_usd", "carried_out_nano_usd")


class Check(IntEnum):
    """What is compared; the numbers are the contract's."""

    CALL = 1
    USAGE_SUM = 2
    LATENCY = 3
    BALANCE = 4
    INVOICE = 5
    PRICE = 6


class Section(IntEnum):
    """The parts of a tenant's books, in the order they are walked."""

    CALLS = 1
    USE = 2
    INVOICES = 3


# Where each section is begun.
_BEGINNINGS = {Section.CALLS: str(_BEFORE_ALL), Section.USE: datetime(1970, 1, 1, tzinfo=UTC).isoformat(), Section.INVOICES: "0"}


@dataclass(frozen=True, slots=True)
class Difference:
    """A figure that is not what the books make it; texts, because a figure may be absent or a digest."""

    check: Check
    subject: str
    figure: str
    stored: str
    recomputed: str


@dataclass(frozen=True, slots=True)
class Part:
    """What came of a part: `following` is where its section goes on, None at its end.

    `summed_months`, YYYY-MM, are those whose events, or counts of refusals, it knew by their sums alone.
    """

    compared: int
    differences: Sequence[Difference]
    untold: int
    following: str | None
    summed_months: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class Position:
    """The part to look at next."""

    tenant_id: TenantId
    section: Section
    after: str


@dataclass(frozen=True, slots=True)
class Page:
    """What came of a part, whose it was, and where the walk goes on; None at its end."""

    tenant_id: TenantId | None
    part: Part
    following: Position | None


class VerifiedBooks(Protocol):
    """Reads and compares, each part in one snapshot of the tenant's."""

    async def next_tenant(self, after: UUID) -> TenantId | None:
        """Returns the first tenant after an id that has anything in the books."""
        ...

    async def calls(self, tenant_id: TenantId, after: UUID) -> Part:
        """Compares calls after a reservation with their entries."""
        ...

    async def use(self, tenant_id: TenantId, start: datetime) -> Part:
        """Compares the sums of the first day with any use, from `start` on, with the calls and the entries of that day."""
        ...

    async def invoices(self, tenant_id: TenantId, after_number: int) -> Part:
        """Makes invoices after a number again."""
        ...


class Verifier:
    """Goes from part to part: of all tenants, or of one."""

    def __init__(self, books: VerifiedBooks) -> None:
        self._books = books

    async def page(self, only: TenantId | None, position: Position | None) -> Page:
        """Looks at the part at a position, or at the first one; parts with nothing in them are passed over."""
        at = position or await self._beginning(only, _BEFORE_ALL)
        part = Part(0, (), 0, None)
        whose = None if at is None else at.tenant_id
        for _ in range(_MOST_EMPTY_PARTS):
            if at is None or part.compared or part.differences:
                break
            whose, part = at.tenant_id, await self._part(at)
            at = await self._following(only, at, part)
        return Page(whose, part, at)

    async def _part(self, at: Position) -> Part:
        match at.section:
            case Section.CALLS:
                return await self._books.calls(at.tenant_id, UUID(at.after))
            case Section.USE:
                return await self._books.use(at.tenant_id, datetime.fromisoformat(at.after))
            case Section.INVOICES:
                return await self._books.invoices(at.tenant_id, int(at.after))

    async def _following(self, only: TenantId | None, at: Position, part: Part) -> Position | None:
        if part.following is not None:
            return Position(at.tenant_id, at.section, part.following)
        if at.section < Section.INVOICES:
            section = Section(at.section + 1)
            return Position(at.tenant_id, section, _BEGINNINGS[section])
        return None if only is not None else await self._beginning(None, at.tenant_id)

    async def _beginning(self, only: TenantId | None, after: UUID) -> Position | None:
        tenant_id = only or await self._books.next_tenant(after)
        return None if tenant_id is None else Position(tenant_id, Section.CALLS, _BEGINNINGS[Section.CALLS])


def invoice_differences(stored: StoredInvoice, made: Invoice) -> list[Difference]:
    """Compares a stored invoice with the same one made again: its amounts, and its digest where no amount tells what else differs."""
    number, held, meant = str(stored.invoice.closing.number), stored.invoice.content, made.content
    pairs = [(name, getattr(held, name), getattr(meant, name)) for name in _AMOUNTS]
    found = [Difference(Check.INVOICE, number, name, str(a), str(b)) for name, a, b in pairs if a != b]
    if found or (stored.invoice == made and stored.digest == digest(made)):
        return found
    said = stored.digest if stored.digest != digest(made) else digest(stored.invoice)
    return [Difference(Check.INVOICE, number, "digest", said.hex(), digest(made).hex())]


def missing_invoice(closing: Closing, made: Invoice) -> Difference:
    """Tells of a closed period whose invoice is not there."""
    return Difference(Check.INVOICE, str(closing.number), "due_nano_usd", "", str(made.content.due_nano_usd))


def unbillable(closing: Closing, stored: str, why: str) -> Difference:
    """Tells of an invoice that cannot be made again: a plan or an amount it was made of is not there any more."""
    return Difference(Check.INVOICE, str(closing.number), why, stored, "")
