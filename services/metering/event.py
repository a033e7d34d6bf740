"""Events of the product as values: what a tenant used, what names it, and what says that two of them are the same."""

import hashlib
from collections.abc import Sequence
from datetime import datetime
from enum import IntEnum
from typing import NamedTuple
from uuid import UUID

# Texts of an event hold none: Postgres could not keep them.
SEPARATOR = "\x00"


class RecordOutcome(IntEnum):
    """What came of an event; the numbers are the contract's and the database's."""

    RECORDED = 1
    DUPLICATE = 2
    CONFLICT = 3
    UNKNOWN_TYPE = 4
    TIME_IN_FUTURE = 5


class ReverseOutcome(IntEnum):
    """What came of a reversal; the numbers are the contract's and the database's."""

    REVERSED = 1
    NOT_FOUND = 2
    EXPIRED = 3


class Event(NamedTuple):
    """An event to record: the tenant's id as 16 bytes, its own as text, the time in microseconds since 1970, a JSON object or None.

    A plain tuple, because thousands come at once. Its order is the one in which everybody takes claims; of two with one name the one that
    came first, and so has the lower id, is first.
    """

    tenant_id: bytes
    source: str
    id: str
    event_id: str
    digest: bytes
    product: str
    event_type: str
    quantity: int
    occurred_us: int
    user: str
    feature: str
    metadata: str | None


class Recorded(NamedTuple):
    """How one event went: the id that stands, as text, and of a conflict the digest that stands."""

    outcome: RecordOutcome
    event_id: str = ""
    digest: bytes = b""


class Reversal(NamedTuple):
    """An event to take back, and the id its reversal will have. Ordered as `Event`."""

    tenant_id: bytes
    source: str
    id: str
    event_id: str
    reason: str


class Reversed(NamedTuple):
    """How one reversal went, and its id."""

    outcome: ReverseOutcome
    event_id: str = ""


class LedgerEvent(NamedTuple):
    """A row of the ledger: an event, or with `reverses` a reversal."""

    event_id: UUID
    record_time: datetime
    product: str
    source: str
    id: str
    event_type: str
    quantity: int
    occurred_at: datetime
    user: str
    feature: str
    reverses: UUID | None
    metadata: str | None


def content_digest(texts: Sequence[str]) -> bytes | None:
    """Returns the SHA-256 of texts in a fixed order; None when one of them holds a NUL, which would make the order a guess."""
    content = SEPARATOR.join(texts)
    if content.count(SEPARATOR) >= len(texts):
        return None
    return hashlib.sha256(content.encode()).digest()
