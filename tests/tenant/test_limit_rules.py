"""The rules a tenant is held to: its plan's, those in a plan's place, and its own. They always make sense, and only an operator loosens."""

import json
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import protovalidate
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from services.kernel.errors import Forbidden, InvalidRequest
from services.kernel.ids import TenantId, new_uuid7
from services.tenant.adapters.plan_loader import read_plan_file
from services.tenant.app import PLAN_FILE
from services.tenant.effective_config import Overrides, StoredConfiguration, effective
from services.tenant.limit_changes import LimitWish, limit_wish, with_limits
from services.tenant.limit_rule import (
    STANDARD,
    Mode,
    NearEdge,
    Origin,
    Rule,
    Scope,
    StoreFailure,
    Unit,
    Window,
    rule_of,
    rule_problem,
    standard_problem,
    terms_of,
)
from services.tenant.limit_rules import MAX_OWN_RULES, OwnLimits, OwnRule, effective_rules, lifting_plan
from services.tenant.plan import Plan
from services.tenant.plan_rules import COUNTED_TERMS, AbuseGuard, Behaviour, Feature, LimitTerms, limit_terms_form, limit_terms_of
from services.tenant.servicers.limit_rules import limit_rules_message, rule_message

LADDER = read_plan_file(PLAN_FILE).plans
PLANS = {plan.name: plan for plan in LADDER}
CREATED = datetime(2026, 1, 31, 12, tzinfo=UTC)
NAMES = ("ours", "theirs", "requests_burst", "ai_interviews", "tokens_per_day", "own_ours", "audio_seconds_per_request")
VALIDATOR = protovalidate.Validator()


def rules_of_any_kind() -> st.SearchStrategy[Rule]:
    """Rules in every combination of words, sensible or not."""
    edges = st.builds(NearEdge, shorten=st.booleans(), min_output_tokens=st.sampled_from((0, 1, 1_000_000)), wait=st.booleans())
    return st.builds(
        Rule,
        name=st.sampled_from(NAMES),
        unit=st.sampled_from(Unit),
        window=st.sampled_from(Window),
        limit=st.sampled_from((0, 1, 50_000, 9_000_000_000_000_000)),
        window_seconds=st.sampled_from((0, 1, 60, 600)),
        product_unit=st.sampled_from(("", "ai_interviews")),
        scope=st.sampled_from(Scope),
        user=st.sampled_from(("", "ada@example.com")),
        feature=st.sampled_from(("", "chat")),
        mode=st.sampled_from(Mode),
        on_store_failure=st.sampled_from(StoreFailure),
        near_edge=edges,
        burst=st.booleans(),
    )


def sensible(rule: Rule) -> Rule:
    """The nearest rule that makes sense, so that no example is thrown away."""
    if rule.name in STANDARD:
        unit, window, seconds = STANDARD[rule.name]
        rule = replace(rule, unit=unit, window=window, window_seconds=seconds, scope=Scope.TENANT)
    if rule.unit is Unit.CONCURRENT_CALLS:
        rule = replace(rule, window=Window.RUNNING)
    elif rule.window is Window.RUNNING or (rule.window is Window.REQUEST and rule.unit in (Unit.REQUESTS, Unit.RETRIES)):
        rule = replace(rule, window=Window.SLIDING)
    sliding = rule.window is Window.SLIDING
    books = rule.unit is Unit.COST_NANO_USD or rule.window in (Window.DAY, Window.MONTH, Window.BILLING_CYCLE)
    shorten = rule.near_edge.shorten and rule.unit in (Unit.TOKENS, Unit.COST_NANO_USD)
    return replace(
        rule,
        window_seconds=(rule.window_seconds or 60) if sliding else 0,
        product_unit="ai_interviews" if rule.unit is Unit.PRODUCT else "",
        user=rule.user if rule.scope in (Scope.USER, Scope.USER_FEATURE) else "",
        feature=rule.feature if rule.scope in (Scope.FEATURE, Scope.USER_FEATURE) else "",
        on_store_failure=StoreFailure.CLOSED if books else rule.on_store_failure,
        near_edge=NearEdge(
            shorten, rule.near_edge.min_output_tokens if shorten else 0, rule.near_edge.wait and rule.window is not Window.REQUEST
        ),
        burst=rule.burst and sliding,
    )


