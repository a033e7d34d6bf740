"""Holds that lie ahead, one clock and one scripted port: when they are taken, who may use them, and that each ends once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime

import pytest

from mesh.common.v1 import error_reason_pb2, limit_rule_pb2
from services.inference.call import CallRef, HoldToTake, LimitLeft, Question, Reservation, RetrievalMode
from services.inference.finishing import Finishing
from services.inference.hold_bundle import HoldAhead
from services.inference.holds_ahead import PAUSE_SECONDS, USABLE_SECONDS, HoldsAhead
from services.inference.lease_keeper import LeaseKeeper
from services.inference.models import describe
from services.inference.ports import Ledger
from services.inference.prompt_assembly import USER, Turn
from services.inference.refusals import LimitRefused
from services.inference.worst_case import Hold, Price, make_hold
from services.kernel.errors import MeshError, Unavailable
from services.kernel.ids import CallId, ReservationId, TenantId, new_uuid7
from services.kernel.tenant_context import TenantContext
from tests.inference.peers import HAIKU

PRICE = Price("prices-1", 1_000_000_000, 5_000_000_000)
REQUESTS = limit_rule_pb2.LIMIT_UNIT_REQUESTS
ACME, OTHER = TenantId(new_uuid7()), TenantId(new_uuid7())
REFUSED = LimitRefused(error_reason_pb2.ERROR_REASON_PLAN_LIMIT, "no", 1.0, (), {}, REQUESTS)


@dataclass
class ScriptedLimits:
    """Holds whatever is asked, with so many calls left, unless told otherwise."""

    left: int = 10_000
    batches: list[Sequence[HoldToTake]] = field(default_factory=list)
    released: list[ReservationId] = field(default_factory=list)
    refusing: MeshError | None = None
    failing: MeshError | None = None
    degraded: bool = False
    shortened: bool = False
    go_on: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.go_on.set()

    def held(self, wanted: HoldToTake) -> Reservation:
        hold = wanted.hold
        output = hold.max_output_tokens // 2 if self.shortened else hold.max_output_tokens
        limits = (LimitLeft("requests_per_minute", 20_000, self.left, REQUESTS),)
        return Reservation(
            wanted.reservation_id, 7, datetime.now(UTC), limits, hold.tokens, hold.cost_nano_usd, output, degraded=self.degraded
        )

    async def reserve(self, wanted: HoldToTake) -> Reservation:
        raise NotImplementedError

    async def reserve_ahead(self, wanted: Sequence[HoldToTake]) -> Sequence[Reservation | MeshError]:
        self.batches.append(wanted)
        await self.go_on.wait()
        if self.failing is not None:
            raise self.failing
        outcomes: list[Reservation | MeshError] = [self.held(one) for one in wanted]
        return outcomes if self.refusing is None else [*outcomes[:-1], self.refusing]

    async def extend(self, tenant: TenantContext, reservation: Reservation, hold: Hold) -> None:
        raise NotImplementedError

    async def renew(self, refs: Sequence[CallRef]) -> Sequence[CallRef]:
        return []

    async def release(self, tenant: TenantContext, reservation_id: ReservationId, epoch: int) -> None:
        self.released.append(reservation_id)

    def taken_ahead(self) -> list[ReservationId]:
        return [one.reservation_id for batch in self.batches for one in batch]


@dataclass
class Desk:
    """Holds ahead on a clock that stands still unless it is moved."""

    limits: ScriptedLimits
    leases: LeaseKeeper
    ahead: HoldsAhead
    now: float = 100.0
    fresh: bool = True

    def take(self, tenant_id: TenantId = ACME, **changes: object) -> HoldAhead | None:
        asked = question(tenant_id, **changes)
        return self.ahead.take(asked, worst_case(asked))

    def answered(self, tenant_id: TenantId = ACME, **changes: object) -> None:
        """One call was asked about by itself, and held."""
        asked = question(tenant_id, **changes)
        hold = worst_case(asked)
        self.ahead.asked(asked, hold, self.limits.held(HoldToTake(ReservationId(new_uuid7()), asked, hold, 1)))

    async def heat(self, tenant_id: TenantId = ACME, calls: int = 80, a_second: float = 50.0, **changes: object) -> list[HoldAhead]:
        """Makes calls at a pace; returns the holds that they took."""
        taken = []
        for _ in range(calls):
            self.now += 1 / a_second
            if (held := self.take(tenant_id, **changes)) is not None:
                taken.append(held)
            else:
                self.answered(tenant_id, **changes)
            await settled()
        return taken

    async def until_some_are_on_their_way(self) -> list[ReservationId]:
        """Makes calls until more holds were asked for, which do not come yet; returns which."""
        self.limits.go_on.clear()
        asked = len(self.limits.batches)
        while len(self.limits.batches) == asked:
            await self.heat(calls=1)
        return [one.reservation_id for one in self.limits.batches[-1]]

    def lying(self) -> list[ReservationId]:
        return [held.reservation.reservation_id for bundle in self.ahead._bundles.values() for held in bundle.holds]

    def kept(self) -> set[ReservationId]:
        return {ref.reservation_id for ref in self.leases._leases}


async def settled() -> None:
    """Lets everything that was started come to where it waits, or to its end."""
    for _ in range(10):
        await asyncio.sleep(0)


def question(tenant_id: TenantId = ACME, **changes: object) -> Question:
    """A question of a tenant."""
    context = TenantContext(tenant_id, "free", "local", "key:1", frozenset(), 1, datetime.now(UTC), False, "token")
    asked = Question(
        call_id=CallId(new_uuid7()),
        tenant=context,
        tenant_id=tenant_id,
        messages=(Turn(USER, "How are you?"),),
        model=describe(HAIKU),
        price=PRICE,
        max_output_tokens=100,
        context_tokens=30_000,
        weight=1,
        feature="",
        user="",
        conversation_id="",
        retrieval=RetrievalMode.OFF,
        top_k=3,
        stop_sequences=(),
        deadline=1e12,
    )
    return replace(asked, **changes)  # type: ignore[arg-type]


def worst_case(asked: Question, input_tokens: int = 1_000) -> Hold:
    """What such a question is held at."""
    return make_hold(input_tokens, asked.max_output_tokens, asked.price, spare_tokens=200)


@pytest.fixture
async def desk() -> AsyncIterator[Desk]:
    """A desk of the test's own; at its end every hold was taken by a call or released once, and nothing is kept alive."""
    limits, finishing = ScriptedLimits(), Finishing()
    leases = LeaseKeeper(limits, Ledger)  # type: ignore[type-abstract,arg-type]
    made: list[Desk] = []
    ahead = HoldsAhead(
        limits,
        leases,
        finishing,
        is_fresh=lambda: made[0].fresh,
        hot_calls_per_second=20.0,
        most_holds=500,
        clock=lambda: made[0].now,
    )
    made.append(Desk(limits, leases, ahead))
    yield made[0]
    limits.go_on.set()
    await ahead.close()
    await finishing.close()
    assert ahead.lying == 0
    assert len(limits.released) == len(set(limits.released)) == ahead.counts.unused
    if limits.failing is None and limits.refusing is None:
        assert ahead.counts.ahead + ahead.counts.unused == len(limits.taken_ahead())


