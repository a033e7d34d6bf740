"""The limits' own code against the oracle: whatever happens, in whatever order and when, decisions, counters and figures are equal."""

import asyncio
import os
from collections.abc import Callable, Coroutine
from dataclasses import replace
from datetime import UTC
from itertools import takewhile
from typing import Any, NamedTuple, TypeVar
from uuid import UUID
from zoneinfo import ZoneInfo

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test
from pydantic import SecretStr

from mesh.metering.v1 import ledger_service_pb2 as ledger
from services.kernel.errors import ContentConflict, InvalidRequest, LimitExceeded, MeshError, ReservationLost
from services.kernel.ids import ReservationId, new_uuid7
from services.kernel.rpc.channel import MeshChannel
from services.ratelimit.adapters.redis_link import PipelinedLink
from services.ratelimit.calendar_periods import Calendar, moment
from services.ratelimit.consumption import Use
from services.ratelimit.counter import Family
from services.ratelimit.decision import Refusal
from services.ratelimit.limit_rule import CALENDAR, MINUTE_US, SECOND_US, LimitRule, Scope, Unit, Window
from services.ratelimit.limits import NOBODY, NOTHING, Amounts, Demand, Shortening, Subject
from services.ratelimit.reservation import LARGEST_ID_AGE_SECONDS, CommitKind, Held, Request, Settlement
from services.ratelimit.terms import Terms
from tests.ratelimit.callers import TOKENS, InferenceSettings
from tests.ratelimit.limits_by_hand import Backing, LimitsByHand
from tests.ratelimit.oracle import Granted, Oracle, OracleCall
from tests.ratelimit.scripted_peer import LedgerCall, running_peer

EXAMPLES = int(os.environ.get("TENANTRY_TEST_EXAMPLES", "25"))
LEASE_US = 5 * SECOND_US
HOUR_US = 3600 * SECOND_US
DURABLE, VOLATILE = "interviews", "searches"
WINDOWS_US = (10 * SECOND_US, MINUTE_US, 600 * SECOND_US)
UNITS = {
    Unit.REQUESTS: (Window.SLIDING, Window.SLIDING, Window.DAY, Window.MONTH),
    Unit.TOKENS: (Window.SLIDING, Window.SLIDING, Window.DAY, Window.MONTH, Window.CYCLE, Window.REQUEST),
    Unit.COST: (Window.DAY, Window.MONTH, Window.REQUEST),
    Unit.RUNNING: (Window.RUNNING,),
    Unit.RETRIES: (Window.SLIDING, Window.DAY),
    Unit.PRODUCT: (Window.SLIDING, Window.DAY),
}
FEW = (Unit.REQUESTS, Unit.RUNNING, Unit.RETRIES)
SUBJECTS = (NOBODY, Subject("ada", "chat"), Subject("bob"))
STATES = {
    ledger.CALL_STATE_OPEN: "held",
    ledger.CALL_STATE_UNRESOLVED: "pinned",
    ledger.CALL_STATE_SETTLED: "settled",
    ledger.CALL_STATE_VOID: "void",
}

T = TypeVar("T")
small = st.integers(0, 60)
subjects = st.builds(Subject, st.sampled_from(("", "ada", "bob")), st.sampled_from(("", "chat")))
calendars = st.sampled_from((("UTC|31", Calendar(UTC, 31)), ("Asia/Kathmandu|5", Calendar(ZoneInfo("Asia/Kathmandu"), 5))))
shortenings = st.one_of(st.none(), st.tuples(st.integers(1, 40), st.integers(1, 20), st.integers(0, 3_000_000)))
seldom = st.sampled_from((False, False, False, True))
skews_us = st.sampled_from((0, 0, -40 * SECOND_US, 40 * SECOND_US))
waits_us = st.sampled_from((0, 1, 1, 700_000))
amounts = st.builds(Amounts, small, small)


class Times(NamedTuple):
    """How long a call waits before it is made, and by how much its caller's clock is wrong."""

    wait_us: int
    skew_us: int


