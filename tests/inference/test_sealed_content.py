"""Conversations sealed under the tenant's own data key: as usable as plain ones, unreadable in the database, moved to new keys online."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import asyncpg
import grpc
import orjson
import pytest

from mesh.common.v1 import error_reason_pb2
from mesh.common.v1 import lifecycle_service_pb2 as pb
from mesh.inference.v1 import conversation_service_pb2 as conversation_pb
from services.kernel.errors import MeshError
from services.kernel.rpc.wire_status import decode_rpc_error
from tests.inference.conftest import OWN_KEYS, PROVIDER_KEY, World, credentials, running_service, service_settings
from tests.inference.peers import Tenant
from tests.support.stores import PostgresStore
from tests.support.waiting import eventually

SECRET = "the vault opens with 4711"
USER = "grace@example.com"


@pytest.fixture
async def sealing(world: World) -> Tenant:
    """A tenant whose content is sealed."""
    return await world.new_tenant(encrypts=True)


async def begin(world: World, tenant: Tenant) -> str:
    """Begins a conversation of a named user."""
    request = conversation_pb.CreateConversationRequest(user=USER)
    response = await world.conversations.CreateConversation(request, metadata=credentials(tenant), timeout=10)
    return str(response.conversation.conversation_id)


async def turns(world: World, tenant: Tenant, conversation_id: str) -> list[str]:
    """The texts of a conversation. Raises: MeshError."""
    request = conversation_pb.ListTurnsRequest(conversation_id=conversation_id)
    try:
        response = await world.conversations.ListTurns(request, metadata=credentials(tenant), timeout=10)
    except grpc.aio.AioRpcError as error:
        raise decode_rpc_error(error, "inference") from None
    return [turn.text for turn in response.turns]


async def reencrypt(world: World, tenant: Tenant, version: int) -> pb.ReencryptTenantResponse:
    """One call of the tenant service."""
    request = pb.ReencryptTenantRequest(active_version=version)
    return await world.lifecycle.ReencryptTenant(request, metadata=world.from_tenant_service(tenant), timeout=30)


async def is_resealed(world: World, tenant: Tenant, version: int) -> bool:
    """Makes the tenant service's call once more and tells whether it is done."""
    return (await reencrypt(world, tenant, version)).done


@asynccontextmanager
async def rows(inference_admin_dsn: str) -> AsyncIterator[asyncpg.Connection]:
    """A connection past every policy."""
    connection = await asyncpg.connect(inference_admin_dsn)
    try:
        yield connection
    finally:
        await connection.close()


@pytest.fixture
def admin_dsn(inference_dsn: str, postgres: PostgresStore) -> str:
    """The same database as its superuser."""
    return postgres.server.dsn(inference_dsn.rpartition("/")[2])


async def everything_of(admin_dsn: str, tenant: Tenant) -> str:
    """All raw rows of a tenant's conversations, as text and as the text of their bytes."""
    async with rows(admin_dsn) as connection:
        found = []
        for table in ("turns", "conversations"):
            for row in await connection.fetch(f"SELECT * FROM inference.{table} t WHERE tenant_id = $1", tenant.tenant_id):
                found += [value.decode("latin-1") if isinstance(value, bytes) else str(value) for value in row.values()]
        return "\n".join(found)


async def test_a_sealed_conversation_reads_like_any_other(world: World, sealing: Tenant, admin_dsn: str) -> None:
    """History, list and export give the plaintext to its owner; the raw rows hold neither text nor user."""
    conversation_id = await begin(world, sealing)
    answer = await world.answer(sealing, SECRET, conversation_id=conversation_id)
    await world.answer(sealing, "And then?", conversation_id=conversation_id)
    assert [message["content"] for message in world.sent()["messages"]] == [SECRET, answer.text, "And then?"]
    assert (await turns(world, sealing, conversation_id))[:3] == [SECRET, answer.text, "And then?"]
    stream = world.lifecycle.ExportTenant(pb.ExportTenantRequest(), metadata=world.from_tenant_service(sealing), timeout=10)
    exported = [(item.kind, orjson.loads(item.record_json)) async for item in stream]
    assert [record["user_name"] for kind, record in exported if kind.endswith("conversations")] == [USER]
    assert SECRET in [record["text"] for kind, record in exported if kind.endswith("turns")]
    raw = await everything_of(admin_dsn, sealing)
    assert not [word for word in (SECRET, USER, answer.text) if word in raw]


