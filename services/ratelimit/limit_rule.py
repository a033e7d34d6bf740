"""A tenant's rules: what each counts, over which time and whose use. Knows which apply to a request; counts nothing itself."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from enum import IntEnum, StrEnum
from typing import Protocol

from services.ratelimit.limits import NOBODY, Subject

SECOND_US = 1_000_000
MINUTE_US = 60 * SECOND_US


class Unit(IntEnum):
    """What a rule counts; the numbers are those of the contract and of the scripts."""

    REQUESTS = 1
    TOKENS = 2
    COST = 3
    RUNNING = 4
    RETRIES = 5
    PRODUCT = 6


class Window(IntEnum):
    """Over which time; the numbers are those of the contract."""

    SLIDING = 1
    DAY = 2
    MONTH = 3
    CYCLE = 4
    REQUEST = 5
    RUNNING = 6


CALENDAR = (Window.DAY, Window.MONTH, Window.CYCLE)


class Scope(StrEnum):
    """Whose use; the values are part of the counters' names."""

    TENANT = "t"
    USER = "u"
    FEATURE = "f"
    USER_FEATURE = "x"

    def covers(self, subject: Subject) -> bool:
        """Tells whether a request of the subject is counted in this scope."""
        needs_user, needs_feature = self in (Scope.USER, Scope.USER_FEATURE), self in (Scope.FEATURE, Scope.USER_FEATURE)
        return (bool(subject.user) or not needs_user) and (bool(subject.feature) or not needs_feature)

    def of(self, subject: Subject) -> Subject:
        """The part of the subject that this scope tells apart."""
        match self:
            case Scope.TENANT:
                return NOBODY
            case Scope.USER:
                return Subject(user=subject.user)
            case Scope.FEATURE:
                return Subject(feature=subject.feature)
            case Scope.USER_FEATURE:
                return subject


@dataclass(frozen=True, slots=True)
class LimitRule:
    """One rule. `user` and `feature` narrow it to one of them. `fails_open`: it admits from a local allowance while its store is away.

    `grants`: it is the plan's or an operator's, so that its unit is one the tenant has; a tenant's own only narrows.
    """

    name: str
    unit: Unit
    window: Window
    limit: int
    window_us: int = 0
    scope: Scope = Scope.TENANT
    product_unit: str = ""
    user: str = ""
    feature: str = ""
    shadow: bool = False
    fails_open: bool = False
    shortens: bool = False
    min_output_tokens: int = 1
    waits: bool = False
    burst: bool = False
    lifting_plan: str = ""
    grants: bool = True

    def applies_to(self, subject: Subject) -> bool:
        """Tells whether a request of the subject is held to it."""
        return self.scope.covers(subject) and self.user in ("", subject.user) and self.feature in ("", subject.feature)

    @property
    def counts(self) -> bool:
        """Whether it has a counter: each request by itself needs none, and what runs is counted by its leases."""
        return self.window is Window.SLIDING or self.window in CALENDAR


class PlanLimits(Protocol):
    """The part of a plan that is counted where no rules are given; 0 means unlimited."""

    requests_per_minute: int
    tokens_per_minute: int
    tokens_per_day: int
    cost_nano_usd_per_month: int
    concurrent_calls: int


_OF_PLAN = (
    LimitRule("requests_per_minute", Unit.REQUESTS, Window.SLIDING, 0, MINUTE_US),
    LimitRule("tokens_per_minute", Unit.TOKENS, Window.SLIDING, 0, MINUTE_US),
    LimitRule("tokens_per_day", Unit.TOKENS, Window.DAY, 0),
    LimitRule("cost_nano_usd_per_month", Unit.COST, Window.MONTH, 0),
    LimitRule("concurrent_calls", Unit.RUNNING, Window.RUNNING, 0),
)


def rules_of_plan(plan: PlanLimits) -> tuple[LimitRule, ...]:
    """The rules that a plan's numbers stand for."""
    limits: Iterator[int] = (getattr(plan, rule.name) for rule in _OF_PLAN)
    return tuple(replace(rule, limit=limit) for rule, limit in zip(_OF_PLAN, limits, strict=True) if limit)


def applicable(rules: Iterable[LimitRule], subject: Subject) -> tuple[LimitRule, ...]:
    """The rules a request of the subject is held to."""
    return tuple(rule for rule in rules if rule.applies_to(subject))
