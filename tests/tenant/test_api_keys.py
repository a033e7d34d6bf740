"""A tenant's keys: made with no more rights than the maker's, listed without secrets, revoked at once, invisible to others."""

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import grpc
import pytest

from mesh.common.v1 import error_reason_pb2
from mesh.tenant.v1 import api_key_service_pb2, tenant_service_pb2
from services.kernel.errors import MeshError
from services.kernel.paging import encode_page_token
from services.tenant.api_key import ApiKeyText
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


async def rotate(harness: Harness, metadata: Metadata, key_id: str, **fields: Any) -> api_key_service_pb2.RotateApiKeyResponse:
    """Rotates a key."""
    request = api_key_service_pb2.RotateApiKeyRequest(**{"key_id": key_id, "request_id": str(uuid4()), **fields})
    return await call(harness.keys.RotateApiKey, request, metadata)


async def test_a_rotated_key_and_its_successor_work_until_the_overlap_ends(harness: Harness) -> None:
    """The successor has the same name, scopes and networks and the plan's tier of now; the old key ends when the overlap does."""
    created = await harness.create()
    old = await make_key(harness, created.api_key, scopes=["tenant:read", "usage:read"], allowed_cidrs=["192.0.2.0/24"])
    await harness.execute("UPDATE tenant.tenants SET plan = 'enterprise' WHERE tenant_id = $1", UUID(created.tenant.tenant_id))
    answer = await rotate(harness, with_key(created.api_key), old.key.key_id)
    assert (answer.key.display_name, answer.key.scopes, answer.key.allowed_cidrs) == ("back end", old.key.scopes, ["192.0.2.0/24"])
    assert not answer.key.HasField("expire_time")
    assert taken_apart(answer.api_key).tier == "enterprise"
    assert (answer.replaced.replaced_by, answer.key.replaced_by) == (answer.key.key_id, "")
    overlap = answer.replaced.expire_time.ToDatetime() - answer.key.create_time.ToDatetime()
    assert abs(overlap - timedelta(days=1)) < timedelta(seconds=5)
    for text in (old.api_key, answer.api_key):
        assert (await harness.authenticate(text)).context_token
    await harness.execute("UPDATE tenant.api_keys SET expire_time = now() WHERE key_id = $1", old.key.key_id)
    assert (await refusal(harness.authenticate(old.api_key))).reason == error_reason_pb2.ERROR_REASON_CREDENTIAL_EXPIRED
    assert (await harness.authenticate(answer.api_key)).context_token
    tenant_id = created.tenant.tenant_id
    assert [record["target"] for record in await harness.audit(tenant_id, "KEY_ROTATED")] == [f"key:{old.key.key_id}"]
    assert await harness.value("SELECT count(*) FROM tenant.changes WHERE tenant_id = $1 AND kind = 'KEY'", UUID(tenant_id)) == 1


async def test_an_overlap_never_lengthens_a_keys_life(harness: Harness) -> None:
    """A key that ends before the overlap keeps its own end; its successor lives as long as it was made to; 0 ends it at once."""
    created = await harness.create()
    end = datetime.now(UTC) + timedelta(hours=1)
    old = await make_key(harness, created.api_key, expire_time=end)
    answer = await rotate(harness, with_key(created.api_key), old.key.key_id, overlap_seconds=604_800)
    assert answer.replaced.expire_time == old.key.expire_time
    lived = answer.key.expire_time.ToDatetime(tzinfo=UTC) - answer.key.create_time.ToDatetime(tzinfo=UTC)
    assert abs(lived - timedelta(hours=1)) < timedelta(seconds=30)
    await rotate(harness, with_key(created.api_key), answer.key.key_id, overlap_seconds=0)
    assert (await refusal(harness.authenticate(answer.api_key))).reason == error_reason_pb2.ERROR_REASON_CREDENTIAL_EXPIRED


async def test_a_repeated_rotation_makes_no_second_successor(harness: Harness) -> None:
    """The same wish answers the same key: with a new text while it was never used, which ends the lost one, and without one afterwards."""
    created = await harness.create()
    old = await make_key(harness, created.api_key)
    metadata, wish = with_key(created.api_key), {"request_id": str(uuid4()), "overlap_seconds": 60}
    lost = await rotate(harness, metadata, old.key.key_id, **wish)
    again = await rotate(harness, metadata, old.key.key_id, **wish)
    assert again.key.key_id == lost.key.key_id
    assert again.replaced == lost.replaced
    assert (await refusal(harness.authenticate(lost.api_key))).reason == error_reason_pb2.ERROR_REASON_CREDENTIAL_INVALID
    assert (await harness.authenticate(again.api_key)).context_token
    # The text that was handed out last ended the one before it: that is a change of who may come in, and on record as one.
    [record] = await harness.audit(created.tenant.tenant_id, "KEY_TEXT_REPLACED")
    assert (record["target"], record["subject"]) == (f"key:{lost.key.key_id}", f"key:{taken_apart(created.api_key).key_id}")
    used = await rotate(harness, metadata, old.key.key_id, **wish)
    assert len(await harness.audit(created.tenant.tenant_id, "KEY_TEXT_REPLACED")) == 1
    assert (used.key.key_id, used.api_key) == (lost.key.key_id, "")
    assert (await harness.authenticate(again.api_key)).context_token
    error = await refusal(rotate(harness, metadata, old.key.key_id, **{**wish, "overlap_seconds": 61}))
    assert error.reason == error_reason_pb2.ERROR_REASON_CONTENT_CONFLICT
    assert len((await listed(harness, created.api_key)).keys) == 3


