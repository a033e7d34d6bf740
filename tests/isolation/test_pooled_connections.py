"""Two tenants share pooled connections, back to back and at once, also through PgBouncer: neither ever sees the other's rows.

Through PgBouncer every session has been left with the attacked tenant on it by a faulty client before the first attack.
"""

import asyncio
from collections.abc import AsyncIterator

import pytest

from devstack.environment import role_dsn
from devstack.mesh_client import credentials
from mesh.retrieval.v1 import document_service_pb2
from services.kernel.ids import TenantId
from services.kernel.tenant_database import TenantDatabase
from services.retrieval.adapters.postgres import PostgresDocumentStore
from tests.isolation.fingerprint import superuser
from tests.isolation.postgres_attacks import attacked_rows, cross_tenant
from tests.isolation.rounds import PGBOUNCER, PLAIN, over
from tests.isolation.target import Target
from tests.support.mesh import Mesh
from tests.support.pooler import leave_behind

CALLS = 2_000
READS = 10_000
AT_ONCE = 16
GIVE_UP_EVERY = 50
LEAVE_BEHIND_EVERY = 1_000


@pytest.fixture
async def one_connection(mesh: Mesh) -> AsyncIterator[TenantDatabase]:
    """The retrieval service's own role and code on a single connection, so that the tenants meet on it at every step."""
    wiring = mesh.stack.wiring
    dsn = role_dsn(mesh.stack.state, mesh.stack.ports, "retrieval", "service", wiring=wiring)
    database = await TenantDatabase.open(dsn, max_size=1, application_name="interleaved", transaction_pooling=wiring.pgbouncer)
    yield database
    await database.close()


@over(PLAIN, PGBOUNCER)
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


@pytest.mark.slow
@pytest.mark.timeout(300)
@over(PLAIN, PGBOUNCER)
async def test_ten_thousand_turns_on_one_connection_never_mix(
    mesh: Mesh, one_connection: TenantDatabase, victim: Target, attacker: Target
) -> None:
    """Two tenants in turn on one pooled connection, with a faulty client's tenant SET for the session: each reads its own alone."""
    store, mixed = PostgresDocumentStore(one_connection), list[str]()
    own = {target.canary: {title for _, title in await _listed(mesh, target)} for target in (victim, attacker)}
    for number in range(READS):
        target, other = ((victim, attacker), (attacker, victim))[number % 2]
        if number % LEAVE_BEHIND_EVERY == 0:
            await _leave_tenant(mesh, one_connection, other)
        found = await store.list_page(TenantId(target.tenant_id), "", 1_000)
        if {document.title for document in found} != own[target.canary]:
            mixed.append(f"turn {number} of {target.tenant_id}: {[document.title for document in found]}")
    assert not mixed, "\n".join(mixed)


@over(PGBOUNCER)
async def test_a_role_behind_a_pooler_reaches_only_the_tenant_that_is_set(mesh: Mesh, victim: Target, attacker: Target) -> None:
    """Each service's role, through PgBouncer and with the attacked tenant left on the session, gets nothing of that tenant."""
    admin = await superuser(mesh.stack)
    try:
        attacked = await attacked_rows(admin, victim.tenant_id, must_be_in_all=False)
    finally:
        await admin.close()
    assert len(attacked) >= 10
    assert await cross_tenant(mesh.stack, attacked, victim.tenant_id, attacker.tenant_id, local=True, through_pooler=True) == []


async def _leave_tenant(mesh: Mesh, database: TenantDatabase, target: Target) -> None:
    if mesh.stack.wiring.pgbouncer:
        dsn = role_dsn(mesh.stack.state, mesh.stack.ports, "retrieval", "service", wiring=mesh.stack.wiring)
        await leave_behind(dsn, {"app.tenant_id": str(target.tenant_id)})
        return
    async with database._acquire() as connection:
        await connection.execute(f"SET app.tenant_id = '{target.tenant_id}'")


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
