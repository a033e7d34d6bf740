"""Changes of a tenant's own limits: rules by name, time zone, billing anchor, guard. Refuses what makes no sense or is an operator's.

A tenant's admin adds rules under names of its own, and all rules hold: whatever it does narrows. What moves the ends of days and cycles, or
takes a plan's rule away, is not a tenant's to set.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import cache
from zoneinfo import available_timezones

from mesh.common.v1 import error_reason_pb2
from services.kernel.errors import Forbidden, InvalidRequest, MeshError
from services.tenant.limit_rule import NAME, STANDARD, Rule, rule_problem, standard_problem, terms_of
from services.tenant.limit_rules import MAX_OWN_RULES, OwnLimits, OwnRule
from services.tenant.plan import Plan
from services.tenant.plan_rules import COUNTED_TERMS, AbuseGuard, guard_form, guard_problem
from services.tenant.scopes import OPERATOR_SCOPE

GROUP = "limit_rules"
RULES_PATH = f"{GROUP}.rules"
SETTING_NAMES = ("time_zone", "cycle_anchor_time", "abuse_guard")
Setting = str | datetime | AbuseGuard | None
# Beyond them no calendar is sure of its time zones.
_FIRST_ANCHOR, _LAST_ANCHOR = datetime(2000, 1, 1, tzinfo=UTC), datetime(2100, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class LimitWish:
    """What is wanted: rules by name, None for one to take away; with `whole_list` every rule that is not named goes as well."""

    rules: Mapping[str, Rule | None] = field(default_factory=dict)
    whole_list: bool = False
    settings: Mapping[str, Setting] = field(default_factory=dict)


def is_limit_path(path: str) -> bool:
    """Tells whether a mask's path leads into a tenant's own limits."""
    return path == GROUP or path.startswith(f"{GROUP}.")


def limit_wish(paths: Sequence[str], rules: Sequence[Rule], settings: Mapping[str, Setting]) -> LimitWish:
    """Returns what the paths ask for; what they do not name is ignored. Raises: InvalidRequest for an unknown path or a repeated name."""
    given: dict[str, Rule] = {}
    for rule in rules:
        if rule.name in given:
            raise InvalidRequest(f"overrides.{RULES_PATH}", f"two rules are named {rule.name}; give each its own name")
        given[rule.name] = rule
    whole = GROUP in paths or RULES_PATH in paths
    named: dict[str, Rule | None] = dict(given) if whole else {}
    asked: dict[str, Setting] = dict(settings) if GROUP in paths else {}
    for path in paths:
        setting, name = path.removeprefix(f"{GROUP}."), path.removeprefix(f"{RULES_PATH}.")
        if setting in SETTING_NAMES:
            asked[setting] = settings[setting]
        elif name != path and NAME.fullmatch(name):
            named[name] = given.get(name)
        elif path not in (GROUP, RULES_PATH):
            known = ", ".join((GROUP, RULES_PATH, f"{RULES_PATH}.<name>", *(f"{GROUP}.{setting}" for setting in SETTING_NAMES)))
            raise InvalidRequest("update_mask", f"knows no path {path}; the paths of limits are {known}")
    return LimitWish(named, whole, asked)


def with_limits(own: OwnLimits, wish: LimitWish, plans: Sequence[Plan], *, by_operator: bool) -> OwnLimits:
    """Returns the tenant's own limits with the wish in them.

    Raises: InvalidRequest, also for a rule to take away that is not there; Forbidden(SCOPE_MISSING).
    """
    for name, value in wish.settings.items():
        if not by_operator and value != getattr(own, name):
            raise _operators_alone(f"{GROUP}.{name}", "only an operator may set it")
        _refuse_bad_setting(name, value)
    kept = {item.rule.name: item for item in own.rules}
    wanted = {**(dict.fromkeys(kept) if wish.whole_list else {}), **wish.rules}
    reserved = {
        *STANDARD,
        *(rule.name for plan in plans for rule in plan.rules()),
        *(item.name for plan in plans for item in plan.features),
    }
    for name, rule in wanted.items():
        before = kept.get(name)
        if rule is None and before is None:
            raise _nothing_named(name)
        if rule == (before and before.rule):
            continue
        if not by_operator:
            _refuse_tenants_reach(name, before, reserved)
        if rule is None:
            kept.pop(name, None)
        else:
            refuse_senseless(rule)
            kept[name] = OwnRule(rule, by_operator)
    if len(kept) > MAX_OWN_RULES:
        raise InvalidRequest(
            f"overrides.{RULES_PATH}", f"a tenant has at most {MAX_OWN_RULES} rules of its own, and would have {len(kept)}"
        )
    return replace(own, rules=tuple(kept[name] for name in sorted(kept)), **wish.settings)  # type: ignore[arg-type] # each setting has its field's type


def _nothing_named(name: str) -> MeshError:
    # A slip in a name must not look like a limit that was changed.
    why = f"names {RULES_PATH}.{name}, and there is no such rule: `rules` gives none of that name, and the tenant has none of its own"
    return InvalidRequest("update_mask", why)


def refuse_senseless(rule: Rule) -> None:
    """Refuses a rule that no plan could hold either. Raises: InvalidRequest."""
    problem = rule_problem(rule) or standard_problem(rule)
    if problem is not None:
        raise InvalidRequest(f"overrides.{RULES_PATH}.{rule.name}.{problem.field}", problem.rule)
    if rule.name in COUNTED_TERMS and rule.limit == 0:
        raise InvalidRequest(
            f"overrides.{RULES_PATH}.{rule.name}.limit", "must be at least 1 in a plan's term; a tenant that may do nothing is suspended"
        )


def refuse_two_numbers(own: OwnLimits, overridden: Sequence[str]) -> None:
    """Refuses a number under `limits` beside a rule of the same name. Raises: InvalidRequest."""
    twice = sorted({item.rule.name for item in own.rules} & set(overridden))
    if twice:
        raise InvalidRequest(
            f"overrides.{RULES_PATH}.{twice[0]}", f"limits.{twice[0]} gives the same rule a number; take back one of the two"
        )


def changed_limit_paths(before: OwnLimits, after: OwnLimits) -> set[str]:
    """Returns the paths of rules and settings that differ; who made a rule is part of it."""
    one, other = ({item.rule.name: item for item in own.rules} for own in (before, after))
    differing = {f"{RULES_PATH}.{name}" for name in one.keys() | other.keys() if one.get(name) != other.get(name)}
    return differing | {f"{GROUP}.{name}" for name in SETTING_NAMES if getattr(before, name) != getattr(after, name)}


def limit_value_at(own: OwnLimits, path: str) -> object:
    """Returns what the history keeps of a path: words and numbers, None for what is not there."""
    name = path.removeprefix(f"{RULES_PATH}.")
    if name != path:
        found = next((item.rule for item in own.rules if item.rule.name == name), None)
        return None if found is None else terms_of(found)
    value: Setting = getattr(own, path.removeprefix(f"{GROUP}."))
    if isinstance(value, AbuseGuard):
        return guard_form(value)
    return value.isoformat() if isinstance(value, datetime) else value


def _refuse_tenants_reach(name: str, before: OwnRule | None, reserved: set[str]) -> None:
    if before is not None and before.by_operator:
        raise _operators_alone(f"{RULES_PATH}.{name}", "an operator made this rule, and only an operator may change it")
    if before is None and name in reserved:
        why = "plans use this name, and only an operator may put a rule in a plan's place; under another name your rule holds beside it"
        raise _operators_alone(f"{RULES_PATH}.{name}", why)


def _refuse_bad_setting(name: str, value: Setting) -> None:
    path = f"overrides.{GROUP}.{name}"
    if name == "time_zone" and value is not None and value not in _time_zones():
        raise InvalidRequest(path, f'no time zone is called "{value}"; give an IANA name such as "Europe/Berlin"')
    if isinstance(value, datetime) and not _FIRST_ANCHOR <= value < _LAST_ANCHOR:
        raise InvalidRequest(path, "must be a moment between the years 2000 and 2099")
    problem = guard_problem(value) if isinstance(value, AbuseGuard) else None
    if problem is not None:
        raise InvalidRequest(path, problem)


@cache
def _time_zones() -> frozenset[str]:
    # Files that stand beside the zones: each machine's own, or none at all.
    return frozenset(available_timezones() - {"localtime", "posixrules", "Factory"})


def _operators_alone(path: str, why: str) -> MeshError:
    return Forbidden(error_reason_pb2.ERROR_REASON_SCOPE_MISSING, f"{path}: {why}", scope=OPERATOR_SCOPE, field=path)
