"""Changing a key that is there: its name, its end and its networks, by whoever may, and in force at the next question."""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import grpc
import pytest
from google.protobuf.field_mask_pb2 import FieldMask

from mesh.common.v1 import error_reason_pb2
from mesh.tenant.v1 import api_key_service_pb2
from services.kernel.errors import MeshError
from tests.tenant.harness import Harness, Metadata, call, refusal, taken_apart, with_key
from tests.tenant.test_api_keys import listed, make_key, revoke, rotate

NARROW = ["tenant:admin", "tenant:read"]


async def change(harness: Harness, metadata: Metadata, key_id: str, *paths: str, **fields: Any) -> api_key_service_pb2.UpdateApiKeyResponse:
    """Changes what the paths name of a key; without paths what the fields name."""
    mask = FieldMask(paths=paths or list(fields))
    request = api_key_service_pb2.UpdateApiKeyRequest(key_id=key_id, update_mask=mask, **fields)
    return await call(harness.keys.UpdateApiKey, request, metadata)


async def test_a_network_is_added_to_a_key_that_is_in_use(harness: Harness) -> None:
    """The key's text stays, it works from the new network at the next question, and no longer from one that was taken away."""
    created = await harness.create()
    made = await make_key(harness, created.api_key, allowed_cidrs=["192.0.2.0/24"])
    metadata, key_id = with_key(created.api_key), made.key.key_id
    assert (await harness.authenticate(made.api_key)).context_token
    assert isinstance(await refusal(harness.authenticate(made.api_key, peer_address="198.51.100.9")), MeshError)
    answer = await change(harness, metadata, key_id, allowed_cidrs=["192.0.2.0/24", "198.51.100.0/24"])
    assert (list(answer.key.allowed_cidrs), list(answer.changed_paths)) == (["192.0.2.0/24", "198.51.100.0/24"], ["allowed_cidrs"])
    for address in ("192.0.2.7", "198.51.100.9"):
        assert (await harness.authenticate(made.api_key, peer_address=address)).context_token
    await change(harness, metadata, key_id, allowed_cidrs=["198.51.100.0/24"])
    assert (await refusal(harness.authenticate(made.api_key))).reason == error_reason_pb2.ERROR_REASON_CREDENTIAL_INVALID
    await change(harness, metadata, key_id, "allowed_cidrs")
    assert (await harness.authenticate(made.api_key, peer_address="2001:db8::1")).context_token


async def test_only_what_the_mask_names_is_changed(harness: Harness) -> None:
    """Fields beside the mask are not looked at; a named and empty one takes the key's end or networks away."""
    created = await harness.create()
    end = datetime.now(UTC) + timedelta(hours=1)
    made = await make_key(harness, created.api_key, expire_time=end, allowed_cidrs=["192.0.2.0/24"])
    metadata, key_id = with_key(created.api_key), made.key.key_id
    renamed = await change(harness, metadata, key_id, "display_name", display_name="front end", allowed_cidrs=["10.0.0.0/8"])
    assert renamed.key.display_name == "front end"
    assert (renamed.key.expire_time, renamed.key.allowed_cidrs) == (made.key.expire_time, made.key.allowed_cidrs)
    endless = await change(harness, metadata, key_id, "expire_time")
    assert not endless.key.HasField("expire_time")
    sooner = datetime.now(UTC) + timedelta(minutes=5)
    bounded = await change(harness, metadata, key_id, expire_time=sooner)
    assert abs(bounded.key.expire_time.ToDatetime(tzinfo=UTC) - sooner) < timedelta(milliseconds=1)
    [kept] = [key for key in (await listed(harness, created.api_key)).keys if key.key_id == key_id]
    assert kept.scopes == made.key.scopes
    assert (kept.display_name, kept.expire_time) == ("front end", bounded.key.expire_time)


async def test_a_change_is_audited_without_words_and_announced_and_a_repetition_is_not(harness: Harness) -> None:
    """The record names the key, who changed it and which fields; every replica is told; the same wish again leaves no trace."""
    created = await harness.create()
    made = await make_key(harness, created.api_key)
    tenant_id, announced = created.tenant.tenant_id, "SELECT count(*) FROM tenant.changes WHERE tenant_id = $1 AND kind = 'KEY'"
    before = await harness.value(announced, UUID(tenant_id))
    wish = {"display_name": "heron's own", "allowed_cidrs": ["192.0.2.0/24"]}
    first = await change(harness, with_key(created.api_key), made.key.key_id, **wish)
    again = await change(harness, with_key(created.api_key), made.key.key_id, **wish)
    assert (again.key, list(again.changed_paths)) == (first.key, [])
    [record] = await harness.audit(tenant_id, "KEY_CHANGED")
    assert (record["target"], record["subject"]) == (f"key:{made.key.key_id}", f"key:{taken_apart(created.api_key).key_id}")
    assert record["detail"] == '{"changed_paths": ["allowed_cidrs", "display_name"]}'
    assert "heron" not in str(dict(record))
    assert await harness.value(announced, UUID(tenant_id)) == before + 1