async def test_only_a_live_key_of_ones_own_is_rotated(harness: Harness) -> None:
    """Revoked, ended and replaced keys are WRONG_STATE with that state; another tenant's is as absent as one that never was."""
    created, other = await harness.create(), await harness.create()
    metadata = with_key(created.api_key)
    made = [await make_key(harness, created.api_key) for _ in range(3)]
    await revoke(harness, metadata, made[0].key.key_id)
    await harness.execute("UPDATE tenant.api_keys SET expire_time = now() WHERE key_id = $1", made[1].key.key_id)
    await rotate(harness, metadata, made[2].key.key_id)
    for key, state in zip(made, ("REVOKED", "EXPIRED", "REPLACED"), strict=True):
        error = await refusal(rotate(harness, metadata, key.key.key_id))
        assert (error.reason, error.metadata["state"]) == (error_reason_pb2.ERROR_REASON_WRONG_STATE, state)
    foreign = await refusal(rotate(harness, metadata, taken_apart(other.api_key).key_id))
    absent = await refusal(rotate(harness, metadata, "aaaaaaaaaaaaaaaa"))
    assert foreign.code is grpc.StatusCode.NOT_FOUND
    assert (foreign.reason, foreign.message, foreign.metadata) == (absent.reason, absent.message, absent.metadata)


async def test_nobody_rotates_their_way_to_a_scope(harness: Harness) -> None:
    """The successor's text is worth its scopes, so who does not hold them cannot have it: a narrow key, or an operator."""
    created = await harness.create()
    narrow = (await make_key(harness, created.api_key, scopes=["tenant:admin"])).api_key
    first = taken_apart(created.api_key).key_id
    for metadata in (with_key(narrow), harness.as_operator(created.tenant.tenant_id)):
        error = await refusal(rotate(harness, metadata, first))
        assert error.reason == error_reason_pb2.ERROR_REASON_SCOPE_MISSING
    assert (await harness.authenticate(created.api_key)).context_token


async def test_a_full_ring_rotates_without_an_overlap_only(harness: Harness) -> None:
    """Up to 100 live keys are made and listed page by page, one more is PLAN_LIMIT, also as a successor beside its predecessor."""
    created = await harness.create()
    made = [await make_key(harness, created.api_key) for _ in range(99)]
    error = await refusal(make_key(harness, created.api_key))
    assert (error.reason, error.metadata["rule"]) == (error_reason_pb2.ERROR_REASON_PLAN_LIMIT, "live_api_keys")
    metadata = with_key(created.api_key)
    error = await refusal(rotate(harness, metadata, made[0].key.key_id, overlap_seconds=60))
    assert (error.reason, error.metadata["rule"]) == (error_reason_pb2.ERROR_REASON_PLAN_LIMIT, "live_api_keys")
    assert (await harness.authenticate(made[0].api_key)).context_token
    await rotate(harness, metadata, made[0].key.key_id, overlap_seconds=0)
    seen, token = list[str](), ""
    while True:
        page = await listed(harness, created.api_key, 40, token)
        seen, token = seen + [key.key_id for key in page.keys], page.next_page_token
        if not token:
            break
    assert (len(seen), len(set(seen))) == (101, 101)