def sensible_rules() -> st.SearchStrategy[Rule]:
    """Rules that make sense and say what their names stand for."""
    return rules_of_any_kind().map(sensible).filter(lambda rule: standard_problem(rule) is None)


def own_rules() -> st.SearchStrategy[tuple[OwnRule, ...]]:
    """What may be kept of a tenant: each name once."""
    found = st.lists(st.builds(OwnRule, sensible_rules(), st.booleans()), max_size=5, unique_by=lambda kept: kept.rule.name)
    return found.map(tuple)


def stored(plan: Plan, own: OwnLimits, **overrides: Any) -> StoredConfiguration:
    """A configuration of a tenant in the pool."""
    kept = Overrides(own_limits=own, **overrides)
    return StoredConfiguration(TenantId(new_uuid7()), 1, "local", "pool", "Acme", plan, kept, CREATED, LADDER)


def rule(**changes: Any) -> Rule:
    """A sensible rule with something changed."""
    return replace(Rule("ours", Unit.TOKENS, Window.SLIDING, 10, 60), **changes)


@given(rules_of_any_kind())
def test_what_makes_sense_is_what_the_contract_takes_and_the_words_allow(found: Rule) -> None:
    """The nearest sensible rule is found sensible, its message keeps the contract, and only a sensible rule equals its nearest."""
    near = sensible(found)
    assert rule_problem(near) is None
    assert VALIDATOR.collect_violations(rule_message(near)) == []
    if found.name not in STANDARD:
        assert (rule_problem(found) is None) == (found == near)


@given(sensible_rules())
def test_a_rule_is_kept_as_it_was(found: Rule) -> None:
    """Through the form of the database and back nothing is lost, and nothing usual is said."""
    kept = json.loads(json.dumps(terms_of(found)))
    assert rule_of(kept) == found
    assert set(kept) >= {"name", "unit", "window", "limit"}
    assert kept.get("mode") != "enforce"


@pytest.mark.parametrize("plan", LADDER, ids=lambda plan: plan.name)
def test_what_a_plan_says_of_limits_is_kept_as_it_was(plan: Plan) -> None:
    """Rules, behaviours and guard come back from the database as the file said them; a plan of an older file says nothing."""
    assert limit_terms_of(json.loads(json.dumps(limit_terms_form(plan.limit_terms)))) == plan.limit_terms
    assert limit_terms_of({}) == LimitTerms()