async def test_calls_at_a_pace_take_holds_that_lie_ahead(desk: Desk) -> None:
    """Of 300 calls at 50 a second nearly all take a hold, each its own, and they are asked for in messages of many."""
    taken = await desk.heat(calls=300)
    ids = [held.reservation.reservation_id for held in taken]
    assert len(ids) == len(set(ids)) > 200
    assert set(ids) <= set(desk.limits.taken_ahead())
    assert len(desk.limits.batches) * 4 <= len(ids)
    assert not desk.limits.released


async def test_calls_that_come_slowly_are_asked_about_one_by_one(desk: Desk) -> None:
    """Below the pace nothing lies ahead, and a burst of any size is no pace."""
    assert not await desk.heat(calls=60, a_second=10.0)
    desk.now += 5.0
    assert not await desk.heat(calls=100, a_second=1e6)
    assert not desk.limits.batches


async def test_a_hold_ahead_covers_each_call_that_takes_it(desk: Desk) -> None:
    """Calls of like size use one another's holds; one that is larger, or unlike in anything the limits are told, does not."""
    [held, *_] = await desk.heat()
    assert held.hold.input_tokens >= 1_000
    assert held.hold.tokens == held.reservation.tokens
    assert all(one.hold == held.hold and one.whole for batch in desk.limits.batches for one in batch)
    for changes in (
        {"user": "ada"},
        {"feature": "chat"},
        {"max_output_tokens": 99},
        {"provider_account": "house"},
        {"price": replace(PRICE, version="prices-2")},
        {"max_wait_seconds": 1.0},
        {"tenant": replace(question().tenant, config_version=2)},
    ):
        assert desk.take(**changes) is None
    assert desk.take(OTHER) is None
    asked = question()
    assert desk.ahead.take(asked, worst_case(asked, 1_100)) is None
    assert (found := desk.ahead.take(asked, worst_case(asked, 900))) is not None
    assert found.hold == held.hold


async def test_the_plans_cap_bounds_what_is_held_ahead(desk: Desk) -> None:
    """A size is rounded up to the most input that the plan allows, never above it."""
    [held, *_] = await desk.heat(context_tokens=1_010)
    assert held.hold.input_tokens == 1_010


async def test_a_hold_is_used_within_a_second_of_its_asking_or_released(desk: Desk) -> None:
    """An old one is not taken; it goes with the next look, and its lease is not kept any more."""
    await desk.heat()
    lying = desk.lying()
    assert lying
    assert set(lying) <= desk.kept()
    desk.now += USABLE_SECONDS
    assert desk.take() is None
    desk.ahead.look(desk.now)
    await settled()
    assert set(lying) <= set(desk.limits.released)
    assert not set(lying) & desk.kept()


async def test_a_hold_whose_lease_was_lost_is_not_used(desk: Desk) -> None:
    """The limits do not know it any more: no call may count on it."""
    await desk.heat()
    for lease in desk.leases._leases.values():
        lease.lost = True
    assert desk.take() is None


