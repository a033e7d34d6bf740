"""The people of a tenant: written by address, listed, removed, and never without an owner."""

import asyncio
from typing import Any
from uuid import UUID, uuid4

import grpc
import pytest

from mesh.common.v1 import error_reason_pb2
from mesh.tenant.v1 import user_service_pb2 as pb
from services.kernel.errors import MeshError
from services.kernel.paging import encode_page_token
from tests.tenant.harness import Harness, call, refusal, with_key

OWNER, ADMIN, MEMBER = pb.USER_ROLE_OWNER, pb.USER_ROLE_ADMIN, pb.USER_ROLE_MEMBER


async def put(harness: Harness, api_key: str, email: str, role: Any) -> pb.User:
    """Writes a user."""
    return (await call(harness.users.PutUser, pb.PutUserRequest(email=email, role=role), with_key(api_key))).user


async def remove(harness: Harness, api_key: str, user_id: str) -> None:
    """Removes a user."""
    await call(harness.users.RemoveUser, pb.RemoveUserRequest(user_id=user_id), with_key(api_key))


async def listed(harness: Harness, api_key: str, page_size: int = 0, token: str = "") -> pb.ListUsersResponse:
    """A page of users."""
    return await call(harness.users.ListUsers, pb.ListUsersRequest(page_size=page_size, page_token=token), with_key(api_key))


async def test_users_are_written_by_address_and_listed_oldest_first(harness: Harness) -> None:
    """The letters' case makes no second user; a changed role keeps the id; each change is on record."""
    created = await harness.create()
    ada = await put(harness, created.api_key, "Ada@example.com", MEMBER)
    await put(harness, created.api_key, "bob@example.com", ADMIN)
    changed = await put(harness, created.api_key, "ada@EXAMPLE.com", ADMIN)
    assert (changed.user_id, changed.email, changed.role) == (ada.user_id, "Ada@example.com", ADMIN)
    assert await put(harness, created.api_key, "ada@example.com", ADMIN) == changed
    seen, token = [], ""
    while True:
        page = await listed(harness, created.api_key, 1, token)
        seen, token = seen + [(user.email, user.role) for user in page.users], page.next_page_token
        if not token:
            break
    assert [role for _, role in seen] == [OWNER, ADMIN, ADMIN]
    assert [email for email, _ in seen[1:]] == ["Ada@example.com", "bob@example.com"]
    tenant_id = created.tenant.tenant_id
    assert (len(await harness.audit(tenant_id, "USER_ADDED")), len(await harness.audit(tenant_id, "USER_CHANGED"))) == (2, 1)


async def test_the_last_owner_stays(harness: Harness) -> None:
    """It is neither removed nor made less, also not by two who remove each other at once."""
    created = await harness.create()
    [owner] = (await listed(harness, created.api_key)).users
    for attempt in (remove(harness, created.api_key, owner.user_id), put(harness, created.api_key, owner.email, MEMBER)):
        error = await refusal(attempt)
        assert (error.code, error.reason) == (grpc.StatusCode.FAILED_PRECONDITION, error_reason_pb2.ERROR_REASON_WRONG_STATE)
        assert error.metadata == {"resource": "user", "state": "LAST_OWNER"}
    second = await put(harness, created.api_key, "second@example.com", OWNER)

    async def attempt_removal(user_id: str) -> MeshError | None:
        try:
            await remove(harness, created.api_key, user_id)
        except MeshError as error:
            return error
        return None

    async with asyncio.TaskGroup() as group, harness.superuser() as connection, connection.transaction():
        await connection.execute("SELECT FROM tenant.tenants WHERE tenant_id = $1 FOR UPDATE", UUID(created.tenant.tenant_id))
        tasks = [group.create_task(attempt_removal(user_id)) for user_id in (owner.user_id, second.user_id)]
        # Both wait for the tenant's row, so that whichever comes second sees what the first has done.
        done, _ = await asyncio.wait(tasks, timeout=1.0)
        assert not done
    assert sorted(task.result() is None for task in tasks) == [False, True]
    assert [user.role for user in (await listed(harness, created.api_key)).users] == [OWNER]


async def test_another_tenants_user_is_as_absent_as_one_that_never_was(harness: Harness) -> None:
    """Removing a foreign id answers as an unknown one and changes nothing there."""
    one, other = await harness.create(), await harness.create()
    guest = await put(harness, other.api_key, "guest@example.com", MEMBER)
    foreign = await refusal(remove(harness, one.api_key, guest.user_id))
    absent = await refusal(remove(harness, one.api_key, str(uuid4())))
    assert foreign.code is grpc.StatusCode.NOT_FOUND
    assert (foreign.message, foreign.metadata) == (absent.message, absent.metadata)
    await remove(harness, other.api_key, guest.user_id)
    assert len((await listed(harness, other.api_key)).users) == 1
    assert len(await harness.audit(other.tenant.tenant_id, "USER_REMOVED")) == 1


async def test_a_tenant_has_at_most_a_thousand_users(harness: Harness) -> None:
    """One more is PLAN_LIMIT; changing one that is there goes on."""
    created = await harness.create()
    await harness.execute(
        "INSERT INTO tenant.users (tenant_id, email, role) "
        "SELECT $1, 'user' || n || '@example.com', 'MEMBER' FROM generate_series(1, 999) n",
        UUID(created.tenant.tenant_id),
    )
    error = await refusal(put(harness, created.api_key, "more@example.com", MEMBER))
    assert (error.reason, error.metadata["rule"]) == (error_reason_pb2.ERROR_REASON_PLAN_LIMIT, "users")
    assert (await put(harness, created.api_key, "user7@example.com", ADMIN)).role == ADMIN


@pytest.mark.parametrize(
    ("email", "role"),
    [
        ("nobody", MEMBER),
        ("", MEMBER),
        ("a@b.example\x00", MEMBER),
        (f"{'a' * 250}@b.example", MEMBER),
        ("a@b.example", 0),
        ("a@b.example", 9),
    ],
)
async def test_a_bad_user_is_refused_by_its_contract(harness: Harness, email: str, role: Any) -> None:
    """Malformed addresses and unknown roles are invalid requests."""
    created = await harness.create()
    assert (await refusal(put(harness, created.api_key, email, role))).code is grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize(
    "token",
    ["x", encode_page_token("api_keys", [str(uuid4())]), encode_page_token("users", ["no-id"])],
    ids=["no token", "another list's", "no id in it"],
)
async def test_a_made_up_user_page_token_is_refused(harness: Harness, token: str) -> None:
    """Tokens of another list, or of no position, are invalid requests."""
    created = await harness.create()
    error = await refusal(listed(harness, created.api_key, 1, token))
    assert (error.code, error.metadata["field"]) == (grpc.StatusCode.INVALID_ARGUMENT, "page_token")
