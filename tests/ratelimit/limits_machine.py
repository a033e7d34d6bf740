"""All that can happen to a tenant's limits, in any order and at any time, to the limits and to the oracle alike."""

from dataclasses import replace

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from mesh.metering.v1 import ledger_service_pb2 as ledger
from services.kernel.ids import ReservationId
from services.ratelimit.calendar_periods import Calendar
from services.ratelimit.consumption import Use
from services.ratelimit.limit_rule import MINUTE_US, SECOND_US, LimitRule, Unit, Window
from services.ratelimit.limits import NOBODY, NOTHING, Amounts, Demand, Shortening, Subject
from services.ratelimit.request import LARGEST_ID_AGE_SECONDS, Request
from services.ratelimit.reservation import Held
from services.ratelimit.settlement import CommitKind, Settlement
from tests.ratelimit.demands import (
    DURABLE,
    VOLATILE,
    Times,
    amounts,
    calendars,
    rule_sets,
    seldom,
    shortenings,
    small,
    subjects,
    times,
    waits_us,
)
from tests.ratelimit.in_step import LEASE_US, InStep, minted_us, verdict_of
from tests.ratelimit.scripted_peer import LedgerCall

SUBJECTS = (NOBODY, Subject("ada", "chat"), Subject("bob"))


class LimitsMachine(InStep, RuleBasedStateMachine):
    """One tenant at the service and at the oracle, led through the same steps by a clock that only the steps move."""

    @initialize(rules=rule_sets, calendar=calendars)
    def begin(self, rules: list[LimitRule], calendar: tuple[str, Calendar]) -> None:
        """A tenant that was never seen."""
        self.begin_with(rules, *calendar)

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

    @precondition(lambda self: len(self.ids) >= self.loses_after)
    @rule()
    def the_store_loses_everything(self) -> None:
        """As a Redis that was emptied, after some more calls each time."""
        self.loses_after = len(self.ids) + 6
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

    @rule(amounts=amounts, subject=subjects, tokens=small, kind=st.sampled_from((CommitKind.SETTLED, CommitKind.VOID)))
    def call(self, amounts: Amounts, subject: Subject, tokens: int, kind: CommitKind) -> None:
        """A whole call, billed at less or more than it held."""
        self.reserve(Times(1, 0), amounts, subject, 1, None, dies=False)
        if self.ids[-1] in self._undecided():
            self.the_ledger_decides(-1, tokens, kind, told=True)

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
        is_old = minted_us(reservation_id) < self.now_us - LARGEST_ID_AGE_SECONDS * SECOND_US
        told = self._decided(fences, outcome, lambda: self.oracle.reserve(reservation_id, demand, self.now_us, subject))
        verdict = told.verdict if told is not None and not is_old else "ended"
        assert verdict_of(outcome) == verdict
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
        assert verdict_of(outcome) == {"lost": "ended"}.get(verdict, verdict)
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
        is_old = minted_us(reservation_id) < self.now_us - LARGEST_ID_AGE_SECONDS * SECOND_US
        # A use that no ledger has is not known again once the counters were loaded anew, nor when it is old.
        if known is None or not known.product_unit or (known.product_unit == VOLATILE and (is_old or known.epoch != self.oracle.epoch)):
            return
        use = Use(reservation_id, known.product_unit, known.demand.quantity + quantity, known.subject)
        outcome = self._outcome(self.limits.consumptions.decide(self.limits.context, use))
        assert verdict_of(outcome) == ("conflict" if quantity else "held")
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
        assert verdict_of(outcome) == told.verdict
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
