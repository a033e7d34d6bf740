"""A tenant's own limits over the wire: who may change what, what is refused, and what is kept of every change."""

import json
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import asyncpg
import grpc
import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from hypothesis import given
from hypothesis import strategies as st

from mesh.common.v1 import error_reason_pb2, lifecycle_service_pb2
from mesh.common.v1 import limit_rule_pb2 as rules_pb2
from mesh.tenant.v1 import configuration_service_pb2 as pb
from mesh.tenant.v1 import plan_service_pb2, tenant_service_pb2
from services.kernel.errors import LimitExceeded
from services.kernel.ids import TenantId
from services.tenant.rule_pace import MOST_CHANGES, refuse_hurry
from tests.tenant.harness import Harness, as_service, call, refusal, update, with_key
from tests.tenant.test_configuration import change_plan, changes, configuration

GUARD = {"refusals_per_minute": 5, "auth_failures_per_minute": 0, "first_seconds": 2, "most_seconds": 60}


def rule(name: str = "ours", **changes: Any) -> rules_pb2.LimitRule:
    """A rule of a tenant's own: tokens in a day, each user by itself."""
    usual: dict[str, Any] = {
        "unit": rules_pb2.LIMIT_UNIT_TOKENS,
        "window": rules_pb2.LIMIT_WINDOW_DAY,
        "scope": rules_pb2.LIMIT_SCOPE_USER,
        "limit": 1_000,
    }
    return rules_pb2.LimitRule(name=name, **{**usual, **changes})


def requests_per_minute(limit: int, **changes: Any) -> rules_pb2.LimitRule:
    """The plan's rule of that name with another number."""
    shape = {"unit": rules_pb2.LIMIT_UNIT_REQUESTS, "window": rules_pb2.LIMIT_WINDOW_SLIDING, "window_seconds": 60}
    return rule("requests_per_minute", scope=rules_pb2.LIMIT_SCOPE_TENANT, limit=limit, **{**shape, **changes})


def in_force(found: pb.Configuration) -> dict[str, rules_pb2.LimitRule]:
    """The rules in force by name."""
    return {item.name: item for item in found.effective.limit_rules.rules}


async def put(harness: Harness, metadata: Any, *rules: rules_pb2.LimitRule, **options: Any) -> pb.UpdateConfigurationResponse:
    """Puts each rule by its name."""
    paths = [f"limit_rules.rules.{item.name}" for item in rules]
    return await update(harness, metadata, paths, limit_rules={"rules": list(rules)}, **options)


async def test_a_new_tenant_is_held_to_its_plans_rules(harness: Harness) -> None:
    """Every term, feature and further rule of the plan, in UTC, with cycles from its creation, the plan's guard and weight."""
    created = await harness.create(plan="free")
    found = await configuration(harness, with_key(created.api_key))
    rules = in_force(found)
    assert (rules["requests_per_minute"].limit, rules["requests_per_minute"].lifting_plan) == (10, "starter")
    assert rules["cost_nano_usd_per_day"].near_edge == rules_pb2.NearEdge(shorten=True, min_output_tokens=64, wait=True)
    assert (rules["advanced_analytics"].limit, rules["advanced_analytics"].lifting_plan) == (0, "professional")
    limits = found.effective.limit_rules
    assert (limits.time_zone, limits.cycle_anchor_time, limits.weight) == ("", created.tenant.create_time, 1)
    assert limits.abuse_guard.refusals_per_minute == 600
    token = (await harness.authenticate(created.api_key)).context_token
    request = tenant_service_pb2.GetTenantConfigRequest()
    served = await call(harness.tenants.GetTenantConfig, request, as_service("ratelimit", token))
    assert served.config.limit_rules == limits
    plans = await call(harness.plans.ListPlans, plan_service_pb2.ListPlansRequest(), harness.as_operator())
    assert list(plans.plans[0].limit_rules.rules) == list(limits.rules)


