"""What time and crashes leave behind is removed: ended sagas, delivered events, half-made tenants and keys without a tenant."""

import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from datetime import timedelta
from pathlib import Path
from uuid import UUID, uuid4

import grpc
import pytest

from mesh.tenant.v1 import placement_service_pb2, tenant_service_pb2
from services.kernel.ids import TenantId, new_uuid7
from services.kernel.migrate import fill, home_of
from services.tenant.adapters.postgres_sagas import LIST_DUE
from services.tenant.adapters.postgres_sweeps import PostgresHistory, PostgresUnrecordedKeys
from services.tenant.app import MIGRATIONS
from services.tenant.app.parts import Parts, build_parts
from services.tenant.placement import PlacementWish
from services.tenant.sweeping import HistoryKeeper, KeySweeper
from services.tenant.tenant_wish import TenantWish
from tests.support.waiting import eventually
from tests.tenant.harness import Harness, call, refusal, wish
from tests.tenant.test_provisioning import assert_whole

DAYS = 90
AGE_SAGAS = "UPDATE tenant.sagas SET end_time = end_time - $2::interval WHERE tenant_id = $1 AND end_time IS NOT NULL"
RECORD = "SELECT outcome FROM tenant.record_tenant($1, $2, $3, $4, $5, $6, 'local', 'operator', '', '')"
NOTES = "SELECT count(*) FROM tenant.unrecorded_keys WHERE tenant_id = ANY ($1::uuid[])"


@pytest.fixture
async def parts(harness: Harness) -> AsyncIterator[Parts]:
    """What another process builds its sweeps from."""
    async with AsyncExitStack() as stack:
        yield await build_parts(harness.settings, stack)


async def test_what_ended_long_ago_is_forgotten_and_nothing_else(harness: Harness, parts: Parts) -> None:
    """Sagas with their steps and delivered events go after their term; younger ones, waiting and dead events and open sagas stay."""
    keeper = HistoryKeeper(PostgresHistory(parts.database, parts.jobs), days=DAYS)
    old, young, waiting = await harness.create(), await harness.create(), await harness.create()
    harness.peers["metering"].failures = [grpc.StatusCode.UNAVAILABLE] * 50
    request = wish()
    await refusal(call(harness.tenants.CreateTenant, request, harness.as_operator()))
    for created, state in ((old, "DELIVERED"), (young, "DELIVERED"), (waiting, "DEAD")):
        tenant_id = UUID(created.tenant.tenant_id)
        await harness.execute("UPDATE tenant.events SET state = $2, end_time = now() WHERE tenant_id = $1", tenant_id, state)
    aged = timedelta(days=DAYS, hours=1)
    for created in (old, waiting):
        tenant_id = UUID(created.tenant.tenant_id)
        await harness.execute("UPDATE tenant.events SET end_time = end_time - $2::interval WHERE tenant_id = $1", tenant_id, aged)
    await harness.execute(AGE_SAGAS, UUID(old.tenant.tenant_id), aged)
    assert await keeper.sweep() == 1
    assert await keeper.sweep() == 0
    left = [[await has_some(harness, table, created) for table in ("sagas", "saga_steps", "events")] for created in (old, young, waiting)]
    assert left == [[False] * 3, [True] * 3, [True] * 3]
    unfinished = await harness.value("SELECT state FROM tenant.sagas WHERE request_id = $1", UUID(request.request_id))
    assert unfinished in ("RUNNING", "COMPENSATING")
    harness.peers["metering"].failures.clear()


async def has_some(harness: Harness, table: str, created: tenant_service_pb2.CreateTenantResponse) -> bool:
    """Tells whether a table has rows of the tenant."""
    return bool(await harness.value(f"SELECT count(*) > 0 FROM tenant.{table} WHERE tenant_id = $1", UUID(created.tenant.tenant_id)))


async def test_a_forgotten_creation_and_erasure_are_answered_as_before(harness: Harness, parts: Parts) -> None:
    """Repeated after its term, a creation answers its tenant, and an erasure its receipt, to its own request alone."""
    keeper = HistoryKeeper(PostgresHistory(parts.database, parts.jobs), days=DAYS)
    request, ended = wish(), await harness.create()
    made = await call(harness.tenants.CreateTenant, request, harness.as_operator())
    erase = tenant_service_pb2.EraseTenantRequest(request_id=str(uuid4()), tenant_id=ended.tenant.tenant_id, confirm_slug=ended.tenant.slug)
    erased = await call(harness.tenants.EraseTenant, erase, harness.as_operator())
    for created in (made, ended):
        await harness.execute(AGE_SAGAS, UUID(created.tenant.tenant_id), timedelta(days=DAYS, hours=1))
    await keeper.sweep()
    gone = "SELECT count(*) FROM tenant.sagas WHERE tenant_id = ANY ($1::uuid[])"
    assert await harness.value(gone, [made.tenant.tenant_id, ended.tenant.tenant_id]) == 0
    assert (await call(harness.tenants.CreateTenant, request, harness.as_operator())).tenant == made.tenant
    assert await call(harness.tenants.EraseTenant, erase, harness.as_operator()) == erased
    erase.request_id = str(uuid4())
    assert (await refusal(call(harness.tenants.EraseTenant, erase, harness.as_operator()))).code is grpc.StatusCode.ALREADY_EXISTS


