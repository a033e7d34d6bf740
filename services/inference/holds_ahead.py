"""Holds taken before their calls come: where a tenant's calls come fast and its limits are far, a call takes one instead of asking.

Each is a reservation like any other. It is opened by the one call that takes it, or released unopened: by this process within about a
second, else by its lease. Refuses to lie ahead where anybody could miss it; then every call is asked about, as if there were none.
"""

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import NamedTuple

import structlog

from services.inference.call import CallRef, HoldToTake, Question, Reservation
from services.inference.finishing import Finishing
from services.inference.hold_bundle import LEAST_HOLDS, Bundle, CallRate, HoldAhead
from services.inference.hold_room import Ahead, is_near, room, rounded_up
from services.inference.lease_keeper import LeaseKeeper
from services.inference.ports import Limits
from services.inference.worst_case import Hold, Price, make_hold
from services.kernel.errors import MeshError
from services.kernel.ids import ReservationId, TenantId, new_uuid7

log = structlog.get_logger(__name__)

# Counted from before it was asked for, so from before it was dated: a call is counted at most this long before it is opened.
USABLE_SECONDS = 1.0
# After a refusal, or an answer that did not come.
PAUSE_SECONDS = 2.0
LOOK_SECONDS = 0.25
TELL_SECONDS = 60.0
MOST_AT_ONCE = 250
RELEASES_AT_ONCE = 8
MOST_KINDS = 10_000


class Kind(NamedTuple):
    """Calls that can use the same holds: all that the limits are told of them, and the rules they are told it under."""

    tenant_id: TenantId
    config_version: int
    user: str
    feature: str
    provider_account: str
    price: Price
    input_tokens: int
    max_output_tokens: int


class HoldCounts:
    """How calls of this process came to their holds, since its start: `ahead`, or `asked`. `unused` lay ahead of no call."""

    def __init__(self) -> None:
        self.ahead = self.asked = self.unused = 0

    def tell(self) -> None:
        """Logs the totals."""
        log.info("holds_counted", ahead=self.ahead, asked=self.asked, unused=self.unused)


