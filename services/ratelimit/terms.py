"""A tenant's rules made ready for decisions: the families they need, and per subject counters and rules in the order scripts take them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b, sha256
from itertools import chain
from struct import Struct

from services.ratelimit.calendar_periods import Boundaries, Calendar
from services.ratelimit.counter import Family, families_of
from services.ratelimit.limit_rule import CALENDAR, LimitRule, Scope, Unit, Window, applicable
from services.ratelimit.limits import Subject
from services.ratelimit.packing import Packable, packed
from services.ratelimit.plan_shelf import PlanShelf, ShelfPart

# What a plan takes beside the names of its counters and the parts of its rules, about.
_PLAN_BYTES, _PART_BYTES = 400, 60
_MOST_PERIODS = 400
_RECENT_SECONDS = 60
# The order in which scripts take calendars; 0 is no calendar.
_CALENDAR_NUMBERS = {Window.DAY: 1, Window.MONTH: 2, Window.CYCLE: 3}
_RUNNING_BESIDE_USES, _RUNNING, _SINGLE = -2, -1, 0
_SHADED = 10
# Where days, months and cycles begin, and the last of each ends.
_CALENDARS = Struct(">12q")


@dataclass(frozen=True, slots=True)
class PlanForm:
    """What the plans of all subjects share that the same rules apply to. `packed` is the same for scripts."""

    rules: tuple[LimitRule, ...]
    families: tuple[Family, ...]
    has_shadow: bool
    packed: bytes
    # What others make of it once, to use for every request: it goes when the form goes.
    made: dict[str, object] = field(default_factory=dict, compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Plan:
    """What a request of one subject is counted in and held to. `own`, for scripts, is what the form does not say."""

    subject: Subject
    product_unit: str
    form: PlanForm
    own: bytes
    # Of each rule, the part of the subject that its scope tells apart.
    parts: tuple[Subject, ...]

    @property
    def rules(self) -> tuple[LimitRule, ...]:
        """The rules it is held to."""
        return self.form.rules

    @property
    def has_shadow(self) -> bool:
        """Whether any of them is in shadow mode."""
        return self.form.has_shadow

    @property
    def packed(self) -> bytes:
        """All of it, for scripts that take one plan."""
        return self.form.packed + self.own

    @property
    def lanes(self) -> list[bytes]:
        """For each rule the name of the line of those whom it keeps out."""
        return [_lane(rule, part) for rule, part in zip(self.rules, self.parts, strict=True)]


@dataclass(frozen=True, slots=True)
class CountedPeriod:
    """What the ledger is to add up: a unit over the calls reserved in [start, end), one sum for each of what the scope tells apart."""

    unit: Unit
    product_unit: str
    scope: Scope
    start_us: int
    end_us: int


@dataclass(frozen=True, slots=True)
class GuardTerms:
    """What opens the guard against abuse, in any minute (0: never), and how long it stays open at first and at most."""

    refusals_per_minute: int
    auth_failures_per_minute: int
    first_seconds: int
    most_seconds: int


class Terms:
    """The rules of one version of a tenant's configuration. Tenants with the same share it: it knows of no tenant."""

    def __init__(
        self,
        rules: Sequence[LimitRule],
        calendar: Calendar | None = None,
        *,
        version: int = 0,
        calendar_name: str = "UTC|1",
        features: Iterable[str] = (),
        guard: GuardTerms | None = None,
        weight: int = 1,
        shelf: PlanShelf[Plan] | None = None,
    ) -> None:
        """`features`: the units that are part of the plan, whether limited or not. `shelf`: bounds the plans of all who have it."""
        self.rules = tuple(rules)
        self.version = version
        self.guard = guard
        self.weight = weight
        self.families = families_of(self.rules)
        self.calendar = calendar or Calendar()
        names = sorted(family.named(calendar_name) for family in self.families)
        # Short, so that the hash it is kept in stays small in the store.
        self.families_digest = sha256(packed(names)).hexdigest()[:32]
        self.recent_seconds = max(_RECENT_SECONDS, *(-(-family.window_us // 1_000_000) for family in self.families))
        units = [rule for rule in self.rules if rule.unit is Unit.PRODUCT]
        self.product_units = frozenset(rule.product_unit for rule in units)
        # What the tenant made itself grants nothing.
        self.included_units = frozenset(features).union(rule.product_unit for rule in units if rule.grants)
        self._durable_units = frozenset(features).union(rule.product_unit for rule in units if rule.window in CALENDAR)
        self._named_users = frozenset(rule.user for rule in self.rules if rule.user)
        self._named_features = frozenset(rule.feature for rule in self.rules if rule.feature)
        self._forms: dict[tuple[str | bool, str | bool, str], PlanForm] = {}
        self._plans: ShelfPart[Plan] = ShelfPart(shelf)
        self._calendars: tuple[tuple[int, int], bytes, tuple[Boundaries, Boundaries, Boundaries]] | None = None

    def plan(self, subject: Subject, product_unit: str = "") -> Plan:
        """The plan of a call, or with a product's unit of its consumption."""
        key = (subject.user, subject.feature, product_unit)
        plan = self._plans.get(key)
        if plan is None:
            plan = self._planned(subject, product_unit)
            self._plans.add(key, plan, len(plan.own) + _PLAN_BYTES + _PART_BYTES * len(plan.parts))
        return plan

    def boundaries(self, now_us: int) -> tuple[Boundaries, Boundaries, Boundaries]:
        """The periods around a moment: days, months, cycles."""
        return self._around(now_us)[2]

    def packed_calendars(self, now_us: int) -> bytes:
        """The same for scripts."""
        return self._around(now_us)[1]

    def is_durable(self, product_unit: str) -> bool:
        """Whether uses of a product's unit must be in the ledger: some rule of it counts longer than the limits remember.

        A plan's feature is counted by billing cycles also where it is not limited: the next plan may limit it.
        """
        return product_unit in self._durable_units

    def families_for(self, product_unit: str) -> tuple[Family, ...]:
        """The families of a call, or of a product's unit."""
        return tuple(family for family in self.families if family.product_unit == product_unit)

    @property
    def unit_stems(self) -> tuple[str, ...]:
        """What the names of units' windows begin with: no ledger may have all that is in them."""
        return tuple(family.stem for family in self.families if family.product_unit and family.window is Window.SLIDING)

    def counted_periods(self, now_us: int) -> dict[CountedPeriod, list[Family]]:
        """What the ledger must add up as of `now_us`, and for which families: the period before, this one and the next."""
        every = dict(zip(CALENDAR, self.boundaries(now_us), strict=True))
        wanted: dict[CountedPeriod, list[Family]] = {}
        # This period first: where there are too many, the neighbours are left out, which only a clock that steps could read.
        for place in (1, 2, 0):
            for family in self.families:
                if family.window not in CALENDAR:
                    continue
                bounds = every[family.window]
                period = CountedPeriod(family.unit, family.product_unit, family.scope, bounds[place], bounds[place + 1])
                if period in wanted or len(wanted) < _MOST_PERIODS:
                    wanted.setdefault(period, []).append(family)
        return wanted

    def _around(self, now_us: int) -> tuple[tuple[int, int], bytes, tuple[Boundaries, Boundaries, Boundaries]]:
        cached = self._calendars
        if cached is not None and cached[0][0] <= now_us < cached[0][1]:
            return cached
        days, months, cycles = (self.calendar.boundaries(window, now_us) for window in CALENDAR)
        # A day that ends is not always a month that does, but cycles and months begin with days.
        made = ((days[1], days[2]), _CALENDARS.pack(*days, *months, *cycles), (days, months, cycles))
        self._calendars = made
        return made

    def _planned(self, subject: Subject, product_unit: str) -> Plan:
        form = self._form_for(subject, product_unit)
        names = [family.counter(subject) for family in form.families]
        own = packed((subject.user, subject.feature, product_unit, names))
        return Plan(subject, product_unit, form, own, tuple(rule.scope.of(subject) for rule in form.rules))

    def _form_for(self, subject: Subject, product_unit: str) -> PlanForm:
        # Which rules apply depends on a name only where a rule names it, else on there being one: so there are few forms for any users.
        user = subject.user if subject.user in self._named_users else bool(subject.user)
        feature = subject.feature if subject.feature in self._named_features else bool(subject.feature)
        key = (user, feature, product_unit)
        form = self._forms.get(key)
        if form is None:
            form = self._forms[key] = self._formed(subject, product_unit)
        return form

    def _formed(self, subject: Subject, product_unit: str) -> PlanForm:
        rules = applicable((rule for rule in self.rules if rule.product_unit == product_unit), subject)
        families = tuple(family for family in self.families_for(product_unit) if family.scope.covers(subject))
        places = {family: place for place, family in enumerate(families, 1)}
        volatile = bool(product_unit) and not self.is_durable(product_unit)
        # Durable uses have leases too: where there may be some, leases alone do not tell how many calls run.
        running = _RUNNING_BESIDE_USES if any(self.is_durable(unit) for unit in self.product_units) else _RUNNING
        has_shadow = any(rule.shadow for rule in rules)
        content: Packable = (
            *_of_families(families),
            tuple(chain.from_iterable(_of_rule(rule, places, running, volatile=volatile) for rule in rules)),
            int(has_shadow),
        )
        return PlanForm(rules, families, has_shadow, packed(content))


def _of_families(families: Sequence[Family]) -> tuple[list[int], list[int], list[int]]:
    """Counters for scripts, by columns: units, calendars, windows. Counters of rules in shadow have units of their own: see common.lua."""
    units = [family.unit + (_SHADED if family.shadow else 0) for family in families]
    return units, [_CALENDAR_NUMBERS.get(family.window, 0) for family in families], [family.window_us for family in families]


def _of_rule(rule: LimitRule, places: dict[Family, int], running: int, *, volatile: bool) -> tuple[Packable, ...]:
    """A rule for scripts: where its counter is, unit, limit, whether in shadow, fewest output tokens (0: not shortened), scope, blind."""
    uncounted = running if rule.window is Window.RUNNING else _SINGLE
    place = places[Family.of(rule)] if rule.counts else uncounted
    blind = int(volatile and rule.counts and not rule.fails_open)
    return place, rule.unit, rule.limit, int(rule.shadow), rule.min_output_tokens if rule.shortens else 0, rule.scope.value, blind


def _lane(rule: LimitRule, part: Subject) -> bytes:
    # Short, and without names of users, as it lies in the store beside every ticket.
    return blake2b(packed((rule.name, part.user, part.feature)), digest_size=8).digest()