async def test_due_sagas_are_found_without_reading_the_ended(harness: Harness) -> None:
    """Among many ended sagas the look for due ones reads the index of those that have not ended."""
    many = """
        INSERT INTO tenant.sagas (tenant_id, kind, request_id, content_digest, state, subject, end_time)
        SELECT gen_random_uuid(), 'PROVISION', gen_random_uuid(), decode(repeat('00', 32), 'hex'), 'DONE', 'many', now()
        FROM generate_series(1, 5000)
    """
    await harness.execute(many)
    await harness.execute("ANALYZE tenant.sagas")
    plan = json.loads(await harness.value(f"EXPLAIN (FORMAT JSON) {LIST_DUE.replace('$1', '4')}"))
    await harness.execute("DELETE FROM tenant.sagas WHERE subject = 'many'")
    assert "sagas_due" in json.dumps(plan)


async def half_made(harness: Harness) -> tuple[tenant_service_pb2.CreateTenantRequest, UUID]:
    """A tenant as a release without sagas left it when it died behind the first step."""
    request, tenant_id = wish(), new_uuid7()
    content = TenantWish(request.slug, request.display_name, request.plan, request.owner_email, request.assistant_name, PlacementWish())
    recorded = await harness.value(
        RECORD, tenant_id, UUID(request.request_id), content.digest(), request.slug, request.display_name, request.plan
    )
    assert recorded == "RECORDED"
    return request, tenant_id


async def test_a_tenant_left_half_made_is_finished_by_its_request(harness: Harness) -> None:
    """Repeated, the request of a tenant that was recorded without a saga makes it whole before it is answered."""
    request, _ = await half_made(harness)
    answer = await call(harness.tenants.CreateTenant, request, harness.as_operator())
    assert answer.tenant.state == tenant_service_pb2.TENANT_STATE_ACTIVE
    await assert_whole(harness, request.request_id, answer)


async def test_a_tenant_left_half_made_is_undone_by_the_upgrade(harness: Harness) -> None:
    """What stopped over an hour before the upgrade is undone in every service, its slug is free; what is younger is left to its caller."""
    (request, tenant_id), (_, younger) = await half_made(harness), await half_made(harness)
    await harness.execute("UPDATE tenant.provisioning SET update_time = now() - interval '2 hours' WHERE tenant_id = $1", tenant_id)
    [file] = Path(MIGRATIONS).glob("0012_*.sql")
    async with harness.superuser() as connection, connection.transaction():
        await connection.execute("SET LOCAL ROLE tenant_owner")
        await connection.execute(fill(file.read_text(), home_of("tenant")))
    await harness.execute("UPDATE tenant.sagas SET due_time = now() WHERE tenant_id = $1", tenant_id)

    async def is_undone() -> bool:
        return bool(await harness.value("SELECT state FROM tenant.tenants WHERE tenant_id = $1", tenant_id) == "FAILED")

    await eventually(is_undone, within_seconds=30)
    assert all(tenant_id in peer.erased for peer in harness.peers.values())
    assert await harness.value("SELECT count(*) FROM tenant.sagas WHERE tenant_id = $1", younger) == 0
    refused = await refusal(call(harness.tenants.CreateTenant, request, harness.as_operator()))
    assert refused.metadata["state"] == "FAILED"
    await call(harness.tenants.CreateTenant, wish(slug=request.slug), harness.as_operator())


async def test_a_repeated_creation_of_a_tenant_that_ends_is_no_success(harness: Harness) -> None:
    """A request whose tenant is being erased is told so, and gets no key."""
    request = wish()
    made = await call(harness.tenants.CreateTenant, request, harness.as_operator())
    tenant_id = UUID(made.tenant.tenant_id)
    await harness.execute("UPDATE tenant.tenants SET state = 'ERASING' WHERE tenant_id = $1", tenant_id)
    keys = await harness.value("SELECT count(*) FROM tenant.api_keys WHERE tenant_id = $1", tenant_id)
    refused = await refusal(call(harness.tenants.CreateTenant, request, harness.as_operator()))
    assert (refused.code, refused.metadata["state"]) == (grpc.StatusCode.FAILED_PRECONDITION, "ERASING")
    assert await harness.value("SELECT count(*) FROM tenant.api_keys WHERE tenant_id = $1", tenant_id) == keys


async def test_a_key_without_a_tenant_is_destroyed_and_no_other(harness: Harness, parts: Parts) -> None:
    """A key that a crash left between sealing and recording is destroyed once it is old; that of a recorded tenant never is."""
    sweeper = KeySweeper(PostgresUnrecordedKeys(parts.database, parts.jobs), parts.vault)
    request = wish(plan="enterprise", isolation=placement_service_pb2.ISOLATION_SILO)
    request.silo.CopyFrom(await harness.own_database())
    made = await call(harness.tenants.CreateTenant, request, harness.as_operator())
    recorded, left = UUID(made.tenant.tenant_id), new_uuid7()
    assert await harness.value(NOTES, [recorded]) == 0
    await parts.vault.live(TenantId(left))
    for tenant_id in (recorded, left):
        await harness.execute("INSERT INTO tenant.unrecorded_keys (tenant_id) VALUES ($1)", tenant_id)
    assert await sweeper.sweep() == 0
    age = "UPDATE tenant.unrecorded_keys SET create_time = now() - interval '1 hour' WHERE tenant_id = ANY ($1::uuid[])"
    await harness.execute(age, [recorded, left])
    assert await sweeper.sweep() == 2
    assert await sweeper.sweep() == 0
    assert len(await parts.vault.live(TenantId(recorded))) == 1
    assert (await parts.vault.destroy(TenantId(left)), await harness.value(NOTES, [recorded, left])) == (0, 0)