async def test_an_operator_puts_a_rule_in_a_plans_place(harness: Harness) -> None:
    """The number, the mode and all else are the operator's, the term of that name says so, and taken back the plan's rule holds again."""
    created = await harness.create(plan="free")
    operator = harness.as_operator(created.tenant.tenant_id)
    loose = requests_per_minute(5_000, mode=rules_pb2.LIMIT_MODE_SHADOW, on_store_failure=rules_pb2.LIMIT_STORE_FAILURE_OPEN)
    # Not read, and said in the answer: who put it.
    loose.origin = rules_pb2.LIMIT_RULE_ORIGIN_OPERATOR
    answer = await put(harness, operator, loose)
    assert in_force(answer.configuration)["requests_per_minute"] == loose
    assert answer.configuration.effective.limits.requests_per_minute == 5_000
    assert list(answer.configuration.operator_paths) == ["limit_rules.rules.requests_per_minute"]
    assert list(answer.changed_paths) == ["limit_rules.rules.requests_per_minute"]
    refused = await refusal(put(harness, with_key(created.api_key), requests_per_minute(1)))
    assert (refused.reason, refused.metadata["field"]) == (
        error_reason_pb2.ERROR_REASON_SCOPE_MISSING,
        "limit_rules.rules.requests_per_minute",
    )
    back = await update(harness, operator, ["limit_rules.rules.requests_per_minute"])
    assert in_force(back.configuration)["requests_per_minute"].limit == 10
    assert back.configuration.overrides == pb.ConfigurationOverrides(ai=pb.AiOverrides(assistant_name="Ada"))


async def test_an_operator_sets_calendar_and_guard(harness: Harness) -> None:
    """Time zone, billing anchor and guard come into force together and are taken back together."""
    created = await harness.create()
    operator = harness.as_operator(created.tenant.tenant_id)
    anchor = Timestamp()
    anchor.FromDatetime(datetime(2025, 1, 31, 9, 30, 0, 5, tzinfo=UTC))
    wanted = {"time_zone": "Europe/Berlin", "cycle_anchor_time": anchor, "abuse_guard": GUARD}
    answer = await update(harness, operator, ["limit_rules"], limit_rules=wanted)
    limits = answer.configuration.effective.limit_rules
    assert (limits.time_zone, limits.cycle_anchor_time, limits.abuse_guard) == ("Europe/Berlin", anchor, rules_pb2.AbuseGuard(**GUARD))
    assert list(answer.changed_paths) == ["limit_rules.abuse_guard", "limit_rules.cycle_anchor_time", "limit_rules.time_zone"]
    assert (await configuration(harness, operator)) == answer.configuration
    [kept] = (await changes(harness, operator)).changes
    assert json.loads(kept.after_json) == {
        "limit_rules.abuse_guard": GUARD,
        "limit_rules.cycle_anchor_time": "2025-01-31T09:30:00.000005+00:00",
        "limit_rules.time_zone": "Europe/Berlin",
    }
    back = (await update(harness, operator, ["limit_rules"])).configuration.effective.limit_rules
    assert (back.time_zone, back.cycle_anchor_time) == ("", created.tenant.create_time)


async def test_a_tenants_admin_narrows_under_names_of_its_own(harness: Harness) -> None:
    """A nested rule and a shadow are put by name, hold beside the plan's, are replaced and removed, and an operator's stay."""
    created = await harness.create()
    key, operator = with_key(created.api_key), harness.as_operator(created.tenant.tenant_id)
    before = in_force(await configuration(harness, key))
    shadow = rule("try_less", limit=5, mode=rules_pb2.LIMIT_MODE_SHADOW, scope=rules_pb2.LIMIT_SCOPE_USER_FEATURE, feature="chat")
    found = in_force((await put(harness, key, rule(), shadow)).configuration)
    assert (found["ours"].limit, found["try_less"].feature, found["ours"].lifting_plan) == (1_000, "chat", "")
    assert {name: found[name] for name in before} == before
    await put(harness, operator, rule("theirs", limit=7))
    answer = await put(harness, key, rule(limit=900))
    origins = {name: item.origin for name, item in in_force(answer.configuration).items()}
    assert (origins.pop("ours"), origins.pop("try_less")) == (rules_pb2.LIMIT_RULE_ORIGIN_TENANT,) * 2
    assert origins.pop("theirs") == rules_pb2.LIMIT_RULE_ORIGIN_OPERATOR
    assert set(origins.values()) == {rules_pb2.LIMIT_RULE_ORIGIN_PLAN}
    assert list(answer.changed_paths) == ["limit_rules.rules.ours"]
    kept = list(answer.configuration.overrides.limit_rules.rules)
    assert [(item.name, item.limit) for item in kept] == [("ours", 900), ("theirs", 7), ("try_less", 5)]
    # The whole list as it was read, with one less: what an operator made is in it and stays.
    answer = await update(harness, key, ["limit_rules.rules"], limit_rules={"rules": kept[:2]})
    assert sorted(set(in_force(answer.configuration)) - set(before)) == ["ours", "theirs"]
    refused = await refusal(update(harness, key, ["limit_rules.rules"], limit_rules={"rules": kept[:1]}))
    assert refused.metadata["field"] == "limit_rules.rules.theirs"
    gone = await update(harness, key, ["limit_rules.rules.ours"])
    assert "ours" not in in_force(gone.configuration)


