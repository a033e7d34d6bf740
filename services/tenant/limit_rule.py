"""One rule of a tenant's limits: its value, the form in which it is kept, and what of it makes no sense.

The words are those of mesh/common/v1/limit_rule.proto in lower case, without their prefix.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from enum import StrEnum
from typing import Any

MOST = 9_000_000_000_000_000
# Every call of a window is told one by one when counters are rebuilt: 78 calls a second for this long fit one answer of the ledger.
MAX_WINDOW_SECONDS = 600
MAX_OUTPUT_TOKENS = 1_000_000
NAME = re.compile(r"[a-z][a-z0-9_]{0,62}")


class Unit(StrEnum):
    """What a rule counts."""

    REQUESTS = "requests"
    TOKENS = "tokens"
    COST_NANO_USD = "cost_nano_usd"
    CONCURRENT_CALLS = "concurrent_calls"
    RETRIES = "retries"
    PRODUCT = "product"


class Window(StrEnum):
    """Over which time a rule counts."""

    SLIDING = "sliding"
    DAY = "day"
    MONTH = "month"
    BILLING_CYCLE = "billing_cycle"
    REQUEST = "request"
    RUNNING = "running"


class Scope(StrEnum):
    """Whose use a rule adds up."""

    TENANT = "tenant"
    USER = "user"
    FEATURE = "feature"
    USER_FEATURE = "user_feature"


class Mode(StrEnum):
    """What a rule does when it is reached."""

    ENFORCE = "enforce"
    SHADOW = "shadow"


class StoreFailure(StrEnum):
    """What a rule does while its counters are not known."""

    CLOSED = "closed"
    OPEN = "open"


class Origin(StrEnum):
    """Whose word a rule is. A tenant's own narrows and grants nothing."""

    PLAN = "plan"
    OPERATOR = "operator"
    TENANT = "tenant"


@dataclass(frozen=True, slots=True)
class NearEdge:
    """What may be done for a call before the rule refuses it; `min_output_tokens` of 0 stands for 1."""

    shorten: bool = False
    min_output_tokens: int = 0
    wait: bool = False


NOTHING_AT_THE_EDGE = NearEdge()


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule. `lifting_plan` and `origin` are put there when the rules of a tenant are made, and are no part of what is kept."""

    name: str
    unit: Unit
    window: Window
    limit: int
    window_seconds: int = 0
    product_unit: str = ""
    scope: Scope = Scope.TENANT
    user: str = ""
    feature: str = ""
    mode: Mode = Mode.ENFORCE
    on_store_failure: StoreFailure = StoreFailure.CLOSED
    near_edge: NearEdge = NOTHING_AT_THE_EDGE
    burst: bool = False
    lifting_plan: str = ""
    origin: Origin = Origin.PLAN


@dataclass(frozen=True, slots=True)
class RuleProblem:
    """Why a rule makes no sense: the field that is wrong, and what it must be."""

    field: str
    rule: str


# What these names stand for everywhere: in plans, in answers, in the refusals that callers branch on.
STANDARD: Mapping[str, tuple[Unit, Window, int]] = {
    "requests_per_minute": (Unit.REQUESTS, Window.SLIDING, 60),
    "tokens_per_minute": (Unit.TOKENS, Window.SLIDING, 60),
    "tokens_per_day": (Unit.TOKENS, Window.DAY, 0),
    "tokens_per_month": (Unit.TOKENS, Window.MONTH, 0),
    "cost_nano_usd_per_day": (Unit.COST_NANO_USD, Window.DAY, 0),
    "cost_nano_usd_per_month": (Unit.COST_NANO_USD, Window.MONTH, 0),
    "concurrent_calls": (Unit.CONCURRENT_CALLS, Window.RUNNING, 0),
    "retries_per_minute": (Unit.RETRIES, Window.SLIDING, 60),
}
WORDS = {"unit": Unit, "window": Window, "scope": Scope, "mode": Mode, "on_store_failure": StoreFailure}
KEPT = tuple(field.name for field in fields(Rule) if field.name not in ("name", "lifting_plan", "origin"))
DEFAULTS = Rule("", Unit.REQUESTS, Window.SLIDING, 0)
SAID = ("unit", "window", "limit")
EDGE = tuple(field.name for field in fields(NearEdge))


def rule_problem(rule: Rule) -> RuleProblem | None:
    """Tells what of the rule makes no sense together; None when all does."""
    return next(_problems(rule), None)


def rule_of(terms: Mapping[str, object]) -> Rule:
    """Builds a rule out of terms that were checked before they were kept."""
    given = {field: terms[field] for field in KEPT if field in terms}
    words = {field: word(str(given[field])) for field, word in WORDS.items() if field in given}
    edge = given.pop("near_edge", None)
    kept: dict[str, Any] = {**given, **words, "near_edge": NearEdge(**edge) if isinstance(edge, dict) else NOTHING_AT_THE_EDGE}
    return Rule(name=str(terms["name"]), **kept)


def terms_of(rule: Rule) -> dict[str, object]:
    """Returns the rule's terms as they are kept and shown: what it must say, and what is not as usual."""
    kept: dict[str, object] = {"name": rule.name}
    for field in KEPT:
        value = getattr(rule, field)
        if field in SAID or value != getattr(DEFAULTS, field):
            kept[field] = edge_terms(value) if isinstance(value, NearEdge) else value
    return kept


