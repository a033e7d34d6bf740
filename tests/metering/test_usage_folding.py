"""Folding: what was there before there were sums is counted too, and a fold that fails is made up for."""

import asyncio
import shutil
from pathlib import Path

import asyncpg

from services.kernel.errors import Unavailable
from services.kernel.ids import new_uuid7
from services.kernel.migrate import migrate
from services.metering.app.loading import MIGRATIONS
from services.metering.usage_folder import UsageFolder
from services.metering.usage_plan import Grain
from tests.metering.mesh import Mesh, bill
from tests.metering.usage import fold
from tests.support.stores import PostgresStore

GRAINS = sorted(set(Grain) - {Grain.CALLS})
BEFORE_SUMS = "0008_counted_periods.sql"
OPEN_AS_BEFORE = """
SELECT outcome FROM metering.open_calls(
    ARRAY[$1::uuid], '{1}', ARRAY[cardinality($2::uuid[])], $2, $2, array_fill(1::smallint, $3), array_fill(0::bigint, $3),
    array_fill(1790000000000000::bigint, $3), array_fill(1790000060000000::bigint, $3), array_fill(1000::bigint, $3),
    array_fill(1000::bigint, $3), array_fill('v'::text, $3), array_fill('p'::text, $3), array_fill('m'::text, $3),
    array_fill('chat'::text, $3), array_fill('user-1'::text, $3), array_fill(''::text, $3), interval '1 minute')
"""
SETTLE = """
SELECT outcome FROM metering.settle_calls(
    ARRAY[$1::uuid], '{1}', ARRAY[cardinality($2::uuid[])], $2, $2, array_fill(true, $3), array_fill(7::bigint, $3),
    array_fill(3::bigint, $3), array_fill(2::bigint, $3), array_fill(0::bigint, $3), array_fill(0::bigint, $3),
    array_fill(0::bigint, $3), array_fill('end'::text, $3), array_fill(''::text, $3), array_fill(20::bigint, $3),
    array_fill(40::bigint, $3))
"""
PRICE = """
WITH v AS (
    INSERT INTO metering.price_versions VALUES ('v', '2026-01-01', 's', '2026-01-01', decode(repeat('00', 32), 'hex')) RETURNING version
)
INSERT INTO metering.prices SELECT version, 'p', 'm', 0, 0, 0, 0, 0 FROM v
"""
BEFORE_EVENTS = "0013_events_are_billed.sql"
TYPES = "INSERT INTO metering.event_types VALUES ('p', 'added', 'added', 1), ('p', 'counted', 'counted', 2), ('p', 'highest', 'highest', 3)"
# Ids are a, b, c, … and their quantities 10, 20, 30, … from the first of their batch on.
RECORD = """
SELECT outcome FROM metering.record_events(
    ARRAY[$1::uuid], '{1}', ARRAY[cardinality($2::text[])], array_fill('s'::text, ARRAY[cardinality($2)]), $2,
    (SELECT array_agg(uuidv7()) FROM unnest($2)), array_fill(decode(repeat('00', 32), 'hex'), ARRAY[cardinality($2)]),
    array_fill('p'::text, ARRAY[cardinality($2)]), $3, (SELECT array_agg(10::bigint * n) FROM generate_series(1, cardinality($2)) n),
    array_fill((extract(epoch FROM now()) * 1000000)::bigint, ARRAY[cardinality($2)]), array_fill('user-1'::text, ARRAY[cardinality($2)]),
    array_fill(''::text, ARRAY[cardinality($2)]), array_fill(NULL::jsonb, ARRAY[cardinality($2)]))
"""
TAKE_BACK = "SELECT outcome FROM metering.reverse_events(ARRAY[$1::uuid], '{1}', '{1}', '{s}', ARRAY[$2::text], ARRAY[uuidv7()], '{wrong}')"
QUANTITIES = """
SELECT product_unit, sum(quantity)::int FROM metering.usage_rollups WHERE tenant_id = $1 AND grain = 1 GROUP BY 1 HAVING sum(quantity) <> 0
ORDER BY 1
"""
LEVELS = "SELECT level::int, sum(events)::int FROM metering.usage_levels WHERE tenant_id = $1 AND grain = 2 GROUP BY 1 ORDER BY 1"
SUMS = """
SELECT grain, sum(settled_calls)::int AS settled, sum(cost_nano_usd)::int AS cost FROM metering.usage_rollups WHERE tenant_id = $1
GROUP BY grain ORDER BY grain
"""


