"""Looks at budgets: nobody's thresholds wait for a tenant that takes long, and that tenant's come all the same."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any, cast

import pytest

from services.kernel.background import BackgroundTasks
from services.kernel.errors import Unavailable
from services.kernel.ids import TenantId, new_uuid7
from services.kernel.tenant_database import TenantDatabase
from services.metering.adapters.postgres_usage_queries import PostgresUsageQueries
from services.metering.budgets import keeper, long_looks
from services.metering.budgets.budget import Budget
from services.metering.budgets.keeper import BudgetKeeper
from services.metering.budgets.long_looks import LongLooks
from services.metering.budgets.look import BudgetLook
from services.metering.budgets.ports import MOST_MARKS, Marked, TakenMarks
from services.metering.usage_query import UsageQuery
from tests.metering.budgets import new_tenant, put, use, wait_fired
from tests.metering.mesh import Mesh
from tests.support.waiting import eventually

SLOW, QUICK, OTHER = sorted(TenantId(new_uuid7()) for _ in range(3))


class Marks:
    """Some tenants, marked for ever; of the first there may be more marks than are taken at a time."""

    def __init__(self, *tenants: TenantId, first_has: int = 1) -> None:
        self.tenants = tenants
        self.first_has = first_has

    @asynccontextmanager
    async def take(self, most: int, passed_over: Collection[TenantId]) -> AsyncIterator[TakenMarks]:
        wanted = [tenant_id for tenant_id in self.tenants if tenant_id not in passed_over]
        if wanted and wanted[0] == self.tenants[0] and self.first_has >= most:
            wanted = wanted[:1]
            self.first_has -= most
            yield TakenMarks(most, [Marked(wanted[0])])
        else:
            yield TakenMarks(len(wanted), [Marked(tenant_id) for tenant_id in wanted])

    @asynccontextmanager
    async def take_of(self, tenant_id: TenantId, most: int) -> AsyncIterator[TakenMarks]:
        yield TakenMarks(1, [Marked(tenant_id)])


class Store:
    """Has no budget of anybody, and remembers who was asked about; with one tenant something happens first."""

    def __init__(self, of_slow: Callable[[], Awaitable[object]]) -> None:
        self.of_slow = of_slow
        self.asked: list[TenantId] = []

    async def list_all(self, tenant_id: TenantId) -> Sequence[Budget]:
        self.asked.append(tenant_id)
        if tenant_id == SLOW:
            await self.of_slow()
        return []


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A clock that stands still unless told."""
    clock = SimpleNamespace(now=1000.0)
    for module in (keeper, long_looks):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


def looker(marks: Marks, store: Store, patient: Store) -> tuple[BudgetKeeper, LongLooks]:
    """The two loops, not running."""
    unused = cast("Any", None)
    aside = LongLooks(marks, BudgetLook(cast("Any", patient), unused, unused))
    return BudgetKeeper(marks, BudgetLook(cast("Any", store), unused, unused), aside, poll_seconds=1.0), aside


async def nothing() -> None:
    """Takes no time."""


async def test_who_takes_too_long_is_set_aside_until_its_own_look_is_over(monkeypatch: pytest.MonkeyPatch, clock: SimpleNamespace) -> None:
    """It is begun once among the others, who come in every look; a minute after its own look it is begun there again."""
    monkeypatch.setattr(keeper, "_TENANT_SECONDS", 0.01)
    store, patient = Store(asyncio.Event().wait), Store(nothing)
    looks, aside = looker(Marks(SLOW, QUICK), store, patient)
    for _ in range(3):
        await looks.look()
    assert store.asked == [SLOW, QUICK, QUICK, QUICK]
    clock.now += 3_600
    await looks.look()
    assert store.asked[4:] == [QUICK]
    running = asyncio.ensure_future(aside.run())

    async def was_looked_at() -> bool:
        return patient.asked == [SLOW] and clock.now + 60 in aside._until.values()

    await eventually(was_looked_at, within_seconds=10)
    await looks.look()
    clock.now += 61
    await looks.look()
    running.cancel()
    assert store.asked[5:] == [QUICK, SLOW, QUICK]


