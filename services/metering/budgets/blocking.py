"""Which rule of the limits a blocking budget needs. A budget counts and tells; refusing is the limits', where holds make it exact."""

import json
from collections.abc import Sequence
from hashlib import blake2b

from mesh.common.v1 import limit_rule_pb2 as pb
from services.kernel.errors import WrongState
from services.metering.budgets.budget import BudgetMeasure, BudgetPeriod, BudgetTerms, BudgetWish

_UNITS = {
    BudgetMeasure.COST: pb.LIMIT_UNIT_COST_NANO_USD,
    BudgetMeasure.TOKENS: pb.LIMIT_UNIT_TOKENS,
    BudgetMeasure.PRODUCT_UNIT: pb.LIMIT_UNIT_PRODUCT,
}
_WINDOWS = {
    BudgetPeriod.DAY: pb.LIMIT_WINDOW_DAY,
    BudgetPeriod.MONTH: pb.LIMIT_WINDOW_MONTH,
    BudgetPeriod.BILLING_CYCLE: pb.LIMIT_WINDOW_BILLING_CYCLE,
}
_LONGEST_NAME, _DIGEST_BYTES = 63, 8


def blocks(terms: BudgetTerms, rules: Sequence[pb.LimitRule]) -> bool:
    """Tells whether one of the rules refuses whatever would pass the amount: it adds up the same use and has this limit or a lower one."""
    return any(_refuses(terms, rule) for rule in rules)


def refuse_unless_blocked(wish: BudgetWish, rules: Sequence[pb.LimitRule]) -> None:
    """Refuses a blocking budget that nothing enforces. Raises: WrongState, which says the rule to put."""
    if not blocks(wish.terms, rules):
        raise WrongState(
            "limit_rule",
            "MISSING",
            "no rule of the tenant's limits refuses what this budget is to block; put this one with "
            f"ConfigurationService.UpdateConfiguration, then the budget again: {json.dumps(_rule_form(wish))}",
        )


def _refuses(terms: BudgetTerms, rule: pb.LimitRule) -> bool:
    return (
        rule.mode != pb.LIMIT_MODE_SHADOW
        and rule.unit == _UNITS[terms.measure]
        and rule.product_unit == terms.product_unit
        and rule.window == _WINDOWS[terms.period]
        and rule.scope == _scope(terms)
        # A rule for each user holds this one too.
        and rule.user in ("", terms.user)
        and rule.feature in ("", terms.feature)
        and rule.limit <= terms.amount
    )


def _scope(terms: BudgetTerms) -> pb.LimitScope.ValueType:
    of_feature = terms.feature or terms.each_feature
    if terms.user or terms.each_user:
        return pb.LIMIT_SCOPE_USER_FEATURE if of_feature else pb.LIMIT_SCOPE_USER
    return pb.LIMIT_SCOPE_FEATURE if of_feature else pb.LIMIT_SCOPE_TENANT


def _rule_name(budget: str) -> str:
    # Of the longest length only with a digest: so it is no other budget's, whatever that is called.
    name = f"budget_{budget}"
    if len(name) < _LONGEST_NAME:
        return name
    digest = blake2b(budget.encode(), digest_size=_DIGEST_BYTES).hexdigest()
    return f"{name[: _LONGEST_NAME - len(digest) - 1]}_{digest}"


def _rule_form(wish: BudgetWish) -> dict[str, str]:
    terms = wish.terms
    form = {
        "name": _rule_name(wish.name),
        "unit": pb.LimitUnit.Name(_UNITS[terms.measure]),
        "product_unit": terms.product_unit,
        "window": pb.LimitWindow.Name(_WINDOWS[terms.period]),
        "scope": pb.LimitScope.Name(_scope(terms)),
        "user": terms.user,
        "feature": terms.feature,
        "limit": str(terms.amount),
    }
    return {key: value for key, value in form.items() if value}