class HoldsAhead:
    """The bundles of one process. Its loop runs as a background task of the app; `hear` listens to the change feed.

    `is_fresh`: whether every change has certainly been heard. `hot_calls_per_second`: from which pace on, of one kind; 0: never.
    """

    def __init__(
        self,
        limits: Limits,
        leases: LeaseKeeper,
        finishing: Finishing,
        *,
        is_fresh: Callable[[], bool],
        hot_calls_per_second: float,
        most_holds: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._limits = limits
        self._leases = leases
        self._finishing = finishing
        self._is_fresh = is_fresh
        self._hot_calls_per_second = hot_calls_per_second
        self._most_holds = most_holds
        self._clock = clock
        # The least recently called first.
        self._bundles: OrderedDict[Kind, Bundle] = OrderedDict()
        # Of each tenant those that have holds, or ask for some.
        self._lying: dict[TenantId, dict[Kind, Bundle]] = {}
        self._paused_until: dict[TenantId, float] = {}
        self._closed = False
        self.counts = HoldCounts()

    @property
    def lying(self) -> int:
        """How many holds lie ahead, or may."""
        return sum(bundle.lying for bundles in self._lying.values() for bundle in bundles.values())

    def take(self, question: Question, hold: Hold) -> HoldAhead | None:
        """Takes a hold that covers this one, if there is one; it is the caller's, to open or to release. Never waits."""
        if not self._hot_calls_per_second or self._closed or question.max_wait_seconds:
            return None
        now, kind = self._clock(), _kind(question, hold)
        bundle = self._bundle(kind, hold, now)
        bundle.rate.seen(now)
        if not self._is_fresh():
            return None
        taken = bundle.take(now)
        self._fill(kind, bundle, question, now)
        if taken is not None:
            self.counts.ahead += 1
        return taken

    def asked(self, question: Question, hold: Hold, reservation: Reservation) -> None:
        """Learns from the answer to a call that was asked about by itself."""
        self.counts.asked += 1
        if (bundle := self._bundles.get(_kind(question, hold))) is not None:
            self._learn(question.tenant_id, bundle, reservation)

    async def give_way(self, tenant_id: TenantId) -> bool:
        """Lets go of what lies ahead of the tenant's calls, as one of them was refused; True when that freed something.

        Nothing lies ahead of them for a while then.
        """
        self._pause(tenant_id)
        freed = self._take_all(tenant_id)
        await self._release(freed)
        return bool(freed)

    def drop(self, tenant_id: TenantId | None) -> None:
        """Ends the bundles of a tenant, or everybody's: under what is in force now, each call is asked about first."""
        for kind in [kind for kind in self._bundles if tenant_id in (None, kind.tenant_id)]:
            self._end(kind)

    def hear(self, tenant_id: TenantId | None, change: str) -> None:
        """Listens to the change feed: whatever a change is about, no hold of before it is used after it was heard."""
        self.drop(tenant_id)

    async def run(self) -> None:
        """Releases what grew old, and tells how much was used, until cancelled."""
        told_at = self._clock()
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            now = self._clock()
            self.look(now)
            if now - told_at >= TELL_SECONDS:
                told_at = now
                self.counts.tell()

    def look(self, now: float) -> None:
        """Releases what no call may use any more."""
        for tenant_id in list(self._lying):
            for bundle in self._lying[tenant_id].values():
                self._let_go(bundle.take_old(now))
            self._settle_lying(tenant_id)
        self._paused_until = {tenant_id: until for tenant_id, until in self._paused_until.items() if until > now}

    async def close(self) -> None:
        """Releases everything; what is on its way is released as it comes. Finishing waits for both."""
        self._closed = True
        self.drop(None)
        self.counts.tell()

    def _bundle(self, kind: Kind, hold: Hold, now: float) -> Bundle:
        bundle = self._bundles.get(kind)
        if bundle is None:
            whole = make_hold(kind.input_tokens, kind.max_output_tokens, kind.price, spare_tokens=hold.spare_tokens)
            bundle = self._bundles[kind] = Bundle(whole, CallRate(now))
            if len(self._bundles) > MOST_KINDS:
                self._end(next(iter(self._bundles)))
        else:
            self._bundles.move_to_end(kind)
        return bundle

    def _fill(self, kind: Kind, bundle: Bundle, question: Question, now: float) -> None:
        lacks = bundle.lacks(now, self._hot_calls_per_second)
        if not lacks or bundle.limits is None or self._paused_until.get(kind.tenant_id, 0.0) > now:
            return
        lacks = min(lacks, MOST_AT_ONCE, self._most_holds - self.lying)
        may = room(bundle.limits, bundle.hold, self._ahead_of(kind.tenant_id))
        lacks = lacks if may is None else min(lacks, may)
        if lacks < LEAST_HOLDS:
            return
        bundle.asked = lacks
        self._lying.setdefault(kind.tenant_id, {})[kind] = bundle
        self._finishing.start(question.tenant, self._ask(bundle, question, lacks, now))

    async def _ask(self, bundle: Bundle, question: Question, count: int, asked_at: float) -> None:
        wanted = [HoldToTake(ReservationId(new_uuid7()), question, bundle.hold, 1, whole=True) for _ in range(count)]
        try:
            outcomes = await self._limits.reserve_ahead(wanted)
        except MeshError as error:
            # What was held all the same ends with its lease.
            log.info("holds_not_taken", count=count, error=str(error))
            outcomes = []
        finally:
            bundle.asked = 0
        held = [outcome for outcome in outcomes if isinstance(outcome, Reservation)]
        taken = [self._begin(question, bundle.hold, reservation, asked_at) for reservation in held]
        useless: list[HoldAhead] = []
        if len(held) < count or not all(_is_whole(bundle.hold, reservation) for reservation in held):
            self._pause(question.tenant_id)
            useless = [*taken, *self._take_all(question.tenant_id)]
        elif bundle.is_over:
            useless = taken
        else:
            bundle.holds.extend(taken)
            self._learn(question.tenant_id, bundle, held[-1])
        self._settle_lying(question.tenant_id)
        # Here and not as work of its own: who waits for what is on its way waits for this too.
        await self._release(useless)

    def _begin(self, question: Question, hold: Hold, reservation: Reservation, asked_at: float) -> HoldAhead:
        lease = self._leases.begin(CallRef(question.tenant_id, reservation.reservation_id))
        return HoldAhead(question.tenant, hold, reservation, lease, asked_at + USABLE_SECONDS)

    def _learn(self, tenant_id: TenantId, bundle: Bundle, newest: Reservation) -> None:
        # Admitted by nobody who counts, it says nothing of the limits.
        bundle.limits = None if newest.degraded else newest.limits
        if newest.degraded or is_near(newest.limits, self._ahead_of(tenant_id)):
            self._let_go(self._take_all(tenant_id))

    def _ahead_of(self, tenant_id: TenantId) -> Ahead:
        return Ahead.of((bundle.hold, bundle.lying) for bundle in self._lying.get(tenant_id, {}).values())

    def _pause(self, tenant_id: TenantId) -> None:
        self._paused_until[tenant_id] = self._clock() + PAUSE_SECONDS

    def _end(self, kind: Kind) -> None:
        bundle = self._bundles.pop(kind)
        bundle.is_over = True
        self._let_go(bundle.take_all())
        self._settle_lying(kind.tenant_id)

    def _take_all(self, tenant_id: TenantId) -> list[HoldAhead]:
        everything = [held for bundle in self._lying.get(tenant_id, {}).values() for held in bundle.take_all()]
        self._settle_lying(tenant_id)
        return everything

    def _settle_lying(self, tenant_id: TenantId) -> None:
        lying = {kind: bundle for kind, bundle in self._lying.get(tenant_id, {}).items() if bundle.lying}
        if lying:
            self._lying[tenant_id] = lying
        else:
            self._lying.pop(tenant_id, None)

    def _let_go(self, holds: Sequence[HoldAhead]) -> None:
        if holds:
            self._finishing.start(holds[0].tenant, self._release(holds))

    async def _release(self, holds: Sequence[HoldAhead]) -> None:
        self.counts.unused += len(holds)
        for start in range(0, len(holds), RELEASES_AT_ONCE):
            async with asyncio.TaskGroup() as group:
                for held in holds[start : start + RELEASES_AT_ONCE]:
                    group.create_task(self._release_one(held))

    async def _release_one(self, held: HoldAhead) -> None:
        self._leases.end(held.lease)
        reservation = held.reservation
        try:
            await self._limits.release(held.tenant, reservation.reservation_id, reservation.epoch)
        except MeshError as error:
            # Only an early release: the end of its lease, and the ledger, let it go as well.
            log.warning("hold_not_released", reservation_id=str(reservation.reservation_id), error=str(error))


def _kind(question: Question, hold: Hold) -> Kind:
    return Kind(
        question.tenant_id,
        question.tenant.config_version,
        question.user,
        question.feature,
        question.provider_account,
        question.price,
        max(hold.input_tokens, min(rounded_up(hold.input_tokens), question.context_tokens)),
        hold.max_output_tokens,
    )


def _is_whole(hold: Hold, reservation: Reservation) -> bool:
    covered = hold.within(reservation.tokens, reservation.cost_nano_usd)
    return covered and reservation.output_tokens == hold.max_output_tokens and not reservation.degraded