def edge_terms(edge: NearEdge) -> dict[str, object]:
    """Returns what is said of the edge."""
    return {field: getattr(edge, field) for field in EDGE if getattr(edge, field)}


def _problems(rule: Rule) -> Iterator[RuleProblem]:
    if not 0 <= rule.limit <= MOST:
        yield RuleProblem("limit", f"must be from 0 to {MOST}")
    if (rule.unit is Unit.PRODUCT) != bool(rule.product_unit):
        yield RuleProblem("product_unit", "names the product's unit of a rule of the unit product, and is empty otherwise")
    if rule.product_unit and not NAME.fullmatch(rule.product_unit):
        yield RuleProblem("product_unit", "must be named like ai_interviews")
    yield from _window_problems(rule)
    if rule.user and rule.scope not in (Scope.USER, Scope.USER_FEATURE):
        yield RuleProblem("user", f"must be empty: the scope {rule.scope} does not look at users; take user or user_feature")
    if rule.feature and rule.scope not in (Scope.FEATURE, Scope.USER_FEATURE):
        yield RuleProblem("feature", f"must be empty: the scope {rule.scope} does not look at features; take feature or user_feature")
    if len(rule.user) > 200 or len(rule.feature) > 100:
        yield RuleProblem("user" if len(rule.user) > 200 else "feature", "is too long: a user has at most 200 characters, a feature 100")
    yield from _edge_problems(rule)


def _window_problems(rule: Rule) -> Iterator[RuleProblem]:
    if (rule.window is Window.RUNNING) != (rule.unit is Unit.CONCURRENT_CALLS):
        yield RuleProblem("window", "must be running for concurrent_calls, and for nothing else")
    if rule.window is Window.REQUEST and rule.unit not in (Unit.TOKENS, Unit.COST_NANO_USD, Unit.PRODUCT):
        yield RuleProblem("window", f"must not be request: {rule.unit} of a single request are always 1")
    if rule.window is Window.SLIDING and not 1 <= rule.window_seconds <= MAX_WINDOW_SECONDS:
        yield RuleProblem("window_seconds", f"must be from 1 to {MAX_WINDOW_SECONDS} for a sliding window")
    if rule.window is not Window.SLIDING and rule.window_seconds:
        yield RuleProblem("window_seconds", f"must be 0: the window {rule.window} has its length from elsewhere")
    if rule.burst and rule.window is not Window.SLIDING:
        yield RuleProblem("burst", "needs a sliding window")
    books = rule.unit is Unit.COST_NANO_USD or rule.window in (Window.DAY, Window.MONTH, Window.BILLING_CYCLE)
    if rule.on_store_failure is StoreFailure.OPEN and books:
        yield RuleProblem("on_store_failure", "must be closed for money, days, months and billing cycles")


def _edge_problems(rule: Rule) -> Iterator[RuleProblem]:
    edge = rule.near_edge
    if edge.shorten and rule.unit not in (Unit.TOKENS, Unit.COST_NANO_USD):
        yield RuleProblem("near_edge.shorten", f"helps with tokens and cost, not with {rule.unit}")
    if edge.min_output_tokens and not edge.shorten:
        yield RuleProblem("near_edge.min_output_tokens", "needs shorten")
    if not 0 <= edge.min_output_tokens <= MAX_OUTPUT_TOKENS:
        yield RuleProblem("near_edge.min_output_tokens", f"must be from 0 to {MAX_OUTPUT_TOKENS}")
    if edge.wait and rule.window is Window.REQUEST:
        yield RuleProblem("near_edge.wait", "does not help where each request counts by itself")


def standard_problem(rule: Rule) -> RuleProblem | None:
    """Tells why the rule must not have a standard name; None when the name is free or the rule is what the name says."""
    meant = STANDARD.get(rule.name)
    if meant is None or (meant == (rule.unit, rule.window, rule.window_seconds) and rule.scope is Scope.TENANT):
        return None
    unit, window, seconds = meant
    over = f"{seconds} s, sliding" if seconds else f"the window {window}"
    return RuleProblem("name", f"{rule.name} stands for {unit} of the whole tenant over {over}; take another name")
