"""A tenant's own configuration: who may change what, what comes into force, and what is kept of every change."""

import asyncio
import json
from dataclasses import fields, replace
from typing import Any
from uuid import UUID

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.common.v1 import error_reason_pb2, lifecycle_service_pb2
from mesh.tenant.v1 import configuration_service_pb2 as pb
from mesh.tenant.v1 import tenant_service_pb2
from services.kernel.errors import MeshError
from services.kernel.ids import TenantId, new_uuid7
from services.tenant.adapters.plan_loader import load_plans, read_plan_file
from services.tenant.app import PLAN_FILE
from services.tenant.configuration import PATHS, changed_paths, is_endpoint
from services.tenant.effective_config import OVERRIDE_NAMES, Overrides, StoredConfiguration, effective
from services.tenant.plan import Plan, PlanCatalog, sense_problem
from tests.support.stores import PostgresStore
from tests.support.waiting import eventually
from tests.tenant.harness import Harness, Metadata, as_service, call, refusal, running_service, update, with_key
from tests.tenant.test_api_keys import make_key

PLANS = {plan.name: plan for plan in read_plan_file(PLAN_FILE).plans}
HAIKU, SONNET, OPUS = PLANS["enterprise"].allowed_models


async def configuration(harness: Harness, metadata: Metadata) -> pb.Configuration:
    """What is in force."""
    return (await call(harness.configuration.GetConfiguration, pb.GetConfigurationRequest(), metadata)).configuration


async def change_plan(harness: Harness, tenant_id: str, plan: str, **options: Any) -> pb.ChangePlanResponse:
    """Puts a tenant on another plan, as the operator."""
    return await call(harness.configuration.ChangePlan, pb.ChangePlanRequest(plan=plan, **options), harness.as_operator(tenant_id))


async def changes(harness: Harness, metadata: Metadata, **page: Any) -> pb.ListConfigurationChangesResponse:
    """A page of the history."""
    return await call(harness.configuration.ListConfigurationChanges, pb.ListConfigurationChangesRequest(**page), metadata)


async def test_without_overrides_the_plan_is_in_force(harness: Harness) -> None:
    """A new tenant has its plan's terms, its own name for the assistant, and nothing that an operator set."""
    created = await harness.create()
    found = await configuration(harness, with_key(created.api_key))
    served = await call(harness.tenants.GetTenantConfig, tenant_service_pb2.GetTenantConfigRequest(), with_key(created.api_key))
    assert found.effective == served.config
    assert (found.effective.limits.tokens_per_month, found.effective.data_retention_days) == (12_000_000, 365)
    assert found.effective.features["ai_interviews"] == tenant_service_pb2.FeatureTerms(enabled=True, limit=500)
    assert found.overrides == pb.ConfigurationOverrides(ai=pb.AiOverrides(assistant_name="Ada"))
    assert (list(found.operator_paths), found.placement) == ([], "pool")


async def test_a_tenant_sets_its_own_words_and_narrows_its_models(harness: Harness) -> None:
    """What a tenant's admin may set comes into force with the answer, and the token tells that there is a new version."""
    created = await harness.create()
    key = with_key(created.api_key)
    before = await harness.authenticate(created.api_key)
    answer = await update(
        harness,
        key,
        ["ai.system_prompt_prefix", "ai.allowed_models", "ai.default_model", "ai.max_output_tokens", "data_retention_days"],
        ai={
            "system_prompt_prefix": "Answer in Latin.\nAlways.",
            "allowed_models": [HAIKU],
            "default_model": HAIKU,
            "max_output_tokens": 2_000,
        },
        data_retention_days=7,
    )
    assert list(answer.changed_paths) == [
        "ai.allowed_models",
        "ai.default_model",
        "ai.max_output_tokens",
        "ai.system_prompt_prefix",
        "data_retention_days",
    ]
    found = await configuration(harness, key)
    assert found == answer.configuration
    ai = found.effective.ai
    assert (ai.system_prompt_prefix, list(ai.allowed_models), ai.default_model) == ("Answer in Latin.\nAlways.", [HAIKU], HAIKU)
    assert (ai.max_output_tokens, found.effective.data_retention_days) == (2_000, 7)
    token = (await harness.authenticate(created.api_key)).context_token
    assert token != before.context_token
    served = await call(harness.tenants.GetTenantConfig, tenant_service_pb2.GetTenantConfigRequest(), as_service("inference", token))
    assert served.config == found.effective


