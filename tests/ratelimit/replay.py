"""Replays a log of decisions in the order of the store's time, by the rules alone, and says which were wrong.

Knows nothing of scripts: it adds up what was held, by whom and when it ended. Where an answer was lost, it reckons with both cases.
Rules in shadow mode are left out: they decide nothing.
"""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import groupby
from uuid import UUID

from services.ratelimit.counter import Family
from services.ratelimit.limit_rule import CALENDAR, LimitRule, Scope, Unit, Window
from services.ratelimit.limits import Amounts, Subject
from services.ratelimit.terms import Terms
from tests.ratelimit.bounded_counter import BoundedCounter
from tests.ratelimit.decision_log import Asked, DecisionLog, Kept, Raise, Told, need

# What happens at one moment, in the order in which it is reckoned.
LEASE_ENDS, MAY_RAISE, RAISED, STARTS, REFUSED, ENDS = range(6)
Event = tuple[int, int, Asked, object]


@dataclass
class Findings:
    """What the replay found. `rounded_count`: refusals that only the compactness of a log explains, within one quantum of its window."""

    over_admissions: list[str] = field(default_factory=list)
    false_refusals: list[str] = field(default_factory=list)
    wrong_figures: list[str] = field(default_factory=list)
    admitted_count: int = 0
    refused_count: int = 0
    raised_count: int = 0
    figure_count: int = 0
    rounded_count: int = 0


