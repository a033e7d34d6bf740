"""Events in transactions: gathered while one is under way, two at a time, and the same behind a pooler, where a session is nobody's."""

import asyncio
import hashlib
from collections.abc import AsyncIterator, Sequence
from datetime import UTC, datetime

import asyncpg
import pytest

from services.kernel.ids import new_uuid7, new_uuid7_texts
from services.kernel.tenant_database import TenantDatabase
from services.metering.adapters.postgres_events import PostgresEvents
from services.metering.adapters.sorted_batch import slices_of
from services.metering.event import Event, LedgerEvent, Recorded, RecordOutcome, Reversal, Reversed
from services.metering.event_log import EventLog
from services.metering.event_types import EventType, EventTypeCatalog, TypeName
from services.metering.group_commit import MAX_ITEMS
from tests.metering.mesh import Peers, dsn_of, migrated
from tests.support.pooler import running_pgbouncer
from tests.support.stores import PostgresStore

REGISTER = "INSERT INTO metering.event_types (product, event_type, unit, aggregation) VALUES ('hiring', 'held', 'interviews', 1)"
KEPT = """
SELECT tenant_id, count(*) AS events, sum(quantity)::int AS quantity, count(DISTINCT k.event_id) AS claims, max(metadata ->> 'room') AS room
FROM metering.events e JOIN metering.event_claims k USING (tenant_id, source, id) WHERE e.event_id = k.event_id GROUP BY tenant_id
"""

# As replicas of the release before record.
RECORD_COLUMNS = """
SELECT item, outcome, event_id FROM metering.record_events($1::uuid[], $2::integer[], $3::integer[], $4::text[], $5::text[],
    $6::uuid[], $7::bytea[], $8::text[], $9::text[], $10::bigint[], $11::bigint[], $12::text[], $13::text[], $14::jsonb[])
"""


def held(tenant_id: bytes, ids: Sequence[str]) -> list[Event]:
    """Events of one kind, by these ids."""
    now, minted = int(datetime.now(UTC).timestamp() * 1_000_000), new_uuid7_texts(len(ids))
    return [
        Event(tenant_id, "s", name, event_id, hashlib.sha256(name.encode()).digest(), "hiring", "held", 2, now, "ada", "", '{"room": "7"}')
        for name, event_id in zip(ids, minted, strict=True)
    ]


class Held:
    """A store of events that lets no transaction end before it is told to."""

    def __init__(self) -> None:
        self.under_way: list[int] = []
        self.released = asyncio.Event()

    async def record(self, events: Sequence[Event]) -> Sequence[Recorded]:
        self.under_way.append(len(events))
        await self.released.wait()
        return [Recorded(RecordOutcome.RECORDED, event.event_id) for event in events]

    async def reverse(self, reversals: Sequence[Reversal]) -> Sequence[Reversed]:
        raise NotImplementedError

    async def page(self, *position: object) -> Sequence[LedgerEvent]:
        raise NotImplementedError


class Known:
    """Every type is known."""

    async def register(self, event_type: EventType) -> EventType:
        raise NotImplementedError

    async def known(self, names: Sequence[TypeName]) -> Sequence[TypeName]:
        return names

    async def page(self, after: TypeName, size: int) -> Sequence[EventType]:
        raise NotImplementedError


async def test_a_second_transaction_begins_once_half_of_one_waits() -> None:
    """Below that, what comes while one is under way is gathered; there are never more than two, nor more in one than it takes."""
    store, tenant = Held(), new_uuid7().bytes
    log = EventLog(store, EventTypeCatalog(Known()), clock=lambda: datetime.now(UTC))  # type: ignore[arg-type] # what else they do is not asked for
    sent = 0

    async def seen(batches: int) -> list[int]:
        nonlocal sent
        for _ in range(batches):
            sent += 1
            events = held(tenant, [f"{sent}-{index}" for index in range(100)])
            group.create_task(log.record(events))
        # Each batch asks for its type, then waits; a flush is a task of its own.
        for _ in range(10):
            await asyncio.sleep(0)
        return list(store.under_way)

    async with asyncio.TaskGroup() as group:
        assert await seen(1) == [100]
        assert await seen(5) == [100]
        assert await seen(1) == [100, 600]
        assert await seen(14) == [100, 600]
        store.released.set()
    assert store.under_way[2:] == [MAX_ITEMS // 100 * 100, 400]


@pytest.fixture
async def pooled(postgres: PostgresStore, peers: Peers) -> AsyncIterator[tuple[asyncpg.Pool, PostgresEvents]]:
    """A ledger of its own, an administrator's way to it, and the service's through two connections that change hands."""
    dsn = await postgres.fresh_database()
    await migrated(dsn, peers)
    admin = await asyncpg.create_pool(dsn, min_size=0, max_size=3)
    await admin.execute(REGISTER)
    async with running_pgbouncer([dsn_of(dsn, "metering_service")]) as (through_it,):
        database = await TenantDatabase.open(through_it, max_size=8, application_name="test", transaction_pooling=True)
        yield admin, PostgresEvents(database)
        await database.close()
    await admin.close()


async def test_batches_behind_a_pooler_are_recorded_whole(pooled: tuple[asyncpg.Pool, PostgresEvents]) -> None:
    """Whoever uses a connection first there or last: every event is one row and one claim of its tenant, however often it is sent."""
    admin, store = pooled
    tenants = [new_uuid7() for _ in range(3)]
    names = [str(index) for index in range(40)]
    async with asyncio.TaskGroup() as group:
        for _ in range(12):
            group.create_task(store.record([event for tenant in tenants for event in held(tenant.bytes, names)]))
    rows = await admin.fetch(KEPT)
    assert sorted(tuple(row) for row in rows) == sorted((tenant, 40, 80, 40, "7") for tenant in tenants)


async def test_replicas_of_two_releases_record_the_same_names_once(pooled: tuple[asyncpg.Pool, PostgresEvents]) -> None:
    """While replicas are renewed, the older ones record columns and the newer ones rows: each event is one row, whoever was told so."""
    admin, store = pooled
    tenants = [new_uuid7() for _ in range(3)]
    # More than are tried at once, and fewer.
    names = {tenant: [str(index) for index in range(count)] for tenant, count in zip(tenants, (40, 5, 200), strict=True)}

    async def by_columns() -> int:
        batch = sorted(event for tenant in tenants for event in held(tenant.bytes, names[tenant]))
        ids, *columns = zip(*batch, strict=True)
        stood = await admin.fetch(RECORD_COLUMNS, *slices_of(ids), *columns)
        return len(batch) - len(stood)

    async def by_rows() -> int:
        found = await store.record([event for tenant in tenants for event in held(tenant.bytes, names[tenant])])
        return sum(result.outcome is RecordOutcome.RECORDED for result in found)

    async with asyncio.TaskGroup() as group:
        recorded = [group.create_task(way()) for _ in range(6) for way in (by_columns, by_rows)]
    assert sum(task.result() for task in recorded) == 245
    rows = await admin.fetch(KEPT)
    wanted = [(tenant, len(names[tenant]), 2 * len(names[tenant]), len(names[tenant]), "7") for tenant in tenants]
    assert sorted(tuple(row) for row in rows) == sorted(wanted)