async def test_what_the_mask_does_not_name_stays_and_what_it_names_empty_is_taken_back(harness: Harness) -> None:
    """Only named paths change; an empty value takes the override back; a group names everything in it."""
    created = await harness.create()
    key = with_key(created.api_key)
    await update(harness, key, ["ai.system_prompt_prefix", "data_retention_days"], ai={"system_prompt_prefix": "A"}, data_retention_days=5)
    await update(harness, key, ["ai.assistant_name"], ai={"assistant_name": "Bo", "system_prompt_prefix": "ignored"})
    found = await configuration(harness, key)
    assert (found.effective.ai.system_prompt_prefix, found.effective.ai.assistant_name) == ("A", "Bo")
    operator = harness.as_operator(created.tenant.tenant_id)
    await update(harness, operator, ["ai", "data_retention_days"])
    found = await configuration(harness, key)
    assert (found.effective.ai.system_prompt_prefix, found.effective.ai.assistant_name) == ("", "Assistant")
    assert found.effective.data_retention_days == 365
    assert found.overrides == pb.ConfigurationOverrides()


async def test_an_operator_overrides_any_limit_and_may_go_beyond_the_plan(harness: Harness) -> None:
    """Limits, models beyond the plan, endpoint, encryption and higher caps are the operator's to give."""
    created = await harness.create(plan="free")
    operator = harness.as_operator(created.tenant.tenant_id)
    limits = {name: number for number, name in enumerate(OVERRIDE_NAMES[:8], start=1)}
    answer = await update(
        harness,
        operator,
        ["limits", "ai.allowed_models", "ai.max_output_tokens", "ai.dedicated_endpoint", "encrypt_content", "data_retention_days"],
        limits=limits,
        ai={"allowed_models": [HAIKU, OPUS], "max_output_tokens": 9_000, "dedicated_endpoint": "https://acme.provider.example/v2"},
        encrypt_content=True,
        data_retention_days=0,
    )
    found = answer.configuration.effective
    assert {name: getattr(found.limits, name) for name in limits} == limits
    assert (list(found.ai.allowed_models), found.ai.max_output_tokens) == ([HAIKU, OPUS], 9_000)
    assert (found.ai.dedicated_endpoint, found.encrypt_content, found.data_retention_days) == ("https://acme.provider.example/v2", True, 0)
    assert list(answer.configuration.operator_paths) == ["ai.allowed_models", "ai.max_output_tokens", "data_retention_days"]
    facts = await harness.value("SELECT encrypt_content FROM tenant.get_facts($1)", UUID(created.tenant.tenant_id))
    assert facts is True


@pytest.mark.parametrize(
    ("paths", "overrides", "reason"),
    [
        (["limits.requests_per_minute"], {"limits": {"requests_per_minute": 5}}, error_reason_pb2.ERROR_REASON_SCOPE_MISSING),
        (["limits"], {}, error_reason_pb2.ERROR_REASON_SCOPE_MISSING),
        (["ai"], {}, error_reason_pb2.ERROR_REASON_SCOPE_MISSING),
        (["ai.dedicated_endpoint"], {"ai": {"dedicated_endpoint": "https://x.example"}}, error_reason_pb2.ERROR_REASON_SCOPE_MISSING),
        (["encrypt_content"], {"encrypt_content": False}, error_reason_pb2.ERROR_REASON_SCOPE_MISSING),
        (["ai.max_output_tokens"], {"ai": {"max_output_tokens": 8_193}}, error_reason_pb2.ERROR_REASON_SCOPE_MISSING),
        (["data_retention_days"], {"data_retention_days": 366}, error_reason_pb2.ERROR_REASON_SCOPE_MISSING),
        (["data_retention_days"], {"data_retention_days": 0}, error_reason_pb2.ERROR_REASON_SCOPE_MISSING),
        (["ai.allowed_models"], {"ai": {"allowed_models": [SONNET, OPUS]}}, error_reason_pb2.ERROR_REASON_MODEL_TIER),
    ],
)
async def test_a_tenant_never_reaches_beyond_its_plan(harness: Harness, paths: list[str], overrides: Any, reason: int) -> None:
    """What is an operator's to give is refused to the tenant's own admin, and nothing is written."""
    created = await harness.create()
    key = with_key(created.api_key)
    before = await configuration(harness, key)
    error = await refusal(update(harness, key, paths, **overrides))
    assert (error.code, error.reason) == (grpc.StatusCode.PERMISSION_DENIED, reason)
    assert await configuration(harness, key) == before
    assert list((await changes(harness, key)).changes) == []


