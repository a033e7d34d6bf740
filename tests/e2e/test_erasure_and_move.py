"""An operator erases a tenant that is on its way to another place: whoever is first, the erasure ends and nothing is left."""

import asyncio
import itertools
import json
import os
import uuid
from pathlib import Path

import grpc
import pytest

from devstack.mesh_client import Metadata, credentials, operator_credentials, refusal
from mesh.retrieval.v1 import document_service_pb2
from mesh.tenant.v1 import placement_service_pb2, tenant_service_pb2
from tests.e2e.test_erasure import Used, as_operator, erasing, nothing_is_left, the_receipt_holds
from tests.support.mesh import Mesh

# How long after the move the erasure begins: from before it is written down to after its end.
DELAYS_SECONDS = (0.0, 0.02, 0.05, 0.08, 0.11, 0.15)
RACES = int(os.environ.get("TENANTRY_TEST_RACES", "6"))
PATIENCE_SECONDS = 90.0
MAY_ANSWER = {"NOT_FOUND", "FAILED_PRECONDITION", "UNAVAILABLE"}


@pytest.mark.slow
@pytest.mark.timeout(900)
async def test_an_erasure_that_meets_a_move_ends_and_leaves_nothing(mesh: Mesh, tmp_path: Path) -> None:
    """The receipt verifies and no store holds anything of the tenant, whenever the erasure begins."""
    races = itertools.islice(zip(itertools.cycle(DELAYS_SECONDS), itertools.cycle(("silo", "bridge", "silo")), strict=False), RACES)
    for delay_seconds, to in races:
        used = await with_a_document(mesh)
        async with asyncio.TaskGroup() as group:
            moving = group.create_task(move(mesh, used, to))
            await asyncio.sleep(delay_seconds)
            erased = group.create_task(erase(mesh, used))
        assert moving.result() in MAY_ANSWER | {"OK"}, (delay_seconds, to)
        answer = erased.result()
        assert answer.receipt.verified, (delay_seconds, to, json.loads(answer.receipt.body_json)["verification"])
        await the_receipt_holds(mesh, answer, tmp_path)
        await nothing_is_left(mesh, used)


async def with_a_document(mesh: Mesh) -> Used:
    """A tenant of the pool with something to move."""
    used = Used(await mesh.tenant("enterprise"), f"heliotrope-{uuid.uuid4().hex[:12]}", 0)
    documents = [
        document_service_pb2.DocumentInput(document_key=f"{number}.md", title=f"On {used.fact}", text=f"The code is {used.fact}.")
        for number in range(5)
    ]
    request = document_service_pb2.UpsertDocumentsRequest(documents=documents)
    await mesh.client.documents.UpsertDocuments(request, metadata=credentials(used.tenant.api_key), timeout=30)
    return used


async def move(mesh: Mesh, used: Used, to: str) -> str:
    """Moves the tenant; returns OK or the code of the refusal."""
    request = placement_service_pb2.MoveTenantRequest(to=placement_service_pb2.Isolation.Value(f"ISOLATION_{to.upper()}"))
    operator: Metadata = operator_credentials(mesh.stack.state.secrets.operator_key, "grown out of the pool")
    metadata = (*operator, ("x-tenant-id", used.tenant.tenant_id))
    try:
        await mesh.client.placements.MoveTenant(request, metadata=metadata, timeout=PATIENCE_SECONDS)
    except grpc.aio.AioRpcError as error:
        return str(refusal(error).code)
    return "OK"


async def erase(mesh: Mesh, used: Used) -> tenant_service_pb2.EraseTenantResponse:
    """Erases the tenant, asking again for as long as a service was cut off from a place that goes: nothing else is excused."""
    request = erasing(used)
    async with asyncio.timeout(PATIENCE_SECONDS):
        while True:
            try:
                return await mesh.client.tenants.EraseTenant(request, metadata=as_operator(mesh), timeout=PATIENCE_SECONDS)
            except grpc.aio.AioRpcError as error:
                assert refusal(error).code == "UNAVAILABLE", refusal(error)
