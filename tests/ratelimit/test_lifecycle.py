"""A tenant's beginning and end at the limits."""

import json

import grpc
import pytest

from mesh.common.v1 import lifecycle_service_pb2 as lifecycle
from mesh.common.v1 import lifecycle_service_pb2_grpc
from services.kernel.errors import MeshError
from services.kernel.ids import new_uuid7
from tests.ratelimit.callers import AtService, Service


async def erase(service: Service, tenant: AtService) -> dict[str, int]:
    """Erases and returns the counts by kind."""
    stub = lifecycle_service_pb2_grpc.TenantLifecycleServiceStub(service.tenant.channel)
    answer = await service.tenant.unary(stub.EraseTenant, lifecycle.EraseTenantRequest(), timeout_seconds=5, tenant=tenant.context)
    return {item.kind: item.count for item in answer.erased}


async def test_erasing_a_tenant_leaves_none_of_its_keys_and_all_of_the_others(service: Service) -> None:
    """Every key of the tenant goes, whatever its name; a repeated call finds nothing."""
    tenant, other = service.tenant_with(tokens_per_day=100), service.tenant_with(tokens_per_day=100)
    for each in (tenant, other):
        await each.reserve(10)
        await each.reserve(10)
    await service.link.send("SET", f"{{{tenant.tenant_id}}}:left-behind", "x")
    counts = await erase(service, tenant)
    assert counts == {
        "redis:meta": 1,
        "redis:reservations": 2,
        "redis:leases": 2,
        "redis:counters": 4,
        "redis:ended": 0,
        "redis:waiters": 0,
        "redis:guard": 0,
        "redis:uses": 0,
        "redis:left-behind": 1,
    }
    # The tombstone alone, for as long as a token of the tenant may still be shown.
    meta = f"{{{tenant.tenant_id}}}:meta"
    assert await service.link.send("KEYS", f"{{{tenant.tenant_id}}}:*") == [meta.encode()]
    assert 300_000 < await service.link.send("PTTL", meta) <= 330_000  # type: ignore[operator] # a number
    assert set((await erase(service, tenant)).values()) == {0}
    assert (await other.limits())["tokens_per_day"].used == 20


async def test_an_export_reads_every_record(service: Service) -> None:
    """The tenant gets its counters and each reservation in words."""
    tenant = service.tenant_with(tokens_per_day=100)
    reservation_id = new_uuid7()
    await tenant.reserve(10, 7, id=reservation_id)
    stub = lifecycle_service_pb2_grpc.TenantLifecycleServiceStub(service.tenant.channel)
    request = lifecycle.ExportTenantRequest()
    async with service.tenant.stream(stub.ExportTenant, request, timeout_seconds=5, tenant=tenant.context) as records:
        exported = [(record.kind, json.loads(record.record_json)) async for record in records]
    (meta_kind, meta), (counters_kind, counters), (kind, record) = exported
    assert (meta_kind, meta["epoch"], meta["outstanding"]) == ("redis:meta", "1", "1")
    assert (counters_kind, counters["t:s60:t"].split()[-1]) == ("redis:counters", "10")
    assert kind == "redis:reservations"
    assert (record["reservation_id"], record["state"], record["tokens"], record["cost_nano_usd"]) == (
        str(reservation_id),
        "held",
        "10",
        "7",
    )


async def test_provisioning_makes_nothing_and_can_be_repeated(service: Service) -> None:
    """Counters begin with the first call; provisioning only makes sure the store is there."""
    tenant = service.tenant_with(tokens_per_day=100)
    stub = lifecycle_service_pb2_grpc.TenantLifecycleServiceStub(service.tenant.channel)
    for _ in range(2):
        answer = await service.tenant.unary(
            stub.ProvisionTenant, lifecycle.ProvisionTenantRequest(), timeout_seconds=5, tenant=tenant.context
        )
        assert not answer.resources
    assert set(await tenant.store.dump()) == {None}


async def test_a_late_token_does_not_bring_an_erased_tenants_counters_back(service: Service) -> None:
    """After the erasure a call with a token from before is NOT_FOUND and makes no key; a scan finds the tombstone and nothing else."""
    tenant = service.tenant_with(tokens_per_day=100)
    await tenant.reserve(10)
    await erase(service, tenant)
    for attempt in (lambda: tenant.reserve(10), tenant.limits):
        with pytest.raises(MeshError) as caught:
            await attempt()
        assert caught.value.code is grpc.StatusCode.NOT_FOUND
    assert await scan(service, tenant) == {"redis:keys": 0, "redis:tombstone": 1}
    await service.link.send("SET", f"{{{tenant.tenant_id}}}:left-behind", "x")
    assert await scan(service, tenant) == {"redis:keys": 1, "redis:tombstone": 1}


async def scan(service: Service, tenant: AtService) -> dict[str, int]:
    """What the service still finds of the tenant."""
    stub = lifecycle_service_pb2_grpc.TenantLifecycleServiceStub(service.tenant.channel)
    answer = await service.tenant.unary(stub.ScanTenant, lifecycle.ScanTenantRequest(), timeout_seconds=5, tenant=tenant.context)
    return {item.store: item.found_count for item in answer.stores}