async def test_what_an_operator_set_a_tenant_leaves_alone(harness: Harness) -> None:
    """A cap that an operator set is not the tenant's to change or take back, until the operator takes it back."""
    created = await harness.create()
    key, operator = with_key(created.api_key), harness.as_operator(created.tenant.tenant_id)
    await update(harness, operator, ["ai.max_output_tokens", "ai.default_max_output_tokens"],
                 ai={"max_output_tokens": 100, "default_max_output_tokens": 100})  # fmt: skip
    for ai in ({"max_output_tokens": 50}, {}):
        error = await refusal(update(harness, key, ["ai.max_output_tokens"], ai=ai))
        assert (error.reason, error.metadata["field"]) == (error_reason_pb2.ERROR_REASON_SCOPE_MISSING, "ai.max_output_tokens")
    await update(harness, operator, ["ai.max_output_tokens"])
    answer = await update(harness, key, ["ai.max_output_tokens"], ai={"max_output_tokens": 200})
    assert answer.configuration.effective.ai.max_output_tokens == 200


@pytest.mark.parametrize(
    ("paths", "overrides"),
    [
        ([], {}),
        (["colour"], {}),
        (["ai.colour"], {}),
        (["limits.weight"], {"limits": {"weight": 0}}),
        (["limits.weight"], {"limits": {"weight": 1001}}),
        (["limits.requests_per_minute"], {"limits": {"requests_per_minute": -1}}),
        (["ai.default_model"], {"ai": {"default_model": OPUS}}),
        (["ai.default_model"], {"ai": {"default_model": "gpt-9"}}),
        (["ai.allowed_models"], {"ai": {"allowed_models": [HAIKU, "gpt-9"]}}),
        (["ai.allowed_models"], {"ai": {"allowed_models": [HAIKU]}}),
        (["ai.allowed_models"], {"ai": {"allowed_models": [SONNET, SONNET]}}),
        (["ai.max_output_tokens"], {"ai": {"max_output_tokens": 500}}),
        (["ai.max_output_tokens"], {"ai": {"max_output_tokens": 0}}),
        (["ai.default_max_output_tokens"], {"ai": {"default_max_output_tokens": 8_193}}),
        (["ai.system_prompt_prefix"], {"ai": {"system_prompt_prefix": "é" * 2_001}}),
        (["ai.assistant_name"], {"ai": {"assistant_name": "a\nb"}}),
        (["ai.assistant_name"], {"ai": {"assistant_name": "x" * 101}}),
        (["ai.dedicated_endpoint"], {"ai": {"dedicated_endpoint": "ftp://x.example"}}),
        (["data_retention_days"], {"data_retention_days": -1}),
        (["data_retention_days"], {"data_retention_days": 36_501}),
    ],
)
async def test_terms_that_make_no_sense_are_refused_whoever_asks(harness: Harness, paths: list[str], overrides: Any) -> None:
    """Unknown paths and models, values out of range, and terms that contradict each other are invalid, an operator's too."""
    created = await harness.create()
    operator = harness.as_operator(created.tenant.tenant_id)
    before = await configuration(harness, operator)
    assert (await refusal(update(harness, operator, paths, **overrides))).code is grpc.StatusCode.INVALID_ARGUMENT
    assert await configuration(harness, operator) == before


@pytest.mark.parametrize(
    ("url", "taken"),
    [
        ("https://acme.provider.example", True),
        ("https://acme.provider.example:8443/anthropic", True),
        ("http://127.0.0.1:8080", True),
        ("http://localhost:8080", True),
        ("http://[::1]:8080", True),
        ("http://acme.provider.example", False),
        ("http://127.0.0.1.evil.example", False),
        ("https://user:secret@acme.example", False),
        ("https://acme.example/?key=secret", False),
        ("https://acme.example/#x", False),
        ("https://acme.example:99999", False),
        ("https://", False),
        ("https://acme.example/ x", False),
        ("https://acmé.example", False),
        ("file:///etc/passwd", False),
        ("acme.example", False),
        ("https://[::1", False),
    ],
)
def test_an_endpoint_is_https_and_carries_no_secret(url: str, taken: bool) -> None:
    """Https anywhere, http on loopback alone, and never a user, a query or a fragment."""
    assert is_endpoint(url) is taken


