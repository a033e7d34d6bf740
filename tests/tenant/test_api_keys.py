"""A tenant's keys: made with no more rights than the maker's, listed without secrets, revoked at once, invisible to others."""

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import grpc
import pytest

from mesh.common.v1 import error_reason_pb2
from mesh.tenant.v1 import api_key_service_pb2, tenant_service_pb2
from services.kernel.errors import MeshError
from services.kernel.paging import encode_page_token
from services.tenant.scopes import TENANT_SCOPES
from tests.tenant.harness import Harness, Metadata, call, refusal, taken_apart, with_key


async def make_key(harness: Harness, api_key: str, **fields: Any) -> api_key_service_pb2.CreateApiKeyResponse:
    """Makes a key as the holder of another one."""
    return await make_key_as(harness, with_key(api_key), **fields)


async def make_key_as(harness: Harness, metadata: Metadata, **fields: Any) -> api_key_service_pb2.CreateApiKeyResponse:
    """Makes a key with any credential."""
    request = api_key_service_pb2.CreateApiKeyRequest(**{"display_name": "back end", "scopes": ["tenant:read"], **fields})
    return await call(harness.keys.CreateApiKey, request, metadata)


async def revoke(harness: Harness, metadata: Metadata, key_id: str) -> api_key_service_pb2.ApiKey:
    """Revokes a key."""
    return (await call(harness.keys.RevokeApiKey, api_key_service_pb2.RevokeApiKeyRequest(key_id=key_id), metadata)).key


async def listed(harness: Harness, api_key: str, page_size: int = 0, token: str = "") -> api_key_service_pb2.ListApiKeysResponse:
    """One page of a tenant's keys."""
    request = api_key_service_pb2.ListApiKeysRequest(page_size=page_size, page_token=token)
    return await call(harness.keys.ListApiKeys, request, with_key(api_key))


async def test_a_new_key_works_with_its_scopes_and_no_others(harness: Harness) -> None:
    """The key proves its tenant, may do what it was made for, and is recorded in the audit log."""
    created = await harness.create()
    made = await make_key(harness, created.api_key, scopes=["tenant:read", "documents:read"])
    assert list(made.key.scopes) == ["documents:read", "tenant:read"]
    assert taken_apart(made.api_key).key_id == made.key.key_id
    answer = await call(harness.tenants.GetTenant, tenant_service_pb2.GetTenantRequest(), with_key(made.api_key))
    assert answer.tenant == created.tenant
    error = await refusal(listed(harness, made.api_key))
    assert error.reason == error_reason_pb2.ERROR_REASON_SCOPE_MISSING
    records = await harness.audit(created.tenant.tenant_id, "KEY_CREATED")
    assert [record["target"] for record in records][-1] == f"key:{made.key.key_id}"
    assert records[-1]["subject"] == f"key:{taken_apart(created.api_key).key_id}"


async def test_nobody_hands_out_a_scope_they_do_not_hold(harness: Harness) -> None:
    """A key with few scopes makes keys with no more; an operator makes none that spends money or acts as an operator."""
    created = await harness.create()
    narrow = (await make_key(harness, created.api_key, scopes=["tenant:admin", "tenant:read"])).api_key
    operator = harness.as_operator(created.tenant.tenant_id)
    for metadata, scope in (
        (with_key(narrow), "inference:generate"),
        (with_key(created.api_key), "operator:tenants"),
        (with_key(created.api_key), "made:up"),
        (operator, "inference:generate"),
        (operator, "operator:tenants"),
    ):
        error = await refusal(make_key_as(harness, metadata, scopes=["tenant:read", scope]))
        assert (error.code, error.reason) == (grpc.StatusCode.PERMISSION_DENIED, error_reason_pb2.ERROR_REASON_SCOPE_MISSING)
        assert error.metadata == {"scope": scope}
    assert len((await listed(harness, created.api_key)).keys) == 2


@pytest.mark.parametrize(
    "fields",
    [
        {"display_name": ""},
        {"display_name": "n" * 101},
        {"display_name": "a\x00b"},
        {"scopes": []},
        {"scopes": ["tenant:read", "tenant:read"]},
        {"scopes": ["not a scope"]},
        {"expire_time": datetime.now(UTC) - timedelta(seconds=1)},
    ],
)
async def test_a_bad_wish_for_a_key_is_refused(harness: Harness, fields: dict[str, Any]) -> None:
    """Nameless, overlong, scopeless, repeated, malformed and already expired keys are invalid requests."""
    created = await harness.create()
    assert (await refusal(make_key(harness, created.api_key, **fields))).code is grpc.StatusCode.INVALID_ARGUMENT
    assert len((await listed(harness, created.api_key)).keys) == 1


