"""The end of a tenant in this service: everything can be read out, then everything but the audit log is gone."""

import json
from uuid import UUID

import grpc

from mesh.common.v1 import error_reason_pb2, lifecycle_service_pb2
from mesh.tenant.v1 import tenant_service_pb2
from tests.tenant.harness import Harness, as_service, call, refusal, taken_apart, wish, with_key

ERASE = lifecycle_service_pb2.EraseTenantRequest()


async def context_of(harness: Harness, api_key: str) -> list[tuple[str, str]]:
    """Metadata of the tenant service calling itself for the tenant."""
    return list(as_service("tenant", (await harness.authenticate(api_key)).context_token))


async def test_provisioning_the_tenant_service_itself_makes_nothing(harness: Harness) -> None:
    """The call is answered and changes nothing."""
    created = await harness.create()
    metadata = await context_of(harness, created.api_key)
    answer = await call(harness.lifecycle.ProvisionTenant, lifecycle_service_pb2.ProvisionTenantRequest(), metadata)
    assert list(answer.resources) == []


async def test_an_erased_tenant_leaves_only_its_audit_log(harness: Harness) -> None:
    """Counts are told by kind, the key is dead, the slug is free, other tenants are untouched, and a repeat finds nothing."""
    request = wish()
    created = await call(harness.tenants.CreateTenant, request, harness.as_operator())
    bystander = await harness.create()
    tenant_id = UUID(created.tenant.tenant_id)
    metadata = await context_of(harness, created.api_key)
    erased = {item.kind: item.count for item in (await call(harness.lifecycle.EraseTenant, ERASE, metadata)).erased}
    assert erased == {
        "postgres:tenant.api_key_directory": 1,
        "postgres:tenant.api_keys": 1,
        "postgres:tenant.issuer_directory": 0,
        "postgres:tenant.issuers": 0,
        "postgres:tenant.domain_directory": 0,
        "postgres:tenant.domains": 0,
        "postgres:tenant.provider_keys": 0,
        "postgres:tenant.users": 1,
        "postgres:tenant.tenant_settings": 1,
        "postgres:tenant.purges": 0,
        "postgres:tenant.sagas": 1,
        "postgres:tenant.placements": 0,
        "postgres:tenant.move_directory": 0,
        "postgres:tenant.provisioning": 1,
        "postgres:tenant.slug_directory": 1,
        "postgres:tenant.tenants": 1,
        "postgres:tenant.configuration_changes": 0,
        "postgres:tenant.flags": 0,
        "key_store:tenant_keys.data_keys": 0,
    }
    assert {item.count for item in (await call(harness.lifecycle.EraseTenant, ERASE, metadata)).erased} == {0}
    assert (await refusal(harness.authenticate(created.api_key))).reason == error_reason_pb2.ERROR_REASON_CREDENTIAL_INVALID
    actions = await harness.value("SELECT array_agg(action ORDER BY audit_id) FROM tenant.audit WHERE tenant_id = $1", tenant_id)
    assert actions == ["TENANT_CREATED", "KEY_CREATED", "KEY_REVOKED", "TENANT_ERASED", "DATA_KEY_DESTROYED"]
    gone = await refusal(
        call(harness.tenants.GetTenantConfig, tenant_service_pb2.GetTenantConfigRequest(), metadata_for_inference(metadata))
    )
    assert gone.code is grpc.StatusCode.NOT_FOUND
    await harness.authenticate(bystander.api_key)
    await harness.create(slug=created.tenant.slug)


def metadata_for_inference(metadata: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """The same tenant context in the hands of inference."""
    return list(as_service("inference", dict(metadata)["x-tenant-context"]))


async def test_a_late_retry_does_not_bring_an_erased_tenant_back(harness: Harness) -> None:
    """The request id of an erased tenant stays spent."""
    request = wish()
    created = await call(harness.tenants.CreateTenant, request, harness.as_operator())
    await call(harness.lifecycle.EraseTenant, ERASE, await context_of(harness, created.api_key))
    error = await refusal(call(harness.tenants.CreateTenant, request, harness.as_operator()))
    assert (error.code, error.metadata["state"]) == (grpc.StatusCode.FAILED_PRECONDITION, "ERASED")


async def test_the_export_holds_every_record_and_no_secret(harness: Harness) -> None:
    """Tenant, settings, provisioning, owner, keys and audit records stream as JSON, without secrets, hashes or another tenant's data."""
    created, other = await harness.create(), await harness.create()
    metadata = await context_of(harness, created.api_key)
    stream = harness.lifecycle.ExportTenant(lifecycle_service_pb2.ExportTenantRequest(), metadata=metadata, timeout=10)
    records = [(item.kind, json.loads(item.record_json)) async for item in stream]
    kinds = {kind for kind, _ in records}
    assert kinds == {
        f"postgres:tenant.{name}"
        for name in ("tenants", "tenant_settings", "provisioning", "users", "api_keys", "sagas", "saga_steps", "events", "audit")
    }
    assert {record["tenant_id"] for _, record in records} == {created.tenant.tenant_id}
    text = json.dumps(records)
    key = taken_apart(created.api_key)
    assert key.key_id in text
    assert key.secret not in text
    assert key.secret_sha256().hex() not in text
    assert other.tenant.tenant_id not in text


async def test_a_long_audit_log_is_exported_whole(harness: Harness) -> None:
    """Records beyond one page arrive, each once."""
    created = await harness.create()
    tenant_id = UUID(created.tenant.tenant_id)
    await harness.execute(
        "INSERT INTO tenant.audit (tenant_id, action, subject, target) SELECT $1, 'NOTE', 's', n::text FROM generate_series(1, 1100) n",
        tenant_id,
    )
    stream = harness.lifecycle.ExportTenant(
        lifecycle_service_pb2.ExportTenantRequest(), metadata=await context_of(harness, created.api_key), timeout=10
    )
    targets = [record["target"] async for item in stream if (record := json.loads(item.record_json)).get("action") == "NOTE"]
    assert sorted(map(int, targets)) == list(range(1, 1101))


async def test_only_the_tenant_service_ends_tenants(harness: Harness) -> None:
    """Neither another service nor the tenant's own key may erase or export."""
    created = await harness.create()
    token = (await harness.authenticate(created.api_key)).context_token
    for metadata in (as_service("inference", token), with_key(created.api_key)):
        error = await refusal(call(harness.lifecycle.EraseTenant, ERASE, metadata))
        assert error.reason == error_reason_pb2.ERROR_REASON_CALLER_NOT_ALLOWED
