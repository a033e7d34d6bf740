"""When the sweep looks at whom: as a lease ends, not each second, and never later than that."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any, cast

import pytest

from services.kernel.errors import Unavailable
from services.kernel.ids import ReservationId, TenantId, new_uuid7
from services.kernel.tenant_context import TenantContext
from services.ratelimit.consumption import Consumptions, Use
from services.ratelimit.counter import Family
from services.ratelimit.fencing import LEFTOVER_SECONDS, ExpiredHolds, Fences, FenceVerdict, Fencing
from services.ratelimit.limit_rule import SECOND_US, LimitRule, Scope, Unit, Window
from services.ratelimit.limits import Amounts, Demand
from services.ratelimit.open_allowance import OpenAllowance
from services.ratelimit.ready_counters import ReadyCounters
from services.ratelimit.rebuild import CountedSum, Rebuilder
from services.ratelimit.request import Ask, Request
from services.ratelimit.reservation import Reservations
from services.ratelimit.standing import Answer
from services.ratelimit.terms import Terms
from tests.ratelimit.callers import AtStore, Stores, now_us

LEASE_SECONDS = 5.0
# More than Redis keeps in one piece, which it looks through at once.
MANY = 1_200
MakeTenant = Callable[..., AtStore]


class Scripted:
    """A store and a ledger that say what a test tells them, and remember who was asked about."""

    def __init__(self) -> None:
        self.now = 1_000.0
        self.says: dict[TenantId, ExpiredHolds | Exception] = {}
        self.asked: list[list[TenantId]] = []
        self.while_answering: Callable[[], None] = lambda: None
        self.away: set[TenantId] = set()
        self.fencing = Fencing(self, self, lease_seconds=LEASE_SECONDS, clock=lambda: self.now)

    def clear(self) -> list[TenantId]:
        """Whom it was asked about since the last time."""
        asked, self.asked = [tenant_id for some in self.asked for tenant_id in some], []
        return asked

    async def swept(self, after_seconds: float = 0.0) -> list[TenantId]:
        """Sweeps so much later; returns whom it looked at."""
        self.now += after_seconds
        await self.fencing.sweep()
        return self.clear()

    async def expired(self, tenant_ids: Sequence[TenantId], at_most: int) -> list[ExpiredHolds]:
        self.asked.append(list(tenant_ids))
        self.while_answering()
        told = [self.says.get(tenant_id, ExpiredHolds(tenant_id, 1, 0, ())) for tenant_id in tenant_ids]
        return [holds for holds in told if isinstance(holds, ExpiredHolds)]

    async def apply_fences(self, fences: Sequence[Fences]) -> list[int | Unavailable]:
        return [Unavailable("redis") if tenant_id in self.away else len(verdicts) for tenant_id, _, verdicts in fences]

    async def tenants_with_leases(self) -> Sequence[TenantId]:
        return ()

    async def fence(self, calls: Sequence[tuple[TenantId, ReservationId, int]], timeout_seconds: float) -> list[FenceVerdict]:
        return [FenceVerdict.VOID for _ in calls]


def tenants(count: int) -> list[TenantId]:
    """New ones."""
    return [TenantId(new_uuid7()) for _ in range(count)]


async def test_a_tenant_is_looked_at_when_its_lease_ends_and_then_when_the_next_one_does() -> None:
    """A hold of five seconds costs no look before them; what the store says of the next lease is when the next look is."""
    scripted, (tenant_id,) = Scripted(), tenants(1)
    scripted.fencing.watch_lease(tenant_id)
    assert await scripted.swept(LEASE_SECONDS - 0.1) == []
    scripted.fencing.watch_lease(tenant_id)
    scripted.says[tenant_id] = ExpiredHolds(tenant_id, 1, 2, (), wait_seconds=3.0)
    assert await scripted.swept(0.1) == [tenant_id]
    assert await scripted.swept(2.9) == []
    scripted.says[tenant_id] = ExpiredHolds(tenant_id, 1, 0, (), leftovers=True)
    assert await scripted.swept(0.1) == [tenant_id]
    assert await scripted.swept(LEFTOVER_SECONDS - 1) == []
    del scripted.says[tenant_id]
    assert await scripted.swept(1) == [tenant_id]
    assert await scripted.swept(10_000) == []


async def test_a_lease_is_never_looked_at_later_because_of_something_else() -> None:
    """Holds taken later, leftovers, and the scan leave what is due sooner where it is; what is asked for at once comes at once."""
    scripted, (tenant_id,) = Scripted(), tenants(1)
    scripted.says[tenant_id] = ExpiredHolds(tenant_id, 1, 1, (), wait_seconds=1.0)
    scripted.fencing.watch(tenant_id)
    assert await scripted.swept() == [tenant_id]
    scripted.now += 0.5
    scripted.fencing.watch_lease(tenant_id)
    assert await scripted.swept(0.5) == [tenant_id]
    scripted.fencing.watch(tenant_id)
    assert await scripted.swept() == [tenant_id]


async def test_a_hold_taken_while_the_store_answers_is_looked_at_when_it_ends() -> None:
    """The answer is of before it: that nothing is held any more does not end the looking."""
    scripted, (tenant_id,) = Scripted(), tenants(1)
    scripted.fencing.watch(tenant_id)
    scripted.while_answering = lambda: scripted.fencing.watch_lease(tenant_id)
    assert await scripted.swept() == [tenant_id]
    scripted.while_answering = lambda: None
    assert await scripted.swept(LEASE_SECONDS - 0.1) == []
    assert await scripted.swept(0.1) == [tenant_id]


async def test_whom_the_store_does_not_answer_for_is_looked_at_again() -> None:
    """One whose part of it is away, and all of them when the look itself fails or is given up."""
    scripted, (gone, other) = Scripted(), tenants(2)
    for tenant_id in (gone, other):
        scripted.fencing.watch(tenant_id)
    scripted.says[gone] = Unavailable("redis")
    assert await scripted.swept() == [gone, other]
    assert await scripted.swept() == [gone]

    def fails(error: BaseException) -> Callable[[], None]:
        def raised() -> None:
            raise error

        return raised

    for error in (RuntimeError("a fault"), asyncio.CancelledError()):
        scripted.while_answering = fails(error)
        with pytest.raises(type(error)):
            await scripted.swept()
        scripted.clear()
        scripted.while_answering = lambda: None
        assert await scripted.swept() == [gone]


async def test_answers_that_the_store_did_not_take_are_asked_for_again() -> None:
    """Of the tenant whose part of the store went away; a caller who waits for them is told that the store is away."""
    scripted, (gone, other) = Scripted(), tenants(2)
    for tenant_id in (gone, other):
        scripted.says[tenant_id] = ExpiredHolds(tenant_id, 1, 1, [ReservationId(new_uuid7())])
        scripted.fencing.watch(tenant_id)
    scripted.away.add(gone)
    assert await scripted.swept() == [gone, other]
    del scripted.says[other]
    assert await scripted.swept() == [gone, other]
    assert await scripted.swept() == [gone]
    with pytest.raises(Unavailable):
        await scripted.fencing.fence_expired(gone)
    scripted.away.clear()
    await scripted.fencing.fence_expired(gone)


async def test_what_is_of_no_use_is_forgotten_at_once_and_no_wait_is_longer_than_a_lease() -> None:
    """Page by page, each sweep, with or without leases; and a store whose clock was put right is not believed beyond a lease."""
    scripted, (tenant_id,) = Scripted(), tenants(1)
    scripted.says[tenant_id] = ExpiredHolds(tenant_id, 1, 0, (), leftovers=True, more=True)
    scripted.fencing.watch_lease(tenant_id)
    assert await scripted.swept(LEASE_SECONDS) == [tenant_id]
    assert await scripted.swept() == [tenant_id]
    scripted.says[tenant_id] = ExpiredHolds(tenant_id, 1, 1, (), wait_seconds=3_600.0)
    assert await scripted.swept() == [tenant_id]
    assert await scripted.swept(LEASE_SECONDS - 0.1) == []
    assert await scripted.swept(0.1) == [tenant_id]


class Silent:
    """A store that does what it is asked and whose answers are lost."""

    async def reserve(self, tenant_id: TenantId, terms: Terms, asks: Sequence[Ask]) -> list[Answer]:
        raise Unavailable("redis")


def a_context(tenant_id: TenantId) -> TenantContext:
    """Of a tenant, as it is proven."""
    until = datetime.now(UTC) + timedelta(minutes=5)
    return TenantContext(tenant_id, "pro", "local", "user:1", frozenset(), 1, until, False, "token")


@pytest.mark.parametrize("asked", ["reserve", "consume", "consume together"])
async def test_a_lease_is_looked_for_also_where_the_store_did_not_answer(asked: str) -> None:
    """It may have held what it was asked for: if it did, that ends with its lease, and not when the scan comes by."""
    scripted, (tenant_id,) = Scripted(), tenants(1)
    rules = [LimitRule("pages", Unit.PRODUCT, Window.DAY, 5, product_unit="pages")]
    terms, context, silent = Terms(rules, features=["pages"]), a_context(tenant_id), cast("Any", Silent())

    async def terms_of(context: TenantContext, at_least: int = 0) -> Terms:
        return terms

    counters = ReadyCounters(terms_of, Rebuilder(silent, silent), scripted.fencing, OpenAllowance(silent))
    use = Use(ReservationId(new_uuid7()), "pages", 1)
    consumptions = Consumptions(silent, silent, counters, scripted.fencing)
    with pytest.raises(Unavailable):
        if asked == "reserve":
            await Reservations(silent, counters, scripted.fencing).reserve(context, Request(use.consumption_id, Demand(Amounts(1, 1))))
        elif asked == "consume":
            await consumptions.consume(context, use)
        else:
            await consumptions.decide_together(context, [use, replace(use, consumption_id=ReservationId(new_uuid7()))])
    assert await scripted.swept(LEASE_SECONDS - 0.1) == []
    assert await scripted.swept(0.1) == [tenant_id]


async def waits(tenant: AtStore) -> float:
    """What the store says of when to look again."""
    (holds,) = await tenant.store.expired([tenant.tenant_id], 10)
    return holds.wait_seconds


@pytest.mark.parametrize("attempt", [0, 1])
async def test_the_store_says_when_the_first_of_all_leases_ends(at_store: MakeTenant, attempt: int) -> None:
    """Of calls and of uses of units alike; at once while one has ended already, and again from when that is done."""
    tenant = await at_store(lease_seconds=30.0).loaded()
    await tenant.held(10)
    await tenant.held(attempt=0)
    assert 25 < await waits(tenant) <= 30
    sooner = await replace(tenant, stores=Stores(tenant.link, lease_seconds=10.0)).held(attempt=attempt)
    assert 5 < await waits(tenant) <= 10
    await tenant.end_lease(sooner)
    assert await waits(tenant) == 0
    assert await tenant.store.apply_fences([(tenant.tenant_id, 1, [(sooner, FenceVerdict.VOID)])]) == [1]
    assert 20 < await waits(tenant) <= 30


@pytest.mark.parametrize("days_ago", [0, 4])
async def test_pages_of_dead_counters_are_reasons_to_come_back_at_once_and_living_ones_are_none(
    at_store: MakeTenant, days_ago: int
) -> None:
    """Of many users: sweep after sweep until none that is dead is left; counters that live are looked through without haste."""
    tenant = at_store()
    family = Family(Unit.TOKENS, Window.DAY, scope=Scope.USER)
    tenant.terms = Terms([LimitRule("day", Unit.TOKENS, Window.DAY, 10**6, scope=Scope.USER)])
    day_us = 86_400 * SECOND_US
    start_us = now_us() - now_us() % day_us - days_ago * day_us
    await tenant.loaded(sums=[CountedSum([family], start_us, 5, user=f"user-{number}") for number in range(MANY)])
    swept = 0
    while (await tenant.store.expired([tenant.tenant_id], 10))[0].more:
        swept += 1
    left = await tenant.link.send("HLEN", f"{{{tenant.tenant_id}}}:counters")
    if days_ago:
        assert swept >= 2
        assert cast("int", left) < 100
    else:
        assert (swept, left) == (0, MANY)