@pytest.mark.parametrize(
    ("wrong", "field"),
    [
        ({"limit": -1}, "limit"),
        ({"limit": 9_000_000_000_000_001}, "limit"),
        ({"unit": Unit.PRODUCT}, "product_unit"),
        ({"product_unit": "seats"}, "product_unit"),
        ({"unit": Unit.PRODUCT, "product_unit": "Seats"}, "product_unit"),
        ({"unit": Unit.CONCURRENT_CALLS}, "window"),
        ({"window": Window.RUNNING, "window_seconds": 0}, "window"),
        ({"unit": Unit.REQUESTS, "window": Window.REQUEST, "window_seconds": 0}, "window"),
        ({"window_seconds": 0}, "window_seconds"),
        ({"window_seconds": 601}, "window_seconds"),
        ({"window": Window.DAY}, "window_seconds"),
        ({"window": Window.DAY, "window_seconds": 0, "burst": True}, "burst"),
        ({"window": Window.DAY, "window_seconds": 0, "on_store_failure": StoreFailure.OPEN}, "on_store_failure"),
        ({"window": Window.MONTH, "window_seconds": 0, "on_store_failure": StoreFailure.OPEN}, "on_store_failure"),
        ({"window": Window.BILLING_CYCLE, "window_seconds": 0, "on_store_failure": StoreFailure.OPEN}, "on_store_failure"),
        ({"unit": Unit.COST_NANO_USD, "on_store_failure": StoreFailure.OPEN}, "on_store_failure"),
        ({"user": "ada"}, "user"),
        ({"scope": Scope.FEATURE, "user": "ada"}, "user"),
        ({"scope": Scope.USER, "feature": "chat"}, "feature"),
        ({"scope": Scope.USER, "user": "a" * 201}, "user"),
        ({"scope": Scope.FEATURE, "feature": "a" * 101}, "feature"),
        ({"unit": Unit.REQUESTS, "near_edge": NearEdge(shorten=True)}, "near_edge.shorten"),
        ({"near_edge": NearEdge(min_output_tokens=5)}, "near_edge.min_output_tokens"),
        ({"near_edge": NearEdge(shorten=True, min_output_tokens=1_000_001)}, "near_edge.min_output_tokens"),
        ({"window": Window.REQUEST, "window_seconds": 0, "near_edge": NearEdge(wait=True)}, "near_edge.wait"),
    ],
)
def test_a_rule_that_contradicts_itself_says_where(wrong: dict[str, Any], field: str) -> None:
    """The first field that makes no sense is named, with what it must be."""
    problem = rule_problem(rule(**wrong))
    assert problem is not None
    assert (problem.field, bool(problem.rule)) == (field, True)


def test_the_shipped_plans_limits_are_the_promised_rules() -> None:
    """Terms and features are rules by their names, an unlimited one is none, one that is not enabled allows nothing."""
    free = {found.name: found for found in PLANS["free"].rules()}
    assert [name for name in free if name in COUNTED_TERMS] == list(COUNTED_TERMS)
    edge = NearEdge(shorten=True, min_output_tokens=64, wait=True)
    assert free["tokens_per_month"] == Rule("tokens_per_month", Unit.TOKENS, Window.MONTH, 500_000, near_edge=edge)
    assert free["ai_interviews"] == Rule("ai_interviews", Unit.PRODUCT, Window.BILLING_CYCLE, 5, product_unit="ai_interviews")
    assert free["advanced_analytics"].limit == 0
    assert free["concurrent_calls"] == Rule("concurrent_calls", Unit.CONCURRENT_CALLS, Window.RUNNING, 2)
    closed = replace(PLANS["free"], features=(Feature("seats", enabled=False, limit=5),))
    assert [found.limit for found in closed.rules() if found.name == "seats"] == [0]
    enterprise = {found.name for found in PLANS["enterprise"].rules()}
    assert not enterprise & {"tokens_per_month", "ai_interviews", "audio_seconds", "advanced_analytics"}
    for plan in LADDER:
        rules = plan.rules()
        assert len({found.name for found in rules}) == len(rules)
        for found in rules:
            assert (rule_problem(found), standard_problem(found)) == (None, None)
        numbers = {found.name: found.limit for found in rules}
        assert numbers["cost_nano_usd_per_day"] <= numbers["cost_nano_usd_per_month"]


@pytest.mark.parametrize(
    ("plan", "name", "lifts"),
    [
        ("free", "requests_per_minute", "starter"),
        ("free", "tokens_per_month", "starter"),
        ("free", "advanced_analytics", "professional"),
        ("free", "retries_per_minute", "starter"),
        ("free", "audio_seconds_per_request", "starter"),
        ("starter", "requests_burst", "professional"),
        ("professional", "requests_burst", "enterprise"),
        ("professional", "ai_interviews", "enterprise"),
        ("professional", "tokens_per_month", "enterprise"),
        ("enterprise", "requests_per_minute", ""),
    ],
)
def test_a_refusal_can_name_the_smallest_plan_that_allows_more(plan: str, name: str, lifts: str) -> None:
    """The smallest of the larger plans with a larger number, without such a rule, or with the feature; none where none allows more."""
    [found] = [found for found in effective_rules(PLANS[plan], (), LADDER) if found.name == name]
    assert found.lifting_plan == lifts


