"""Rules of limits as messages, both ways."""

from collections.abc import Sequence

from mesh.common.v1 import limit_rule_pb2 as rules_pb2
from mesh.tenant.v1 import configuration_service_pb2 as messages
from services.kernel.timestamps import parse_timestamp, to_timestamp
from services.tenant.limit_changes import GROUP, RULES_PATH, LimitWish, Setting, is_limit_path, limit_wish
from services.tenant.limit_rule import NOTHING_AT_THE_EDGE, Mode, NearEdge, Origin, Rule, Scope, StoreFailure, Unit, Window
from services.tenant.limit_rules import LimitRules, OwnLimits
from services.tenant.plan_rules import AbuseGuard
from services.tenant.text import printable

_UNIT_NUMBERS = {
    Unit.REQUESTS: rules_pb2.LIMIT_UNIT_REQUESTS,
    Unit.TOKENS: rules_pb2.LIMIT_UNIT_TOKENS,
    Unit.COST_NANO_USD: rules_pb2.LIMIT_UNIT_COST_NANO_USD,
    Unit.CONCURRENT_CALLS: rules_pb2.LIMIT_UNIT_CONCURRENT_CALLS,
    Unit.RETRIES: rules_pb2.LIMIT_UNIT_RETRIES,
    Unit.PRODUCT: rules_pb2.LIMIT_UNIT_PRODUCT,
}
_WINDOW_NUMBERS = {
    Window.SLIDING: rules_pb2.LIMIT_WINDOW_SLIDING,
    Window.DAY: rules_pb2.LIMIT_WINDOW_DAY,
    Window.MONTH: rules_pb2.LIMIT_WINDOW_MONTH,
    Window.BILLING_CYCLE: rules_pb2.LIMIT_WINDOW_BILLING_CYCLE,
    Window.REQUEST: rules_pb2.LIMIT_WINDOW_REQUEST,
    Window.RUNNING: rules_pb2.LIMIT_WINDOW_RUNNING,
}
_SCOPE_NUMBERS = {
    Scope.TENANT: rules_pb2.LIMIT_SCOPE_TENANT,
    Scope.USER: rules_pb2.LIMIT_SCOPE_USER,
    Scope.FEATURE: rules_pb2.LIMIT_SCOPE_FEATURE,
    Scope.USER_FEATURE: rules_pb2.LIMIT_SCOPE_USER_FEATURE,
}
_MODE_NUMBERS = {Mode.ENFORCE: rules_pb2.LIMIT_MODE_ENFORCE, Mode.SHADOW: rules_pb2.LIMIT_MODE_SHADOW}
_FAILURE_NUMBERS = {StoreFailure.CLOSED: rules_pb2.LIMIT_STORE_FAILURE_CLOSED, StoreFailure.OPEN: rules_pb2.LIMIT_STORE_FAILURE_OPEN}
_ORIGIN_NUMBERS = {
    Origin.PLAN: rules_pb2.LIMIT_RULE_ORIGIN_PLAN,
    Origin.OPERATOR: rules_pb2.LIMIT_RULE_ORIGIN_OPERATOR,
    Origin.TENANT: rules_pb2.LIMIT_RULE_ORIGIN_TENANT,
}
# What the contract does not demand has a usual value.
_UNITS = {number: unit for unit, number in _UNIT_NUMBERS.items()}
_WINDOWS = {number: window for window, number in _WINDOW_NUMBERS.items()}
_SCOPES = {number: scope for scope, number in _SCOPE_NUMBERS.items()}
_MODES = {rules_pb2.LIMIT_MODE_UNSPECIFIED: Mode.ENFORCE} | {number: mode for mode, number in _MODE_NUMBERS.items()}
_FAILURES = {rules_pb2.LIMIT_STORE_FAILURE_UNSPECIFIED: StoreFailure.CLOSED} | {
    number: failure for failure, number in _FAILURE_NUMBERS.items()
}


