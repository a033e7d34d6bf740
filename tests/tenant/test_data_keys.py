"""A tenant's data keys: made on need, handed to two services, rotated, rewrapped, destroyed for good; and the secrets sealed with them."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from uuid import UUID

import asyncpg
import grpc
import pytest
from pydantic import SecretStr

from mesh.common.v1 import error_reason_pb2, lifecycle_service_pb2
from mesh.tenant.v1 import data_key_service_pb2, data_key_service_pb2_grpc, secret_service_pb2
from services.kernel.sealing import TenantKeys, row_identity
from services.tenant.app import build
from tests.tenant.harness import Harness, Metadata, as_service, call, new_master_key, refusal, with_key

GET_KEYS = data_key_service_pb2.GetDataKeysRequest()
GET_PROVIDER_KEY = secret_service_pb2.GetProviderKeyRequest()
OWN_KEY = "sk-ant-own-key-of-this-tenant"


class Owner:
    """A tenant and what its callers and the services carry for it."""

    def __init__(self, harness: Harness, tenant_id: str, api_key: str, token: str) -> None:
        self.harness, self.tenant_id, self.api_key, self.token = harness, tenant_id, api_key, token

    @classmethod
    async def new(cls, harness: Harness) -> "Owner":
        created = await harness.create()
        token = (await harness.authenticate(created.api_key)).context_token
        return cls(harness, created.tenant.tenant_id, created.api_key, token)

    def by(self, service: str) -> Metadata:
        return as_service(service, self.token)

    async def keys(self, service: str = "retrieval") -> list[data_key_service_pb2.DataKey]:
        return list((await call(self.harness.data_keys.GetDataKeys, GET_KEYS, self.by(service))).keys)

    async def rotate(self) -> data_key_service_pb2.RotateDataKeyResponse:
        request = data_key_service_pb2.RotateDataKeyRequest(tenant_id=self.tenant_id)
        return await call(self.harness.data_keys.RotateDataKey, request, self.harness.as_operator())

    async def put_provider_key(self, text: str = OWN_KEY) -> secret_service_pb2.ProviderKeyInfo:
        request = secret_service_pb2.PutProviderKeyRequest(api_key=text)
        return (await call(self.harness.secrets.PutProviderKey, request, with_key(self.api_key))).info

    async def provider_key(self) -> str:
        return (await call(self.harness.secrets.GetProviderKey, GET_PROVIDER_KEY, self.by("inference"))).api_key

    async def erase(self) -> dict[str, int]:
        answer = await call(self.harness.lifecycle.EraseTenant, lifecycle_service_pb2.EraseTenantRequest(), self.by("tenant"))
        return {item.kind: item.count for item in answer.erased}


@pytest.fixture
async def owner(harness: Harness) -> Owner:
    """A tenant of the test's own."""
    return await Owner.new(harness)


async def stored(harness: Harness, sql: str, *args: object) -> list[asyncpg.Record]:
    """Rows of the key store, past every policy."""
    connection = await asyncpg.connect(harness.settings.key_store_admin_dsn.get_secret_value())
    try:
        return list(await connection.fetch(sql, *args))
    finally:
        await connection.close()


async def test_the_first_need_makes_one_key_for_all_who_ask(owner: Owner) -> None:
    """Many first questions at once get the same single active key of 32 bytes; another tenant's is another."""
    async with asyncio.TaskGroup() as group:
        asked = [group.create_task(owner.keys()) for _ in range(8)]
    assert len({(len(task.result()), task.result()[0].key) for task in asked}) == 1
    [key] = await owner.keys("inference")
    assert (key.version, len(key.key), key.active) == (1, 32, True)
    assert (await (await Owner.new(owner.harness)).keys())[0].key != key.key