@pytest.mark.parametrize(
    ("cidrs", "inside", "outside"),
    [
        (["192.0.2.0/24"], ["192.0.2.0", "192.0.2.255", "::ffff:192.0.2.7"], ["192.0.3.0", "", "unix", "::192.0.2.7", "2001:db8::1"]),
        (["192.0.2.7/32", "2001:db8::/48"], ["192.0.2.7", "2001:db8::1", "2001:DB8:0:ffff::"], ["192.0.2.8", "2001:db8:1::", "::1"]),
        (["::ffff:192.0.2.0/120"], ["192.0.2.9", "::ffff:192.0.2.9"], ["192.0.3.9"]),
        (["::/0"], ["2001:db8::1"], ["192.0.2.7", "::ffff:192.0.2.7", ""]),
        (["0.0.0.0/0"], ["192.0.2.7", "::ffff:192.0.2.7"], ["2001:db8::1", ""]),
        ([], ["192.0.2.7", "", "unix"], []),
    ],
)
async def test_a_key_is_used_from_its_networks_only(harness: Harness, cidrs: list[str], inside: list[str], outside: list[str]) -> None:
    """Elsewhere, and from an unknown address, it is refused as a wrong key is; the refusal is on record with the address."""
    created = await harness.create()
    made = await make_key(harness, created.api_key, allowed_cidrs=cidrs)
    own = taken_apart(made.api_key)
    wrong = str(ApiKeyText(own.tier, own.key_id, own.secret[::-1]))
    plain = await refusal(harness.authenticate(wrong))
    for address in outside:
        error = await refusal(harness.authenticate(made.api_key, peer_address=address))
        assert (error.code, error.reason, error.message, error.metadata) == (plain.code, plain.reason, plain.message, plain.metadata)
    records = await harness.audit(created.tenant.tenant_id, "KEY_USE_REFUSED")
    assert {(record["subject"], record["peer_address"]) for record in records} == {(f"key:{own.key_id}", address) for address in outside}
    [key] = [key for key in (await listed(harness, created.api_key)).keys if key.key_id == own.key_id]
    assert not key.HasField("last_use_time")
    for address in inside:
        assert (await harness.authenticate(made.api_key, peer_address=address)).context_token
    [key] = [key for key in (await listed(harness, created.api_key)).keys if key.key_id == own.key_id]
    assert key.HasField("last_use_time")


async def test_a_key_outside_its_networks_is_not_told_that_it_ended(harness: Harness) -> None:
    """The end of a key, or its tenant's suspension, is told to who may use it, and to nobody elsewhere."""
    created = await harness.create()
    made = await make_key(harness, created.api_key, allowed_cidrs=["198.51.100.0/24"])
    await harness.execute("UPDATE tenant.api_keys SET expire_time = now() WHERE key_id = $1", made.key.key_id)
    assert (await refusal(harness.authenticate(made.api_key))).reason == error_reason_pb2.ERROR_REASON_CREDENTIAL_INVALID
    error = await refusal(harness.authenticate(made.api_key, peer_address="198.51.100.9"))
    assert error.reason == error_reason_pb2.ERROR_REASON_CREDENTIAL_EXPIRED


async def test_a_service_is_asked_from_the_callers_own_address(harness: Harness) -> None:
    """The tenant service's own entrance holds the list against who really connected."""
    created = await harness.create()
    here = await make_key(harness, created.api_key, allowed_cidrs=["127.0.0.0/8"])
    elsewhere = await make_key(harness, created.api_key, allowed_cidrs=["192.0.2.0/24"])
    read = tenant_service_pb2.GetTenantRequest()
    assert (await call(harness.tenants.GetTenant, read, with_key(here.api_key))).tenant == created.tenant
    error = await refusal(call(harness.tenants.GetTenant, read, with_key(elsewhere.api_key)))
    assert error.reason == error_reason_pb2.ERROR_REASON_CREDENTIAL_INVALID


@pytest.mark.parametrize(
    "cidr",
    [
        "192.0.2.1/24",
        "192.0.2.0",
        "192.0.2.0/33",
        "192.0.2.0/255.255.255.0",
        "192.0.2.0/0.0.0.255",
        "192.0.2/24",
        "192.0.02.0/24",
        "2001:db8::1/48",
        "2001:db8::/129",
        "fe80::%eth0/64",
        " 192.0.2.0/24",
        "192.0.2.0/+24",
        "١٩٢.0.2.0/24",
        "example.com/24",
        "",
        "/0",
    ],
)
async def test_a_malformed_network_is_refused_by_its_place(harness: Harness, cidr: str) -> None:
    """Only the strict form is taken; the refusal names the item, and no key is made."""
    created = await harness.create()
    error = await refusal(make_key(harness, created.api_key, allowed_cidrs=["192.0.2.0/24", cidr]))
    assert (error.code, error.metadata["field"]) == (grpc.StatusCode.INVALID_ARGUMENT, "allowed_cidrs[1]")
    assert len((await listed(harness, created.api_key)).keys) == 1


async def test_networks_are_kept_once_and_at_most_twenty(harness: Harness) -> None:
    """Twenty fit, spellings of one network are one, and the twenty-first is refused."""
    created = await harness.create()
    many = [f"10.{number}.0.0/16" for number in range(20)]
    made = await make_key(harness, created.api_key, allowed_cidrs=many)
    assert list(made.key.allowed_cidrs) == many
    made = await make_key(harness, created.api_key, allowed_cidrs=["2001:DB8:0::/48", "2001:db8::/48", "::ffff:10.0.0.0/104", "10.0.0.0/8"])
    assert list(made.key.allowed_cidrs) == ["2001:db8::/48", "10.0.0.0/8"]
    error = await refusal(make_key(harness, created.api_key, allowed_cidrs=[*many, "10.99.0.0/16"]))
    assert (error.code, error.metadata["field"]) == (grpc.StatusCode.INVALID_ARGUMENT, "allowed_cidrs")
