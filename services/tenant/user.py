"""The people of a tenant. Refuses to leave it without an owner."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import Enum, StrEnum
from typing import Protocol
from uuid import UUID

from services.kernel.errors import InvalidRequest, MeshError, NotFound, WrongState
from services.kernel.ids import TenantId, parse_uuid
from services.kernel.paging import cut_page, decode_page_token, encode_page_token, page_size, refused_page_token
from services.tenant.actor import Actor
from services.tenant.full import too_many
from services.tenant.text import printable

MAX_USERS = 1000
_LISTING = "users"


class UserRole(StrEnum):
    """What a user is to the tenant."""

    OWNER = "OWNER"
    ADMIN = "ADMIN"
    MEMBER = "MEMBER"


@dataclass(frozen=True, slots=True)
class User:
    """A user."""

    user_id: UUID
    email: str
    role: UserRole
    create_time: datetime


class UserRefusal(Enum):
    """Why a change was not made."""

    FULL = "FULL"
    LAST_OWNER = "LAST_OWNER"
    ABSENT = "ABSENT"


class UserStore(Protocol):
    """Where users are kept. Every method is one transaction of that tenant."""

    async def put_user(self, tenant_id: TenantId, email: str, role: UserRole, max_users: int, actor: Actor) -> User | UserRefusal:
        """Adds the user, or changes its role."""
        ...

    async def list_users(self, tenant_id: TenantId, after: UUID | None, limit: int) -> Sequence[User]:
        """Returns users younger than the position, oldest first."""
        ...

    async def remove_user(self, tenant_id: TenantId, user_id: UUID, actor: Actor) -> UserRefusal | None:
        """Removes the user; None when it is done."""
        ...


class UserDirectory:
    """The users of whichever tenant a call acts for."""

    def __init__(self, store: UserStore) -> None:
        self._store = store

    async def put(self, tenant_id: TenantId, email: str, role: UserRole, actor: Actor) -> User:
        """Writes the user. Raises: WrongState for the last owner, LimitExceeded(PLAN_LIMIT)."""
        written = await self._store.put_user(tenant_id, printable(email, "email"), role, MAX_USERS, actor)
        if isinstance(written, UserRefusal):
            raise _refused(written, tenant_id)
        return written

    async def list(self, tenant_id: TenantId, asked_size: int, token: str) -> tuple[Sequence[User], str]:
        """Returns a page of users and the token of the next page. Raises: InvalidRequest(page_token)."""
        size = page_size(asked_size)
        found = await self._store.list_users(tenant_id, _position(token), size + 1)
        return cut_page(found, size, lambda last: encode_page_token(_LISTING, [str(last.user_id)]))

    async def remove(self, tenant_id: TenantId, user_id: UUID, actor: Actor) -> None:
        """Removes the user. Raises: NotFound, also for another tenant's; WrongState for the last owner."""
        refused = await self._store.remove_user(tenant_id, user_id, actor)
        if refused is not None:
            raise _refused(refused, tenant_id)


def _position(token: str) -> UUID | None:
    position = decode_page_token(token, _LISTING, 1)
    try:
        return None if position is None else parse_uuid(position[0], "page_token")
    except InvalidRequest:
        raise refused_page_token() from None


def _refused(refusal: UserRefusal, tenant_id: TenantId) -> MeshError:
    match refusal:
        case UserRefusal.FULL:
            return too_many(tenant_id, "users", "users", MAX_USERS)
        case UserRefusal.LAST_OWNER:
            return WrongState("user", "LAST_OWNER", "the tenant's last owner stays one; make another user an owner first")
        case UserRefusal.ABSENT:
            return NotFound("user")