async def test_a_change_meant_for_another_version_is_refused(harness: Harness) -> None:
    """Of two who read the same version and change it, the second is told; 0 does not ask."""
    created = await harness.create()
    key = with_key(created.api_key)
    version = (await configuration(harness, key)).effective.version
    first = await update(harness, key, ["data_retention_days"], expected_version=version, data_retention_days=9)
    assert first.configuration.effective.version == version + 1
    error = await refusal(update(harness, key, ["data_retention_days"], expected_version=version, data_retention_days=8))
    assert (error.code, error.reason) == (grpc.StatusCode.FAILED_PRECONDITION, error_reason_pb2.ERROR_REASON_WRONG_STATE)
    assert error.metadata == {"resource": "configuration", "state": f"VERSION_{version + 1}"}
    error = await refusal(change_plan(harness, created.tenant.tenant_id, "free", expected_version=version))
    assert error.reason == error_reason_pb2.ERROR_REASON_WRONG_STATE
    assert (await configuration(harness, key)).effective.data_retention_days == 9


async def test_a_dry_run_answers_what_would_be_in_force_and_changes_nothing(harness: Harness) -> None:
    """validate_only gives the configuration a change would make, refuses what the change would be refused for, and leaves no trace."""
    created = await harness.create()
    tenant_id, key = created.tenant.tenant_id, with_key(created.api_key)
    before, announced = await configuration(harness, key), await harness.value("SELECT count(*) FROM tenant.changes")
    tried = await update(harness, key, ["data_retention_days"], validate_only=True, data_retention_days=3)
    assert (tried.configuration.effective.data_retention_days, list(tried.changed_paths)) == (3, ["data_retention_days"])
    planned = await change_plan(harness, tenant_id, "free", validate_only=True)
    assert (planned.configuration.effective.tier, planned.changed) == ("free", True)
    assert (await refusal(change_plan(harness, tenant_id, "golden", validate_only=True))).code is grpc.StatusCode.NOT_FOUND
    assert await configuration(harness, key) == before
    assert await harness.audit(tenant_id, "CONFIG_CHANGED") == []
    assert list((await changes(harness, key)).changes) == []
    assert await harness.value("SELECT count(*) FROM tenant.changes") == announced
    done = await update(harness, key, ["data_retention_days"], data_retention_days=3)
    assert done.configuration == tried.configuration


async def test_repeating_a_change_changes_nothing_more(harness: Harness) -> None:
    """The same values again raise no version and write no history; neither does the plan the tenant is on."""
    created = await harness.create()
    key = with_key(created.api_key)
    first = await update(harness, key, ["data_retention_days"], data_retention_days=9)
    again = await update(harness, key, ["data_retention_days"], data_retention_days=9)
    assert (again.configuration, list(again.changed_paths)) == (first.configuration, [])
    assert not (await change_plan(harness, created.tenant.tenant_id, "professional")).changed
    assert len((await changes(harness, key)).changes) == 1


async def test_every_change_is_kept_audited_and_announced(harness: Harness) -> None:
    """History tells who, when, why and both values by path; the audit log names the paths and no value; replicas are told."""
    created = await harness.create()
    tenant_id, key = created.tenant.tenant_id, with_key(created.api_key)
    await update(harness, key, ["ai.system_prompt_prefix"], ai={"system_prompt_prefix": "Our own words."})
    await update(harness, harness.as_operator(tenant_id, "bought more"), ["limits.tokens_per_day"], limits={"tokens_per_day": 9})
    await change_plan(harness, tenant_id, "enterprise")
    kept = list((await changes(harness, key)).changes)
    version = (await configuration(harness, key)).effective.version
    assert [(change.version, list(change.changed_paths)) for change in kept] == [
        (version, ["plan"]),
        (version - 1, ["limits.tokens_per_day"]),
        (version - 2, ["ai.system_prompt_prefix"]),
    ]
    assert [(json.loads(change.before_json), json.loads(change.after_json)) for change in kept] == [
        ({"plan": "professional"}, {"plan": "enterprise"}),
        ({"limits.tokens_per_day": None}, {"limits.tokens_per_day": 9}),
        ({"ai.system_prompt_prefix": None}, {"ai.system_prompt_prefix": "Our own words."}),
    ]
    assert (kept[1].subject, kept[1].reason) == (f"operator:{harness.operator.key_id}", "bought more")
    assert kept[2].subject.startswith("key:")
    audited = await harness.audit(tenant_id, "CONFIG_CHANGED")
    assert [record["target"] for record in audited] == ["config:ai.system_prompt_prefix", "config:limits.tokens_per_day", "config:plan"]
    assert "Our own words." not in repr(audited)
    assert await harness.value("SELECT count(*) FROM tenant.changes WHERE tenant_id = $1 AND kind = 'CONFIG'", UUID(tenant_id)) == 3