async def test_a_stored_key_is_wrapped_and_bound_to_its_tenant(owner: Owner) -> None:
    """The key store holds no key as such, and a wrapping moved to another tenant's row does not open and is on record."""
    [key] = await owner.keys()
    thief = await Owner.new(owner.harness)
    await thief.keys()
    [row] = await stored(owner.harness, "SELECT wrapped_key FROM tenant_keys.data_keys WHERE tenant_id = $1", UUID(owner.tenant_id))
    assert key.key not in row["wrapped_key"]
    await stored(
        owner.harness,
        "UPDATE tenant_keys.data_keys SET wrapped_key = $2 WHERE tenant_id = $1 RETURNING 1",
        UUID(thief.tenant_id),
        row["wrapped_key"],
    )
    assert (await refusal(thief.keys())).code is grpc.StatusCode.INTERNAL
    [record] = await owner.harness.audit(thief.tenant_id, "KEY_USE_FAILED")
    assert record["target"] == "data_key:1"


@pytest.mark.parametrize("service", ["tenant", "ratelimit", "metering"])
async def test_other_services_get_no_keys(owner: Owner, service: str) -> None:
    """A service that seals nothing is CALLER_NOT_ALLOWED, with the tenant's real token too; so is the tenant itself."""
    for metadata in (owner.by(service), with_key(owner.api_key), owner.harness.as_operator(owner.tenant_id)):
        for asked in (
            call(owner.harness.data_keys.GetDataKeys, GET_KEYS, metadata),
            call(owner.harness.secrets.GetProviderKey, GET_PROVIDER_KEY, metadata),
        ):
            assert (await refusal(asked)).reason == error_reason_pb2.ERROR_REASON_CALLER_NOT_ALLOWED


async def test_retrieval_gets_no_provider_key(owner: Owner) -> None:
    """The key of the provider's account is inference's alone."""
    error = await refusal(call(owner.harness.secrets.GetProviderKey, GET_PROVIDER_KEY, owner.by("retrieval")))
    assert error.reason == error_reason_pb2.ERROR_REASON_CALLER_NOT_ALLOWED


async def test_a_rotation_makes_a_new_key_and_retires_the_old(owner: Owner) -> None:
    """After a rotation one key is left, another one; every peer was asked until it was done; secrets still open; it is on record."""
    await owner.put_provider_key()
    [before] = await owner.keys()
    peer = owner.harness.peers["retrieval"]
    peer.pages_left = 3
    rotated = await owner.rotate()
    [after] = await owner.keys()
    assert (rotated.active_version, rotated.resealed_count) == (2, 4)
    assert (after.version, after.active) == (2, True)
    assert after.key != before.key
    assert peer.reencrypted == [2, 2, 2]
    assert await owner.provider_key() == OWN_KEY
    assert [record["target"] for record in await owner.harness.audit(owner.tenant_id, "DATA_KEY_ROTATED")] == ["data_key:2"]
    kinds = await owner.harness.value(
        "SELECT count(*) FROM tenant.changes WHERE tenant_id = $1 AND kind = 'DATA_KEY'", UUID(owner.tenant_id)
    )
    assert kinds >= 2


async def test_a_rotation_that_stopped_half_way_goes_on(owner: Owner) -> None:
    """While a peer is away both keys stay readable; asked again, the same rotation ends and no third key was made."""
    await owner.put_provider_key()
    owner.harness.peers["inference"].failures += [grpc.StatusCode.FAILED_PRECONDITION]
    assert (await refusal(owner.rotate())).code is grpc.StatusCode.FAILED_PRECONDITION
    assert [(key.version, key.active) for key in await owner.keys()] == [(1, False), (2, True)]
    assert await owner.provider_key() == OWN_KEY
    assert (await owner.rotate()).active_version == 2
    assert [key.version for key in await owner.keys()] == [2]


async def test_writers_of_secrets_and_a_rotation_lose_nothing(owner: Owner) -> None:
    """Keys put while rotations run always open afterwards: no write is left under a key that was retired."""
    await owner.put_provider_key()
    for number in range(3):
        async with asyncio.TaskGroup() as group:
            group.create_task(owner.rotate())
            for writer in range(4):
                group.create_task(owner.put_provider_key(f"sk-ant-{number}-{writer}"))
        assert (await owner.provider_key()).startswith(f"sk-ant-{number}-")


