"""The plan file: complete, sensible, and never changed behind a version's back."""

import copy
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from services.tenant.app import PLAN_FILE
from services.tenant.limit_rule import Mode, NearEdge, Rule, Scope, StoreFailure, Unit, Window
from services.tenant.plan import PlanCatalog, PlanCatalogRefused, needs_loading, read_catalog
from services.tenant.plan_rules import AbuseGuard, LimitTerms

ROOT = Path(__file__).parents[2]
DOCUMENT = yaml.safe_load(PLAN_FILE.read_text())


def changed(**fields: Any) -> dict[str, Any]:
    """The shipped file with fields of its first plan replaced; None removes one."""
    document: dict[str, Any] = copy.deepcopy(DOCUMENT)
    for name, value in fields.items():
        document["plans"][0][name] = value
        if value is None:
            del document["plans"][0][name]
    return document


def test_the_shipped_plans_are_the_promised_ones() -> None:
    """Requests, tokens a day, concurrency, context and weight of the four plans, and the models each may use."""
    plans = {plan.name: plan for plan in read_catalog(DOCUMENT).plans}
    figures = {
        name: (p.requests_per_minute, p.tokens_per_day, p.concurrent_calls, p.context_tokens, p.weight, len(p.allowed_models))
        for name, p in plans.items()
    }
    assert figures == {
        "free": (10, 50_000, 2, 8_000, 1, 1),
        "starter": (30, 200_000, 5, 16_000, 2, 1),
        "professional": (60, 500_000, 10, 32_000, 4, 2),
        "enterprise": (600, 10_000_000, 100, 200_000, 8, 3),
    }
    for plan in plans.values():
        # Otherwise a plan would promise a context that its own minute cannot pay for.
        assert plan.context_tokens + plan.max_output_tokens <= plan.tokens_per_minute


def test_each_plan_says_where_data_may_be_how_long_it_is_kept_and_which_features_it_has() -> None:
    """Placement grows with the plan, retention is told in days, and every plan has a word on every feature."""
    plans = {plan.name: plan for plan in read_catalog(DOCUMENT).plans}
    assert {name: plan.isolation for name, plan in plans.items()} == {
        "free": ("pool",),
        "starter": ("pool",),
        "professional": ("pool", "bridge"),
        "enterprise": ("pool", "bridge", "silo"),
    }
    assert {name: plan.data_retention_days for name, plan in plans.items()} == {
        "free": 30,
        "starter": 90,
        "professional": 365,
        "enterprise": 0,
    }
    for plan in plans.values():
        assert [feature.name for feature in plan.features] == ["advanced_analytics", "ai_interviews", "audio_seconds"]
        assert plan.tokens_per_month == 0 or plan.tokens_per_month >= plan.tokens_per_day
    assert PlanCatalog(1, (plans["free"],)).digest() != PlanCatalog(1, (replace(plans["free"], features=()),)).digest()


@pytest.mark.parametrize(
    "document",
    [
        None,
        [],
        {"version": 1},
        {"version": 0, "plans": DOCUMENT["plans"]},
        {"version": True, "plans": DOCUMENT["plans"]},
        {"version": 1, "plans": []},
        {"version": 1, "plans": ["free"]},
        {"version": 1, "plans": DOCUMENT["plans"] + DOCUMENT["plans"][:1]},
        changed(weight=0),
        changed(weight=1001),
        changed(weight=None),
        changed(weight="1"),
        changed(tokens_per_day=-1),
        changed(cost_nano_usd_per_month=1.5),
        changed(default_model="claude-opus-4-6"),
        changed(allowed_models=[]),
        changed(allowed_models="claude"),
        changed(default_max_output_tokens=2_000),
        changed(default_max_output_tokens=0),
        changed(name="Free"),
        changed(name="fr_ee"),
        changed(name="7up"),
        changed(name="f" * 64),
        changed(colour="red"),
        changed(tokens_per_month=-1),
        changed(tokens_per_month=None),
        changed(data_retention_days=36_501),
        changed(encrypt_content=1),
        changed(encrypt_content="yes"),
        changed(isolation=[]),
        changed(isolation="pool"),
        changed(isolation=["pool", "pool"]),
        changed(isolation=["moon"]),
        changed(features=["ai_interviews"]),
        changed(features={"AI": {"enabled": True, "limit": 1}}),
        changed(features={7: {"enabled": True, "limit": 1}}),
        changed(features={"ai_interviews": {"enabled": True}}),
        changed(features={"ai_interviews": {"enabled": 1, "limit": 1}}),
        changed(features={"ai_interviews": {"enabled": True, "limit": -1}}),
        changed(features={"ai_interviews": {"enabled": True, "limit": True}}),
        changed(features={"ai_interviews": True}),
        changed(features={f"feature_{n}": {"enabled": True, "limit": 1} for n in range(101)}),
    ],
)
def test_a_plan_file_that_does_not_say_everything_is_refused(document: object) -> None:
    """Missing, unknown, senseless and repeated entries stop the load with a sentence."""
    with pytest.raises(PlanCatalogRefused):
        read_catalog(document)