class Replay:
    """One tenant's decisions."""

    def __init__(self, log: DecisionLog, tenant_id: UUID, terms: Terms, lease_us: int, findings: Findings) -> None:
        self._log, self._tenant_id, self._terms, self._lease_us = log, tenant_id, terms, lease_us
        self._first = {told.asked.id: told for told in log.held if told.asked.tenant_id == tenant_id}
        self.findings = findings
        self.counters: dict[str, BoundedCounter] = {}
        # Of each id, the families and counters it was charged to.
        self._charged: dict[UUID, list[tuple[Family, BoundedCounter]]] = {}
        self._amounts: dict[UUID, Amounts] = {}

    def run(self) -> None:
        """Goes through it from the beginning to the end."""
        events = sorted(self._events(), key=lambda event: event[:2])
        for time_us, moment in groupby(events, key=lambda event: event[0]):
            by_kind: dict[int, list[Event]] = defaultdict(list)
            for event in moment:
                by_kind[event[1]].append(event)
            self._at(time_us, by_kind)

    def counter(self, family: Family, subject: Subject, time_us: int) -> tuple[str, BoundedCounter]:
        """The counter of a family that a call of this moment is counted in, by its name at the store."""
        if family.window is Window.RUNNING:
            name = f"running:{family.scope}:{family.scope.of(subject)}"
        elif family.window in CALENDAR:
            name = family.of_period(subject, self._terms.calendar.period(family.window, time_us)[0])
        else:
            name = family.counter(subject)
        found = self.counters.get(name)
        if found is None:
            found = self.counters[name] = BoundedCounter(family.window_us)
        return name, found

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
            if kept.end_us is not None:
                yield kept.end_us, ENDS, asked, kept
        for told in self._log.refused:
            if told.asked.tenant_id == self._tenant_id:
                yield told.time_us, REFUSED, told.asked, told

    def _at(self, time_us: int, by_kind: dict[int, list[Event]]) -> None:
        for _, _, asked, bounds in by_kind[LEASE_ENDS]:
            for family, counter in self._charged.get(asked.id, ()):
                if family.window is Window.RUNNING:
                    counter.correct(asked.id, time_us, *bounds)  # type: ignore[misc] # a pair
        for _, kind, asked, raised in by_kind[MAY_RAISE] + by_kind[RAISED]:
            assert isinstance(raised, Raise)
            self._raise(asked, raised, time_us, for_sure=kind == RAISED)
        open_refusals = self._still_open([told for _, _, _, told in by_kind[REFUSED] if isinstance(told, Told)], time_us)
        starts = by_kind[STARTS]
        ordered = len(starts) < 2 or all(asked.id in self._first and self._first[asked.id].figures for _, _, asked, _ in starts)
        for _, _, asked, _ in sorted(starts, key=lambda event: self._place(event[2])):
            self._start(asked, time_us, has_figures=ordered)
            open_refusals = self._still_open(open_refusals, time_us)
        for told in open_refusals:
            self.findings.false_refusals.append(self._said(told, time_us))
        self.findings.refused_count += len(by_kind[REFUSED])
        for _, _, asked, kept in by_kind[ENDS]:
            assert isinstance(kept, Kept)
            self._end(asked, kept, time_us)

    def _place(self, asked: Asked) -> int:
        """Decisions of one moment are of one script: the figures of all together only rise in it."""
        told = self._first.get(asked.id)
        every = {rule.name for rule in self._terms.rules if rule.scope is Scope.TENANT}
        return sum(used for rule, used in told.figures.items() if rule in every) if told else 0

    def _families(self, asked: Asked) -> list[Family]:
        running = [] if asked.product_unit else [Family(Unit.RUNNING, Window.RUNNING, scope=scope) for scope in Scope]
        every = [*self._terms.families_for(asked.product_unit), *running]
        return [family for family in every if not family.shadow and family.scope.covers(asked.subject)]

    def _start(self, asked: Asked, time_us: int, *, has_figures: bool) -> None:
        self.findings.admitted_count += 1
        amounts = self._amounts[asked.id] = asked.demand.amounts
        charged = self._charged[asked.id] = []
        for family in self._families(asked):
            amount = need(family.unit, asked, amounts)
            if amount is not None:
                _, counter = self.counter(family, asked.subject, time_us)
                counter.put(asked.id, time_us, amount, amount)
                charged.append((family, counter))
        told = self._first.get(asked.id)
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
        whole = Amounts(max(known.tokens, raised.amounts.tokens), max(known.cost_nano_usd, raised.amounts.cost_nano_usd))
        for family, counter in self._charged[asked.id]:
            if family.unit in (Unit.TOKENS, Unit.COST):
                amount = need(family.unit, asked, whole)
                counter.correct(asked.id, time_us, amount if for_sure else None, amount)
        if not for_sure:
            return
        self.findings.raised_count += 1
        self._amounts[asked.id] = whole
        reserve_us = self._log.kept[asked.id].reserve_us
        for rule in self._rules(asked):
            grew = need(rule.unit, asked, whole) != need(rule.unit, asked, known)
            in_window = rule.window is not Window.SLIDING or reserve_us > time_us - rule.window_us
            if grew and in_window and not rule.shadow:
                counter = self._of(rule, asked.subject, reserve_us if rule.window in CALENDAR else time_us)
                if counter.low > rule.limit:
                    self.findings.over_admissions.append(f"{rule.name}: {counter.low} of {rule.limit} at {time_us}, raised {asked.id}")

    def _end(self, asked: Asked, kept: Kept, time_us: int) -> None:
        for family, counter in self._charged[asked.id]:
            amount = need(family.unit, asked, kept.amounts) or 0
            gone = family.unit is Unit.RUNNING or (kept.state == "released") or (kept.state == "void" and family.unit is Unit.PRODUCT)
            counter.correct(asked.id, time_us, 0 if gone else amount, 0 if gone else amount)

    def _rules(self, asked: Asked) -> list[LimitRule]:
        return [rule for rule in self._terms.rules if rule.product_unit == asked.product_unit and rule.applies_to(asked.subject)]

    def _of(self, rule: LimitRule, subject: Subject, time_us: int) -> BoundedCounter:
        family = Family(rule.unit, rule.window, scope=rule.scope) if rule.window is Window.RUNNING else Family.of(rule)
        counter = self.counter(family, subject, time_us)[1]
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
        at_us = self._log.kept[asked.id].reserve_us if rule.window in CALENDAR else time_us
        return self._of(rule, asked.subject, at_us), need(rule.unit, asked, told.more) or 0

    def _said(self, told: Told, time_us: int) -> str:
        rule = next(rule for rule in self._terms.rules if rule.name == told.rule)
        counter, amount = self._counter_and_need(rule, told, time_us)
        bounds = f"{counter.low}..{counter.high}..{counter.most(time_us)}"
        return f"{rule.name}: told {told.used} of {rule.limit} and {amount} needed, is {bounds} at {time_us} for {told.asked.id}"
