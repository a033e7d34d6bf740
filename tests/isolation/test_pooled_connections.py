"""Two tenants share pooled connections, back to back and at once, also through PgBouncer: neither ever sees the other's rows.

Through PgBouncer every session has been left with the attacked tenant on it by a faulty client before the first attack.
"""

import asyncio

import pytest

from devstack.environment import role_dsn
from devstack.mesh_client import credentials
from mesh.retrieval.v1 import document_service_pb2
from services.kernel.ids import TenantId
from services.kernel.placement import Place, PlacementKind, Whereabouts
from services.kernel.tenant_database import TenantDatabase
from tests.isolation.fingerprint import superuser, tenant_tables
from tests.isolation.places import following
from tests.isolation.postgres_attacks import attacked_rows, cross_tenant
from tests.isolation.rounds import BRIDGE, PGBOUNCER, PLAIN, POOL, against
from tests.isolation.target import Target
from tests.support.mesh import Mesh
from tests.support.pooler import leave_behind

CALLS = 2_000
READS = 10_000
# No filter: nothing but the tenant and the schema that are set for the transaction stands between the two.
EVERYTHING = "SELECT document_id FROM documents"
AT_ONCE = 16
GIVE_UP_EVERY = 50
LEAVE_BEHIND_EVERY = 1_000


# On the paths of the services a bridge and the pool share the pooled connections; through a pooler the sessions as well.
@against((PLAIN, BRIDGE), (PGBOUNCER, POOL))
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
@against((PLAIN, POOL), (PGBOUNCER, BRIDGE))
async def test_ten_thousand_turns_on_one_connection_never_mix(mesh: Mesh, victim: Target, attacker: Target) -> None:
    """Two tenants in turn on one pooled connection, with the other's place SET for the session: each sees its own rows, unfiltered."""
    own = {target.canary: {document_id for document_id, _ in await _listed(mesh, target)} for target in (victim, attacker)}
    bridge, mixed = f"t_{victim.tenant_id.hex}", list[str]()
    async with following(mesh.stack, "retrieval", Whereabouts(Place(PlacementKind.BRIDGE, schema=bridge))) as database:
        for number in range(READS):
            target, other = ((victim, attacker), (attacker, victim))[number % 2]
            if number % LEAVE_BEHIND_EVERY == 0:
                await _leave_tenant(mesh, database, other)
            async with database.transaction(TenantId(target.tenant_id)) as connection:
                found = {str(row["document_id"]) for row in await connection.fetch(EVERYTHING)}
            if found != own[target.canary]:
                mixed.append(f"turn {number} of {target.tenant_id}: {found}")
    assert not mixed, "\n".join(mixed)


@against((PGBOUNCER, POOL))
async def test_a_role_behind_a_pooler_reaches_only_the_tenant_that_is_set(mesh: Mesh, victim: Target, attacker: Target) -> None:
    """Each service's role, through PgBouncer and with the attacked tenant left on the session, gets nothing of that tenant."""
    admin = await superuser(mesh.stack)
    try:
        attacked = await attacked_rows(admin, await tenant_tables(admin), victim.tenant_id, must_be_in_all=False)
    finally:
        await admin.close()
    assert len(attacked) >= 10
    assert await cross_tenant(mesh.stack, attacked, victim.tenant_id, attacker.tenant_id, local=True, through_pooler=True) == []


async def _leave_tenant(mesh: Mesh, database: TenantDatabase, target: Target) -> None:
    left = {"app.tenant_id": str(target.tenant_id)}
    if mesh.stack.wiring.pgbouncer:
        dsn = role_dsn(mesh.stack.state, mesh.stack.ports, "retrieval", "service", wiring=mesh.stack.wiring)
        await leave_behind(dsn, left | {"search_path": f"t_{target.tenant_id.hex}"})
        return
    async with database._acquire() as connection:
        await connection.execute(f"SET app.tenant_id = '{left['app.tenant_id']}'")


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