async def test_plain_content_asks_for_no_key(world: World, tenant: Tenant, admin_dsn: str) -> None:
    """A tenant that does not seal costs no question for keys, and is stored as before."""
    conversation_id = await begin(world, tenant)
    await world.answer(tenant, SECRET, conversation_id=conversation_id)
    assert (await turns(world, tenant, conversation_id))[0] == SECRET
    assert world.script.all("data_keys") == []
    assert SECRET in await everything_of(admin_dsn, tenant)


async def test_what_is_sealed_opens_whatever_the_flag_says_now(world: World, sealing: Tenant) -> None:
    """After the flag is off, older turns still open and newer ones stand beside them in plain text."""
    conversation_id = await begin(world, sealing)
    await world.answer(sealing, SECRET, conversation_id=conversation_id)
    sealing.encrypts = False
    world.script.tenants[f"{sealing.key}-later"] = sealing
    plain = Tenant(sealing.config, f"{sealing.key}-later", False, sealing.data_keys)
    await world.answer(plain, "In the open", conversation_id=conversation_id)
    read = await turns(world, plain, conversation_id)
    assert (read[0], read[2]) == (SECRET, "In the open")


async def test_the_history_bound_counts_plaintext(world: World, sealing: Tenant, tenant: Tenant) -> None:
    """A sealed conversation sends exactly as many turns as the same one in plain text."""
    sent = []
    for who in (sealing, tenant):
        conversation_id = await begin(world, who)
        for number in range(6):
            await world.answer(who, f"{number} " + "x" * 6000, conversation_id=conversation_id, max_output_tokens=20)
        sent.append([message["content"][:2] for message in world.sent()["messages"] if message["role"] == "user"])
    assert sent[0] == sent[1]
    assert 1 < len(sent[0]) < 6