USER_RULE = {"unit": "tokens", "window": "day", "scope": "user", "limit": 1}


def test_a_plan_says_how_its_limits_behave_and_adds_rules() -> None:
    """Bursts, nested rules, caps of one request, shadows, what happens near the edge and the guard; the terms stay what they were."""
    document = changed(
        rules={
            "requests_per_minute": {"mode": "shadow", "on_store_failure": "open"},
            "tokens_per_day": {"near_edge": {"shorten": True, "min_output_tokens": 9}},
            "ai_interviews": {"mode": "shadow"},
            "retries_per_minute": {"limit": 3},
            "tokens_per_user": USER_RULE,
            "burst": {"unit": "requests", "window": "sliding", "window_seconds": 5, "limit": 2, "burst": True},
            "chat_of_ada": {**USER_RULE, "scope": "user_feature", "user": "ada", "feature": "chat"},
            "longest_audio": {"unit": "product", "product_unit": "audio_seconds", "window": "request", "limit": 60},
        },
        abuse_guard={"refusals_per_minute": 9, "auth_failures_per_minute": 0, "first_seconds": 1, "most_seconds": 8},
    )
    plan = read_catalog(document).plans[0]
    rules = {rule.name: rule for rule in plan.rules()}
    requests = Rule("requests_per_minute", Unit.REQUESTS, Window.SLIDING, 10, 60, mode=Mode.SHADOW, on_store_failure=StoreFailure.OPEN)
    assert rules["requests_per_minute"] == requests
    assert rules["tokens_per_day"].near_edge == NearEdge(shorten=True, min_output_tokens=9)
    assert rules["ai_interviews"].mode is Mode.SHADOW
    assert rules["retries_per_minute"] == Rule("retries_per_minute", Unit.RETRIES, Window.SLIDING, 3, 60)
    assert rules["tokens_per_user"] == Rule("tokens_per_user", Unit.TOKENS, Window.DAY, 1, scope=Scope.USER)
    assert (rules["chat_of_ada"].user, rules["chat_of_ada"].feature) == ("ada", "chat")
    assert rules["burst"].burst
    assert plan.limit_terms.abuse_guard == AbuseGuard(9, 0, 1, 8)
    older = changed(rules=None, abuse_guard=None)
    assert read_catalog(older).plans[0].limit_terms == LimitTerms()
    assert read_catalog(older).digest() != read_catalog(DOCUMENT).digest()


@pytest.mark.parametrize(
    ("rules", "said"),
    [
        ([], "rules must map"),
        ({"Burst": USER_RULE}, "rules.Burst: a rule is named like"),
        ({7: USER_RULE}, "rules.7: a rule is named like"),
        ({"ours": 7}, "rules.ours: a rule has unit, window, limit"),
        ({"ours": {"unit": "tokens", "limit": 1}}, r"rules.ours: .*differing: \['window'\]"),
        ({"ours": {**USER_RULE, "colour": "red"}}, r"rules.ours: .*differing: \['colour'\]"),
        ({"ours": {**USER_RULE, "unit": "euros"}}, "rules.ours.unit must be one of requests, tokens"),
        ({"ours": {**USER_RULE, "window": ["day"]}}, "rules.ours.window must be one of sliding, day"),
        ({"ours": {**USER_RULE, "limit": "1"}}, "rules.ours.limit must be a whole number"),
        ({"ours": {**USER_RULE, "limit": True}}, "rules.ours.limit must be a whole number"),
        ({"ours": {**USER_RULE, "burst": 1}}, "rules.ours.burst must be true or false"),
        ({"ours": {**USER_RULE, "user": 7}}, "rules.ours.user must be text"),
        ({"ours": {**USER_RULE, "near_edge": "wait"}}, "rules.ours.near_edge may have shorten"),
        ({"ours": {**USER_RULE, "near_edge": {"hurry": True}}}, "rules.ours.near_edge may have shorten"),
        ({"ours": {**USER_RULE, "near_edge": {"wait": 1}}}, "rules.ours.near_edge.wait must be true or false"),
        ({"ours": {**USER_RULE, "near_edge": {"min_output_tokens": True}}}, "near_edge.min_output_tokens must be a whole number"),
        ({"ours": {**USER_RULE, "on_store_failure": "open"}}, "rules.ours.on_store_failure must be closed"),
        ({"ours": {**USER_RULE, "scope": "tenant", "user": "ada"}}, "rules.ours.user must be empty"),
        ({"tokens_per_day": {"limit": 5}}, "rules.tokens_per_day has its number from the plan's own term"),
        ({"tokens_per_day": 5}, "rules.tokens_per_day: a rule has"),
        ({"tokens_per_day": {"on_store_failure": "open"}}, "rules.tokens_per_day.on_store_failure must be closed"),
        ({"tokens_per_day": {"mode": "maybe"}}, "rules.tokens_per_day.mode must be one of enforce, shadow"),
        ({"retries_per_minute": {"limit": 5, "window": "day"}}, "rules.retries_per_minute.window_seconds must be 0"),
        ({"retries_per_minute": {"limit": 5, "unit": "requests"}}, "rules.retries_per_minute: .*take another name"),
        ({"retries_per_minute": {"limit": 5, "scope": "user"}}, "rules.retries_per_minute: .*take another name"),
        ({f"r{number}": USER_RULE for number in range(101)}, "rules must map at most 100"),
        ({f"r{number}": USER_RULE for number in range(92)}, "more than 100 rules"),
    ],
)
def test_a_rule_of_a_plan_that_makes_no_sense_is_refused_with_its_place(rules: object, said: str) -> None:
    """The message names the plan, the rule, the field and what it must be."""
    with pytest.raises(PlanCatalogRefused, match=f"plan free: .*{said}"):
        read_catalog(changed(rules=rules))


