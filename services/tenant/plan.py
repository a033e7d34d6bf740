"""Plans: what a tenant may use at most, read from the versioned file plans.yaml. Refuses a file that does not say everything.

Only the file changes plans. A change needs a higher file version, so that what was in force at any time stays known.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Protocol

from services.kernel.errors import NotFound
from services.tenant.limit_rule import Rule
from services.tenant.plan_rules import COUNTED_TERMS, Feature, LimitTerms, read_limit_terms, refuse_senseless, rules_of
from services.tenant.rule_reading import RuleRefused

PLACEMENTS = ("pool", "bridge", "silo")
MAX_RETENTION_DAYS = 36_500
_MAX_MONEY = 9_000_000_000_000_000
_MAX_WEIGHT = 1000
_MAX_FEATURES = 100
# What a plan need not say.
_MAY_SAY = frozenset(("rules", "abuse_guard"))
_FEATURE_NAME = re.compile(r"[a-z][a-z0-9_]{0,62}")


class PlanCatalogRefused(Exception):
    """The plan file is wrong, or does not fit what was loaded before; the message says where and what to do."""


@dataclass(frozen=True, slots=True)
class SenseProblem:
    """Why terms make no sense: the field that is wrong, and what it must be."""

    field: str
    rule: str


@dataclass(frozen=True, slots=True)
class Plan:
    """The terms of one plan. Limits of 0 mean unlimited, 0 days of retention mean for ever; `isolation` lists the placements allowed."""

    name: str
    requests_per_minute: int
    tokens_per_minute: int
    tokens_per_day: int
    tokens_per_month: int
    cost_nano_usd_per_month: int
    concurrent_calls: int
    context_tokens: int
    weight: int
    default_model: str
    allowed_models: tuple[str, ...]
    default_max_output_tokens: int
    max_output_tokens: int
    data_retention_days: int
    encrypt_content: bool
    isolation: tuple[str, ...]
    features: tuple[Feature, ...]
    limit_terms: LimitTerms = field(default_factory=LimitTerms)

    def rules(self) -> tuple[Rule, ...]:
        """Returns every rule of the plan, terms and features among them."""
        return rules_of({name: getattr(self, name) for name in COUNTED_TERMS}, self.features, self.limit_terms)


@dataclass(frozen=True, slots=True)
class PlanCatalog:
    """All plans of one version of the file, from the smallest to the largest."""

    version: int
    plans: tuple[Plan, ...]

    def digest(self) -> bytes:
        """Returns the SHA-256 of the plans, without the version: equal terms have equal digests."""
        text = json.dumps([asdict(plan) for plan in self.plans], sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).digest()


class PlanDirectory(Protocol):
    """Where the plans in force are read."""

    async def list_plans(self) -> Sequence[Plan]:
        """Returns the plans in force, from the smallest to the largest."""
        ...


def read_catalog(document: object) -> PlanCatalog:
    """Builds the catalog from the parsed file. Raises: PlanCatalogRefused."""
    if not isinstance(document, dict) or set(document) != {"version", "plans"}:
        raise PlanCatalogRefused("the plan file holds exactly `version` and `plans`")
    version, entries = document["version"], document["plans"]
    if type(version) is not int or version < 1:
        raise PlanCatalogRefused("`version` must be a whole number of at least 1")
    if not isinstance(entries, list) or not entries:
        raise PlanCatalogRefused("`plans` must list at least one plan")
    plans = tuple(_read_plan(entry) for entry in entries)
    if len({plan.name for plan in plans}) != len(plans):
        raise PlanCatalogRefused("each plan's name must occur once")
    return PlanCatalog(version, plans)


def needs_loading(catalog: PlanCatalog, loaded_version: int | None, loaded_digest: bytes | None, loaded_names: frozenset[str]) -> bool:
    """Tells whether the catalog is new. Raises: PlanCatalogRefused when it changes what its version already stands for, or drops a plan."""
    missing = loaded_names - {plan.name for plan in catalog.plans}
    if missing:
        raise PlanCatalogRefused(f"plans {sorted(missing)} are in use and must stay in the file")
    if loaded_version is None or catalog.version > loaded_version:
        return True
    if catalog.version < loaded_version:
        raise PlanCatalogRefused(f"version {loaded_version} is loaded, the file is older: {catalog.version}")
    if catalog.digest() != loaded_digest:
        raise PlanCatalogRefused(f"version {catalog.version} is loaded with other terms: raise `version` above it")
    return False


def unknown_plan() -> NotFound:
    """Builds the refusal of a plan that is not on offer."""
    return NotFound("plan", "no such plan is on offer; ListPlans names those that are")


def sense_problem(terms: Plan) -> SenseProblem | None:
    """Tells what of the terms makes no sense together; None when all does. A tenant's own terms are held to the same as a plan's."""
    if not 1 <= terms.weight <= _MAX_WEIGHT:
        return SenseProblem("weight", f"must be from 1 to {_MAX_WEIGHT}")
    if terms.default_model not in terms.allowed_models:
        return SenseProblem("default_model", "must be one of allowed_models")
    if not 1 <= terms.default_max_output_tokens <= terms.max_output_tokens:
        return SenseProblem("default_max_output_tokens", "must be from 1 to max_output_tokens")
    if not 0 <= terms.data_retention_days <= MAX_RETENTION_DAYS:
        return SenseProblem("data_retention_days", f"must be from 0 to {MAX_RETENTION_DAYS}")
    return None


def _read_plan(entry: object) -> Plan:
    names = {part.name for part in fields(Plan)} - {"limit_terms"}
    if not isinstance(entry, dict) or not names <= set(entry) <= names | _MAY_SAY:
        given = set(entry) if isinstance(entry, dict) else set()
        differing = sorted(map(str, (given ^ names) - _MAY_SAY))
        raise PlanCatalogRefused(f"a plan holds exactly {sorted(names)}, and may hold {sorted(_MAY_SAY)}; differing: {differing}")
    models = entry["allowed_models"]
    if not isinstance(models, list) or not models or not all(isinstance(model, str) and model for model in models):
        raise PlanCatalogRefused(f"plan {entry['name']}: allowed_models must list model names")
    for name in names - {"name", "default_model", "allowed_models", "encrypt_content", "isolation", "features"}:
        _require_count(entry, name)
    if type(entry["encrypt_content"]) is not bool:
        raise PlanCatalogRefused(f"plan {entry['name']}: encrypt_content must be true or false")
    features = _read_features(entry)
    terms = {name: entry[name] for name in names}
    read = {"allowed_models": tuple(models), "isolation": _read_isolation(entry), "features": features}
    plan = Plan(**{**terms, **read, "limit_terms": _read_limits(entry, features)})
    _require_name(plan)
    problem = sense_problem(plan)
    if problem is not None:
        raise PlanCatalogRefused(f"plan {plan.name}: {problem.field} {problem.rule}")
    return plan


def _read_limits(entry: Mapping[str, object], features: tuple[Feature, ...]) -> LimitTerms:
    try:
        terms = read_limit_terms(entry, features)
        refuse_senseless(features, terms)
    except RuleRefused as refused:
        raise PlanCatalogRefused(f"plan {entry['name']}: {refused}") from None
    return terms


def _read_isolation(entry: Mapping[str, object]) -> tuple[str, ...]:
    placements = entry["isolation"]
    if not isinstance(placements, list) or not placements or any(placement not in PLACEMENTS for placement in placements):
        raise PlanCatalogRefused(f"plan {entry['name']}: isolation must list at least one of {list(PLACEMENTS)}")
    if len(set(placements)) != len(placements):
        raise PlanCatalogRefused(f"plan {entry['name']}: isolation must list each placement once")
    return tuple(placements)


def _read_features(entry: Mapping[str, object]) -> tuple[Feature, ...]:
    found = entry["features"]
    if not isinstance(found, dict) or len(found) > _MAX_FEATURES:
        raise PlanCatalogRefused(f"plan {entry['name']}: features must map at most {_MAX_FEATURES} names to enabled and limit")
    features = []
    for name, terms in sorted(found.items(), key=str):
        if not isinstance(name, str) or not _FEATURE_NAME.fullmatch(name):
            raise PlanCatalogRefused(f"plan {entry['name']}: the feature {name} must be named like ai_interviews")
        if not isinstance(terms, dict) or set(terms) != {"enabled", "limit"} or type(terms["enabled"]) is not bool:
            raise PlanCatalogRefused(f"plan {entry['name']}: the feature {name} holds exactly `enabled` (true or false) and `limit`")
        _require_count({**terms, "name": f"{entry['name']}, feature {name}"}, "limit")
        features.append(Feature(name, terms["enabled"], terms["limit"]))
    return tuple(features)


def _require_count(entry: Mapping[str, object], name: str) -> None:
    value = entry[name]
    if type(value) is not int or not 0 <= value <= _MAX_MONEY:
        raise PlanCatalogRefused(f"plan {entry['name']}: {name} must be a whole number from 0 to {_MAX_MONEY}")


def _require_name(plan: Plan) -> None:
    if (
        not isinstance(plan.name, str)
        or not plan.name.isascii()
        or not plan.name.replace("-", "a").isalnum()
        or plan.name != plan.name.lower()
    ):
        raise PlanCatalogRefused(f"plan {plan.name}: a name is lower-case letters, digits and hyphens")
    if not plan.name[0].isalpha() or len(plan.name) > 63:
        raise PlanCatalogRefused(f"plan {plan.name}: a name begins with a letter and has at most 63 characters")
