"""Replays a log of decisions in the order of the store's time, by the rules alone, and says which were wrong.

Knows nothing of scripts: it adds up what was held, by whom and when it ended. Where an answer was lost, it reckons with both cases.
It believes no end that neither the ledger nor the caller who let it go speaks of. Rules in shadow mode are left out: they decide nothing.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import groupby
from uuid import UUID

from mesh.metering.v1 import ledger_service_pb2 as ledger
from services.ratelimit.counter import Family
from services.ratelimit.limit_rule import CALENDAR, SECOND_US, LimitRule, Scope, Unit, Window
from services.ratelimit.limits import NOTHING, Amounts, Subject
from services.ratelimit.terms import Terms
from tests.ratelimit.bounded_counter import BoundedCounter
from tests.ratelimit.decision_log import Asked, DecisionLog, Kept, Raise, Told, need
from tests.ratelimit.scripted_peer import LedgerCall

# What happens at one moment, in the order in which it is reckoned.
LEASE_ENDS, MAY_RAISE, RAISED, STARTS, REFUSED, ENDS = range(6)
Event = tuple[int, int, Asked, object]


@dataclass
class Findings:
    """What the replay found. `rounded_count`: refusals that only the compactness of a log explains, within one quantum of its window."""

    over_admissions: list[str] = field(default_factory=list)
    false_refusals: list[str] = field(default_factory=list)
    wrong_figures: list[str] = field(default_factory=list)
    # Holds that went, or were billed, otherwise than the ledger says.
    unfounded_ends: list[str] = field(default_factory=list)
    # Holds whose caller was told of another moment than the one they are kept with.
    moved_holds: list[str] = field(default_factory=list)
    admitted_count: int = 0
    refused_count: int = 0
    raised_count: int = 0
    figure_count: int = 0
    rounded_count: int = 0
    refused_raise_count: int = 0
    refusing_rules: Counter[str] = field(default_factory=Counter)


class Replay:
    """One tenant's decisions."""

    def __init__(
        self, log: DecisionLog, tenant_id: UUID, terms: Terms, lease_us: int, findings: Findings, calls: Mapping[bytes, LedgerCall]
    ) -> None:
        """`calls`: what the ledger has of the tenant in the end."""
        self._log, self._tenant_id, self._terms, self._lease_us, self._calls = log, tenant_id, terms, lease_us, calls
        self._first = {told.asked.id: told for told in log.held if told.asked.tenant_id == tenant_id}
        self.findings = findings
        self.counters: dict[str, BoundedCounter] = {}
        # Of each id, the families and counters it was charged to.
        self._charged: dict[UUID, list[tuple[Family, BoundedCounter]]] = {}
        self._amounts: dict[UUID, Amounts] = {}
        # What depends on nothing but whom a call serves.
        self._families_of: dict[tuple[Subject, str], list[tuple[Family, str]]] = {}
        self._rules_of: dict[tuple[Subject, str], list[LimitRule]] = {}
        self._periods: dict[Window, tuple[int, int]] = {}

    def run(self) -> None:
        """Goes through it from the beginning to the end."""
        events = sorted(self._events(), key=lambda event: event[:2])
        for time_us, moment in groupby(events, key=lambda event: event[0]):
            by_kind: dict[int, list[Event]] = defaultdict(list)
            for event in moment:
                by_kind[event[1]].append(event)
            self._at(time_us, by_kind)

    def counter(self, family: Family, subject: Subject, time_us: int) -> BoundedCounter:
        """The counter of a family that a call of this moment is counted in, by its name at the store."""
        return self._named(_stem(family, subject), family, time_us)

    def _named(self, stem: str, family: Family, time_us: int) -> BoundedCounter:
        name = f"{stem}@{self._period_start_us(family.window, time_us) // SECOND_US}" if family.window in CALENDAR else stem
        found = self.counters.get(name)
        if found is None:
            found = self.counters[name] = BoundedCounter(family.window_us)
        return found

    def _period_start_us(self, window: Window, time_us: int) -> int:
        known = self._periods.get(window)
        if known is None or not known[0] <= time_us < known[1]:
            known = self._periods[window] = self._terms.calendar.period(window, time_us)
        return known[0]

    def _events(self) -> Iterable[Event]:
        for asked in self._log.asked.values():
            kept = self._log.kept.get(asked.id)
            if asked.tenant_id != self._tenant_id or kept is None:
                continue
            yield kept.reserve_us, STARTS, asked, kept
            low_us = max([kept.reserve_us, *(start for start, _, is_sure in asked.renewals if is_sure)]) + self._lease_us
            high_us = max([kept.reserve_us, *(end for _, end, _ in asked.renewals)]) + self._lease_us
            yield low_us, LEASE_ENDS, asked, (0, None)
            yield high_us, LEASE_ENDS, asked, (None, 0)
            for raised in asked.raises:
                yield raised.from_us, MAY_RAISE, asked, raised
                if raised.to_us is not None:
                    yield raised.to_us, RAISED, asked, raised
            if kept.end_us is not None and self._is_founded(asked, kept):
                yield kept.end_us, ENDS, asked, kept
            elif kept.end_us is not None:
                said = self._calls.get(asked.id.bytes)
                self.findings.unfounded_ends.append(f"{asked.id}: {kept.state} with {kept.amounts}, the ledger has {said}")
        for told in self._log.refused:
            if told.asked.tenant_id == self._tenant_id:
                yield told.time_us, REFUSED, told.asked, told

    def _is_founded(self, asked: Asked, kept: Kept) -> bool:
        """Whether it ended as the ledger says, or was let go before it was opened; what is used at once is in no ledger."""
        said = self._calls.get(asked.id.bytes)
        state = said.state if said is not None else None
        match kept.state:
            case "settled" if asked.product_unit:
                return (state == ledger.CALL_STATE_SETTLED) == self._terms.is_durable(asked.product_unit)
            case "settled":
                return said is not None and state == ledger.CALL_STATE_SETTLED and kept.amounts == Amounts(said.tokens, said.cost)
            case "void":
                return state == ledger.CALL_STATE_VOID and kept.amounts == NOTHING
            case _:
                return kept.amounts == NOTHING and (state == ledger.CALL_STATE_VOID or (state is None and asked.let_go))

    def _at(self, time_us: int, by_kind: dict[int, list[Event]]) -> None:
        for _, _, asked, bounds in by_kind[LEASE_ENDS]:
            for family, counter in self._charged.get(asked.id, ()):
                if family.window is Window.RUNNING:
                    counter.correct(asked.id, time_us, *bounds)  # type: ignore[misc] # a pair
        for _, kind, asked, raised in by_kind[MAY_RAISE] + by_kind[RAISED]:
            assert isinstance(raised, Raise)
            self._raise(asked, raised, time_us, for_sure=kind == RAISED)
        refusals = [told for _, _, _, told in by_kind[REFUSED] if isinstance(told, Told)]
        open_refusals = self._still_open(refusals, time_us)
        starts = by_kind[STARTS]
        ordered = len(starts) < 2 or all(asked.id in self._first and self._first[asked.id].figures for _, _, asked, _ in starts)
        for _, _, asked, _ in sorted(starts, key=lambda event: self._place(event[2])):
            self._start(asked, time_us, has_figures=ordered)
            open_refusals = self._still_open(open_refusals, time_us)
        for told in open_refusals:
            self.findings.false_refusals.append(self._said(told, time_us))
        self.findings.refused_count += len(refusals)
        self.findings.refused_raise_count += sum(told.more is not None for told in refusals)
        self.findings.refusing_rules.update(told.rule for told in refusals)
        for _, _, asked, kept in by_kind[ENDS]:
            assert isinstance(kept, Kept)
            self._end(asked, kept, time_us)

    def _place(self, asked: Asked) -> int:
        """Decisions of one moment are of one script: the figures of all together only rise in it."""
        told = self._first.get(asked.id)
        every = {rule.name for rule in self._terms.rules if rule.scope is Scope.TENANT}
        return sum(used for rule, used in told.figures.items() if rule in every) if told else 0

    def _families(self, asked: Asked) -> list[tuple[Family, str]]:
        key = (asked.subject, asked.product_unit)
        found = self._families_of.get(key)
        if found is None:
            running = [] if asked.product_unit else [Family(Unit.RUNNING, Window.RUNNING, scope=scope) for scope in Scope]
            every = [*self._terms.families_for(asked.product_unit), *running]
            own = [family for family in every if not family.shadow and family.scope.covers(asked.subject)]
            found = self._families_of[key] = [(family, _stem(family, asked.subject)) for family in own]
        return found

    def _start(self, asked: Asked, time_us: int, *, has_figures: bool) -> None:
        self.findings.admitted_count += 1
        amounts = self._amounts[asked.id] = asked.demand.amounts
        charged = self._charged[asked.id] = []
        for family, stem in self._families(asked):
            amount = need(family.unit, asked, amounts)
            if amount is not None:
                counter = self._named(stem, family, time_us)
                counter.put(asked.id, time_us, amount, amount)
                charged.append((family, counter))
        told = self._first.get(asked.id)
        if told is not None and not asked.product_unit and told.time_us != time_us:
            self.findings.moved_holds.append(f"{asked.id}: told of {told.time_us}, kept with {time_us}")
        for rule in self._rules(asked):
            if rule.shadow or need(rule.unit, asked, amounts) is None:
                continue
            counter = self._of(rule, asked.subject, time_us)
            if counter.low > rule.limit:
                self.findings.over_admissions.append(f"{rule.name}: {counter.low} of {rule.limit} at {time_us} with {asked.id}")
            if told is not None and has_figures and rule.name in told.figures:
                self.findings.figure_count += 1
                if not counter.low <= told.figures[rule.name] <= counter.most(time_us):
                    bounds = f"{counter.low}..{counter.most(time_us)}"
                    self.findings.wrong_figures.append(f"{rule.name}: told {told.figures[rule.name]}, is {bounds} at {time_us}")

    def _raise(self, asked: Asked, raised: Raise, time_us: int, *, for_sure: bool) -> None:
        known = self._amounts.get(asked.id)
        if known is None:
            return
        watched = [
            (rule, self._of(rule, asked.subject, self._at_us(rule, asked, time_us)))
            for rule in self._rules(asked)
            if rule.unit in (Unit.TOKENS, Unit.COST) and rule.counts and not rule.shadow
        ]
        if not for_sure and raised.to_us is not None:
            for rule, counter in watched:
                counter.watch((asked.id, rule.name), time_us)
        least = {rule.name: counter.least((asked.id, rule.name), time_us) for rule, counter in watched} if for_sure else {}
        whole = Amounts(max(known.tokens, raised.amounts.tokens), max(known.cost_nano_usd, raised.amounts.cost_nano_usd))
        for family, counter in self._charged[asked.id]:
            if family.unit in (Unit.TOKENS, Unit.COST):
                amount = need(family.unit, asked, whole)
                counter.correct(asked.id, time_us, amount if for_sure else None, amount)
        if not for_sure:
            return
        self.findings.raised_count += 1
        self._amounts[asked.id] = whole
        for rule, _ in watched:
            grown = (need(rule.unit, asked, whole) or 0) - (need(rule.unit, asked, known) or 0)
            in_window = rule.window is not Window.SLIDING or self._log.kept[asked.id].reserve_us > time_us - rule.window_us
            # Where an answer was lost it was made at any moment since, and is right if it fitted at one of them: what was billed
            # meanwhile may be more than was held.
            if grown and in_window and least[rule.name] + grown > rule.limit:
                total = f"{least[rule.name]} and {grown} of {rule.limit}"
                self.findings.over_admissions.append(f"{rule.name}: {total} in {raised.from_us}..{time_us}, raised {asked.id}")

    def _at_us(self, rule: LimitRule, asked: Asked, time_us: int) -> int:
        """The moment in whose period a call counts: that of its reservation."""
        return self._log.kept[asked.id].reserve_us if rule.window in CALENDAR else time_us

    def _end(self, asked: Asked, kept: Kept, time_us: int) -> None:
        if asked.id not in self._charged:
            self.findings.unfounded_ends.append(f"{asked.id}: {kept.state} at {time_us}, before it was held at {kept.reserve_us}")
            return
        for family, counter in self._charged[asked.id]:
            amount = need(family.unit, asked, kept.amounts) or 0
            gone = family.unit is Unit.RUNNING or (kept.state == "released") or (kept.state == "void" and family.unit is Unit.PRODUCT)
            counter.correct(asked.id, time_us, 0 if gone else amount, 0 if gone else amount)

    def _rules(self, asked: Asked) -> list[LimitRule]:
        key = (asked.subject, asked.product_unit)
        found = self._rules_of.get(key)
        if found is None:
            own = (rule for rule in self._terms.rules if rule.product_unit == asked.product_unit)
            found = self._rules_of[key] = [rule for rule in own if rule.applies_to(asked.subject)]
        return found

    def _of(self, rule: LimitRule, subject: Subject, time_us: int) -> BoundedCounter:
        family = Family(rule.unit, rule.window, scope=rule.scope) if rule.window is Window.RUNNING else Family.of(rule)
        counter = self.counter(family, subject, time_us)
        counter.pass_to(time_us)
        return counter

    def _still_open(self, refusals: list[Told], time_us: int) -> list[Told]:
        """Those that are not right as of now. In one script each was right at its own place among the holds."""
        return [told for told in refusals if not self._is_right(told, time_us)]

    def _is_right(self, told: Told, time_us: int) -> bool:
        rule = next(rule for rule in self._terms.rules if rule.name == told.rule)
        counter, amount = self._counter_and_need(rule, told, time_us)
        fits_figure = counter.low <= told.used <= counter.most(time_us)
        if not fits_figure or told.used + amount <= rule.limit:
            return False
        if counter.high + amount <= rule.limit:
            self.findings.rounded_count += 1
        return True

    def _counter_and_need(self, rule: LimitRule, told: Told, time_us: int) -> tuple[BoundedCounter, int]:
        asked = told.asked
        if told.more is None:
            return self._of(rule, asked.subject, time_us), need(rule.unit, asked, asked.demand.amounts) or 0
        return self._of(rule, asked.subject, self._at_us(rule, asked, time_us)), need(rule.unit, asked, told.more) or 0

    def _said(self, told: Told, time_us: int) -> str:
        rule = next(rule for rule in self._terms.rules if rule.name == told.rule)
        counter, amount = self._counter_and_need(rule, told, time_us)
        bounds = f"{counter.low}..{counter.high}..{counter.most(time_us)}"
        return f"{rule.name}: told {told.used} of {rule.limit} and {amount} needed, is {bounds} at {time_us} for {told.asked.id}"


def _stem(family: Family, subject: Subject) -> str:
    """The name of the subject's counter at the store, without its period."""
    return f"running:{family.scope}:{family.scope.of(subject)}" if family.window is Window.RUNNING else family.counter(subject)
