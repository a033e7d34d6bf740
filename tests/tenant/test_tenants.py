"""Reading tenants, their configuration and the plans."""

from dataclasses import replace
from uuid import UUID, uuid4

import grpc
import pytest
from google.protobuf.field_mask_pb2 import FieldMask

from mesh.common.v1 import error_reason_pb2
from mesh.tenant.v1 import configuration_service_pb2, plan_service_pb2, tenant_service_pb2
from services.kernel.paging import encode_page_token
from services.tenant.adapters.plan_loader import load_plans, read_plan_file
from services.tenant.app import PLAN_FILE, migrate_schema
from services.tenant.plan import PlanCatalog, PlanCatalogRefused
from tests.support.stores import PostgresStore
from tests.tenant.harness import Harness, as_service, call, refusal, running_service, with_key
from tests.tenant.test_api_keys import make_key

GET = tenant_service_pb2.GetTenantRequest()
CONFIG = tenant_service_pb2.GetTenantConfigRequest()


async def listed(harness: Harness, page_size: int, token: str = "") -> tenant_service_pb2.ListTenantsResponse:
    """One page of the operator's list."""
    request = tenant_service_pb2.ListTenantsRequest(page_size=page_size, page_token=token)
    return await call(harness.tenants.ListTenants, request, harness.as_operator())


async def test_a_key_reads_its_own_tenant_only(harness: Harness) -> None:
    """GetTenant answers the tenant of the credential; claiming another one is refused."""
    one, other = await harness.create(), await harness.create()
    assert (await call(harness.tenants.GetTenant, GET, with_key(one.api_key))).tenant == one.tenant
    claim = [*with_key(one.api_key), ("x-tenant-id", other.tenant.tenant_id)]
    assert (await refusal(call(harness.tenants.GetTenant, GET, claim))).reason == error_reason_pb2.ERROR_REASON_TENANT_MISMATCH


async def test_an_operator_reads_the_tenant_it_names(harness: Harness) -> None:
    """An operator sees a tenant by naming it; naming none is malformed for a method that needs one."""
    created = await harness.create()
    answer = await call(harness.tenants.GetTenant, GET, harness.as_operator(created.tenant.tenant_id))
    assert answer.tenant == created.tenant
    assert (await refusal(call(harness.tenants.GetTenant, GET, harness.as_operator()))).code is grpc.StatusCode.INVALID_ARGUMENT


async def test_who_bills_is_told_the_plan_a_tenant_is_on(harness: Harness) -> None:
    """Metering asks by id and hears plan and calendar of now; an id nobody has is not found; no other service and no operator may ask."""
    created = await harness.create(plan="professional")
    tenant_id = UUID(created.tenant.tenant_id)
    request = plan_service_pb2.GetTenantPlanRequest(tenant_id=tenant_id.bytes)
    assert (await call(harness.plans.GetTenantPlan, request, as_service("metering"))).plan == "professional"
    change = configuration_service_pb2.ChangePlanRequest(plan="enterprise")
    await call(harness.configuration.ChangePlan, change, harness.as_operator(created.tenant.tenant_id))
    assert (await call(harness.plans.GetTenantPlan, request, as_service("metering"))).plan == "enterprise"
    told = await call(harness.plans.GetTenantPlan, request, as_service("metering"))
    assert (told.time_zone, told.cycle_anchor_time) == ("", created.tenant.create_time)
    zone = configuration_service_pb2.UpdateConfigurationRequest(
        overrides=configuration_service_pb2.ConfigurationOverrides(limit_rules={"time_zone": "Europe/Berlin"}),
        update_mask=FieldMask(paths=["limit_rules.time_zone"]),
    )
    await call(harness.configuration.UpdateConfiguration, zone, harness.as_operator(created.tenant.tenant_id))
    assert (await call(harness.plans.GetTenantPlan, request, as_service("metering"))).time_zone == "Europe/Berlin"
    absent = plan_service_pb2.GetTenantPlanRequest(tenant_id=uuid4().bytes)
    refused = await refusal(call(harness.plans.GetTenantPlan, absent, as_service("metering")))
    assert (refused.code, refused.metadata) == (grpc.StatusCode.NOT_FOUND, {"resource": "tenant"})
    for metadata in (as_service("inference"), harness.as_operator(), with_key(created.api_key)):
        refused = await refusal(call(harness.plans.GetTenantPlan, request, metadata))
        assert refused.reason == error_reason_pb2.ERROR_REASON_CALLER_NOT_ALLOWED


