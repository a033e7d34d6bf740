"""How the ledger reads: its own tenant's rows, each once, through indexes, however many others there are."""

from datetime import UTC, datetime, timedelta

import asyncpg
import pytest

from mesh.metering.v1 import ledger_service_pb2 as pb
from services.kernel.ids import TenantId
from services.metering.adapters.postgres_epochs import PostgresEpochs
from services.metering.epoch import CountedPeriod, CountedScope, CountedUnit
from tests.metering.mesh import Mesh, Tenant, bill

CALLS, USES, OTHERS = 60, 30, 900
# Rows read by this session without an index and through one, and not yet told to the server.
READ = """
SELECT relname, coalesce(seq_tup_read, 0) AS scanned, coalesce(idx_tup_fetch, 0) AS fetched
FROM pg_stat_xact_user_tables WHERE schemaname = 'metering'
"""
READ_OF_CALLS = f"SELECT coalesce(sum(scanned + fetched), 0)::bigint FROM ({READ}) r WHERE relname = 'calls'"
# As a table is before anybody looked at it.
FORGET_ESTIMATES = (
    "DELETE FROM pg_statistic WHERE starelid = 'metering.calls'::regclass",
    "UPDATE pg_class SET reltuples = -1, relpages = 0 WHERE oid = 'metering.calls'::regclass",
)


async def fill(mesh: Mesh, tenant: Tenant, calls: int, uses: int) -> None:
    """Settled calls and uses of units of the last hours."""
    now = datetime.now(UTC)
    times = [now - timedelta(seconds=3_600 + 10 * index) for index in range(max(calls, uses))]
    opened = [mesh.opening(tenant, reserve_time=time) for time in times[:calls]]
    await mesh.open(*opened)
    await mesh.settle(*[bill(call.ref) for call in opened])
    await mesh.record(*[mesh.use(tenant, reserve_time=time) for time in times[:uses]])


def overlapping() -> list[CountedPeriod]:
    """Thirty periods of every unit and scope that all hold the same rows."""
    end = int(datetime.now(UTC).timestamp() * 1_000_000)
    return [
        CountedPeriod(unit, "ai_interviews" if unit is CountedUnit.PRODUCT else "", scope, end - days * 86_400_000_000, end)
        for days in (2, 31)
        for unit in CountedUnit
        for scope in (CountedScope.TENANT, CountedScope.USER, CountedScope.USER_FEATURE)
    ]


async def test_snapshot_reads_each_row_of_its_tenant_once_and_nobody_elses(mesh: Mesh) -> None:
    """Thirty overlapping periods among many times the rows of other tenants: no table is scanned, and no row is fetched for each period."""
    tenant = mesh.new_tenant()
    for _ in range(3):
        await fill(mesh, mesh.new_tenant(), OTHERS, OTHERS)
    await fill(mesh, tenant, CALLS, USES)
    await mesh.admin.execute("ANALYZE metering.calls, metering.entries, metering.unit_entries")
    read: dict[str, tuple[int, int]] = {}

    class Counting:
        """The service's own database, asked afterwards what its transaction read."""

        async def call(self, tenant_id: TenantId, sql: str, *args: object) -> object:
            async with mesh.app.database.transaction(tenant_id) as connection:
                before = {row["relname"]: row for row in await connection.fetch(READ)}
                rows = await connection.fetch(sql, *args)
                for row in await connection.fetch(READ):
                    known = before.get(row["relname"], {"scanned": 0, "fetched": 0})
                    read[row["relname"]] = (row["scanned"] - known["scanned"], row["fetched"] - known["fetched"])
            return rows

    snapshot = await PostgresEpochs(Counting()).begin_epoch(TenantId(tenant.id), overlapping(), 7_200)  # type: ignore[arg-type] # as above
    assert {item.amount for item in snapshot.sums} == {CALLS, CALLS * 150, CALLS * 350_000, USES}
    assert len(snapshot.sums) == len([period for period in overlapping() if period.unit is not CountedUnit.RETRIES])
    assert {scanned for table, (scanned, _) in read.items() if table in ("calls", "entries", "unit_entries", "outbox")} <= {0}
    # Once for each question, sums, recent, open and unresolved, whatever index of the tenant serves it; never once for each period.
    assert read["calls"][1] <= 4 * (CALLS + USES)
    assert read["entries"][1] <= CALLS


async def test_what_a_batch_reads_grows_with_the_batch_alone(mesh: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many calls the tenant has had, before anybody counted them: opening, extending, settling and using reads what it names."""
    tenant, fetched = mesh.new_tenant(), list[int]()
    await fill(mesh, tenant, OTHERS, OTHERS)
    for statement in FORGET_ESTIMATES:
        await mesh.admin.execute(statement)

    async def counting(_: TenantId | None, sql: str, *args: object) -> list[asyncpg.Record]:
        async with mesh.admin.acquire() as connection, connection.transaction():
            await connection.execute("SET LOCAL ROLE metering_service")
            before = await connection.fetchval(READ_OF_CALLS)
            rows = await connection.fetch(sql, *args)
            fetched.append(await connection.fetchval(READ_OF_CALLS) - before)
        return rows

    monkeypatch.setattr(mesh.app.database, "call", counting)
    calls = [mesh.opening(tenant) for _ in range(CALLS)]
    await mesh.open(*calls)
    await mesh.extend(*[pb.ExtendCall(ref=call.ref, bound_tokens=2_000, bound_nano_usd=6_000_000) for call in calls])
    await mesh.settle(*[bill(call.ref) for call in calls])
    await mesh.record(*[mesh.use(tenant) for _ in range(CALLS)])
    assert len(fetched) >= 4
    # Locked, changed, and answered for.
    assert max(fetched) <= 4 * CALLS
