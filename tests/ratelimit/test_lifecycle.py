"""A tenant's beginning and end at the limits."""

import json

from mesh.common.v1 import lifecycle_service_pb2 as lifecycle
from mesh.common.v1 import lifecycle_service_pb2_grpc
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
        "redis:window": 2,
        "redis:ended": 0,
        "redis:left-behind": 1,
    }
    assert await service.link.send("KEYS", f"{{{tenant.tenant_id}}}:*") == []
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
    (meta_kind, meta), (kind, record) = exported
    assert (meta_kind, meta["epoch"], meta["window_tokens"]) == ("redis:meta", "1", "10")
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
    assert await tenant.store.dump() == [None] * 5