async def test_the_list_shows_every_tenant_once_by_slug(harness: Harness) -> None:
    """Pages of any size join to one list ordered by slug without gaps or repeats."""
    made = {(await harness.create()).tenant.slug for _ in range(5)}
    whole = [tenant.slug for tenant in (await listed(harness, 1000)).tenants]
    assert whole == sorted(whole)
    assert made <= set(whole)
    paged, token = [], ""
    while True:
        page = await listed(harness, 3, token)
        assert len(page.tenants) <= 3
        paged += [tenant.slug for tenant in page.tenants]
        token = page.next_page_token
        if not token:
            break
    assert paged == whole


@pytest.mark.parametrize(
    "token",
    [
        "garbage",
        "%%%",
        "e30",
        encode_page_token("api_keys", ["x"]),
        encode_page_token("tenants", ["x", "y"]),
        encode_page_token("tenants", ["a\x00"]),
        "x" * 201,
    ],
)
async def test_a_page_token_of_nobody_is_refused(harness: Harness, token: str) -> None:
    """Garbage, another list's token and one with control characters are invalid requests."""
    assert (await refusal(listed(harness, 10, token))).code is grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize("page_size", [-1, 1001])
async def test_a_page_size_out_of_range_is_refused(harness: Harness, page_size: int) -> None:
    """Page sizes are 0 to 1000."""
    assert (await refusal(listed(harness, page_size))).code is grpc.StatusCode.INVALID_ARGUMENT


async def test_only_an_operator_lists_tenants_and_plans(harness: Harness) -> None:
    """A tenant's key, whatever its scopes, sees neither the other tenants nor the price list of limits."""
    created = await harness.create()
    key = with_key(created.api_key)
    for question in (
        call(harness.tenants.ListTenants, tenant_service_pb2.ListTenantsRequest(), key),
        call(harness.plans.ListPlans, plan_service_pb2.ListPlansRequest(), key),
    ):
        assert (await refusal(question)).code is grpc.StatusCode.PERMISSION_DENIED


async def test_the_plans_on_offer_are_those_of_the_file(harness: Harness) -> None:
    """ListPlans answers the four plans, smallest first, with the limits and models of plans.yaml."""
    answer = await call(harness.plans.ListPlans, plan_service_pb2.ListPlansRequest(), harness.as_operator())
    catalog = read_plan_file(PLAN_FILE)
    assert [plan.name for plan in answer.plans] == ["free", "starter", "professional", "enterprise"]
    for served, plan in zip(answer.plans, catalog.plans, strict=True):
        assert served.limits.tokens_per_day == plan.tokens_per_day
        assert served.limits.cost_nano_usd_per_month == plan.cost_nano_usd_per_month
        assert tuple(served.ai.allowed_models) == plan.allowed_models
        assert served.ai.default_model == plan.default_model
        assert served.limits.weight >= 1
        assert served.limits.tokens_per_month == plan.tokens_per_month
        assert (served.data_retention_days, served.encrypt_content) == (plan.data_retention_days, plan.encrypt_content)
        assert tuple(served.placements) == plan.isolation
        features = {(name, terms.enabled, terms.limit) for name, terms in served.features.items()}
        assert features == {(feature.name, feature.enabled, feature.limit) for feature in plan.features}