def test_a_plan_that_does_not_know_a_unit_lifts_nothing_of_it() -> None:
    """No word on a feature is no promise of it; a plan whose rule only looks lifts; one where the tenant cannot be does not."""
    [interviews] = [found for found in PLANS["free"].rules() if found.name == "ai_interviews"]
    without = replace(PLANS["enterprise"], features=())
    assert lifting_plan(interviews, [without]) == ""
    assert lifting_plan(interviews, [without, PLANS["enterprise"]]) == "enterprise"
    looking = replace(
        PLANS["starter"], requests_per_minute=1, limit_terms=LimitTerms(behaviours=(Behaviour("requests_per_minute", Mode.SHADOW),))
    )
    [requests] = [found for found in PLANS["free"].rules() if found.name == "requests_per_minute"]
    assert lifting_plan(requests, [looking]) == "starter"
    [placed] = [found for found in effective_rules(PLANS["free"], (), LADDER, placement="silo") if found.name == "requests_per_minute"]
    assert placed.lifting_plan == "enterprise"


@given(plan=st.sampled_from(LADDER), own=own_rules(), number=st.none() | st.integers(0, 10**6))
def test_whatever_is_kept_the_rules_in_force_make_sense(plan: Plan, own: tuple[OwnRule, ...], number: int | None) -> None:
    """At most 200 rules that each make sense, every name once, in a message that its contract takes."""
    config = effective(stored(plan, OwnLimits(own), tokens_per_day=number))
    rules = config.limit_rules.rules
    assert len({found.name for found in rules}) == len(rules) <= 200
    assert [rule_problem(found) for found in rules if rule_problem(found)] == []
    assert VALIDATOR.collect_violations(limit_rules_message(config.limit_rules, config.plan.weight)) == []


@given(plan=st.sampled_from(LADDER), own=own_rules())
def test_what_a_tenant_made_takes_nothing_away(plan: Plan, own: tuple[OwnRule, ...]) -> None:
    """Every rule that holds without the tenant's own holds with them, unchanged; each of its own holds too, told as its own."""
    by_operator = tuple(kept for kept in own if kept.by_operator)
    with_all, without = (effective(stored(plan, OwnLimits(kept))).limit_rules.rules for kept in (own, by_operator))
    assert set(without) <= set(with_all)
    nameless = [replace(found, name="") for found in with_all if found not in without]
    assert sorted(map(repr, nameless)) == sorted(
        repr(replace(kept.rule, name="", origin=Origin.TENANT)) for kept in own if not kept.by_operator
    )


@given(plan=st.sampled_from(LADDER), own=own_rules())
def test_what_an_operator_put_in_a_plans_place_is_in_force_alone(plan: Plan, own: tuple[OwnRule, ...]) -> None:
    """The operator's rule has the name, no plan lifts it, and the term of that name says its number."""
    config = effective(stored(plan, OwnLimits(own)))
    for kept in own:
        if kept.by_operator:
            assert [found for found in config.limit_rules.rules if found.name == kept.rule.name] == [
                replace(kept.rule, origin=Origin.OPERATOR)
            ]
            if kept.rule.name in COUNTED_TERMS:
                assert getattr(config.plan, kept.rule.name) == kept.rule.limit


@given(plan=st.sampled_from(LADDER), name=st.sampled_from(COUNTED_TERMS), number=st.integers(0, 10**6))
def test_an_overridden_number_is_the_rules_and_no_plan_lifts_it(plan: Plan, name: str, number: int) -> None:
    """The override stays whatever the plan: 0 takes the rule away, another number is in it, and no plan is praised in vain."""
    found = {found.name: found for found in effective(stored(plan, OwnLimits(), **{name: number})).limit_rules.rules}
    assert (found[name].limit, found[name].lifting_plan) == (number, "") if number else name not in found


