"""The rules that a tenant is held to: its plan's, with what an operator put in their place, and its own beside them. Pure.

All rules hold at the same time, so a rule of the tenant's own can only narrow. What a tenant made never takes a plan's rule away.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime

from services.tenant.limit_rule import Mode, Origin, Rule, Unit
from services.tenant.plan import Plan
from services.tenant.plan_rules import AbuseGuard

MAX_OWN_RULES = 100
_LONGEST_NAME = 63


@dataclass(frozen=True, slots=True)
class OwnRule:
    """A rule that one tenant has beside or in place of its plan's. One that an operator made is an operator's to change."""

    rule: Rule
    by_operator: bool

    @property
    def told(self) -> Rule:
        """The rule, with whose word it is."""
        return replace(self.rule, origin=Origin.OPERATOR if self.by_operator else Origin.TENANT)


@dataclass(frozen=True, slots=True)
class OwnLimits:
    """What a tenant has instead of its plan's word on limits; None: the plan's guard, UTC, billing cycles from the tenant's creation."""

    rules: tuple[OwnRule, ...] = ()
    time_zone: str | None = None
    cycle_anchor_time: datetime | None = None
    abuse_guard: AbuseGuard | None = None


@dataclass(frozen=True, slots=True)
class LimitRules:
    """All that a tenant's limits are decided by. An empty time zone is UTC."""

    rules: tuple[Rule, ...]
    time_zone: str
    cycle_anchor_time: datetime | None
    abuse_guard: AbuseGuard | None


def effective_rules(
    terms: Plan, own: Sequence[OwnRule], ladder: Sequence[Plan], overridden: frozenset[str] = frozenset(), placement: str = "pool"
) -> tuple[Rule, ...]:
    """Returns the rules in force, each with the plan that lifts it.

    `terms` are the plan's with the tenant's numbers in them, `overridden` the names of those numbers: no plan lifts what would stay.
    `ladder` holds all plans from the smallest to the largest; of them those count in which the tenant could be where it is placed.
    """
    by_operator = {kept.rule.name: kept.told for kept in own if kept.by_operator}
    plan_rules = terms.rules()
    within_reach = [plan for plan in larger_plans(terms, ladder) if placement in plan.isolation]
    found = [
        by_operator.pop(rule.name)
        if rule.name in by_operator
        else replace(rule, lifting_plan="" if rule.name in overridden else lifting_plan(rule, within_reach))
        for rule in plan_rules
    ]
    found += by_operator.values()
    taken = {rule.name for rule in found} | {kept.rule.name for kept in own}
    for kept in own:
        if not kept.by_operator:
            name = kept.rule.name
            if name in {rule.name for rule in found}:
                # A later plan uses the name: both hold, and the plan's keeps it.
                name = _free_name(name, taken)
                taken.add(name)
            found.append(replace(kept.told, name=name))
    return tuple(found)


def larger_plans(plan: Plan, ladder: Sequence[Plan]) -> list[Plan]:
    """Returns the plans above one: what only a smaller plan lacks is nothing to move for."""
    names = [other.name for other in ladder]
    return list(ladder[names.index(plan.name) + 1 :]) if plan.name in names else []


def lifting_plan(rule: Rule, ladder: Sequence[Plan]) -> str:
    """Returns the first plan whose rule of that name allows more, or that has no such rule; empty where none does."""
    return next((plan.name for plan in ladder if _lifts(plan, rule)), "")


def _lifts(plan: Plan, rule: Rule) -> bool:
    other = next((candidate for candidate in plan.rules() if candidate.name == rule.name), None)
    if other is None:
        # A plan that does not know the unit gives nothing of it, rather than all.
        return rule.unit is not Unit.PRODUCT or _has_unit(plan, rule.product_unit)
    if other.mode is Mode.SHADOW and rule.mode is Mode.ENFORCE:
        return True
    if _counts(other) != _counts(rule):
        return False
    return other.limit > rule.limit and other.window_seconds <= rule.window_seconds


def _counts(rule: Rule) -> tuple[str, ...]:
    return (rule.unit, rule.product_unit, rule.window, rule.scope, rule.user, rule.feature)


def _has_unit(plan: Plan, unit: str) -> bool:
    return any(feature.name == unit and feature.enabled for feature in plan.features) or any(
        rule.product_unit == unit and rule.limit for rule in plan.limit_terms.rules
    )


def _free_name(name: str, taken: set[str]) -> str:
    for number in range(1, len(taken) + 2):
        mark = "own_" if number == 1 else f"own{number}_"
        candidate = (mark + name)[:_LONGEST_NAME]
        if candidate not in taken:
            return candidate
    raise AssertionError("more names are tried than are taken")