async def test_a_key_is_widened_only_by_who_holds_its_scopes(harness: Harness) -> None:
    """A later end, or an address more, takes the key's scopes: a narrow key and an operator may only narrow and rename."""
    created = await harness.create()
    end = datetime.now(UTC) + timedelta(hours=1)
    made = await make_key(
        harness, created.api_key, scopes=["inference:generate"], expire_time=end, allowed_cidrs=["192.0.2.0/24", "2001:db8::/48"]
    )
    narrow = with_key((await make_key(harness, created.api_key, scopes=NARROW)).api_key)
    key_id = made.key.key_id
    for metadata in (narrow, harness.as_operator(created.tenant.tenant_id)):
        for paths, fields in (
            (["allowed_cidrs"], {}),
            (["allowed_cidrs"], {"allowed_cidrs": ["192.0.2.0/24", "192.0.3.0/24"]}),
            (["allowed_cidrs"], {"allowed_cidrs": ["192.0.0.0/16"]}),
            (["allowed_cidrs"], {"allowed_cidrs": ["::/0"]}),
            (["expire_time"], {}),
            (["expire_time"], {"expire_time": end + timedelta(seconds=1)}),
        ):
            error = await refusal(change(harness, metadata, key_id, *paths, **fields))
            assert (error.reason, error.metadata) == (error_reason_pb2.ERROR_REASON_SCOPE_MISSING, {"scope": "inference:generate"})
        await change(harness, metadata, key_id, display_name="renamed")
    [kept] = [key for key in (await listed(harness, created.api_key)).keys if key.key_id == key_id]
    assert (kept.expire_time, kept.allowed_cidrs) == (made.key.expire_time, made.key.allowed_cidrs)
    narrowed = ["192.0.2.128/25", "2001:db8:0:1::/64"]
    answer = await change(harness, narrow, key_id, allowed_cidrs=narrowed, expire_time=end - timedelta(minutes=1))
    assert list(answer.changed_paths) == ["allowed_cidrs", "expire_time"]
    await change(harness, with_key(created.api_key), key_id, "allowed_cidrs", "expire_time")


async def test_a_dead_key_stays_as_it_is(harness: Harness) -> None:
    """Revoked and ended keys are WRONG_STATE with that state; a replaced one keeps its end, and may end sooner."""
    created, other = await harness.create(), await harness.create()
    metadata = with_key(created.api_key)
    made = [await make_key(harness, created.api_key) for _ in range(3)]
    await revoke(harness, metadata, made[0].key.key_id)
    await harness.execute("UPDATE tenant.api_keys SET expire_time = now() WHERE key_id = $1", made[1].key.key_id)
    for key, state in zip(made, ("REVOKED", "EXPIRED"), strict=False):
        error = await refusal(change(harness, metadata, key.key.key_id, "expire_time"))
        assert (error.reason, error.metadata["state"]) == (error_reason_pb2.ERROR_REASON_WRONG_STATE, state)
        assert isinstance(await refusal(harness.authenticate(key.api_key)), MeshError)
    await rotate(harness, metadata, made[2].key.key_id)
    error = await refusal(change(harness, metadata, made[2].key.key_id, "expire_time"))
    assert (error.reason, error.metadata["state"]) == (error_reason_pb2.ERROR_REASON_WRONG_STATE, "REPLACED")
    await change(harness, metadata, made[2].key.key_id, expire_time=datetime.now(UTC) + timedelta(minutes=1))
    foreign = await refusal(change(harness, metadata, taken_apart(other.api_key).key_id, display_name="mine"))
    absent = await refusal(change(harness, metadata, "aaaaaaaaaaaaaaaa", display_name="mine"))
    assert foreign.code is grpc.StatusCode.NOT_FOUND
    assert (foreign.reason, foreign.message, foreign.metadata) == (absent.reason, absent.message, absent.metadata)


@pytest.mark.parametrize(
    ("paths", "fields", "field"),
    [
        ([], {}, "update_mask"),
        (["scopes"], {}, "update_mask"),
        (["display_name", "revoke_time"], {"display_name": "x"}, "update_mask"),
        (["display_name"], {}, "display_name"),
        (["display_name"], {"display_name": "a\nb"}, "display_name"),
        (["display_name"], {"display_name": "n" * 101}, "display_name"),
        (["expire_time"], {"expire_time": datetime.now(UTC) - timedelta(seconds=1)}, "expire_time"),
        (["allowed_cidrs"], {"allowed_cidrs": ["10.0.0.0/8", "192.0.2.1/24"]}, "allowed_cidrs[1]"),
    ],
)
async def test_a_bad_change_is_refused_by_its_field(harness: Harness, paths: Sequence[str], fields: dict[str, Any], field: str) -> None:
    """No path, a path that cannot be changed, and values a new key could not have are refused, and nothing is changed."""
    created = await harness.create()
    made = await make_key(harness, created.api_key)
    request = api_key_service_pb2.UpdateApiKeyRequest(key_id=made.key.key_id, update_mask=FieldMask(paths=paths), **fields)
    error = await refusal(call(harness.keys.UpdateApiKey, request, with_key(created.api_key)))
    assert (error.code, error.field_violations[0].field) == (grpc.StatusCode.INVALID_ARGUMENT, field)
    assert made.key in (await listed(harness, created.api_key)).keys


async def test_a_key_that_ends_with_the_calendar_is_rotated(harness: Harness) -> None:
    """The successor of a key that was made, or changed, to live to the end of the year 9999 does not outlive it, and is no fault."""
    created = await harness.create()
    last = datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC)
    made = await make_key(harness, created.api_key)
    await change(harness, with_key(created.api_key), made.key.key_id, expire_time=last)
    # As if made a year ago: a life counted from now ends after the calendar.
    await harness.execute("UPDATE tenant.api_keys SET create_time = now() - interval '1 year' WHERE key_id = $1", made.key.key_id)
    answer = await rotate(harness, with_key(created.api_key), made.key.key_id)
    assert answer.key.expire_time.ToDatetime(tzinfo=UTC) == last