def test_the_calendar_is_utc_from_the_tenants_creation_unless_an_operator_says_otherwise() -> None:
    """Time zone, billing anchor and guard: the tenant's where there is one, else UTC, its creation and the plan's guard."""
    usual = effective(stored(PLANS["free"], OwnLimits())).limit_rules
    assert (usual.time_zone, usual.cycle_anchor_time, usual.abuse_guard) == ("", CREATED, PLANS["free"].limit_terms.abuse_guard)
    guard, anchor = AbuseGuard(1, 2, 3, 4), datetime(2026, 3, 1, tzinfo=UTC)
    own = effective(stored(PLANS["free"], OwnLimits((), "Europe/Berlin", anchor, guard))).limit_rules
    assert (own.time_zone, own.cycle_anchor_time, own.abuse_guard) == ("Europe/Berlin", anchor, guard)


def wish_for(found: Sequence[Rule]) -> LimitWish:
    """Asks for each rule by its name."""
    return LimitWish({item.name: item for item in found})


@given(own=own_rules(), wished=st.lists(sensible_rules(), max_size=3), removed=st.sampled_from(NAMES), whole=st.booleans())
def test_a_tenants_admin_never_loosens(own: tuple[OwnRule, ...], wished: list[Rule], removed: str, whole: bool) -> None:
    """Whatever it asks for, it is refused or every rule that is not its own stays as it was."""
    assume(len({item.name for item in wished}) == len(wished))
    before = OwnLimits(tuple(sorted(own, key=lambda kept: kept.rule.name)))
    # What is not there is none to take away, and that alone is refused.
    taken_away = {removed: None} if any(kept.rule.name == removed for kept in own) else {}
    wish = LimitWish({**taken_away, **wish_for(wished).rules}, whole)
    try:
        after = with_limits(before, wish, LADDER, by_operator=False)
    except InvalidRequest:
        # A plan's term may be unlimited or large, never nothing: nobody makes it so.
        return
    except Forbidden as refused:
        assert refused.metadata["scope"] == "operator:tenants"
        return
    assert [kept for kept in after.rules if kept.by_operator] == [kept for kept in before.rules if kept.by_operator]
    taken = {*STANDARD, *(found.name for plan in LADDER for found in plan.rules())} - {kept.rule.name for kept in before.rules}
    assert not taken & {kept.rule.name for kept in after.rules}


def test_one_more_than_a_hundred_rules_is_refused() -> None:
    """A tenant has at most 100 rules of its own, however few come at a time."""
    full = OwnLimits(tuple(OwnRule(rule(name=f"r{number:03}"), by_operator=False) for number in range(MAX_OWN_RULES)))
    with pytest.raises(InvalidRequest, match="at most 100"):
        with_limits(full, wish_for([rule(name="one_more")]), LADDER, by_operator=True)
    assert len(with_limits(full, wish_for([rule(name="r001", limit=3)]), LADDER, by_operator=True).rules) == MAX_OWN_RULES


def test_two_rules_of_one_name_and_unknown_paths_are_refused() -> None:
    """A name stands for one rule; a path that leads to nothing is told the paths there are."""
    settings = {"time_zone": None, "cycle_anchor_time": None, "abuse_guard": None}
    with pytest.raises(InvalidRequest, match="two rules are named ours"):
        limit_wish(["limit_rules.rules"], [rule(), rule(limit=3)], settings)
    for path in ("limit_rules.colour", "limit_rules.rules.", "limit_rules.rules.A", "limit_rules.rules.a.b"):
        with pytest.raises(InvalidRequest, match="the paths of limits are"):
            limit_wish([path], [], settings)
    assert limit_wish(["limit_rules.rules.ours", "limit_rules.rules.gone"], [rule()], settings).rules == {"ours": rule(), "gone": None}


def test_names_that_two_would_have_are_told_apart() -> None:
    """Where a later plan uses a tenant's name for a rule, the tenant's holds beside it under another, however many are taken."""
    own = tuple(OwnRule(rule(name=name), by_operator=False) for name in ("requests_burst", "own_requests_burst"))
    names = [found.name for found in effective_rules(PLANS["starter"], own, LADDER)]
    assert names[-2:] == ["own2_requests_burst", "own_requests_burst"]