@pytest.mark.parametrize("given", [[], [rule()], [rule("tokens_per_usr")]], ids=["none", "another's", "a slip"])
async def test_a_mask_that_names_a_rule_that_is_nowhere_is_refused(harness: Harness, given: list[rules_pb2.LimitRule]) -> None:
    """A slip in a name is told, whoever asks and whatever else is named, and nothing is changed; a plan's rule is none to take away."""
    created = await harness.create()
    key = with_key(created.api_key)
    await put(harness, key, rule())
    before = await configuration(harness, key)
    for name in ("tokens_per_user", "tokens_per_month"):
        for metadata in (key, harness.as_operator(created.tenant.tenant_id)):
            paths = [f"limit_rules.rules.{name}", "ai.assistant_name", "limit_rules.rules.ours"]
            error = await refusal(update(harness, metadata, paths, limit_rules={"rules": given}, ai={"assistant_name": "Bob"}))
            assert (error.code, error.reason) == (grpc.StatusCode.INVALID_ARGUMENT, error_reason_pb2.ERROR_REASON_INVALID_REQUEST)
            assert error.field_violations[0].field == "update_mask"
            assert f"limit_rules.rules.{name}" in error.message
    assert await configuration(harness, key) == before
    await update(harness, key, ["limit_rules.rules.ours"])
    assert (await refusal(update(harness, key, ["limit_rules.rules.ours"]))).field_violations[0].field == "update_mask"


@pytest.mark.parametrize(
    ("paths", "limit_rules"),
    [
        (["limit_rules.rules.tokens_per_month"], {"rules": [rule("tokens_per_month", scope=rules_pb2.LIMIT_SCOPE_TENANT)]}),
        (["limit_rules.rules.retries_per_minute"], {"rules": [rule("retries_per_minute")]}),
        (["limit_rules.rules.ai_interviews"], {"rules": [rule("ai_interviews")]}),
        (["limit_rules.rules.requests_burst"], {"rules": [rule("requests_burst")]}),
        (["limit_rules"], {"rules": [rule()], "time_zone": "Asia/Tokyo"}),
        (["limit_rules.time_zone"], {"time_zone": "Asia/Tokyo"}),
        (["limit_rules.cycle_anchor_time"], {"cycle_anchor_time": Timestamp(seconds=1_700_000_000)}),
        (["limit_rules.abuse_guard"], {"abuse_guard": GUARD}),
    ],
)
async def test_what_could_loosen_is_refused_to_a_tenant(harness: Harness, paths: list[str], limit_rules: Any) -> None:
    """Names of plans' rules, the calendar and the guard are an operator's; the refusal names scope and path, and nothing is changed."""
    created = await harness.create(plan="free")
    key = with_key(created.api_key)
    before = await configuration(harness, key)
    error = await refusal(update(harness, key, paths, limit_rules=limit_rules))
    assert (error.code, error.reason) == (grpc.StatusCode.PERMISSION_DENIED, error_reason_pb2.ERROR_REASON_SCOPE_MISSING)
    assert error.metadata["scope"] == "operator:tenants"
    assert error.metadata["field"].startswith("limit_rules.")
    assert await configuration(harness, key) == before


