"""Two tenants share one service's pooled connections, back to back and at once: neither ever sees the other's rows."""

import asyncio

from devstack.mesh_client import credentials
from mesh.retrieval.v1 import document_service_pb2
from tests.isolation.target import Target
from tests.support.mesh import Mesh

CALLS = 2_000
AT_ONCE = 16
GIVE_UP_EVERY = 50


async def test_two_thousand_interleaved_lists_never_mix(mesh: Mesh, victim: Target, attacker: Target) -> None:
    """Alternating lists of two tenants each hold exactly their own tenant's documents, also right after a cancelled one."""
    own = {target.canary: await _listed(mesh, target) for target in (victim, attacker)}
    assert own[victim.canary]
    assert own[attacker.canary]
    assert not own[victim.canary] & own[attacker.canary]
    slots, mixed, answered = asyncio.Semaphore(AT_ONCE), list[str](), 0

    async def one(number: int) -> None:
        nonlocal answered
        target = (victim, attacker)[number % 2]
        async with slots:
            if number % GIVE_UP_EVERY == 0:
                await _give_up(mesh, target)
                return
            found = await _listed(mesh, target)
            answered += 1
            if found != own[target.canary]:
                mixed.append(f"call {number} of {target.tenant_id}: {found}")

    async with asyncio.TaskGroup() as group:
        for number in range(CALLS):
            group.create_task(one(number))
    assert not mixed, "\n".join(mixed)
    assert answered == CALLS - CALLS // GIVE_UP_EVERY


async def _listed(mesh: Mesh, target: Target) -> frozenset[tuple[str, str]]:
    request = document_service_pb2.ListDocumentsRequest(page_size=1000)
    listed = await mesh.client.documents.ListDocuments(request, metadata=credentials(target.tenant.api_key), timeout=20)
    return frozenset((document.document_id, document.title) for document in listed.documents)


async def _give_up(mesh: Mesh, target: Target) -> None:
    """Leaves while the service is at work: the connection it used must come back with no tenant on it."""
    call = mesh.client.documents.ListDocuments(
        document_service_pb2.ListDocumentsRequest(page_size=1000), metadata=credentials(target.tenant.api_key)
    )
    await asyncio.sleep(0)
    call.cancel()