@pytest.mark.parametrize("whose", [ACME, None])
async def test_no_hold_is_used_after_a_change_was_heard(desk: Desk, whose: TenantId | None) -> None:
    """A suspension, or a feed that cannot say what was missed: what lies ahead is released, what is on its way as it comes."""
    await desk.heat()
    on_its_way = await desk.until_some_are_on_their_way()
    lying = desk.lying()
    assert lying
    desk.ahead.hear(whose, "STATE")
    assert desk.take() is None
    desk.limits.go_on.set()
    await settled()
    assert set(desk.limits.released) >= {*lying, *on_its_way}
    assert desk.take() is None


async def test_a_change_of_another_tenant_is_none_of_this(desk: Desk) -> None:
    """Who is not concerned keeps what lies ahead."""
    await desk.heat()
    desk.ahead.hear(OTHER, "STATE")
    assert desk.take() is not None


async def test_no_hold_is_used_while_changes_may_be_unheard(desk: Desk) -> None:
    """With a silent feed each call is asked about, and nothing is taken ahead."""
    await desk.heat()
    desk.fresh = False
    batches = len(desk.limits.batches)
    assert not await desk.heat(calls=20)
    assert len(desk.limits.batches) == batches


async def test_nothing_lies_ahead_near_an_edge(desk: Desk) -> None:
    """With room for 64 calls four lie ahead, with room for 63 none; and an answer that shows the edge lets go of what lies ahead."""
    desk.limits.left = 63
    assert not await desk.heat(calls=100)
    assert not desk.limits.batches
    desk.limits.left = 64
    await desk.heat(calls=2)
    assert [len(batch) for batch in desk.limits.batches] == [4]
    lying = desk.lying()
    assert lying
    desk.limits.left = 8 * len(lying) - 1
    desk.answered()
    await settled()
    assert set(lying) == set(desk.limits.released)


async def test_all_kinds_of_a_tenants_calls_share_one_part(desk: Desk) -> None:
    """With room for 160 calls ten lie ahead, whatever the kinds are, and another tenant's are its own."""
    desk.limits.left = 160
    for feature in ("chat", "search", "summary"):
        await desk.heat(feature=feature, calls=52)
        assert desk.ahead.lying <= 10
    assert desk.ahead.lying > 4
    await desk.heat(OTHER, calls=53)
    assert desk.ahead.lying > 10


async def test_a_refused_call_gets_what_lay_ahead_back(desk: Desk) -> None:
    """What this process keeps is free before the refused call asks again, and nothing lies ahead for a while."""
    await desk.heat()
    lying = desk.lying()
    assert await desk.ahead.give_way(ACME)
    assert set(lying) <= set(desk.limits.released)
    assert not await desk.ahead.give_way(ACME)
    asked = len(desk.limits.batches)
    assert not await desk.heat(calls=int(PAUSE_SECONDS * 50) - 2)
    assert len(desk.limits.batches) == asked
    assert await desk.heat(calls=100)


@pytest.mark.parametrize(
    "trouble", [{"refusing": REFUSED}, {"failing": Unavailable("ratelimit")}, {"degraded": True}, {"shortened": True}], ids=str
)
async def test_trouble_on_the_way_leaves_nothing_ahead_and_a_pause(desk: Desk, trouble: dict[str, object]) -> None:
    """One refused, none answered, admitted without a store, or held short: all of it goes, and each call is asked about for a while."""
    assert not await desk.heat(calls=49)
    for name, value in trouble.items():
        setattr(desk.limits, name, value)
    for _ in range(6):
        desk.now += 0.02
        desk.take()
        await settled()
    assert len(desk.limits.batches) == 1
    assert not desk.lying()
    held = 0 if "failing" in trouble else len(desk.limits.batches[0]) - ("refusing" in trouble)
    assert len(desk.limits.released) == held


async def test_never_two_fillings_at_once(desk: Desk) -> None:
    """While one is on its way, whatever calls come, no other is sent."""
    desk.limits.go_on.clear()
    assert not await desk.heat(calls=80)
    assert len(desk.limits.batches) == 1
    desk.limits.go_on.set()
    await settled()
    assert desk.take() is not None


async def test_all_tenants_together_have_a_bound(desk: Desk) -> None:
    """However many calls come, no more lie ahead than the process may have."""
    for tenant_id in (ACME, OTHER, TenantId(new_uuid7())):
        await desk.heat(tenant_id, calls=4_000, a_second=1_000.0)
        assert desk.ahead.lying <= 500
    assert desk.ahead.lying > 400


async def test_closing_releases_what_lies_ahead_and_what_comes_later(desk: Desk) -> None:
    """After it no call takes a hold; the fixture sees that each was released once."""
    await desk.heat()
    await desk.until_some_are_on_their_way()
    assert desk.ahead.lying > len(desk.lying()) > 0
    await desk.ahead.close()
    batches = len(desk.limits.batches)
    assert not await desk.heat()
    assert len(desk.limits.batches) == batches
