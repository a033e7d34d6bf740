"""The plan file: complete, sensible, and never changed behind a version's back."""

import copy
from dataclasses import replace
from typing import Any

import pytest
import yaml

from services.tenant.app import PLAN_FILE
from services.tenant.plan import PlanCatalog, PlanCatalogRefused, needs_loading, read_catalog

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