def test_a_feature_and_a_rule_never_share_a_name() -> None:
    """A feature named like a standard rule is refused: one name would stand for two numbers."""
    with pytest.raises(PlanCatalogRefused, match="tokens_per_day names a feature and another rule"):
        read_catalog(changed(features={"tokens_per_day": {"enabled": True, "limit": 1}}, rules={}))


@pytest.mark.parametrize(
    "guard",
    [
        7,
        {},
        {"refusals_per_minute": 1},
        {"refusals_per_minute": "1", "auth_failures_per_minute": 0, "first_seconds": 1, "most_seconds": 1},
        {"refusals_per_minute": -1, "auth_failures_per_minute": 0, "first_seconds": 1, "most_seconds": 1},
        {"refusals_per_minute": 1, "auth_failures_per_minute": 1_000_001, "first_seconds": 1, "most_seconds": 1},
        {"refusals_per_minute": 1, "auth_failures_per_minute": 0, "first_seconds": 0, "most_seconds": 1},
        {"refusals_per_minute": 1, "auth_failures_per_minute": 0, "first_seconds": 9, "most_seconds": 8},
        {"refusals_per_minute": 1, "auth_failures_per_minute": 0, "first_seconds": 9, "most_seconds": 86_401},
    ],
)
def test_a_guard_says_everything_and_in_order(guard: object) -> None:
    """All four numbers, in range, and the longest time is not shorter than the first."""
    with pytest.raises(PlanCatalogRefused, match="plan free: abuse_guard"):
        read_catalog(changed(abuse_guard=guard))


def test_a_catalog_is_loaded_once_a_version() -> None:
    """New versions load, the same one is left alone, other terms under it and older files are refused, plans are never dropped."""
    catalog = read_catalog(DOCUMENT)
    names = frozenset(plan.name for plan in catalog.plans)
    assert needs_loading(catalog, None, None, frozenset())
    version = catalog.version
    assert not needs_loading(catalog, version, catalog.digest(), names)
    assert needs_loading(PlanCatalog(version + 1, catalog.plans), version, catalog.digest(), names)
    for loaded, digest in ((version, bytes(32)), (version + 1, catalog.digest())):
        with pytest.raises(PlanCatalogRefused):
            needs_loading(catalog, loaded, digest, names)
    with pytest.raises(PlanCatalogRefused, match="must stay"):
        needs_loading(PlanCatalog(catalog.version + 1, catalog.plans[1:]), catalog.version, catalog.digest(), names)


def test_the_guides_plan_is_one_that_is_taken() -> None:
    """What docs/limits.md shows of a plan can be written into the file as it stands, and gives the rules that it says."""
    [block] = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs/limits.md").read_text(encoding="utf-8"), re.DOTALL)
    [shown] = yaml.safe_load(block)
    document = copy.deepcopy(DOCUMENT)
    document["plans"][1].update(shown)
    starter = read_catalog(document).plans[1]
    rules = {rule.name: rule for rule in starter.rules()}
    assert set(shown["rules"]) <= set(rules)
    assert rules["chat_per_minute"] == Rule("chat_per_minute", Unit.REQUESTS, Window.SLIDING, 10, 60, scope=Scope.FEATURE, feature="chat")
    assert rules["advanced_analytics"].limit == 0
