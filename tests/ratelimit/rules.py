"""Rules as the tenant service tells them, in few words."""

from typing import Any

from mesh.common.v1 import limit_rule_pb2 as rules

_UNITS = {
    "requests": rules.LIMIT_UNIT_REQUESTS,
    "tokens": rules.LIMIT_UNIT_TOKENS,
    "cost": rules.LIMIT_UNIT_COST_NANO_USD,
    "running": rules.LIMIT_UNIT_CONCURRENT_CALLS,
    "retries": rules.LIMIT_UNIT_RETRIES,
}
_WINDOWS = {
    "day": rules.LIMIT_WINDOW_DAY,
    "month": rules.LIMIT_WINDOW_MONTH,
    "cycle": rules.LIMIT_WINDOW_BILLING_CYCLE,
    "request": rules.LIMIT_WINDOW_REQUEST,
    "running": rules.LIMIT_WINDOW_RUNNING,
}
_SCOPES = {
    "": rules.LIMIT_SCOPE_TENANT,
    "user": rules.LIMIT_SCOPE_USER,
    "feature": rules.LIMIT_SCOPE_FEATURE,
    "both": rules.LIMIT_SCOPE_USER_FEATURE,
}
SHADOW = rules.LIMIT_MODE_SHADOW
OPEN = rules.LIMIT_STORE_FAILURE_OPEN


def rule(name: str, unit: str, window: str | int, limit: int, scope: str = "", **fields: Any) -> rules.LimitRule:
    """A rule; a number as its window is seconds that slide, and a unit that is none of the mesh's is the product's."""
    sliding = isinstance(window, int)
    return rules.LimitRule(
        name=name,
        unit=_UNITS.get(unit, rules.LIMIT_UNIT_PRODUCT),
        product_unit="" if unit in _UNITS else unit,
        window=rules.LIMIT_WINDOW_SLIDING if isinstance(window, int) else _WINDOWS[window],
        window_seconds=int(window) if sliding else 0,
        limit=limit,
        scope=_SCOPES[scope],
        **fields,
    )
