"""The log of a tenant's events: recorded and taken back in group commits, each answered once it is on disk.

Refuses events of unknown types and of more than a day ahead; what was recorded before is decided inside the store's transaction.
"""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Protocol
from uuid import UUID

import structlog

from services.kernel.ids import TenantId, parse_uuid
from services.kernel.paging import decode_page_token, encode_page_token, position_time
from services.metering.event import Event, LedgerEvent, Recorded, RecordOutcome, Reversal, Reversed
from services.metering.event_types import EventTypeCatalog, TypeName
from services.metering.group_commit import MAX_ITEMS, GroupCommit

log = structlog.get_logger(__name__)

# Clocks differ, and a day may have begun elsewhere.
FUTURE_BOUND = timedelta(days=1)
# Worth a transaction of its own: waiting for others would save nothing.
LARGE_BATCH = 250
# One is written while the next is read; of large batches, and of the others where half of what a transaction takes waits: with less,
# a second would only make both small.
MAX_IN_FLIGHT = 2
ENOUGH = MAX_ITEMS // 2


@dataclass(frozen=True, slots=True)
class EventPosition:
    """The last event of the page before: the next page holds those recorded before it."""

    record_time: datetime
    event_id: UUID


class EventStore(Protocol):
    """The table of events, one transaction a call; outcomes in the order of the items."""

    async def record(self, events: Sequence[Event]) -> Sequence[Recorded]:
        """Records events of any tenants, each name once for ever."""
        ...

    async def reverse(self, reversals: Sequence[Reversal]) -> Sequence[Reversed]:
        """Takes events back, each once for ever."""
        ...

    async def page(self, tenant_id: TenantId, after: EventPosition | None, size: int) -> Sequence[LedgerEvent]:
        """Returns up to `size` events of a tenant, last recorded first, recorded before the position."""
        ...


class EventLog:
    """Events for callers of one tenant each, in transactions for all of them."""

    def __init__(self, store: EventStore, types: EventTypeCatalog, *, clock: Callable[[], datetime]) -> None:
        self._store = store
        self._types = types
        self._clock = clock
        self._records = GroupCommit(store.record, max_in_flight=MAX_IN_FLIGHT, enough=ENOUGH)
        self._reversals = GroupCommit(store.reverse)
        self._large = asyncio.Semaphore(MAX_IN_FLIGHT)

    async def record(self, events: Sequence[Event]) -> Sequence[Recorded]:
        """Records events, each name once for ever; returns what came of each."""
        refused = await self._refusals(events)
        accepted = [event for event, refusal in zip(events, refused, strict=True) if refusal is None] if refused else events
        recorded = await self._commit(accepted) if accepted else ()
        _tell_conflicts(accepted, recorded)
        if not refused:
            return recorded
        answers = iter(recorded)
        return [next(answers) if refusal is None else refusal for refusal in refused]

    async def reverse(self, reversals: Sequence[Reversal]) -> Sequence[Reversed]:
        """Takes events back, each once for ever; returns what came of each."""
        return await self._reversals.submit(reversals)

    async def page(self, tenant_id: TenantId, token: str, size: int) -> Sequence[LedgerEvent]:
        """Returns up to `size` events after a token. Raises: InvalidRequest(page_token)."""
        return await self._store.page(tenant_id, _position(token, tenant_id), size)

    async def close(self) -> None:
        """Waits for every accepted batch."""
        await self._records.close()
        await self._reversals.close()

    async def _commit(self, events: Sequence[Event]) -> Sequence[Recorded]:
        if len(events) < LARGE_BATCH:
            return await self._records.submit(events)
        async with self._large:
            return await self._store.record(events)

    async def _refusals(self, events: Sequence[Event]) -> Sequence[Recorded | None]:
        """Returns the refusal of each event, or nothing at all when none is refused."""
        names = {(event.product, event.event_type) for event in events}
        unknown = await self._types.unknown({TypeName(*name) for name in names})
        latest_us = int((self._clock() + FUTURE_BOUND).timestamp() * 1_000_000)
        if not unknown and max(event.occurred_us for event in events) <= latest_us:
            return ()
        return [_refusal(event, unknown, latest_us) for event in events]


def _refusal(event: Event, unknown: set[TypeName], latest_us: int) -> Recorded | None:
    if (event.product, event.event_type) in unknown:
        return Recorded(RecordOutcome.UNKNOWN_TYPE)
    return Recorded(RecordOutcome.TIME_IN_FUTURE) if event.occurred_us > latest_us else None


def _tell_conflicts(events: Sequence[Event], recorded: Sequence[Recorded]) -> None:
    # Looked up once and not for each event.
    conflict = RecordOutcome.CONFLICT
    conflicts = [event for event, result in zip(events, recorded, strict=True) if result.outcome is conflict]
    if conflicts:
        log.warning("event_conflicts", events=len(conflicts), first_source=conflicts[0].source, first_id=conflicts[0].id)


def event_page_token(last: LedgerEvent, tenant_id: TenantId) -> str:
    """Returns the token of the page after an event."""
    return encode_page_token(_listing(tenant_id), [last.record_time.isoformat(), str(last.event_id)])


def _position(token: str, tenant_id: TenantId) -> EventPosition | None:
    position = decode_page_token(token, _listing(tenant_id), 2)
    if position is None:
        return None
    return EventPosition(position_time(position[0]), UUID(int=parse_uuid(position[1], "page_token").int))


def _listing(tenant_id: TenantId) -> str:
    return f"events {tenant_id}"