times = st.builds(Times, waits_us, skews_us)


@st.composite
def a_rule(draw: st.DrawFn) -> LimitRule:
    """Any rule that the contract allows, small enough to be met."""
    unit = draw(st.sampled_from(list(UNITS)))
    window = draw(st.sampled_from(UNITS[unit]))
    scope = draw(st.sampled_from((Scope.TENANT, *Scope)))
    product_unit = draw(st.sampled_from((DURABLE, VOLATILE) if window is Window.SLIDING else (DURABLE,))) if unit is Unit.PRODUCT else ""
    return LimitRule(
        "rule",
        unit,
        window,
        draw(st.integers(0, 5 if unit in FEW else 120)),
        draw(st.sampled_from(WINDOWS_US)) if window is Window.SLIDING else 0,
        scope,
        product_unit=product_unit,
        user=draw(st.sampled_from(("", "ada"))) if scope in (Scope.USER, Scope.USER_FEATURE) else "",
        shadow=draw(st.booleans()),
        fails_open=draw(st.booleans()),
        shortens=draw(st.booleans()),
        min_output_tokens=draw(st.integers(1, 20)),
    )


rule_sets = st.lists(a_rule(), min_size=3, max_size=8).map(
    lambda rules: [replace(each, name=f"rule_{place}") for place, each in enumerate(rules)]
)


