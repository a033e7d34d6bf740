"""Which counters there are: a family is a unit over a window by a scope, and each of its counters has a name in the store."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from hashlib import blake2b

from services.ratelimit.limit_rule import CALENDAR, MINUTE_US, SECOND_US, LimitRule, Scope, Unit, Window
from services.ratelimit.limits import Subject

_UNITS = {Unit.REQUESTS: "q", Unit.TOKENS: "t", Unit.COST: "c", Unit.RETRIES: "y"}
# In bytes: ids such as UUIDs are kept as they are.
_LONGEST_PART, _DIGEST_BYTES = 40, 20
_WINDOWS = {Window.DAY: "d", Window.MONTH: "m", Window.CYCLE: "b"}


@dataclass(frozen=True, slots=True)
class Family:
    """Counters of one kind. Those of rules in shadow mode are their own."""

    unit: Unit
    window: Window
    window_us: int = 0
    scope: Scope = Scope.TENANT
    product_unit: str = ""
    shadow: bool = False

    @classmethod
    def of(cls, rule: LimitRule) -> "Family":
        """The family of a rule that counts."""
        window_us = rule.window_us if rule.window is Window.SLIDING else 0
        return cls(rule.unit, rule.window, window_us, rule.scope, rule.product_unit, rule.shadow)

    @property
    def stem(self) -> str:
        """What the names of its counters begin with."""
        unit = f"p{self.product_unit}" if self.unit is Unit.PRODUCT else _UNITS[self.unit]
        window = f"s{self.window_us / SECOND_US:g}" if self.window is Window.SLIDING else _WINDOWS[self.window]
        return f"{unit}:{window}:{self.scope}{'~' if self.shadow else ''}"

    def counter(self, subject: Subject) -> str:
        """The name of the counter that a request of the subject is counted in, without its period."""
        part = self.scope.of(subject)
        match self.scope:
            case Scope.TENANT:
                return self.stem
            case Scope.USER:
                return f"{self.stem}:{short(part.user)}"
            case Scope.FEATURE:
                return f"{self.stem}:{short(part.feature)}"
            case Scope.USER_FEATURE:
                # The length keeps ("a", "bc") and ("ab", "c") apart.
                user = short(part.user)
                return f"{self.stem}:{len(user)}:{user}:{short(part.feature)}"

    def of_period(self, subject: Subject, start_us: int) -> str:
        """The whole name of a calendar counter, as scripts write it."""
        return f"{self.counter(subject)}@{start_us // SECOND_US}"

    def named(self, calendars: str) -> str:
        """The family's name among those that are loaded: with the calendar, as the sums of another calendar are others."""
        return f"{self.stem}|{calendars}" if self.window in CALENDAR else self.stem


# Kept for every tenant, so that changing numbers alone never needs the ledger.
STANDARD = (
    Family(Unit.REQUESTS, Window.SLIDING, MINUTE_US),
    Family(Unit.TOKENS, Window.SLIDING, MINUTE_US),
    Family(Unit.TOKENS, Window.DAY),
    Family(Unit.TOKENS, Window.MONTH),
    Family(Unit.COST, Window.DAY),
    Family(Unit.COST, Window.MONTH),
)


def short(name: str) -> str:
    """A user's or feature's name as it stands in counters' names: itself up to 40 bytes, and 41 bytes with a digest of it beyond.

    A user has one in each family, until their periods end. The lengths tell a digest from a name that looks like one.
    """
    encoded = name.encode()
    if len(encoded) <= _LONGEST_PART:
        return name
    return f"~{blake2b(encoded, digest_size=_DIGEST_BYTES).hexdigest()}"


def families_of(rules: Iterable[LimitRule]) -> tuple[Family, ...]:
    """Every family that a tenant with these rules needs, each once."""
    return tuple(dict.fromkeys((*STANDARD, *(Family.of(rule) for rule in rules if rule.counts))))


def enforced(family: Family) -> Family:
    """The family that counts the same for rules that refuse."""
    return replace(family, shadow=False)