async def test_a_service_reads_the_configuration_with_the_tenants_context(harness: Harness) -> None:
    """Each service gets limits, models and names for the tenant whose token it carries, and without a token nothing."""
    created = await harness.create(plan="free", assistant_name="Bo")
    token = (await harness.authenticate(created.api_key)).context_token
    for service in ("ratelimit", "inference", "retrieval", "metering"):
        config = (await call(harness.tenants.GetTenantConfig, CONFIG, as_service(service, token, created.tenant.tenant_id))).config
        assert (config.tenant_id, config.tier, config.ai.assistant_name) == (created.tenant.tenant_id, "free", "Bo")
        assert (config.limits.requests_per_minute, config.limits.concurrent_calls, config.limits.context_tokens) == (10, 2, 8000)
        assert list(config.ai.allowed_models) == ["claude-haiku-4-5-20251001"]
    error = await refusal(call(harness.tenants.GetTenantConfig, CONFIG, as_service("inference", None, created.tenant.tenant_id)))
    assert error.code is grpc.StatusCode.UNAUTHENTICATED


async def test_a_key_without_the_scope_reads_nothing(harness: Harness) -> None:
    """GetTenant and GetTenantConfig need tenant:read of an outside caller."""
    created = await harness.create()
    narrow = (await make_key(harness, created.api_key, scopes=["limits:read"])).api_key
    key = with_key(narrow)
    for question in (call(harness.tenants.GetTenant, GET, key), call(harness.tenants.GetTenantConfig, CONFIG, key)):
        error = await refusal(question)
        assert (error.reason, error.metadata["scope"]) == (error_reason_pb2.ERROR_REASON_SCOPE_MISSING, "tenant:read")


async def test_a_change_of_settings_raises_the_version_in_tokens_and_configuration(harness: Harness) -> None:
    """The token names the version that GetTenantConfig answers, so services know at once that theirs is old."""
    created = await harness.create()
    await harness.execute(
        "UPDATE tenant.tenant_settings SET assistant_name = 'Cleo', config_version = config_version + 1 WHERE tenant_id = $1",
        UUID(created.tenant.tenant_id),
    )
    config = (await call(harness.tenants.GetTenantConfig, CONFIG, with_key(created.api_key))).config
    assert (config.version, config.ai.assistant_name) == (read_plan_file(PLAN_FILE).version + 2, "Cleo")


async def test_loading_plans_again_changes_nothing_and_a_change_needs_a_new_version(postgres: PostgresStore) -> None:
    """Migrating twice is harmless; other terms need a higher version, raise every tenant's configuration version and keep the old terms."""
    async with running_service(postgres) as harness:
        await migrate_schema(harness.settings)
        created = await harness.create()
        catalog = read_plan_file(PLAN_FILE)
        smaller = tuple(replace(plan, requests_per_minute=7) if plan.name == "professional" else plan for plan in catalog.plans)
        with pytest.raises(PlanCatalogRefused, match="raise `version`"):
            await load_plans(harness.admin_dsn, PlanCatalog(catalog.version, smaller))
        assert await load_plans(harness.admin_dsn, PlanCatalog(catalog.version + 1, smaller))
        config = (await call(harness.tenants.GetTenantConfig, CONFIG, with_key(created.api_key))).config
        assert (config.version, config.limits.requests_per_minute) == (catalog.version + 2, 7)
        kept = "SELECT array_agg(requests_per_minute ORDER BY version) FROM tenant.plan_versions WHERE plan = 'professional'"
        assert await harness.value(kept) == [60, 7]
        announced = "SELECT count(*) FROM tenant.changes WHERE kind = 'PLANS' AND tenant_id = '00000000-0000-0000-0000-000000000000'"
        assert await harness.value(announced) == 2
        with pytest.raises(PlanCatalogRefused, match="older"):
            await load_plans(harness.admin_dsn, catalog)