async def test_the_history_is_read_in_pages(harness: Harness) -> None:
    """Pages join to the whole history, newest first; another tenant's page token is refused."""
    created, other = await harness.create(), await harness.create()
    key = with_key(created.api_key)
    for days in range(1, 6):
        await update(harness, key, ["data_retention_days"], data_retention_days=days)
    paged: list[int] = []
    token = ""
    while True:
        page = await changes(harness, key, page_size=2, page_token=token)
        paged += [change.version for change in page.changes]
        if not (token := page.next_page_token):
            break
        error = await refusal(changes(harness, with_key(other.api_key), page_token=token))
        assert error.code is grpc.StatusCode.INVALID_ARGUMENT
    assert paged == sorted(paged, reverse=True)
    assert len(set(paged)) == 5


async def test_a_plan_is_changed_by_an_operator_to_one_that_allows_the_placement(harness: Harness) -> None:
    """Unknown plans are not found; a plan without the tenant's placement is refused; a tenant's own key may not change plans."""
    created = await harness.create(plan="enterprise")
    tenant_id = created.tenant.tenant_id
    await harness.execute("UPDATE tenant.tenants SET placement = 'bridge' WHERE tenant_id = $1", UUID(tenant_id))
    error = await refusal(change_plan(harness, tenant_id, "starter"))
    assert (error.reason, error.metadata["state"]) == (error_reason_pb2.ERROR_REASON_WRONG_STATE, "BRIDGE")
    error = await refusal(change_plan(harness, tenant_id, "golden"))
    assert (error.code, error.metadata["resource"]) == (grpc.StatusCode.NOT_FOUND, "plan")
    assert "ListPlans" in error.message
    request = pb.ChangePlanRequest(plan="professional")
    error = await refusal(call(harness.configuration.ChangePlan, request, with_key(created.api_key)))
    assert (error.reason, error.metadata["scope"]) == (error_reason_pb2.ERROR_REASON_SCOPE_MISSING, "operator:tenants")
    error = await refusal(call(harness.configuration.ChangePlan, request, harness.as_operator()))
    assert error.code is grpc.StatusCode.INVALID_ARGUMENT
    changed = await change_plan(harness, tenant_id, "professional")
    assert (changed.configuration.effective.tier, changed.configuration.effective.limits.requests_per_minute) == ("professional", 60)
    tenant = await call(harness.tenants.GetTenant, tenant_service_pb2.GetTenantRequest(), with_key(created.api_key))
    assert tenant.tenant.plan == "professional"


async def test_what_a_tenant_chose_is_held_to_a_smaller_plan(harness: Harness) -> None:
    """After a change to a smaller plan nothing the tenant had chosen for itself reaches above it, and later changes are not in the way."""
    created = await harness.create()
    tenant_id, key = created.tenant.tenant_id, with_key(created.api_key)
    await update(
        harness,
        key,
        ["ai.allowed_models", "ai.default_model", "ai.max_output_tokens", "ai.default_max_output_tokens", "data_retention_days"],
        ai={"allowed_models": [SONNET], "default_model": SONNET, "max_output_tokens": 8_000, "default_max_output_tokens": 4_000},
        data_retention_days=300,
    )
    found = (await change_plan(harness, tenant_id, "free")).configuration.effective
    assert (list(found.ai.allowed_models), found.ai.default_model) == ([HAIKU], HAIKU)
    assert (found.ai.max_output_tokens, found.ai.default_max_output_tokens, found.data_retention_days) == (1_024, 1_024, 30)
    await update(harness, key, ["ai.assistant_name"], ai={"assistant_name": "Bo"})
    back = (await change_plan(harness, tenant_id, "professional")).configuration.effective
    assert (list(back.ai.allowed_models), back.ai.max_output_tokens, back.data_retention_days) == ([SONNET], 8_000, 300)