class LimitsMachine(RuleBasedStateMachine):
    """One tenant at the service and at the oracle, led through the same steps by a clock that only the steps move."""

    def __init__(self, loop: asyncio.AbstractEventLoop, backing: Backing) -> None:
        super().__init__()
        self._loop, self._backing = loop, backing
        self.ids: list[ReservationId] = []
        # When leases end.
        self.until_us: dict[ReservationId, int] = {}
        # What the ledger has to tell.
        self.outbox: list[Settlement] = []

    @initialize(rules=rule_sets, calendar=calendars)
    def begin(self, rules: list[LimitRule], calendar: tuple[str, Calendar]) -> None:
        """A tenant that was never seen."""
        self.calendar_name, own = calendar
        self.limits = LimitsByHand(self._backing, self._terms(rules, own, 1))
        self.oracle = Oracle(rules, own, durable_units=frozenset({DURABLE}))
        self.tenant_id = self.limits.at_store.tenant_id
        self._set_clock(self.limits.scripts.now_us)

    # Time and stores

    @rule(us=st.sampled_from((1000, SECOND_US, LEASE_US - 1, LEASE_US, 10 * SECOND_US, MINUTE_US, 700 * SECOND_US, 86_400 * SECOND_US)))
    def time_passes(self, us: int) -> None:
        """Moments, a lease, any window, a day."""
        self._pass(us)

    @precondition(lambda self: self.ids)
    @rule(number=small, place=st.integers(0, 8), before_us=st.integers(0, 1))
    def time_passes_to_an_edge(self, number: int, place: int, before_us: int) -> None:
        """To the microsecond in which something leaves a rule's window, or a lease ends, or the one before it."""
        call = (self.oracle.calls or {}).get(self._pick(number))
        windows_us = [0, *(each.window_us for each in self.oracle.rules if each.window is Window.SLIDING)]
        window_us = windows_us[place % len(windows_us)]
        ends_us = self.until_us.get(self._pick(number), 0) if not window_us else 0 if call is None else call.reserve_us + window_us
        self._pass(max(0, ends_us - before_us - self.now_us))

    @rule(really=seldom)
    def the_store_loses_everything(self, really: bool) -> None:
        """As a Redis that was emptied."""
        if not really:
            return
        self._do(self.limits.at_store.lose())
        self.oracle.lose()

    @rule(number=small, limit=st.integers(0, 200), how=st.sampled_from(("limit", "limit", "mode", "gone")))
    def rules_change(self, number: int, limit: int, how: str) -> None:
        """Another number, or another rule, which makes other counters."""
        rules = list(self.oracle.rules)
        place = number % len(rules)
        changed = rules[place]
        if how == "limit" or changed.unit is Unit.PRODUCT:
            rules[place] = replace(changed, limit=limit)
        elif how == "mode":
            rules[place] = replace(changed, shadow=not changed.shadow)
        elif len(rules) > 1:
            del rules[place]
        before, self.oracle.rules = self.limits.terms, rules
        self.limits.at_store.terms = self._terms(rules, self.oracle.calendar, before.version + 1)
        if self.limits.terms.families_digest != before.families_digest and self.oracle.calls is not None:
            self._do(self.limits.looks.check(self.limits.context, NOBODY, Demand(NOTHING)))
            self._loaded(only_rules_changed=True)

    @precondition(lambda self: self._expired())
    @rule()
    def a_sweep(self) -> None:
        """The ledger is asked about every ended lease."""
        self._do(self.limits.fencing.fence_expired(self.tenant_id))
        self._fenced()

    # Calls

    @rule(times=times, amounts=amounts, subject=subjects, attempt=st.sampled_from((1, 1, 2)), short=shortenings, dies=seldom)
    def reserve(
        self, times: Times, amounts: Amounts, subject: Subject, attempt: int, short: tuple[int, int, int] | None, dies: bool
    ) -> None:
        """A call, which the ledger opens, or which dies before."""
        self._pass(times.wait_us)
        tokens, cost = amounts.tokens, amounts.cost_nano_usd
        shortening = None
        if short is not None and short[1] <= short[0] <= tokens:
            shortening = Shortening(*short)
            cost += -(-short[0] * short[2] // 1_000_000)
        reservation_id = self._new_id(times.skew_us)
        held = self._reserve(reservation_id, Demand(Amounts(tokens, cost), attempt, 0, shortening), subject)
        if held is not None and not dies:
            granted = held.answer.granted
            self.limits.ledger.calls[reservation_id.bytes] = LedgerCall(
                ledger.CALL_STATE_OPEN, self.now_us, granted.tokens, granted.cost_nano_usd, 0, subject.user, subject.feature, attempt
            )

    @rule(cost=small, subject=subjects, raises=st.lists(st.tuples(waits_us, small, small), min_size=1, max_size=4))
    def stream(self, cost: int, subject: Subject, raises: list[tuple[int, int, int]]) -> None:
        """A call that asks for more as it goes."""
        self.reserve(Times(1, 0), Amounts(1, cost), subject, 1, None, dies=False)
        for wait_us, more_tokens, more_cost in raises:
            self._pass(wait_us)
            self.extend(0, more_tokens, cost + more_cost, 0)

    @precondition(lambda self: self.ids)
    @rule(number=small, tokens=small)
    def repeat(self, number: int, tokens: int) -> None:
        """A Reserve again, with the same amounts or with others."""
        known = (self.oracle.calls or {}).get(self._pick(number))
        if known is not None and not known.product_unit:
            amounts = Amounts(known.demand.amounts.tokens if tokens % 2 else tokens, known.demand.amounts.cost_nano_usd)
            self._reserve(self._pick(number), Demand(amounts, known.demand.attempt), known.subject)

    def _reserve(self, reservation_id: ReservationId, demand: Demand, subject: Subject) -> Held | None:
        before, fences = self._do(self.limits.contents()), self.limits.fence_count
        (outcome,) = self._do(self.limits.reservations.decide(self.limits.context, [Request(reservation_id, demand, subject)]))
        self._reloaded()
        is_old = _minted_us(reservation_id) < self.now_us - LARGEST_ID_AGE_SECONDS * SECOND_US
        told = self._decided(fences, outcome, lambda: self.oracle.reserve(reservation_id, demand, self.now_us, subject))
        verdict = told.verdict if told is not None and not is_old else "ended"
        assert _verdict(outcome) == verdict
        if not isinstance(outcome, Held):
            self._changed_nothing(before, fences)
            return None
        self._is_exact(outcome, subject)
        assert told is not None
        assert outcome.answer.granted == told.amounts
        assert not told.output_tokens or outcome.answer.output_tokens == told.output_tokens
        assert {each.status.rule.name for each in outcome.shadow_refusals} >= told.shadow_refusals
        self._leased(reservation_id)
        return outcome

    @precondition(lambda self: self.ids)
    @rule(number=small, tokens=small, cost=small, shift=st.sampled_from((0, 0, 0, 1)))
    def extend(self, number: int, tokens: int, cost: int, shift: int) -> None:
        """More, by totals; also of what has ended, or in another epoch."""
        reservation_id, amounts, epoch = self._pick(number), Amounts(tokens, cost), self.oracle.epoch + shift
        before, fences = self._do(self.limits.contents()), self.limits.fence_count
        outcome = self._outcome(self.limits.extensions.extend(self.limits.context, reservation_id, epoch, amounts))
        verdict = self.oracle.extend(reservation_id, amounts, epoch, self.now_us)
        if self.limits.fence_count > fences:
            assert verdict == "refused"
            self._fenced()
            verdict = self.oracle.extend(reservation_id, amounts, epoch, self.now_us)
        assert _verdict(outcome) == {"lost": "ended"}.get(verdict, verdict)
        if not isinstance(outcome, Held):
            self._changed_nothing(before, fences)
            return
        call = (self.oracle.calls or {})[reservation_id]
        assert outcome.answer.granted == call.amounts
        self._is_exact(outcome, call.subject)
        kept = self.limits.ledger.calls.get(reservation_id.bytes)
        if kept is not None and kept.state == ledger.CALL_STATE_OPEN:
            kept.tokens, kept.cost = call.amounts.tokens, call.amounts.cost_nano_usd

    @precondition(lambda self: self.ids)
    @rule(number=small, shift=st.sampled_from((0, 0, -1)))
    def release(self, number: int, shift: int) -> None:
        """By the caller of a call that was never opened; in another epoch it is nothing."""
        reservation_id = self._pick(number)
        if reservation_id.bytes in self.limits.ledger.calls:
            return
        self._do(self.limits.reservations.release(self.limits.context, reservation_id, max(0, self.oracle.epoch + shift)))
        if not shift:
            self.oracle.end(reservation_id, "released", NOTHING, counted=False, only_held=True)

    @precondition(lambda self: self.ids)
    @rule(number=small)
    def renew(self, number: int) -> None:
        """A lease that has not ended begins anew; an ended one stays ended."""
        reservation_id = self._pick(number)
        call = (self.oracle.calls or {}).get(reservation_id)
        lives = call is not None and call.state == "held" and call.leased and not call.product_unit
        assert self._do(self.limits.reservations.renew([(self.tenant_id, reservation_id)])) == [lives]
        if lives:
            self._leased(reservation_id)

    @precondition(lambda self: self._undecided())
    @rule(number=small, tokens=small, kind=st.sampled_from((CommitKind.SETTLED, *CommitKind)), told=st.sampled_from((True, True, False)))
    def the_ledger_decides(self, number: int, tokens: int, kind: CommitKind, told: bool) -> None:
        """An open call is settled at less, as much or more than it held, or is void; its commit comes at once, or late."""
        undecided = self._undecided()
        reservation_id = undecided[number % len(undecided)]
        call, actual = self.limits.ledger.calls[reservation_id.bytes], NOTHING
        match kind:
            case CommitKind.SETTLED:
                actual = Amounts(tokens, tokens * 3)
                call.state, call.tokens, call.cost = ledger.CALL_STATE_SETTLED, actual.tokens, actual.cost_nano_usd
            case CommitKind.VOID:
                call.state, call.tokens, call.cost = ledger.CALL_STATE_VOID, 0, 0
            case CommitKind.PIN:
                call.state = ledger.CALL_STATE_UNRESOLVED
        call.epoch = self.limits.ledger.epoch
        self.outbox.append(Settlement(self.tenant_id, reservation_id, call.epoch, kind, actual))
        if told:
            self.commit(-1, again=False)

    @precondition(lambda self: self.outbox)
    @rule(number=small, again=seldom)
    def commit(self, number: int, again: bool) -> None:
        """What the ledger decided is told, in any order, and perhaps once more later."""
        item = self.outbox[number % len(self.outbox)]
        assert self._do(self.limits.reservations.commit([item])) == [True]
        self.oracle.commit(item.reservation_id, item.kind.value, item.actual, item.epoch)
        if not again:
            self.outbox.remove(item)

    # Units and looks

    @rule(times=times, unit=st.sampled_from((DURABLE, VOLATILE)), quantity=st.integers(1, 60), subject=subjects)
    def use(self, times: Times, unit: str, quantity: int, subject: Subject) -> None:
        """Units of the product."""
        self._pass(times.wait_us)
        if unit in self.limits.terms.included_units:
            self._use(Use(self._new_id(times.skew_us), unit, quantity, subject))

    @precondition(lambda self: self.ids)
    @rule(number=small, quantity=st.sampled_from((0, 0, 1)))
    def use_again(self, number: int, quantity: int) -> None:
        """The same use, or another under its id: nothing more is used."""
        reservation_id = self._pick(number)
        known = (self.oracle.calls or {}).get(reservation_id)
        is_old = _minted_us(reservation_id) < self.now_us - LARGEST_ID_AGE_SECONDS * SECOND_US
        # A use that no ledger has is not known again once the counters were loaded anew, nor when it is old.
        if known is None or not known.product_unit or (known.product_unit == VOLATILE and (is_old or known.epoch != self.oracle.epoch)):
            return
        use = Use(reservation_id, known.product_unit, known.demand.quantity + quantity, known.subject)
        outcome = self._outcome(self.limits.consumptions.decide(self.limits.context, use))
        assert _verdict(outcome) == ("conflict" if quantity else "held")
        if not quantity and not is_old and known.state == "held" and known.leased:
            self._leased(reservation_id)

    def _use(self, use: Use) -> None:
        before, fences = self._do(self.limits.contents()), self.limits.fence_count
        outcome = self._outcome(self.limits.consumptions.decide(self.limits.context, use))
        self._reloaded(but=use.consumption_id)
        demand = Demand(attempt=0, quantity=use.quantity)
        told = self._decided(
            fences, outcome, lambda: self.oracle.reserve(use.consumption_id, demand, self.now_us, use.subject, use.product_unit)
        )
        assert _verdict(outcome) == told.verdict
        if not isinstance(outcome, Held):
            self._changed_nothing(before, fences)
            return
        self._is_exact(outcome, use.subject)
        if use.product_unit == DURABLE:
            self._leased(use.consumption_id)
            self.outbox.append(Settlement(self.tenant_id, use.consumption_id, self.oracle.epoch, CommitKind.SETTLED, NOTHING))

    @rule(tokens=small, cost=small, subject=subjects, quantity=st.integers(0, 60), unit=st.sampled_from(("", DURABLE, VOLATILE)))
    def check(self, tokens: int, cost: int, subject: Subject, quantity: int, unit: str) -> None:
        """Says what a demand would meet, and changes nothing."""
        if unit and unit not in self.limits.terms.included_units:
            return
        demand = Demand(attempt=0, quantity=quantity) if unit else Demand(Amounts(tokens, cost))
        was_there, before = self.oracle.calls is not None, self._do(self.limits.contents())
        look = self._do(self.limits.looks.check(self.limits.context, subject, demand, unit))
        self._reloaded()
        assert (look.refusal is None) == self.oracle.admits(demand, self.now_us, subject, unit)
        if was_there:
            assert self._do(self.limits.contents()) == before

    @invariant()
    def every_counter_and_every_figure_is_the_oracles(self) -> None:
        """What is used and what remains, for each of some subjects, by every rule; looked at only while there are counters."""
        if self.oracle.calls is None:
            return
        for subject, statuses in self._do(self.limits.statuses(SUBJECTS)):
            for status in statuses:
                used = self.oracle.used(status.rule, subject, self.now_us)
                assert (status.rule.name, status.used, status.remaining) == (status.rule.name, used, max(0, status.rule.limit - used))

    # How it is done

    def _do(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(timeout=30)

    def _outcome(self, work: Coroutine[Any, Any, Held | Refusal]) -> Held | Refusal | MeshError:
        try:
            return self._do(work)
        except MeshError as error:
            return error

    def _terms(self, rules: list[LimitRule], calendar: Calendar, version: int) -> Terms:
        return Terms(rules, calendar, version=version, calendar_name=self.calendar_name, features=[DURABLE])

    def _pick(self, number: int) -> ReservationId:
        """Mostly one of the latest."""
        return self.ids[-1 - number % min(len(self.ids), 5 if number < 50 else 1000)]

    def _new_id(self, skew_us: int) -> ReservationId:
        """By the clock of a caller, which is wrong by so much."""
        self.ids.append(ReservationId(new_uuid7(moment(self.now_us + skew_us))))
        return self.ids[-1]

    def _pass(self, us: int) -> None:
        if us:
            self._set_clock(self.now_us + us)

    def _set_clock(self, to_us: int) -> None:
        self.now_us = to_us
        self._do(self.limits.scripts.set_clock(to_us))
        for id, call in (self.oracle.calls or {}).items():
            call.leased = self.until_us.get(ReservationId(id), 0) > to_us

    def _leased(self, reservation_id: ReservationId) -> None:
        self.until_us[reservation_id] = self.now_us + LEASE_US

    def _reloaded(self, *, but: ReservationId | None = None) -> None:
        """What was asked of a store without counters was answered after it had them from the ledger; `but` went there afterwards."""
        if self.oracle.calls is None:
            self._loaded(but=but)

    def _loaded(self, *, only_rules_changed: bool = False, but: ReservationId | None = None) -> None:
        calls: dict[ReservationId, OracleCall] = {}
        for id, call in self.limits.ledger.calls.items():
            # What it knows of a fence alone was never held.
            if call.reserve_us and (but is None or id != but.bytes):
                reservation_id, amounts = ReservationId(UUID(bytes=id)), Amounts(call.tokens, call.cost)
                demand = Demand(amounts, 0 if call.product_unit else call.attempt, call.quantity)
                subject = Subject(call.user, call.feature)
                calls[reservation_id] = OracleCall(
                    STATES[call.state], call.reserve_us, amounts, demand, subject, product_unit=call.product_unit
                )
                self._leased(reservation_id)
        self.oracle.load(self.limits.ledger.epoch, calls, self.now_us, only_rules_changed=only_rules_changed)

    def _decided(self, fences: int, outcome: Held | Refusal | MeshError, ask: Callable[[], Granted]) -> Granted:
        """What the oracle says; of what it refuses, again after the ledger was asked, which must be wherever it may help."""
        told, doubtful = ask(), bool(self._expired())
        if told.verdict != "refused":
            assert self.limits.fence_count == fences
        elif self.limits.fence_count > fences:
            self._fenced()
            return ask()
        elif isinstance(outcome, Refusal):
            assert not doubtful or outcome.frees_us is None
        return told

    def _undecided(self) -> list[ReservationId]:
        undecided = (ledger.CALL_STATE_OPEN, ledger.CALL_STATE_UNRESOLVED)
        return [ReservationId(UUID(bytes=id)) for id, call in self.limits.ledger.calls.items() if call.state in undecided]

    def _expired(self) -> list[ReservationId]:
        return [ReservationId(id) for id, call in (self.oracle.calls or {}).items() if call.state == "held" and not call.leased]

    def _fenced(self) -> None:
        """What the ledger was asked about ends as it says: what it never opened goes, what is open stays, what is settled waits."""
        for reservation_id in self._expired():
            state = self.limits.ledger.calls[reservation_id.bytes].state
            if state == ledger.CALL_STATE_UNRESOLVED:
                self.oracle.pin(reservation_id)
            elif state == ledger.CALL_STATE_VOID:
                self.oracle.end(reservation_id, "released", NOTHING, counted=False, only_held=True)

    def _changed_nothing(self, before: list[object], fences: int) -> None:
        # Of a tenant that had to be loaded, or whose leases were asked about, the next invariant speaks.
        if before[0] and self.limits.fence_count == fences:
            assert self._do(self.limits.contents()) == before

    def _is_exact(self, held: Held, subject: Subject) -> None:
        calendar, began_us = self.oracle.calendar, held.answer.reserve_us
        for status in held.limits:
            window = status.rule.window
            # A period that ended meanwhile is told of as it ended.
            if window not in CALENDAR or calendar.period(window, began_us) == calendar.period(window, self.now_us):
                assert (status.rule.name, status.used) == (status.rule.name, self.oracle.used(status.rule, subject, self.now_us))


def _verdict(outcome: Held | Refusal | MeshError) -> str:
    match outcome:
        case Held():
            return "held"
        case Refusal() | LimitExceeded() | InvalidRequest():
            return "refused"
        case ContentConflict():
            return "conflict"
        case ReservationLost():
            return "ended"
        case _:
            raise outcome


def _minted_us(reservation_id: ReservationId) -> int:
    return (reservation_id.int >> 80) * 1000


@pytest.mark.timeout(300)
async def test_the_limits_and_the_oracle_agree(link: PipelinedLink) -> None:
    """Whatever rules there are and whatever happens, on a clock that passes each edge of a window to the microsecond."""
    loop = asyncio.get_running_loop()
    async with running_peer() as peer:
        channel = MeshChannel(
            peer.address, settings=InferenceSettings(service_token=SecretStr(TOKENS["inference"])), target_service="metering"
        )
        backing = Backing(link, peer, channel)
        await asyncio.to_thread(
            run_state_machine_as_test,
            lambda: LimitsMachine(loop, backing),
            settings=settings(
                max_examples=EXAMPLES, stateful_step_count=50, database=None, deadline=None, suppress_health_check=list(HealthCheck)
            ),
        )
        await channel.close()


def test_families_are_those_of_the_rules_and_the_standard_ones() -> None:
    """Numbers, names and modes of answer change no family; another window, scope or mode of counting does."""
    rule = LimitRule("a", Unit.TOKENS, Window.SLIDING, 10, HOUR_US)
    base = Terms([rule]).families_digest
    assert Terms([LimitRule("b", Unit.TOKENS, Window.SLIDING, 20, HOUR_US, burst=True)]).families_digest == base
    for other in (
        LimitRule("a", Unit.TOKENS, Window.SLIDING, 10, HOUR_US // 2),
        LimitRule("a", Unit.TOKENS, Window.SLIDING, 10, HOUR_US, Scope.USER),
        LimitRule("a", Unit.TOKENS, Window.SLIDING, 10, HOUR_US, shadow=True),
        LimitRule("a", Unit.REQUESTS, Window.SLIDING, 10, HOUR_US),
    ):
        assert Terms([other]).families_digest != base
    assert Terms([rule], calendar_name="Europe/Berlin|1").families_digest != base
    assert Family(Unit.TOKENS, Window.DAY) in Terms([]).families


def test_a_tenant_with_many_rules_and_users_takes_a_bounded_part_of_the_process() -> None:
    """What is made ready for many users with long names under a hundred rules is kept for the latest few, and made again as it was."""
    terms = Terms([LimitRule(f"r{n}", Unit.TOKENS, Window.SLIDING, 9, n * SECOND_US, Scope.USER) for n in range(1, 101)])
    users = [Subject(f"{n:04}" + "\N{ELEPHANT}" * 196) for n in range(150)]
    made = [(user, terms.plan(user)) for user in users]
    kept = list(takewhile(lambda item: terms.plan(item[0]) is item[1], reversed(made)))
    assert 1024 * 1024 < sum(len(plan.packed) for _, plan in kept) <= 8 * 1024 * 1024
    assert terms.plan(users[0]) == made[0][1]
