"""What a plan says of limits beyond its terms: further rules, how rules behave, the guard. Refuses what makes no sense, with the place.

The terms themselves are rules too: each counted term and each feature is one, by its own name.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from services.tenant.limit_rule import (
    NOTHING_AT_THE_EDGE,
    STANDARD,
    Mode,
    NearEdge,
    Rule,
    StoreFailure,
    Unit,
    Window,
    edge_terms,
    rule_of,
    rule_problem,
    standard_problem,
    terms_of,
)
from services.tenant.rule_reading import RuleRefused, read_behaviour, read_rule

# With as many of a tenant's own there are never more than 200.
MAX_PLAN_RULES = 100
# The terms of a plan that are counted, in the order in which answers list them.
COUNTED_TERMS = (
    "requests_per_minute",
    "tokens_per_minute",
    "tokens_per_day",
    "tokens_per_month",
    "cost_nano_usd_per_month",
    "concurrent_calls",
)
_MAX_REFUSALS = 1_000_000
_MAX_FIRST_SECONDS = 3_600
_MAX_SECONDS = 86_400


@dataclass(frozen=True, slots=True)
class Feature:
    """Whether a feature is part of a plan, and how much of it in a billing cycle, in the feature's own unit; 0 means unlimited."""

    name: str
    enabled: bool
    limit: int


@dataclass(frozen=True, slots=True)
class Behaviour:
    """How a rule behaves that has its number from a term or a feature."""

    name: str
    mode: Mode = Mode.ENFORCE
    on_store_failure: StoreFailure = StoreFailure.CLOSED
    near_edge: NearEdge = NOTHING_AT_THE_EDGE


@dataclass(frozen=True, slots=True)
class AbuseGuard:
    """When a tenant is kept out for a while, and for how long. Counts of 0 never open it."""

    refusals_per_minute: int
    auth_failures_per_minute: int
    first_seconds: int
    most_seconds: int


@dataclass(frozen=True, slots=True)
class LimitTerms:
    """What a plan says of limits beyond its counted terms and features."""

    rules: tuple[Rule, ...] = ()
    behaviours: tuple[Behaviour, ...] = ()
    abuse_guard: AbuseGuard | None = None


def read_limit_terms(entry: Mapping[str, object], features: tuple[Feature, ...]) -> LimitTerms:
    """Reads `rules` and `abuse_guard` of a plan. Raises: RuleRefused."""
    found = entry.get("rules", {})
    if not isinstance(found, dict) or len(found) > MAX_PLAN_RULES:
        raise RuleRefused(f"rules must map at most {MAX_PLAN_RULES} names to what each rule says")
    derived = {*COUNTED_TERMS, *(feature.name for feature in features)}
    rules, behaviours = [], []
    for name, terms in found.items():
        if name in derived and isinstance(terms, dict):
            behaviours.append(_behaviour(str(name), read_behaviour(f"rules.{name}", terms)))
        else:
            rules.append(_further_rule(name, terms))
    return LimitTerms(tuple(rules), tuple(behaviours), _read_guard(entry))


def rules_of(counts: Mapping[str, int], features: tuple[Feature, ...], terms: LimitTerms) -> tuple[Rule, ...]:
    """Returns every rule of a plan: its counted terms, its features, its further rules. A count of 0 is no rule."""
    behaviours = {behaviour.name: behaviour for behaviour in terms.behaviours}
    derived = [Rule(name, *_shape(name, counts[name])) for name in COUNTED_TERMS if counts[name]]
    derived += [
        Rule(feature.name, Unit.PRODUCT, Window.BILLING_CYCLE, feature.limit if feature.enabled else 0, product_unit=feature.name)
        for feature in features
        if feature.limit or not feature.enabled
    ]
    return (*(_behaving(rule, behaviours.get(rule.name)) for rule in derived), *terms.rules)


def refuse_senseless(features: tuple[Feature, ...], terms: LimitTerms) -> None:
    """Looks over all rules of a plan together. Raises: RuleRefused."""
    if len(COUNTED_TERMS) + len(features) + len(terms.rules) > MAX_PLAN_RULES:
        raise RuleRefused(f"terms, features and rules make more than {MAX_PLAN_RULES} rules: leave some out")
    clash = {feature.name for feature in features} & {*STANDARD, *(rule.name for rule in terms.rules)}
    if clash:
        raise RuleRefused(f"{min(clash)} names a feature and another rule: give one of them another name")
    # A term that is unlimited in the plan may be limited for one tenant: how it behaves must make sense then too.
    limited = tuple(replace(feature, enabled=True, limit=1) for feature in features)
    for rule in rules_of(dict.fromkeys(COUNTED_TERMS, 1), limited, terms):
        problem = rule_problem(rule)
        if problem is not None:
            raise RuleRefused(f"rules.{rule.name}.{problem.field} {problem.rule}")


