"""Rules as a plan file says them. Refuses what says too little or too much, with the place and what to do."""

from collections.abc import Mapping

from services.tenant.limit_rule import DEFAULTS, EDGE, KEPT, NAME, SAID, WORDS, Rule, rule_of, rule_problem


class RuleRefused(Exception):
    """What was read is no rule; the message says which field and what to do."""


def read_rule(name: object, terms: object) -> Rule:
    """Builds a rule out of a file's words. Raises: RuleRefused."""
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise RuleRefused(f"{name}: a rule is named like ai_interviews: small letters, digits and underscores, at most 63")
    if not isinstance(terms, dict) or not set(SAID) <= set(terms) <= set(KEPT):
        given = set(terms) if isinstance(terms, dict) else set()
        wrong = sorted(map(str, given - set(KEPT))) or sorted(set(SAID) - given)
        raise RuleRefused(f"{name}: a rule has {', '.join(SAID)}, and may have {', '.join(KEPT[3:])}; differing: {wrong}")
    for field, value in terms.items():
        _require(f"{name}.{field}", field, value)
    rule = rule_of({"name": name, **terms})
    problem = rule_problem(rule)
    if problem is not None:
        raise RuleRefused(f"{name}.{problem.field} {problem.rule}")
    return rule


def read_behaviour(name: str, terms: Mapping[object, object]) -> dict[str, object]:
    """Reads what may be said of a rule that gets its number elsewhere. Raises: RuleRefused."""
    allowed = ("mode", "on_store_failure", "near_edge")
    if not set(terms) <= set(allowed):
        wrong = sorted(map(str, set(terms) - set(allowed)))
        raise RuleRefused(f"{name} has its number from the plan's own term; here it may have {', '.join(allowed)}, not {', '.join(wrong)}")
    for field, value in terms.items():
        _require(f"{name}.{field}", str(field), value)
    return {str(field): value for field, value in terms.items()}


def _require(where: str, field: str, value: object) -> None:
    if field in WORDS:
        known = [word.value for word in WORDS[field]]
        if value not in known:
            raise RuleRefused(f"{where} must be one of {', '.join(known)}, and is {value}")
    elif field == "near_edge":
        if not isinstance(value, dict) or not set(value) <= set(EDGE):
            raise RuleRefused(f"{where} may have {', '.join(EDGE)}")
        for name, part in value.items():
            wanted = int if name == "min_output_tokens" else bool
            if type(part) is not wanted:
                raise RuleRefused(f"{where}.{name} must be {'a whole number' if wanted is int else 'true or false'}, and is {part}")
    elif type(value) is not type(getattr(DEFAULTS, field)):
        wanted_words = {int: "a whole number", bool: "true or false", str: "text"}[type(getattr(DEFAULTS, field))]
        raise RuleRefused(f"{where} must be {wanted_words}, and is {value}")