async def test_a_version_never_falls(postgres: PostgresStore) -> None:
    """Settings, overrides, plan and plan file each raise it, a plan whose terms are of an older file as well."""
    async with running_service(postgres) as harness:
        created = await harness.create()
        tenant_id, key = created.tenant.tenant_id, with_key(created.api_key)
        seen = [(await configuration(harness, key)).effective.version]

        async def raised() -> bool:
            seen.append((await configuration(harness, key)).effective.version)
            return seen[-1] > seen[-2]

        catalog = read_plan_file(PLAN_FILE)
        assert await load_plans(harness.admin_dsn, PlanCatalog(catalog.version + 5, catalog.plans))
        assert await raised()
        await update(harness, key, ["data_retention_days"], data_retention_days=2)
        assert await raised()
        # As if the newest file had left this plan's terms as they were.
        await harness.execute("UPDATE tenant.plans SET version = $1 WHERE plan = 'free'", catalog.version)
        await change_plan(harness, tenant_id, "free")
        assert await raised()
        token_version = await harness.value("SELECT config_version FROM tenant.get_facts($1)", UUID(tenant_id))
        assert token_version == seen[-1]


@pytest.mark.parametrize(
    ("plan", "placement", "override", "encrypted"),
    [
        ("free", "pool", None, False),
        ("enterprise", "pool", None, True),
        ("free", "silo", None, True),
        ("free", "silo", False, False),
        ("enterprise", "pool", False, False),
        ("free", "pool", True, True),
    ],
)
async def test_token_and_configuration_agree_on_encryption(
    harness: Harness, plan: str, placement: str, override: bool | None, encrypted: bool
) -> None:
    """The override decides, else the plan or a silo; the database's word in the token is the configuration's."""
    created = await harness.create(plan=plan)
    tenant_id = created.tenant.tenant_id
    await harness.execute("UPDATE tenant.tenants SET placement = $2 WHERE tenant_id = $1", UUID(tenant_id), placement)
    if override is not None:
        await update(harness, harness.as_operator(tenant_id), ["encrypt_content"], encrypt_content=override)
    assert (await configuration(harness, with_key(created.api_key))).effective.encrypt_content is encrypted
    assert await harness.value("SELECT encrypt_content FROM tenant.get_facts($1)", UUID(tenant_id)) is encrypted


async def test_a_key_needs_the_scope_of_each_method(harness: Harness) -> None:
    """Reading needs tenant:read, changing and the history tenant:admin."""
    created = await harness.create()
    reader = with_key((await make_key(harness, created.api_key, scopes=["tenant:read"])).api_key)
    assert (await configuration(harness, reader)).effective.tenant_id == created.tenant.tenant_id
    for refused in (update(harness, reader, ["data_retention_days"]), changes(harness, reader)):
        error = await refusal(refused)
        assert (error.reason, error.metadata["scope"]) == (error_reason_pb2.ERROR_REASON_SCOPE_MISSING, "tenant:admin")


async def test_changes_at_once_take_turns(harness: Harness) -> None:
    """Of two changes for the same version that are under way at once, exactly one is made."""
    created = await harness.create()
    key = with_key(created.api_key)
    version = (await configuration(harness, key)).effective.version

    async def attempt(days: int) -> bool:
        request = update(harness, key, ["data_retention_days"], expected_version=version, data_retention_days=days)
        try:
            return bool(await request)
        except MeshError as error:
            assert error.reason == error_reason_pb2.ERROR_REASON_WRONG_STATE
            return False

    blocked = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"

    async def all_wait() -> bool:
        return int(await harness.value(blocked)) == 2

    # Nobody can write while this is held: whoever read the version by then has read the same one.
    async with harness.superuser() as connection:
        held = connection.transaction()
        await held.start()
        await connection.execute("SELECT FROM tenant.tenant_settings WHERE tenant_id = $1 FOR UPDATE", UUID(created.tenant.tenant_id))
        async with asyncio.TaskGroup() as group:
            tries = [group.create_task(attempt(days)) for days in (1, 2)]
            await eventually(all_wait, within_seconds=4)
            await held.rollback()
    assert sum(done.result() for done in tries) == 1
    assert len((await changes(harness, key)).changes) == 1