async def test_calls_of_the_release_before_are_counted(postgres: PostgresStore, tmp_path: Path) -> None:
    """Those that are there are added up by the migration; those that replicas of that release go on writing are counted by the trigger."""
    for path in MIGRATIONS.glob("*.sql"):
        if path.name <= BEFORE_SUMS:
            shutil.copy(path, tmp_path)
    dsn = await postgres.fresh_database()
    await migrate(dsn, "metering", tmp_path)
    admin = await asyncpg.connect(dsn)
    try:
        tenant, early, late = new_uuid7(), [new_uuid7() for _ in range(3)], [new_uuid7() for _ in range(2)]
        await admin.execute(PRICE)
        await admin.fetch(OPEN_AS_BEFORE, tenant, [*early, *late], [5])
        await admin.fetch(SETTLE, tenant, early, [3])
        await migrate(dsn, "metering", MIGRATIONS)
        assert [tuple(row) for row in await admin.fetch(SUMS, tenant)] == [(grain, 3, 21) for grain in GRAINS]
        await admin.fetch(SETTLE, tenant, late, [2])
        again = [new_uuid7()]
        await admin.fetch(OPEN_AS_BEFORE, tenant, again, [1])
        await admin.fetch(SETTLE, tenant, again, [1])
        assert await admin.fetchval("SELECT metering.fold_usage(100)") == 3
        assert [tuple(row) for row in await admin.fetch(SUMS, tenant)] == [(grain, 6, 42) for grain in GRAINS]
        assert await admin.fetchval("SELECT sum(calls)::int FROM metering.usage_latencies WHERE tenant_id = $1", tenant) == 12
    finally:
        await admin.close()


async def test_events_of_the_release_before_are_counted(postgres: PostgresStore, tmp_path: Path) -> None:
    """Those that are there, by the migration, each type by its aggregation, whatever was taken back; those to come by the trigger."""
    for path in MIGRATIONS.glob("*.sql"):
        if path.name <= BEFORE_EVENTS:
            shutil.copy(path, tmp_path)
    dsn = await postgres.fresh_database()
    await migrate(dsn, "metering", tmp_path)
    admin = await asyncpg.connect(dsn)
    try:
        tenant = new_uuid7()
        await admin.execute(TYPES)
        await admin.fetchval("SELECT metering.make_event_month(now()::date)")
        await admin.fetch(RECORD, tenant, ["a", "b", "c", "d"], ["added", "added", "counted", "highest"])
        await admin.fetch(TAKE_BACK, tenant, "b")
        await migrate(dsn, "metering", MIGRATIONS)
        await admin.fetch(RECORD, tenant, ["e", "f", "g"], ["added", "counted", "highest"])
        await admin.fetch(TAKE_BACK, tenant, "a")
        await admin.fetchval("SELECT metering.fold_usage(100)")
        assert [tuple(row) for row in await admin.fetch(QUANTITIES, tenant)] == [("added", 10), ("counted", 2)]
        assert [tuple(row) for row in await admin.fetch(LEVELS, tenant)] == [(30, 1), (40, 1)]
    finally:
        await admin.close()


async def test_only_one_folds_and_nobody_waits_for_it(mesh: Mesh) -> None:
    """While one fold is under way another one folds nothing, and calls are settled as ever."""
    tenant = mesh.new_tenant()
    async with mesh.admin.acquire() as connection, connection.transaction():
        await connection.execute("SELECT pg_advisory_xact_lock(7405, 0)")
        await mesh.settle(bill((await mesh.opened(tenant)).ref))
        assert await mesh.app.jobs.fetch_value("SELECT metering.fold_usage(100)") == 0
        assert await mesh.admin.fetchval("SELECT count(*) FROM metering.usage_pending WHERE tenant_id = $1", tenant.id) == 1
    await fold(mesh)
    assert await mesh.admin.fetchval("SELECT count(*) FROM metering.usage_rollups WHERE tenant_id = $1", tenant.id) == len(GRAINS)


class Refusing:
    """A store that is away once, and then has three times as much as one fold takes, less one."""

    def __init__(self) -> None:
        self.answers = [None, 5_000, 5_000, 4_999]
        self.done = asyncio.Event()

    async def fold_usage(self, most: int) -> int:
        answer = self.answers.pop(0)
        if answer is None:
            raise Unavailable("postgres")
        if not self.answers:
            self.done.set()
        return answer


async def test_a_fold_that_fails_is_made_up_for() -> None:
    """The loop goes on after an outage, and folds until nothing is left."""
    store = Refusing()
    folder = UsageFolder(store, fold_seconds=0.001)
    loop = asyncio.create_task(folder.run())
    async with asyncio.timeout(10):
        await store.done.wait()
    loop.cancel()
    assert store.answers == []
