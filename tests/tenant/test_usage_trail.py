"""The trail of uses and refusals: bounded, off the hot path, and nothing lost while the store is away."""

import asyncio
from collections.abc import Sequence
from datetime import UTC, datetime
from uuid import UUID

import pytest

from services.kernel.errors import Unavailable
from services.kernel.ids import TenantId
from services.tenant.authentication import AuditAction
from services.tenant.usage_trail import EVENTS_AT_ONCE, AuditEvent, KeyUse, UsageTrailBuffer

TENANT = TenantId(UUID(int=7))
NOW = datetime(2026, 1, 1, tzinfo=UTC)


class Store:
    """A store that can be away."""

    def __init__(self) -> None:
        self.away = False
        self.asked = asyncio.Event()
        self.written = asyncio.Event()
        self.uses: list[KeyUse] = []
        self.events: list[tuple[AuditEvent, int]] = []

    async def record_last_uses(self, uses: Sequence[KeyUse]) -> None:
        if self.away:
            raise Unavailable("postgres")
        self.uses += uses

    async def append_audit(self, events: Sequence[tuple[AuditEvent, int]]) -> None:
        self.asked.set()
        if self.away:
            raise Unavailable("postgres")
        self.events += events
        self.written.set()


class Clock:
    """Seconds that pass when told."""

    def __init__(self) -> None:
        self.seconds = 100.0

    def __call__(self) -> float:
        return self.seconds


def refused(trail: UsageTrailBuffer) -> None:
    """One refusal of one key."""
    trail.audit(TENANT, AuditAction.CREDENTIAL_REFUSED, "key:k", "", "192.0.2.7")


async def test_a_key_in_constant_use_is_written_once_a_minute() -> None:
    """A thousand uses within a minute are one write; the next minute has another."""
    store, clock = Store(), Clock()
    trail = UsageTrailBuffer(store, monotonic=clock)
    for _ in range(1000):
        trail.key_used(TENANT, "k", NOW)
        await trail.flush()
    assert len(store.uses) == 1
    clock.seconds += 60.0
    await trail.flush()
    trail.key_used(TENANT, "k", NOW)
    await trail.flush()
    assert len(store.uses) == 2


async def test_a_flood_of_refusals_is_one_record_a_minute_with_its_count() -> None:
    """The first refusal is written at once, what follows within the minute as one count."""
    store, clock = Store(), Clock()
    trail = UsageTrailBuffer(store, monotonic=clock)
    for _ in range(500):
        refused(trail)
        await trail.flush()
    assert [count for _, count in store.events] == [1]
    clock.seconds += 60.0
    await trail.flush()
    assert [count for _, count in store.events] == [1, 499]


async def test_nothing_is_lost_while_the_store_is_away() -> None:
    """What could not be written is kept and written with its full count later."""
    store, clock = Store(), Clock()
    trail = UsageTrailBuffer(store, monotonic=clock)
    store.away = True
    refused(trail)
    trail.key_used(TENANT, "k", NOW)
    for _ in range(2):
        with pytest.raises(Unavailable):
            await trail.flush()
        refused(trail)
    store.away = False
    await trail.flush()
    assert [count for _, count in store.events] == [3]
    assert [use.key_id for use in store.uses] == ["k"]


async def test_closing_writes_counts_that_would_have_waited() -> None:
    """The last flush of a process leaves nothing behind."""
    store = Store()
    trail = UsageTrailBuffer(store, monotonic=Clock())
    refused(trail)
    await trail.flush()
    refused(trail)
    await trail.flush(everything=True)
    assert sum(count for _, count in store.events) == 2


async def test_the_loop_outlives_an_outage_and_writes_afterwards() -> None:
    """The background loop tries again while the store is away and writes once it is back."""
    store = Store()
    trail = UsageTrailBuffer(store, monotonic=Clock(), write_seconds=0.0)
    store.away = True
    async with asyncio.TaskGroup() as group:
        loop = group.create_task(trail.run())
        refused(trail)
        await store.asked.wait()
        store.away = False
        await asyncio.wait_for(store.written.wait(), 5)
        loop.cancel()
    assert [count for _, count in store.events] == [1]


async def test_a_full_trail_refuses_to_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond its bound new kinds of refusals are logged instead of kept; known ones are still counted."""
    monkeypatch.setattr("services.tenant.usage_trail._MAX_ENTRIES", 1)
    store = Store()
    trail = UsageTrailBuffer(store, monotonic=Clock())
    refused(trail)
    trail.audit(TENANT, AuditAction.TENANT_MISMATCH, "key:other", "", "")
    refused(trail)
    await trail.flush(everything=True)
    assert [(event.subject, count) for event, count in store.events] == [("key:k", 2)]


async def test_a_flood_is_written_in_pieces_a_tenants_together() -> None:
    """Thousands of different refusals are many statements, each small, and a piece holds up none that was written before it."""
    store = Store()
    sizes: list[int] = []
    write = store.append_audit

    async def counted(events: Sequence[tuple[AuditEvent, int]]) -> None:
        sizes.append(len(events))
        await write(events)

    store.append_audit = counted  # type: ignore[method-assign] # watched, not replaced
    trail = UsageTrailBuffer(store)
    for number in range(3 * EVENTS_AT_ONCE):
        tenant = TenantId(UUID(int=number % 2))
        trail.audit(tenant, AuditAction.TENANT_MISMATCH, "key:k", f"tenant:{number}", "192.0.2.7")
    await trail.flush()
    assert sizes == [EVENTS_AT_ONCE] * 3
    assert [event.tenant_id for event, _ in store.events] == sorted(event.tenant_id for event, _ in store.events)
