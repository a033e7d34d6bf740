"""kill -9 of the tenant service in the middle of an erasure, and what a receiver of events is told of it."""

import asyncio
import base64
import hashlib
import hmac
import json
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

import grpc
import pytest

from devstack.environment import DATABASE
from devstack.mesh_client import credentials, refusal
from mesh.tenant.v1 import placement_service_pb2, tenant_service_pb2
from services.tenant.erasure import ERASE_ORDER, EraseStep
from tests.e2e.test_erasure import Used, administrator, as_operator, erasing, nothing_is_left, use
from tests.support.mesh import Mesh, running_mesh
from tests.support.waiting import eventually
from tests.tenant.receivers import Receiver, running_receiver

SECRET = "a-secret-of-the-receiver"
# Several starts of services on a machine that may be busy, and the pauses an erasure makes between attempts.
PATIENCE_SECONDS = 150.0
DONE_STEPS = "SELECT array_agg(step) FROM tenant.saga_steps WHERE tenant_id = $1 AND kind = 'ERASE' AND state = 'DONE'"


@dataclass(frozen=True, slots=True)
class Told:
    """A mesh whose tenant service tells a receiver what becomes of tenants."""

    mesh: Mesh
    receiver: Receiver

    async def events(self, tenant_id: str) -> list[str]:
        """What was told of a tenant, each once, in order; every message of it is signed."""
        found: dict[str, str] = {}
        for headers, body in self.receiver.received:
            event = json.loads(body)
            if event["subject"] == tenant_id:
                signed = f"{headers['webhook-id']}.{headers['webhook-timestamp']}.".encode() + body
                expected = base64.b64encode(hmac.new(SECRET.encode(), signed, hashlib.sha256).digest()).decode()
                assert headers["webhook-signature"] == f"v1,{expected}"
                found[headers["webhook-id"]] = event["type"]
        return list(found.values())


@pytest.fixture(scope="module")
async def told() -> AsyncIterator[Told]:
    """A mesh of its own: its services die here."""
    async with running_receiver() as receiver, running_mesh(trace_sample_ratio=0.0) as mesh:
        await mesh.stack.processes["tenant"].stop()
        wanted = {"TENANTRY_EVENT_WEBHOOK_URL": receiver.url, "TENANTRY_EVENT_WEBHOOK_SECRET": SECRET}
        await mesh.stack.start_service("tenant", **wanted)
        # The others come back to a service that was away within two seconds of its return.
        await eventually(lambda: makes_tenants(mesh), within_seconds=PATIENCE_SECONDS)
        yield Told(mesh, receiver)


async def makes_tenants(mesh: Mesh) -> bool:
    """Tells whether the services hear each other."""
    try:
        await mesh.tenant()
    except grpc.aio.AioRpcError as error:
        assert refusal(error).code == "UNAVAILABLE"
        return False
    return True


async def kill(mesh: Mesh, name: str) -> None:
    """Ends a service as a crash would."""
    mesh.stack.processes[name].kill()
    await mesh.stack.processes[name].wait()


async def is_past(mesh: Mesh, used: Used, steps: Sequence[EraseStep]) -> bool:
    """Tells whether the erasure has done these steps."""
    async with administrator(mesh, DATABASE) as connection:
        done = await connection.fetchval(DONE_STEPS, used.tenant_id)
    return set(steps) <= set(done or [])


async def receipt_of(mesh: Mesh, used: Used) -> tenant_service_pb2.ErasureReceipt | None:
    """The receipt, once there is one."""
    request = tenant_service_pb2.GetErasureReceiptRequest(tenant_id=used.tenant.tenant_id)
    try:
        answer = await mesh.client.tenants.GetErasureReceipt(request, metadata=as_operator(mesh), timeout=30)
    except grpc.aio.AioRpcError as error:
        assert refusal(error).code in ("NOT_FOUND", "UNAVAILABLE")
        return None
    return answer.receipt


