"""A tenant's beginning and end in this service, and the walls around its rows."""

from __future__ import annotations

from datetime import UTC, datetime

import asyncpg
import grpc
import orjson
import pytest

from mesh.common.v1 import lifecycle_service_pb2 as pb
from mesh.inference.v1 import prompt_service_pb2 as prompt_pb
from services.kernel.ids import new_uuid7
from tests.inference.conftest import World, credentials
from tests.inference.peers import Tenant
from tests.inference.test_call_audit import is_empty
from tests.inference.test_documents_and_conversations import new_conversation, put_prompt

TABLES = ("prompts", "conversations", "turns")


async def test_provisioning_writes_the_first_prompt_once(world: World, tenant: Tenant) -> None:
    """The first prompt names the assistant and the organisation; provisioning again leaves later prompts alone."""
    newest = await world.prompts.GetPrompt(prompt_pb.GetPromptRequest(), metadata=credentials(tenant))
    assert newest.prompt.text.startswith("You are Ada, the assistant of Acme. ")
    await put_prompt(world, tenant, "Our own words.")
    assert list((await world.provision(tenant)).resources) == ["prompt default@2"]


async def test_export_streams_every_record_of_the_tenant_alone(world: World, tenant: Tenant) -> None:
    """The export holds the tenant's prompts, conversations and turns, each as JSON, and nobody else's."""
    other = await world.new_tenant()
    await world.answer(other, "Not yours", conversation_id=await new_conversation(world, other))
    conversation_id = await new_conversation(world, tenant)
    await world.answer(tenant, "Mine", conversation_id=conversation_id)
    records = [
        (record.kind, orjson.loads(record.record_json))
        async for record in world.lifecycle.ExportTenant(pb.ExportTenantRequest(), metadata=world.from_tenant_service(tenant))
    ]
    assert [kind for kind, _ in records] == [
        "postgres:inference.prompts",
        "postgres:inference.conversations",
        "postgres:inference.turns",
        "postgres:inference.turns",
    ]
    assert records[1][1]["conversation_id"] == conversation_id
    assert records[2][1]["text"] == "Mine"
    assert "Not yours" not in str(records)


async def test_erasure_removes_everything_once(world: World, tenant: Tenant) -> None:
    """Erasing reports what it removed; a second time there is nothing left."""
    await world.answer(tenant, conversation_id=await new_conversation(world, tenant))
    found = [await erase(world, tenant) for _ in range(2)]
    assert found == [
        {
            "postgres:inference.turns": turns,
            "postgres:inference.conversations": others,
            "postgres:inference.prompts": others,
            "postgres:inference.inference_sealing": 0,
        }
        for turns, others in ((2, 1), (0, 0))
    ]


async def test_only_the_tenant_service_drives_a_life(world: World, tenant: Tenant) -> None:
    """An outside caller can neither provision, erase nor export, whatever its scopes."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await world.lifecycle.EraseTenant(pb.EraseTenantRequest(), metadata=credentials(tenant))
    assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED


async def test_the_services_role_sees_no_row_without_a_tenant(world: World, tenant: Tenant, inference_dsn: str) -> None:
    """Row-level security hides every row from a session that names no tenant, or another one."""
    await world.answer(tenant, conversation_id=await new_conversation(world, tenant))
    connection = await asyncpg.connect(inference_dsn)
    try:
        for table in TABLES:
            # The very first statements of a session: the setting was never made.
            with pytest.raises(asyncpg.UndefinedObjectError):
                await connection.fetch(f"SELECT 1 FROM inference.{table}")
        async with connection.transaction():
            await connection.execute("SELECT set_config('app.tenant_id', $1, true)", str(new_uuid7()))
            assert [await connection.fetchval(f"SELECT count(*) FROM inference.{table}") for table in TABLES] == [0, 0, 0]
            await connection.execute("SELECT set_config('app.tenant_id', $1, true)", tenant.config.tenant_id)
            assert [await connection.fetchval(f"SELECT count(*) FROM inference.{table}") for table in TABLES] == [1, 1, 2]
    finally:
        await connection.close()


async def test_nothing_is_written_for_an_erased_tenant_any_more(world: World, tenant: Tenant, inference_dsn: str) -> None:
    """A call that ends late, a late prompt and a late conversation leave no row; a scan finds the tombstone alone."""
    conversation_id = await new_conversation(world, tenant)
    await world.answer(tenant, "the heron lands", conversation_id=conversation_id)
    before = {store.store: (store.found_count, store.canary_count) for store in await scan(world, tenant)}
    # The provider's stub repeats the question in its answer.
    assert before["postgres:inference.turns"] == (2, 2)
    await erase(world, tenant)
    for attempt in (put_prompt(world, tenant, "Again."), new_conversation(world, tenant)):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await attempt
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    # What the call left for the audit log reaches it all the same: the log outlives the tenant.
    await is_empty(inference_dsn, tenant)
    left = {store.store for store in await scan(world, tenant) if store.found_count or store.canary_count}
    assert left == {"postgres:inference.erased_tenants"}


async def test_a_purge_removes_conversations_without_newer_turns(world: World, tenant: Tenant) -> None:
    """What had its last turn before the given time goes with its turns; younger conversations and prompts stay."""
    old = await new_conversation(world, tenant)
    await world.answer(tenant, "old", conversation_id=old)
    cut = datetime.now(UTC)
    young = await new_conversation(world, tenant)
    await world.answer(tenant, "young", conversation_id=young)
    request = pb.PurgeTenantRequest()
    request.older_than.FromDatetime(cut)
    answers = [await world.lifecycle.PurgeTenant(request, metadata=world.from_tenant_service(tenant)) for _ in range(2)]
    counts = [{item.kind: item.count for item in answer.purged} for answer in answers]
    assert counts == [
        {"postgres:inference.turns": 2, "postgres:inference.conversations": 1},
        {"postgres:inference.turns": 0, "postgres:inference.conversations": 0},
    ]
    assert not any(answer.more for answer in answers)
    left = {store.store: store.found_count for store in await scan(world, tenant)}
    assert (left["postgres:inference.turns"], left["postgres:inference.conversations"], left["postgres:inference.prompts"]) == (2, 1, 1)


async def scan(world: World, tenant: Tenant) -> list[pb.ScannedStore]:
    """What the service still finds of the tenant and of a canary."""
    request = pb.ScanTenantRequest(canaries=["the heron lands"])
    return list((await world.lifecycle.ScanTenant(request, metadata=world.from_tenant_service(tenant))).stores)


async def erase(world: World, tenant: Tenant) -> dict[str, int]:
    """Erases the tenant and returns the counts by kind."""
    response = await world.lifecycle.EraseTenant(pb.EraseTenantRequest(), metadata=world.from_tenant_service(tenant))
    return {item.kind: item.count for item in response.erased}