async def test_destroyed_keys_never_come_back(owner: Owner) -> None:
    """Erasing destroys every version; the id gets no new key, also for a token that is still alive; it is on record, once."""
    await owner.put_provider_key()
    await owner.keys()
    assert (await owner.erase())["key_store:tenant_keys.data_keys"] == 1
    assert (await owner.erase())["key_store:tenant_keys.data_keys"] == 0
    error = await refusal(owner.keys())
    assert (error.reason, error.metadata["state"]) == (error_reason_pb2.ERROR_REASON_WRONG_STATE, "DESTROYED")
    assert len(await owner.harness.audit(owner.tenant_id, "DATA_KEY_DESTROYED")) == 1
    assert await stored(owner.harness, "SELECT 1 FROM tenant_keys.data_keys WHERE tenant_id = $1", UUID(owner.tenant_id)) == []


async def test_a_backup_of_the_data_is_unreadable_after_erasure(owner: Owner) -> None:
    """Rows copied before the erasure and put back after it do not open, although the master key is still there."""
    await owner.put_provider_key()
    keys = TenantKeys.of(UUID(owner.tenant_id), {1: (await owner.keys())[0].key}, 1)  # type: ignore[arg-type] # an id is a UUID
    tables = ("tenants", "provider_keys")
    read = "SELECT to_jsonb(t)::text FROM tenant.{} t WHERE tenant_id = $1"
    backup = [await owner.harness.value(read.format(table), UUID(owner.tenant_id)) for table in tables]
    sealed = await owner.harness.value("SELECT sealed_key FROM tenant.provider_keys WHERE tenant_id = $1", UUID(owner.tenant_id))
    assert keys.open(sealed, row_identity("tenant.secret", "provider_key")).decode() == OWN_KEY
    await owner.erase()
    for table, row in zip(tables, backup, strict=True):
        await owner.harness.execute(
            f"INSERT INTO tenant.{table} SELECT * FROM jsonb_populate_record(NULL::tenant.{table}, $1::text::jsonb)", row
        )
    restored = await owner.harness.value("SELECT sealed_key FROM tenant.provider_keys WHERE tenant_id = $1", UUID(owner.tenant_id))
    assert restored == sealed
    assert (await refusal(owner.provider_key())).metadata["state"] == "DESTROYED"


@asynccontextmanager
async def with_master_keys(owner: Owner, master_keys: str) -> AsyncIterator[data_key_service_pb2_grpc.DataKeyServiceStub]:
    """Another replica on the same stores, with other master keys."""
    app = await build(owner.harness.settings.model_copy(update={"master_keys": SecretStr(master_keys)}))
    await app.server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{app.server.bound_port}") as channel:
            yield data_key_service_pb2_grpc.DataKeyServiceStub(channel)
    finally:
        await app.server.stop()
        await app.close()


async def rewrap_all(stub: Any, owner: Owner) -> None:
    """Asks for page after page."""
    token = ""
    while True:
        request = data_key_service_pb2.RewrapDataKeysRequest(page_token=token)
        token = (await call(stub.RewrapDataKeys, request, owner.harness.as_operator())).next_page_token
        if not token:
            return


async def test_rewrapping_moves_every_key_to_the_first_master_key(owner: Owner) -> None:
    """With a new first master key a rewrap leaves the old one nothing, the data keys stay the same, and the old one may go."""
    [before] = await owner.keys()
    old, new = owner.harness.settings.master_keys.get_secret_value(), new_master_key("second")
    wrapped_by = "SELECT master_key_id FROM tenant_keys.data_keys WHERE tenant_id = $1"
    async with with_master_keys(owner, f"{new},{old}") as stub:
        await rewrap_all(stub, owner)
        assert [row[0] for row in await stored(owner.harness, wrapped_by, UUID(owner.tenant_id))] == ["second"]
    async with with_master_keys(owner, new) as stub:
        assert [key.key for key in (await call(stub.GetDataKeys, GET_KEYS, owner.by("inference"))).keys] == [before.key]
    # The session's own service knows the old master key alone.
    async with with_master_keys(owner, f"{old},{new}") as stub:
        await rewrap_all(stub, owner)
    assert [key.key for key in await owner.keys()] == [before.key]