@pytest.mark.parametrize(("seconds", "begun_again"), [(4.0, False), (0.1, True)])
async def test_what_fails_after_long_is_set_aside_and_what_fails_at_once_is_not(
    clock: SimpleNamespace, seconds: float, begun_again: bool
) -> None:
    """A statement that the database gives up on would cost the others its time in every look; a peer that is away costs none."""

    async def fails() -> None:
        clock.now += seconds
        raise Unavailable("postgres")

    store = Store(fails)
    looks, _ = looker(Marks(SLOW, QUICK), store, store)
    for _ in range(2):
        await looks.look()
    assert store.asked == [SLOW, QUICK, *([SLOW] if begun_again else []), QUICK]


async def test_nobody_is_looked_at_again_before_all_others_were(clock: SimpleNamespace) -> None:
    """A tenant whose use goes on while it is looked at, for longer than marks are held, has a turn as everybody has."""

    async def takes_long() -> None:
        clock.now += 4
        await asyncio.sleep(0)

    store = Store(takes_long)
    looks, _ = looker(Marks(SLOW, QUICK, OTHER, first_has=2 * MOST_MARKS + 1), store, store)
    async with asyncio.timeout(10):
        await looks.look()
    assert store.asked == [SLOW, QUICK, OTHER] * 3


async def crashes() -> None:
    """Fails as nothing should."""
    raise ZeroDivisionError


async def test_who_cannot_be_looked_at_for_no_known_reason_is_set_aside(clock: SimpleNamespace) -> None:
    """Those who come after it have their looks, in this round and in the next."""
    store = Store(crashes)
    looks, aside = looker(Marks(SLOW, QUICK), store, store)
    for _ in range(2):
        await looks.look()
    assert store.asked == [SLOW, QUICK, QUICK]
    assert aside.tenants() == {SLOW}


async def test_a_look_that_crashes_is_nobody_elses_affair() -> None:
    """The loop begins anew, and goes on with whoever waits for it still."""
    store, background = Store(crashes), BackgroundTasks()
    _, aside = looker(Marks(SLOW), store, store)
    for tenant_id in (SLOW, QUICK, OTHER):
        aside.put(tenant_id)
    background.start("long_looks", aside.run)

    async def all_were_looked_at() -> bool:
        return store.asked == [SLOW, QUICK, OTHER]

    await eventually(all_were_looked_at, within_seconds=10)
    await background.close()


async def test_thresholds_of_who_takes_too_long_fire_all_the_same(mesh: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    """However little of it a look among the others would get done, and its marks are gone afterwards."""
    monkeypatch.setattr(keeper, "_TENANT_SECONDS", 0.0)
    tenant = new_tenant(mesh)
    await use(mesh, tenant, 80, user="ada")
    await put(mesh, tenant, amount=100, each_user=True, thresholds_percent=[50, 80])
    await put(mesh, tenant, "all", amount=100, thresholds_percent=[50])
    await wait_fired(mesh, tenant, [50, 80])
    await wait_fired(mesh, tenant, [50], "all")

    async def nothing_marked() -> bool:
        return await mesh.admin.fetchval("SELECT count(*) FROM metering.budget_marks WHERE tenant_id = $1", tenant.id) == 0

    await eventually(nothing_marked, within_seconds=30)


async def test_sums_of_who_is_looked_at_by_itself_may_take_longer_than_a_statement(mesh: Mesh) -> None:
    """What the database would give up on for everybody else is waited for, by the server and by the client."""
    tenant = new_tenant(mesh)
    await use(mesh, tenant, 80)
    now = datetime.now(UTC)
    query = UsageQuery(now - timedelta(days=1), now + timedelta(days=1))
    database = await TenantDatabase.open(mesh.settings.postgres_dsn.get_secret_value(), statement_timeout_seconds=0.2)
    usual, patient = (PostgresUsageQueries(database, database, mesh.app.jobs, patience_seconds=seconds) for seconds in (None, 60))
    async with mesh.admin.acquire() as connection, connection.transaction():
        await connection.execute("LOCK TABLE metering.usage_pending IN ACCESS EXCLUSIVE MODE")
        with pytest.raises(Unavailable):
            await usual.of_tenant(TenantId(tenant.id), query, None, 10)
        waiting = asyncio.ensure_future(patient.of_tenant(TenantId(tenant.id), query, None, 10))
        # Longer than the client's own limit, which is a second more than the server's.
        await asyncio.sleep(1.5)
        assert not waiting.done()
    (group,) = await waiting
    assert group.usage.total == 80
    await database.close()