@pytest.mark.parametrize(
    ("limit_rules", "said"),
    [
        ({"time_zone": "Mars/Olympus"}, 'no time zone is called "Mars/Olympus"'),
        ({"time_zone": "localtime"}, 'no time zone is called "localtime"'),
        ({"time_zone": "../../etc/passwd"}, "no time zone is called"),
        ({"time_zone": "x" * 65}, "time_zone"),
        ({"cycle_anchor_time": Timestamp(seconds=1)}, "between the years 2000 and 2099"),
        ({"cycle_anchor_time": Timestamp(seconds=2**60)}, "cycle_anchor_time"),
        ({"abuse_guard": {**GUARD, "most_seconds": 1}}, "most_seconds must be from first_seconds"),
        ({"abuse_guard": {**GUARD, "first_seconds": 0}}, "first_seconds"),
        ({"rules": [rule(), rule(limit=5)]}, "two rules are named ours"),
        ({"rules": [rule(f"r{number}") for number in range(1_000)]}, "rules"),
        ({"rules": [rule("Ours")]}, "name"),
        ({"rules": [rule(limit=-1)]}, "limit"),
        ({"rules": [rule(limit=9_000_000_000_000_001)]}, "limit"),
        ({"rules": [rule(unit=0)]}, "unit"),
        ({"rules": [rule(scope=rules_pb2.LIMIT_SCOPE_TENANT, user="ada")]}, "ours.user: must be empty"),
        ({"rules": [rule(feature="chat")]}, "ours.feature: must be empty"),
        ({"rules": [rule(user="a\nb")]}, "ours.user"),
        ({"rules": [rule(user="a\0b")]}, "ours.user"),
        ({"rules": [rule(window=rules_pb2.LIMIT_WINDOW_RUNNING)]}, "ours.window: must be running"),
        ({"rules": [rule(window=rules_pb2.LIMIT_WINDOW_SLIDING)]}, "ours.window_seconds: must be from 1"),
        ({"rules": [rule(window_seconds=60)]}, "ours.window_seconds: must be 0"),
        ({"rules": [rule(on_store_failure=rules_pb2.LIMIT_STORE_FAILURE_OPEN)]}, "ours.on_store_failure: must be closed"),
        ({"rules": [rule(unit=rules_pb2.LIMIT_UNIT_PRODUCT)]}, "ours.product_unit"),
        ({"rules": [rule("tokens_per_month")]}, "take another name"),
        ({"rules": [requests_per_minute(0)]}, "suspended"),
    ],
)
async def test_limits_that_make_no_sense_are_refused_whoever_asks(harness: Harness, limit_rules: Any, said: str) -> None:
    """Unknown zones, repeated names, selectors without their scope, contradictory windows, open books and too many rules are invalid."""
    created = await harness.create()
    operator = harness.as_operator(created.tenant.tenant_id)
    before = await configuration(harness, operator)
    error = await refusal(update(harness, operator, ["limit_rules"], limit_rules=limit_rules))
    assert error.code is grpc.StatusCode.INVALID_ARGUMENT
    assert said in error.message or any(said in violation.field for violation in error.field_violations), error
    assert await configuration(harness, operator) == before


async def test_a_rule_gets_its_number_from_one_place(harness: Harness) -> None:
    """A number under `limits` beside a rule of that name is refused, whichever came first."""
    created = await harness.create()
    operator = harness.as_operator(created.tenant.tenant_id)
    await put(harness, operator, requests_per_minute(5))
    error = await refusal(update(harness, operator, ["limits.requests_per_minute"], limits={"requests_per_minute": 6}))
    assert (error.code, error.metadata["field"]) == (
        grpc.StatusCode.INVALID_ARGUMENT,
        "overrides.limit_rules.rules.requests_per_minute",
    )
    moved = ["limits.requests_per_minute", "limit_rules.rules.requests_per_minute"]
    answer = await update(harness, operator, moved, limits={"requests_per_minute": 6})
    assert in_force(answer.configuration)["requests_per_minute"].limit == 6


async def test_a_change_of_rules_is_tried_versioned_kept_and_announced_as_any_other(harness: Harness) -> None:
    """A dry run changes nothing, another version is refused, the history tells both rules, the audit log no name that a tenant made up."""
    created = await harness.create()
    tenant_id, key = created.tenant.tenant_id, with_key(created.api_key)
    version = (await configuration(harness, key)).effective.version
    tried = await put(harness, key, rule(), validate_only=True)
    assert "ours" in in_force(tried.configuration)
    assert "ours" not in in_force(await configuration(harness, key))
    assert (await put(harness, key, rule(), expected_version=version)).configuration == tried.configuration
    error = await refusal(put(harness, key, rule(limit=2), expected_version=version))
    assert error.reason == error_reason_pb2.ERROR_REASON_WRONG_STATE
    assert list((await put(harness, key, rule())).changed_paths) == []
    await update(harness, key, ["limit_rules.rules.ours"])
    kept = list((await changes(harness, key)).changes)
    words = {"name": "ours", "unit": "tokens", "window": "day", "scope": "user", "limit": 1_000}
    path = "limit_rules.rules.ours"
    assert [(json.loads(change.before_json), json.loads(change.after_json)) for change in kept] == [
        ({path: words}, {path: None}),
        ({path: None}, {path: words}),
    ]
    assert [record["target"] for record in await harness.audit(tenant_id, "CONFIG_CHANGED")] == ["config:limit_rules.rules"] * 2
    assert await harness.value("SELECT count(*) FROM tenant.changes WHERE tenant_id = $1 AND kind = 'CONFIG'", UUID(tenant_id)) == 2