def limit_rules_message(limits: LimitRules, weight: int) -> rules_pb2.LimitRules:
    """Returns all that a tenant's limits are decided by."""
    return rules_pb2.LimitRules(
        rules=[rule_message(rule) for rule in limits.rules],
        time_zone=limits.time_zone,
        cycle_anchor_time=to_timestamp(limits.cycle_anchor_time),
        abuse_guard=_guard_message(limits.abuse_guard),
        weight=weight,
    )


def own_limits_message(own: OwnLimits) -> messages.LimitRuleOverrides | None:
    """Returns what is the tenant's own; None when nothing is."""
    if own == OwnLimits():
        return None
    return messages.LimitRuleOverrides(
        rules=[rule_message(item.told) for item in own.rules],
        time_zone=own.time_zone or "",
        cycle_anchor_time=to_timestamp(own.cycle_anchor_time),
        abuse_guard=_guard_message(own.abuse_guard),
    )


def operators_rules(own: OwnLimits) -> list[str]:
    """Returns the paths of the rules that an operator made."""
    return [f"{RULES_PATH}.{item.rule.name}" for item in own.rules if item.by_operator]


def wished_limits(paths: Sequence[str], message: messages.LimitRuleOverrides) -> LimitWish:
    """Reads what a mask's paths ask of a tenant's own limits; other paths are passed over. Raises: InvalidRequest."""
    asked = [path for path in paths if is_limit_path(path)]
    anchor = parse_timestamp(message.cycle_anchor_time, f"overrides.{GROUP}.cycle_anchor_time")
    settings: dict[str, Setting] = {
        "time_zone": message.time_zone or None,
        "cycle_anchor_time": anchor if message.HasField("cycle_anchor_time") else None,
        "abuse_guard": _guard(message.abuse_guard) if message.HasField("abuse_guard") else None,
    }
    return limit_wish(asked, [_rule(rule) for rule in message.rules] if asked else [], settings)


def rule_message(rule: Rule) -> rules_pb2.LimitRule:
    """Returns a rule as a message."""
    edge = rule.near_edge
    return rules_pb2.LimitRule(
        name=rule.name,
        unit=_UNIT_NUMBERS[rule.unit],
        product_unit=rule.product_unit,
        window=_WINDOW_NUMBERS[rule.window],
        window_seconds=rule.window_seconds,
        scope=_SCOPE_NUMBERS[rule.scope],
        user=rule.user,
        feature=rule.feature,
        limit=rule.limit,
        mode=_MODE_NUMBERS[rule.mode],
        on_store_failure=_FAILURE_NUMBERS[rule.on_store_failure],
        near_edge=None
        if edge == NOTHING_AT_THE_EDGE
        else rules_pb2.NearEdge(shorten=edge.shorten, min_output_tokens=edge.min_output_tokens, wait=edge.wait),
        burst=rule.burst,
        lifting_plan=rule.lifting_plan,
        origin=_ORIGIN_NUMBERS[rule.origin],
    )


def _rule(message: rules_pb2.LimitRule) -> Rule:
    path = f"overrides.{RULES_PATH}.{message.name}"
    return Rule(
        name=message.name,
        unit=_UNITS[message.unit],
        product_unit=message.product_unit,
        window=_WINDOWS[message.window],
        window_seconds=message.window_seconds,
        scope=_SCOPES[message.scope],
        user=printable(message.user, f"{path}.user"),
        feature=printable(message.feature, f"{path}.feature"),
        limit=message.limit,
        mode=_MODES[message.mode],
        on_store_failure=_FAILURES[message.on_store_failure],
        near_edge=NearEdge(message.near_edge.shorten, message.near_edge.min_output_tokens, message.near_edge.wait),
        burst=message.burst,
    )


def _guard_message(guard: AbuseGuard | None) -> rules_pb2.AbuseGuard | None:
    if guard is None:
        return None
    return rules_pb2.AbuseGuard(
        refusals_per_minute=guard.refusals_per_minute,
        auth_failures_per_minute=guard.auth_failures_per_minute,
        first_seconds=guard.first_seconds,
        most_seconds=guard.most_seconds,
    )


def _guard(message: rules_pb2.AbuseGuard) -> AbuseGuard:
    return AbuseGuard(message.refusals_per_minute, message.auth_failures_per_minute, message.first_seconds, message.most_seconds)