def guard_problem(guard: AbuseGuard) -> str | None:
    """Tells what of a guard makes no sense; None when all does."""
    for name in ("refusals_per_minute", "auth_failures_per_minute"):
        if not 0 <= getattr(guard, name) <= _MAX_REFUSALS:
            return f"{name} must be from 0 to {_MAX_REFUSALS}"
    if not 1 <= guard.first_seconds <= _MAX_FIRST_SECONDS:
        return f"first_seconds must be from 1 to {_MAX_FIRST_SECONDS}"
    if not guard.first_seconds <= guard.most_seconds <= _MAX_SECONDS:
        return f"most_seconds must be from first_seconds ({guard.first_seconds}) to {_MAX_SECONDS}"
    return None


def limit_terms_form(terms: LimitTerms) -> dict[str, object]:
    """Returns the terms as they are kept in the database."""
    return {
        "rules": [terms_of(rule) for rule in terms.rules],
        "behaviours": [_behaviour_form(behaviour) for behaviour in terms.behaviours],
        "abuse_guard": None if terms.abuse_guard is None else guard_form(terms.abuse_guard),
    }


def limit_terms_of(kept: Mapping[str, Any]) -> LimitTerms:
    """Builds the terms from what is kept; what an older file loaded says nothing."""
    return LimitTerms(
        tuple(rule_of(rule) for rule in kept.get("rules", ())),
        tuple(_behaviour(behaviour["name"], behaviour) for behaviour in kept.get("behaviours", ())),
        guard_of(kept.get("abuse_guard")),
    )


def guard_form(guard: AbuseGuard) -> dict[str, int]:
    """Returns the guard as it is kept."""
    return {field.name: getattr(guard, field.name) for field in fields(AbuseGuard)}


def guard_of(kept: Mapping[str, int] | None) -> AbuseGuard | None:
    """Builds the guard from what is kept."""
    return None if kept is None else AbuseGuard(**kept)


def _shape(name: str, limit: int) -> tuple[Unit, Window, int, int]:
    unit, window, seconds = STANDARD[name]
    return unit, window, limit, seconds


def _behaving(rule: Rule, behaviour: Behaviour | None) -> Rule:
    if behaviour is None:
        return rule
    return replace(rule, mode=behaviour.mode, on_store_failure=behaviour.on_store_failure, near_edge=behaviour.near_edge)


def _further_rule(name: object, terms: object) -> Rule:
    standard = STANDARD.get(name) if isinstance(name, str) else None
    if standard is not None and isinstance(terms, dict):
        unit, window, seconds = standard
        # The name says it; who says it again must say the same.
        terms = {"unit": unit.value, "window": window.value, **({"window_seconds": seconds} if seconds else {}), **terms}
    try:
        rule = read_rule(name, terms)
    except RuleRefused as refused:
        raise RuleRefused(f"rules.{refused}") from None
    problem = standard_problem(rule)
    if problem is not None:
        raise RuleRefused(f"rules.{rule.name}: {problem.rule}")
    return rule


def _behaviour(name: str, terms: Mapping[str, Any]) -> Behaviour:
    return Behaviour(
        name,
        Mode(terms.get("mode", Mode.ENFORCE)),
        StoreFailure(terms.get("on_store_failure", StoreFailure.CLOSED)),
        NearEdge(**terms.get("near_edge", {})),
    )


def _behaviour_form(behaviour: Behaviour) -> dict[str, object]:
    return {
        "name": behaviour.name,
        "mode": behaviour.mode,
        "on_store_failure": behaviour.on_store_failure,
        "near_edge": edge_terms(behaviour.near_edge),
    }


def _read_guard(entry: Mapping[str, object]) -> AbuseGuard | None:
    found = entry.get("abuse_guard")
    if found is None:
        return None
    names = tuple(field.name for field in fields(AbuseGuard))
    if not isinstance(found, dict) or set(found) != set(names) or any(type(value) is not int for value in found.values()):
        raise RuleRefused(f"abuse_guard holds exactly {', '.join(names)}, as whole numbers")
    guard = AbuseGuard(**found)
    problem = guard_problem(guard)
    if problem is not None:
        raise RuleRefused(f"abuse_guard: {problem}")
    return guard