async def test_a_missing_master_key_is_named(owner: Owner) -> None:
    """A key whose master key is not configured is refused with the master key's name, and nothing is overwritten."""
    await owner.keys()
    async with with_master_keys(owner, new_master_key("stranger")) as stub:
        error = await refusal(call(stub.GetDataKeys, GET_KEYS, owner.by("inference")))
    assert (error.reason, error.metadata["resource"]) == (error_reason_pb2.ERROR_REASON_WRONG_STATE, "master_key")
    assert "first" in error.message
    assert len(await owner.keys()) == 1


async def test_a_provider_key_goes_in_and_never_comes_out(owner: Owner) -> None:
    """Its owner sees a fingerprint and a time; inference gets the key; the export and the raw row hold neither; deleting ends it."""
    empty = await refusal(
        call(owner.harness.secrets.GetProviderKeyInfo, secret_service_pb2.GetProviderKeyInfoRequest(), with_key(owner.api_key))
    )
    assert empty.code is grpc.StatusCode.NOT_FOUND
    assert await owner.provider_key() == ""
    info = await owner.put_provider_key()
    told = await call(owner.harness.secrets.GetProviderKeyInfo, secret_service_pb2.GetProviderKeyInfoRequest(), with_key(owner.api_key))
    assert told.info == info
    assert len(info.fingerprint) == 16
    assert await owner.provider_key() == OWN_KEY
    stream = owner.harness.lifecycle.ExportTenant(lifecycle_service_pb2.ExportTenantRequest(), metadata=owner.by("tenant"), timeout=10)
    exported = [(item.kind, item.record_json) async for item in stream]
    assert "postgres:tenant.provider_keys" in {kind for kind, _ in exported}
    assert not [record for _, record in exported if OWN_KEY.encode() in record or b"sealed_key" in record]
    row = await owner.harness.value("SELECT to_jsonb(p)::text FROM tenant.provider_keys p WHERE tenant_id = $1", UUID(owner.tenant_id))
    assert OWN_KEY not in row
    assert OWN_KEY.encode().hex() not in row
    for _ in range(2):
        await call(owner.harness.secrets.DeleteProviderKey, secret_service_pb2.DeleteProviderKeyRequest(), with_key(owner.api_key))
    assert await owner.provider_key() == ""
    assert len(await owner.harness.audit(owner.tenant_id, "PROVIDER_KEY_DELETED")) == 1


async def test_a_sealed_secret_moved_to_another_tenant_does_not_open(owner: Owner) -> None:
    """A row swapped between two tenants is INTERNAL for its reader and KEY_USE_FAILED on record; the key is not handed out."""
    thief = await Owner.new(owner.harness)
    await owner.put_provider_key()
    await thief.put_provider_key("sk-ant-of-the-thief")
    stolen = "(SELECT sealed_key FROM tenant.provider_keys WHERE tenant_id = $1)"
    move = f"UPDATE tenant.provider_keys SET sealed_key = {stolen} WHERE tenant_id = $2"
    await owner.harness.execute(move, UUID(owner.tenant_id), UUID(thief.tenant_id))
    error = await refusal(thief.provider_key())
    assert (error.code, OWN_KEY in error.message) == (grpc.StatusCode.INTERNAL, False)
    [record] = await owner.harness.audit(thief.tenant_id, "KEY_USE_FAILED")
    assert record["target"] == "secret:provider_key"
    assert await owner.provider_key() == OWN_KEY


async def test_the_key_stores_role_sees_one_tenant_at_a_time(owner: Owner) -> None:
    """Row-level security holds in the key store: no tenant set is an error, another tenant's keys are no rows, tombstones stay."""
    await owner.keys()
    connection = await asyncpg.connect(owner.harness.settings.key_store_dsn.get_secret_value())
    try:
        with pytest.raises(asyncpg.UndefinedObjectError):
            await connection.fetch("SELECT 1 FROM tenant_keys.data_keys")
        async with connection.transaction():
            await connection.execute("SELECT set_config('app.tenant_id', '01900000-0000-7000-8000-000000000000', true)")
            for sql in ("SELECT 1 FROM tenant_keys.data_keys", "UPDATE tenant_keys.data_keys SET version = version RETURNING 1"):
                assert await connection.fetch(sql) == []
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await connection.execute("DELETE FROM tenant_keys.destroyed_tenants")
    finally:
        await connection.close()