async def test_a_turn_moved_to_another_row_does_not_open(
    world: World, sealing: Tenant, admin_dsn: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A sealed text moved within the tenant, or over from another tenant, is INTERNAL for its reader and a security event in the log."""
    thief = await world.new_tenant(encrypts=True)
    own, other = await begin(world, sealing), await begin(world, thief)
    await world.answer(sealing, SECRET, conversation_id=own)
    await world.answer(thief, "Mine", conversation_id=other)
    stolen = "(SELECT sealed_text FROM inference.turns WHERE tenant_id = $1 AND conversation_id = $2 AND sequence = 1)"
    target = "WHERE tenant_id = $3 AND conversation_id = $4 AND sequence = $5"
    for victim, conversation_id, sequence in ((thief, other, 1), (sealing, own, 2)):
        async with rows(admin_dsn) as connection:
            arguments = (sealing.tenant_id, own, victim.tenant_id, conversation_id, sequence)
            await connection.execute(f"UPDATE inference.turns SET sealed_text = {stolen} {target}", *arguments)
        with pytest.raises(MeshError) as caught:
            await turns(world, victim, conversation_id)
        assert caught.value.reason == error_reason_pb2.ERROR_REASON_INTERNAL
        assert SECRET not in caught.value.message
    assert "key_use_failed" in "".join(capsys.readouterr())


async def test_a_rotation_under_writers_leaves_nothing_behind(world: World, sealing: Tenant, admin_dsn: str) -> None:
    """While turns are written from two replicas, a rotation ends with every turn readable by the new key alone."""
    conversation_id = await begin(world, sealing)
    await world.answer(sealing, SECRET, conversation_id=conversation_id)
    stop = asyncio.Event()

    async def write(number: int) -> int:
        count = 0
        while not stop.is_set():
            await world.answer(sealing, f"writer {number}, turn {count}", conversation_id=conversation_id, max_output_tokens=10)
            count += 1
        return count

    async with asyncio.TaskGroup() as group:
        writers = [group.create_task(write(number)) for number in range(3)]
        await asyncio.sleep(0)
        sealing.data_keys[2] = secrets.token_bytes(32)
        await eventually(lambda: is_resealed(world, sealing, 2), within_seconds=30)
        # Retired at once: whatever was sealed with it from here on would be lost.
        del sealing.data_keys[1]
        stop.set()
    written = sum(task.result() for task in writers)
    async with rows(admin_dsn) as connection:
        versions = await connection.fetch("SELECT DISTINCT key_version FROM inference.turns WHERE tenant_id = $1", sealing.tenant_id)
        counted = await connection.fetchval("SELECT count(*) FROM inference.turns WHERE tenant_id = $1", sealing.tenant_id)
    assert ([row["key_version"] for row in versions], counted) == ([2], 2 * (written + 1))
    # Another replica that never saw the old key reads all of it.
    async with fresh_replica(world) as replica:
        assert (await turns(replica, sealing, conversation_id))[0] == SECRET


@asynccontextmanager
async def fresh_replica(world: World) -> AsyncIterator[World]:
    """Another process's worth of caches on the same stores."""
    dsn = world.inference_dsn
    async with running_service(service_settings(dsn, world.peers.address, "http://127.0.0.1:9")) as (app, channel):
        yield World(app, world.peers, channel, world.stub, world.provider_ledger, dsn)


async def test_a_replica_with_an_old_key_in_memory_cannot_write_with_it(world: World, sealing: Tenant, admin_dsn: str) -> None:
    """After a rotation went through another replica, this one's key is refused by the store; it fetches the new and loses no turn."""
    # Nothing to recall in the one, or the newer key would be met while reading.
    conversation_id, empty = await begin(world, sealing), await begin(world, sealing)
    await world.answer(sealing, "Sealed with the first key", conversation_id=conversation_id)
    sealing.data_keys[2] = secrets.token_bytes(32)
    async with fresh_replica(world) as other:
        assert (await reencrypt(other, sealing, 2)).done
    del sealing.data_keys[1]
    await world.answer(sealing, "Sealed with the second", conversation_id=empty)
    # Read where the old key never was: this replica could still open what it must not have written.
    async with fresh_replica(world) as third:
        read = [(await turns(third, sealing, which))[0] for which in (conversation_id, empty)]
    assert tuple(read) == ("Sealed with the first key", "Sealed with the second")


async def test_rows_of_a_backup_do_not_open_once_the_keys_are_gone(world: World, sealing: Tenant, admin_dsn: str) -> None:
    """Rows copied before the erasure and put back after it do not open: the keys were destroyed, and no other opens them."""
    conversation_id = await begin(world, sealing)
    await world.answer(sealing, SECRET, conversation_id=conversation_id)
    async with rows(admin_dsn) as connection:
        dump = {
            table: await connection.fetch(
                f"SELECT to_jsonb(t)::text AS row FROM inference.{table} t WHERE tenant_id = $1", sealing.tenant_id
            )
            for table in ("conversations", "turns")
        }
    await world.lifecycle.EraseTenant(pb.EraseTenantRequest(), metadata=world.from_tenant_service(sealing), timeout=10)
    sealing.data_keys = {1: secrets.token_bytes(32)}
    async with rows(admin_dsn) as connection:
        # As a restore does: without triggers, or the tombstone would refuse the rows.
        await connection.execute("SET session_replication_role = replica")
        for table, kept in dump.items():
            for row in kept:
                restore = f"INSERT INTO inference.{table} SELECT * FROM jsonb_populate_record(NULL::inference.{table}, $1::text::jsonb)"
                await connection.execute(restore, row["row"])
    async with fresh_replica(world) as replica:
        with pytest.raises(MeshError) as caught:
            await turns(replica, sealing, conversation_id)
    assert caught.value.code is grpc.StatusCode.INTERNAL


async def test_each_tenants_calls_go_out_under_its_own_key(world: World, tenant: Tenant) -> None:
    """Two tenants with own keys and one without: each request carries the right key and no other, and its cost is recorded."""
    owners = [await world.new_tenant(provider_key=key) for key in OWN_KEYS]
    for who in (*owners, tenant):
        assert (await world.answer(who)).summary.cost.nano_usd > 0
    sent = [headers for name, headers in world.script.heard if name == "dispatch"]
    carried = [(headers.get("x-api-key"), headers.get("Authorization")) for headers in sent]
    assert carried == [(OWN_KEYS[0], None), (OWN_KEYS[1], None), (None, f"Bearer {PROVIDER_KEY}")]


async def test_a_refused_own_key_is_named_as_the_tenants(world: World) -> None:
    """The refusal says whose key it was, nothing is billed to the house's, and a corrected key works with the next call."""
    owner = await world.new_tenant(provider_key="revoked-at-the-provider")
    refusal = await world.refusal(owner)
    assert refusal.reason == error_reason_pb2.ERROR_REASON_PROVIDER_MISCONFIGURED
    assert (refusal.metadata["key_owner"], "PutProviderKey" in refusal.message) == ("tenant", True)
    owner.provider_key = OWN_KEYS[0]
    assert (await world.answer(owner)).text


async def test_no_own_key_to_be_had_means_no_call(world: World) -> None:
    """When the tenant's own key cannot be fetched the call is refused before anything is held, and never made under the house's key."""
    owner = await world.new_tenant(provider_key=OWN_KEYS[0])

    def away(_: object) -> None:
        raise MeshError(grpc.StatusCode.UNAVAILABLE, error_reason_pb2.ERROR_REASON_DEPENDENCY_UNAVAILABLE, "scripted")

    world.script.hooks["provider_key"] = away
    assert (await world.refusal(owner)).code is grpc.StatusCode.UNAVAILABLE
    assert world.script.names() == []