async def test_a_tenants_history_is_exported_and_erased_with_it(harness: Harness) -> None:
    """The export holds each change and the settings; erasing counts and removes them, and leaves another tenant's."""
    created, other = await harness.create(), await harness.create()
    for one in (created, other):
        await update(harness, with_key(one.api_key), ["ai.system_prompt_prefix"], ai={"system_prompt_prefix": "Own words."})
    token = (await harness.authenticate(created.api_key)).context_token
    metadata = as_service("tenant", token)
    stream = harness.lifecycle.ExportTenant(lifecycle_service_pb2.ExportTenantRequest(), metadata=tuple(metadata), timeout=10)
    records = [(item.kind, json.loads(item.record_json)) async for item in stream]
    [change] = [record for kind, record in records if kind == "postgres:tenant.configuration_changes"]
    assert (change["tenant_id"], change["after"]) == (created.tenant.tenant_id, {"ai.system_prompt_prefix": "Own words."})
    assert "Own words." in json.dumps([record for kind, record in records if kind == "postgres:tenant.tenant_settings"])
    erased = await call(harness.lifecycle.EraseTenant, lifecycle_service_pb2.EraseTenantRequest(), metadata)
    assert {item.kind: item.count for item in erased.erased}["postgres:tenant.configuration_changes"] == 1
    assert len((await changes(harness, with_key(other.api_key))).changes) == 1
    left = "SELECT count(*) FROM tenant.configuration_changes WHERE tenant_id = $1"
    assert await harness.value(left, UUID(created.tenant.tenant_id)) == 0


def overrides_of_any_kind() -> st.SearchStrategy[Overrides]:
    """Overrides as the contract and the database allow them one by one, whatever they make together."""
    models = st.sampled_from((HAIKU, SONNET, OPUS))
    values: dict[str, st.SearchStrategy[Any]] = {name: st.none() | st.integers(0, 10**6) for name in OVERRIDE_NAMES[:7]}
    values |= {
        "weight": st.none() | st.integers(1, 1000),
        "default_model": st.none() | models,
        "allowed_models": st.none() | st.lists(models, min_size=1, unique=True).map(tuple),
        "default_max_output_tokens": st.none() | st.integers(1, 40_000),
        "max_output_tokens": st.none() | st.integers(1, 40_000),
        "data_retention_days": st.none() | st.integers(0, 1_000),
        "encrypt_content": st.none() | st.booleans(),
        "operator_fields": st.frozensets(st.sampled_from(("allowed_models", "max_output_tokens", "data_retention_days"))),
    }
    return st.builds(Overrides, **values)


def stored(plan: Plan, overrides: Overrides) -> StoredConfiguration:
    """A configuration of a tenant in the pool."""
    return StoredConfiguration(TenantId(new_uuid7()), 1, "local", "pool", "Acme", plan, overrides)


@given(plan=st.sampled_from(list(PLANS.values())), overrides=overrides_of_any_kind())
def test_whatever_is_stored_what_is_in_force_makes_sense(plan: Plan, overrides: Overrides) -> None:
    """Any overrides over any plan give terms that the plan file itself could hold."""
    assert sense_problem(effective(stored(plan, overrides)).plan) is None


@given(plan=st.sampled_from(list(PLANS.values())), overrides=overrides_of_any_kind())
def test_without_an_operator_nothing_reaches_above_the_plan(plan: Plan, overrides: Overrides) -> None:
    """Models, output tokens and retention that no operator set stay within the plan's."""
    terms = effective(stored(plan, replace(overrides, operator_fields=frozenset()))).plan
    assert set(terms.allowed_models) <= set(plan.allowed_models)
    assert terms.max_output_tokens <= plan.max_output_tokens
    assert plan.data_retention_days == 0 or 1 <= terms.data_retention_days <= plan.data_retention_days


@given(plan=st.sampled_from(list(PLANS.values())), one=overrides_of_any_kind(), other=overrides_of_any_kind())
def test_a_difference_is_named_path_by_path(plan: Plan, one: Overrides, other: Overrides) -> None:
    """Two configurations differ in exactly the paths whose values or setters differ."""
    named = changed_paths(stored(plan, one), stored(plan, other))
    differing = {field.name for field in fields(Overrides) if getattr(one, field.name) != getattr(other, field.name)}
    if "operator_fields" in differing:
        differing |= one.operator_fields ^ other.operator_fields
    assert {PATHS[path] for path in named} == differing - {"operator_fields"}