async def test_the_hundred_and_first_live_key_is_refused_even_in_a_race(harness: Harness) -> None:
    """A tenant has at most 100 live keys whoever makes them at once; revoking one makes room."""
    created = await harness.create()

    async def attempt() -> MeshError | None:
        try:
            await make_key(harness, created.api_key)
        except MeshError as error:
            return error
        return None

    await harness.execute(
        "INSERT INTO tenant.api_keys (tenant_id, key_id, secret_sha256, display_name, scopes) "
        "SELECT $1, 'filler' || lpad(n::text, 10, '0'), decode(repeat('ab', 32), 'hex'), 'filler', '{tenant:read}' "
        "FROM generate_series(1, 95) n",
        UUID(created.tenant.tenant_id),
    )
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(attempt()) for _ in range(8)]
    refused = [error for task in tasks if (error := task.result()) is not None]
    assert len(refused) == 4
    for error in refused:
        assert (error.code, error.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, error_reason_pb2.ERROR_REASON_PLAN_LIMIT)
        assert (error.metadata["limit"], error.metadata["used"], error.metadata["remaining"]) == ("100", "100", "0")
        assert error.quota_violations
    await revoke(harness, with_key(created.api_key), "filler0000000001")
    assert await attempt() is None


async def test_keys_are_listed_newest_first_and_never_with_secrets(harness: Harness) -> None:
    """Pages join to the whole list, revoked keys included, and no page holds a secret."""
    created = await harness.create()
    made = [await make_key(harness, created.api_key) for _ in range(4)]
    await revoke(harness, with_key(created.api_key), made[1].key.key_id)
    seen, token = [], ""
    while True:
        page = await listed(harness, created.api_key, 2, token)
        seen += list(page.keys)
        token = page.next_page_token
        if not token:
            break
    expected = [answer.key.key_id for answer in reversed(made)] + [taken_apart(created.api_key).key_id]
    assert [key.key_id for key in seen] == expected
    assert [key.HasField("revoke_time") for key in seen] == [False, False, True, False, False]
    text = str(seen)
    assert not any(taken_apart(answer.api_key).secret in text for answer in made)


@pytest.mark.parametrize(
    ("listing", "time"),
    [
        ("tenants", "2026-01-01T00:00:00+00:00"),
        ("api_keys", "yesterday"),
        ("api_keys", "2026-01-01T00:00:00"),
        ("api_keys", "0001-01-01T00:00:00+23:59"),
    ],
)
async def test_a_made_up_key_page_token_is_refused(harness: Harness, listing: str, time: str) -> None:
    """Tokens of another list or without a real time are invalid requests."""
    created = await harness.create()
    token = encode_page_token(listing, [time, "y"])
    assert (await refusal(listed(harness, created.api_key, 2, token))).code is grpc.StatusCode.INVALID_ARGUMENT


async def test_a_revoked_key_is_dead_at_the_next_question(harness: Harness) -> None:
    """Revocation is idempotent, recorded once, and holds from the next Authenticate."""
    created = await harness.create()
    made = await make_key(harness, created.api_key)
    await harness.authenticate(made.api_key)
    first = await revoke(harness, with_key(created.api_key), made.key.key_id)
    again = await revoke(harness, with_key(created.api_key), made.key.key_id)
    assert first.revoke_time == again.revoke_time
    assert (await refusal(harness.authenticate(made.api_key))).reason == error_reason_pb2.ERROR_REASON_CREDENTIAL_INVALID
    records = await harness.audit(created.tenant.tenant_id, "KEY_REVOKED")
    assert [record["target"] for record in records] == [f"key:{made.key.key_id}"]


async def test_another_tenants_key_is_as_absent_as_one_that_never_was(harness: Harness) -> None:
    """Revoking a foreign key id answers exactly as an unknown one, and the foreign key goes on working."""
    one, other = await harness.create(), await harness.create()
    foreign = await refusal(revoke(harness, with_key(one.api_key), taken_apart(other.api_key).key_id))
    absent = await refusal(revoke(harness, with_key(one.api_key), "aaaaaaaaaaaaaaaa"))
    assert foreign.code is grpc.StatusCode.NOT_FOUND
    assert (foreign.reason, foreign.message, foreign.metadata) == (absent.reason, absent.message, absent.metadata)
    assert (await harness.authenticate(other.api_key)).context_token
    assert {key.key_id for key in (await listed(harness, one.api_key)).keys} == {taken_apart(one.api_key).key_id}


async def test_a_malformed_key_id_is_refused_by_its_contract(harness: Harness) -> None:
    """Key ids have 16 lower-case characters."""
    created = await harness.create()
    error = await refusal(revoke(harness, with_key(created.api_key), "nope"))
    assert error.code is grpc.StatusCode.INVALID_ARGUMENT


async def test_the_first_key_holds_every_tenant_scope(harness: Harness) -> None:
    """A tenant starts with one key that may do all a tenant may."""
    created = await harness.create()
    [key] = (await listed(harness, created.api_key)).keys
    assert set(key.scopes) == TENANT_SCOPES