@pytest.mark.timeout(300)
async def test_a_receiver_is_told_of_a_move_once(told: Told) -> None:
    """A tenant that moved is told with the place it left and the one it lives in; repeating the call tells nothing more."""
    tenant = await told.mesh.tenant("enterprise")
    metadata = (*as_operator(told.mesh), ("x-tenant-id", tenant.tenant_id))
    request = placement_service_pb2.MoveTenantRequest(to=placement_service_pb2.ISOLATION_BRIDGE)
    for _ in range(2):
        await told.mesh.client.placements.MoveTenant(request, metadata=metadata, timeout=120)
    suspend = tenant_service_pb2.SuspendTenantRequest(tenant_id=tenant.tenant_id)
    await told.mesh.client.tenants.SuspendTenant(suspend, metadata=as_operator(told.mesh), timeout=30)

    async def is_told() -> bool:
        return "tenant.suspended" in await told.events(tenant.tenant_id)

    await eventually(is_told, within_seconds=PATIENCE_SECONDS)
    assert await told.events(tenant.tenant_id) == ["tenant.provisioned", "tenant.moved", "tenant.suspended"]
    [moved] = [event for _, body in told.receiver.received if (event := json.loads(body))["type"] == "tenant.moved"]
    assert moved["data"] == {"from": "pool", "to": "bridge"}


@pytest.mark.timeout(300)
async def test_a_receiver_is_told_of_beginnings_and_ends(told: Told) -> None:
    """A tenant that is made and erased is told as made and as erased, signed, in this order, though the receiver fails in between."""
    tenant = await told.mesh.tenant()
    used = Used(tenant, f"heliotrope-{uuid.uuid4().hex[:12]}", 0)
    told.receiver.statuses.append(503)
    await told.mesh.client.tenants.EraseTenant(erasing(used), metadata=as_operator(told.mesh), timeout=120)

    async def is_told() -> bool:
        return "tenant.erased" in await told.events(tenant.tenant_id)

    await eventually(is_told, within_seconds=PATIENCE_SECONDS)
    assert await told.events(tenant.tenant_id) == ["tenant.provisioned", "tenant.erased"]


@pytest.mark.timeout(600)
async def test_an_erasure_ends_by_itself_after_kill_9(told: Told) -> None:
    """Killed twice in its middle the tenant service ends the erasure without being asked again: clean, signed, and told once."""
    mesh = told.mesh
    used = await use(mesh, "silo")
    # Without retrieval the erasure stands still once the keys are dead: it counts what is there before it removes anything.
    await kill(mesh, "retrieval")
    asking = asyncio.ensure_future(mesh.client.tenants.EraseTenant(erasing(used), metadata=as_operator(mesh), timeout=PATIENCE_SECONDS))
    await eventually(lambda: is_past(mesh, used, [EraseStep.KEYS_DEAD]), within_seconds=PATIENCE_SECONDS)
    await kill(mesh, "tenant")
    with pytest.raises(grpc.aio.AioRpcError) as cut:
        await asking
    assert refusal(cut.value).code == "UNAVAILABLE"
    await mesh.stack.start_service("tenant")
    with pytest.raises(grpc.aio.AioRpcError) as dead:
        await mesh.client.tenants.GetTenant(
            tenant_service_pb2.GetTenantRequest(), metadata=credentials(used.tenant.api_key), timeout=30, wait_for_ready=True
        )
    assert refusal(dead.value).code == "UNAUTHENTICATED"
    assert await receipt_of(mesh, used) is None
    await mesh.stack.start_service("retrieval")
    await eventually(lambda: is_past(mesh, used, ERASE_ORDER[: ERASE_ORDER.index(EraseStep.METERING)]), within_seconds=PATIENCE_SECONDS)
    await kill(mesh, "tenant")
    await mesh.stack.start_service("tenant")

    async def is_done() -> bool:
        return await receipt_of(mesh, used) is not None

    await eventually(is_done, within_seconds=PATIENCE_SECONDS)
    receipt = await receipt_of(mesh, used)
    assert receipt is not None
    assert receipt.verified
    await nothing_is_left(mesh, used)

    async def is_told() -> bool:
        return "tenant.erased" in await told.events(used.tenant.tenant_id)

    await eventually(is_told, within_seconds=PATIENCE_SECONDS)
    assert await told.events(used.tenant.tenant_id) == ["tenant.provisioned", "tenant.erased"]