async def test_own_rules_stay_through_a_change_of_plan_and_go_with_the_tenant(harness: Harness) -> None:
    """Another plan brings its own rules beside the tenant's; the export holds them, and the erasure takes them."""
    created = await harness.create(plan="free")
    key = with_key(created.api_key)
    await put(harness, key, rule(user="ada@example.com"))
    moved = in_force((await change_plan(harness, created.tenant.tenant_id, "starter")).configuration)
    assert (moved["ours"].user, moved["requests_per_minute"].limit) == ("ada@example.com", 30)
    metadata = as_service("tenant", (await harness.authenticate(created.api_key)).context_token)
    stream = harness.lifecycle.ExportTenant(lifecycle_service_pb2.ExportTenantRequest(), metadata=tuple(metadata), timeout=10)
    settings = [json.loads(item.record_json) async for item in stream if item.kind == "postgres:tenant.tenant_settings"]
    assert settings[0]["limit_rules"][0]["user"] == "ada@example.com"
    await call(harness.lifecycle.EraseTenant, lifecycle_service_pb2.EraseTenantRequest(), metadata)
    for table in ("tenant_settings", "configuration_changes"):
        assert await harness.value(f"SELECT count(*) FROM tenant.{table} WHERE tenant_id = $1", UUID(created.tenant.tenant_id)) == 0
    audited = "SELECT count(*) FROM tenant.audit a WHERE tenant_id = $1 AND to_jsonb(a)::text ~ 'ada@example.com|rules.ours'"
    assert await harness.value(audited, UUID(created.tenant.tenant_id)) == 0


async def test_a_tenant_changes_its_rules_so_often_and_no_oftener(harness: Harness) -> None:
    """The 31st change within a minute is refused with the rule, the number and the time to wait, and nothing is written."""
    created = await harness.create()
    key, operator = with_key(created.api_key), harness.as_operator(created.tenant.tenant_id)
    for number in range(MOST_CHANGES):
        await put(harness, key, rule(limit=number))
        if number % 10 == 0:
            await put(harness, operator, rule("theirs", limit=number))
    before = await configuration(harness, key)
    error = await refusal(put(harness, key, rule(limit=1_000)))
    assert (error.code, error.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, error_reason_pb2.ERROR_REASON_PLAN_LIMIT)
    assert (error.metadata["rule"], error.metadata["limit"], error.metadata["used"]) == ("limit_rule_changes_per_minute", "30", "30")
    assert error.retry_after_seconds is not None
    assert 0 < error.retry_after_seconds <= 60
    assert await configuration(harness, key) == before
    # What is no rule, or changes nothing, and what an operator does goes on.
    await update(harness, key, ["ai.assistant_name"], ai={"assistant_name": "Ada"})
    await put(harness, key, rule(limit=MOST_CHANGES - 1))
    await put(harness, operator, rule("theirs", limit=1_000))
    await age_changes(harness, created.tenant.tenant_id)
    await put(harness, key, rule(limit=1_000))


async def age_changes(harness: Harness, tenant_id: str) -> None:
    """Makes every change of the tenant a minute older, as time would."""
    connection = await asyncpg.connect(harness.admin_dsn)
    try:
        statement = "UPDATE tenant.configuration_changes SET change_time = change_time - interval '61 seconds' WHERE tenant_id = $1"
        await connection.execute(statement, UUID(tenant_id))
    finally:
        await connection.close()


@given(st.lists(st.floats(0, 200), max_size=60))
def test_after_the_time_a_refusal_names_a_change_is_accepted(ages: list[float]) -> None:
    """And not before: the time is that at which fewer than the allowed changes are within the minute."""
    tenant_id = TenantId(UUID(int=1))
    try:
        refuse_hurry(tenant_id, ages)
    except LimitExceeded as error:
        assert error.retry_after_seconds is not None
        assert sum(age < 60 for age in ages) >= MOST_CHANGES
        refuse_hurry(tenant_id, [age + error.retry_after_seconds + 1e-6 for age in ages])
        with pytest.raises(LimitExceeded):
            refuse_hurry(tenant_id, [age + error.retry_after_seconds - 1e-6 for age in ages])
    else:
        assert sum(age < 60 for age in ages) < MOST_CHANGES
