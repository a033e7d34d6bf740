"""The rules of the limits in plain Python, without a store: what the scripts must agree with, step by step.

It keeps every call for ever and adds up from the beginning each time: nothing is compact here, and nothing is quick.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from uuid import UUID

from services.ratelimit.calendar_periods import Calendar
from services.ratelimit.limit_rule import CALENDAR, LimitRule, Unit, Window
from services.ratelimit.limits import NOBODY, Amounts, Demand, Subject


@dataclass
class OracleCall:
    """A reservation or a use. `counted`: it is in the logs of windows. `shadow`: what rules in shadow mode were charged; None: nothing.

    `demand`: what it was reserved with. `epoch`: in which it was decided here.
    """

    state: str
    reserve_us: int
    amounts: Amounts
    demand: Demand = field(default_factory=Demand)
    subject: Subject = NOBODY
    shadow: Amounts | None = None
    product_unit: str = ""
    counted: bool = True
    epoch: int = 0
    leased: bool = True

    @property
    def held(self) -> bool:
        """Whether it has not ended."""
        return self.state in ("held", "pinned")


@dataclass
class Granted:
    """What was decided: amounts and output tokens when it fits, and the shadow rules that would have refused."""

    verdict: str
    amounts: Amounts = field(default_factory=lambda: Amounts(0, 0))
    output_tokens: int = 0
    shadow_refusals: frozenset[str] = frozenset()


# A slice of before a loss may be used so long after it.
LONGEST_SLICE_US = 850_000


@dataclass
class Oracle:
    """One tenant. `calls` is None while it has no counters. `durable_units`: the units whose uses the ledger has."""

    rules: Sequence[LimitRule]
    calendar: Calendar = field(default_factory=Calendar)
    epoch: int = 0
    calls: dict[UUID, OracleCall] | None = None
    durable_units: frozenset[str] = frozenset()
    # Since when it knows of units that the ledger does not have; 0: always.
    knows_since_us: int = 0

    def used(self, rule: LimitRule, subject: Subject, now_us: int) -> int:
        """What a rule counts for a subject as of now."""
        if rule.window is Window.REQUEST:
            return 0
        volatile = rule.unit is Unit.PRODUCT and rule.product_unit not in self.durable_units and not rule.fails_open
        used = sum(self._amount(rule, call) for call in self._of(rule, subject) if self._within(rule, call, now_us))
        is_blind = volatile and self.knows_since_us + LONGEST_SLICE_US > now_us - rule.window_us
        return max(used, rule.limit) if is_blind else used

    def reserve(self, reservation_id: UUID, demand: Demand, now_us: int, subject: Subject = NOBODY, product_unit: str = "") -> Granted:
        """Decides a Reserve of a fresh id, or a use of a product's units."""
        if self.calls is None:
            return Granted("rebuild")
        known = self.calls.get(reservation_id)
        if known is not None:
            return self._again(known, demand)
        rules = self._applicable(subject, product_unit)
        granted = self._fitted([rule for rule in rules if not rule.shadow], demand, subject, now_us)
        if granted is None:
            return Granted("refused")
        shadow = self._fitted(rules, demand, subject, now_us)
        refusals = frozenset[str]()
        if shadow is None:
            over = (rule for rule in rules if rule.shadow and self._excess(rule, demand, subject, now_us) > 0)
            refusals = frozenset(rule.name for rule in over)
        state = "held" if demand.attempt or product_unit in self.durable_units else "settled"
        self.calls[reservation_id] = OracleCall(
            state, now_us, granted[0], demand, subject, None if shadow is None else shadow[0], product_unit, epoch=self.epoch
        )
        return Granted("held", *granted, refusals)

    def admits(self, demand: Demand, now_us: int, subject: Subject = NOBODY, product_unit: str = "") -> bool:
        """Whether no rule that is enforced would refuse it."""
        rules = [rule for rule in self._applicable(subject, product_unit) if not rule.shadow]
        return self._fitted(rules, demand, subject, now_us) is not None

    def extend(self, reservation_id: UUID, amounts: Amounts, epoch: int, now_us: int) -> str:
        """Raises a living hold."""
        call = (self.calls or {}).get(reservation_id)
        if call is None or call.product_unit or epoch != self.epoch or call.state != "held" or not call.leased:
            return "lost"
        whole = Amounts(max(amounts.tokens, call.amounts.tokens), max(amounts.cost_nano_usd, call.amounts.cost_nano_usd))
        more = Amounts(whole.tokens - call.amounts.tokens, whole.cost_nano_usd - call.amounts.cost_nano_usd)
        rules = [rule for rule in self._applicable(call.subject, "") if rule.unit in (Unit.TOKENS, Unit.COST)]
        refused = [rule for rule in rules if self._too_much(rule, call, whole, more, now_us)]
        if any(not rule.shadow for rule in refused):
            return "refused"
        call.amounts = whole
        if call.shadow is not None and not refused:
            call.shadow = Amounts(call.shadow.tokens + more.tokens, call.shadow.cost_nano_usd + more.cost_nano_usd)
        return "held"

    def end(self, reservation_id: UUID, state: str, amounts: Amounts, *, counted: bool, only_held: bool = False) -> None:
        """Moves a hold to its end, if it is one."""
        call = (self.calls or {}).get(reservation_id)
        if call is None or not call.held or (only_held and call.state != "held"):
            return
        call.state, call.amounts, call.counted = state, amounts, counted
        call.shadow = amounts if call.shadow is not None else None

    def pin(self, reservation_id: UUID) -> None:
        """Keeps a hold without its lease."""
        call = (self.calls or {}).get(reservation_id)
        if call is not None and call.state == "held":
            call.state = "pinned"

    def commit(self, reservation_id: UUID, kind: str, amounts: Amounts, epoch: int) -> bool:
        """Applies what the ledger says; no snapshot is ever pending here."""
        if self.calls is None or epoch < self.epoch:
            return True
        if epoch > self.epoch:
            self.lose()
        elif kind == "pin":
            self.pin(reservation_id)
        elif kind == "void":
            self.end(reservation_id, "void", Amounts(0, 0), counted=True)
        else:
            self.end(reservation_id, "settled", amounts, counted=True)
        return True

    def lose(self) -> None:
        """Loses all counters."""
        self.calls = None

    def load(self, epoch: int, calls: Mapping[UUID, OracleCall], now_us: int, *, only_rules_changed: bool = False) -> None:
        """Takes what the ledger has. Uses that no ledger has stay known where only the rules have changed; else nobody knows them."""
        stay = {id: call for id, call in (self.calls or {}).items() if call.product_unit and call.product_unit not in self.durable_units}
        for call in calls.values():
            call.shadow = call.amounts
        self.epoch, self.calls = epoch, {**calls, **(stay if only_rules_changed else {})}
        if epoch > 1 and not only_rules_changed:
            self.knows_since_us = now_us

    def _again(self, known: OracleCall, demand: Demand) -> Granted:
        same = known.demand.amounts == demand.amounts
        if known.held and not same:
            return Granted("conflict")
        if known.state == "held" and known.leased and same:
            return Granted("held", known.amounts)
        return Granted("ended")

    def _applicable(self, subject: Subject, product_unit: str) -> list[LimitRule]:
        return [rule for rule in self.rules if rule.product_unit == product_unit and rule.applies_to(subject)]

    def _fitted(self, rules: Sequence[LimitRule], demand: Demand, subject: Subject, now_us: int) -> tuple[Amounts, int] | None:
        """The largest that fits, by trying every output from the wanted one down."""
        over = [rule for rule in rules if self._excess(rule, demand, subject, now_us) > 0]
        short = demand.shortening
        if not over:
            return demand.amounts, short.max_output_tokens if short else 0
        if short is None or not all(rule.shortens and rule.unit in (Unit.TOKENS, Unit.COST) for rule in over):
            return None
        fewest = max(short.min_output_tokens, *(rule.min_output_tokens for rule in over))
        for output in range(short.max_output_tokens - 1, fewest - 1, -1):
            cut = short.max_output_tokens - output
            cost = demand.amounts.cost_nano_usd - cut * short.output_nano_usd_per_million // 1_000_000
            smaller = Amounts(demand.amounts.tokens - cut, cost)
            if all(self._excess(rule, replace(demand, amounts=smaller), subject, now_us) <= 0 for rule in over):
                return smaller, output
        return None

    def _excess(self, rule: LimitRule, demand: Demand, subject: Subject, now_us: int) -> int:
        need = _need(rule, demand)
        return 0 if need is None else need - (rule.limit - self.used(rule, subject, now_us))

    def _too_much(self, rule: LimitRule, call: OracleCall, whole: Amounts, more: Amounts, now_us: int) -> bool:
        added = _of_unit(rule.unit, more)
        if not added:
            return False
        if rule.window is Window.REQUEST:
            return _of_unit(rule.unit, whole) > rule.limit
        charged = call.shadow is not None or not rule.shadow
        in_window = rule.window is not Window.SLIDING or call.reserve_us > now_us - rule.window_us
        # It counts in the period it was reserved in.
        at_us = call.reserve_us if rule.window in CALENDAR else now_us
        return charged and in_window and added > rule.limit - self.used(rule, call.subject, at_us)

    def _of(self, rule: LimitRule, subject: Subject) -> Iterator[OracleCall]:
        for call in (self.calls or {}).values():
            same = rule.scope.covers(call.subject) and rule.scope.of(call.subject) == rule.scope.of(subject)
            if same and call.product_unit == rule.product_unit and (call.shadow is not None or not rule.shadow):
                yield call

    def _within(self, rule: LimitRule, call: OracleCall, now_us: int) -> bool:
        if rule.window is Window.RUNNING:
            return call.state == "held" and call.leased
        if rule.window is Window.SLIDING:
            return call.reserve_us > now_us - rule.window_us
        return self.calendar.period(rule.window, call.reserve_us) == self.calendar.period(rule.window, now_us)

    def _amount(self, rule: LimitRule, call: OracleCall) -> int:
        amounts = call.shadow if rule.shadow and call.shadow is not None else call.amounts
        match rule.unit:
            case Unit.REQUESTS:
                return int(call.counted and call.demand.attempt == 1)
            case Unit.RETRIES:
                return int(call.counted and call.demand.attempt > 1)
            case Unit.RUNNING:
                return 1
            case Unit.PRODUCT:
                return call.demand.quantity
            case _:
                return _of_unit(rule.unit, amounts)


def _need(rule: LimitRule, demand: Demand) -> int | None:
    match rule.unit:
        case Unit.REQUESTS:
            return 1 if demand.attempt == 1 else None
        case Unit.RETRIES:
            return 1 if demand.attempt > 1 else None
        case Unit.RUNNING:
            return 1
        case Unit.PRODUCT:
            return demand.quantity
        case _:
            return _of_unit(rule.unit, demand.amounts)


def _of_unit(unit: Unit, amounts: Amounts) -> int:
    return amounts.tokens if unit is Unit.TOKENS else amounts.cost_nano_usd
