"""A tenant's users in Postgres, each change with its audit record.

The tenant's row serialises changes, so that two at once never remove both owners.
"""

from collections.abc import Sequence
from uuid import UUID

import asyncpg

from services.kernel.ids import TenantId
from services.kernel.tenant_database import Connection, TenantDatabase
from services.tenant.actor import Actor
from services.tenant.adapters.postgres_audit import append_audit
from services.tenant.user import User, UserRefusal, UserRole

LOCK_TENANT = "SELECT tenant_id FROM tenant.tenants WHERE tenant_id = $1 FOR UPDATE"
FIND_BY_EMAIL = "SELECT user_id, email, role, create_time FROM tenant.users WHERE tenant_id = $1 AND lower(email) = lower($2)"
FIND_BY_ID = "SELECT user_id, email, role, create_time FROM tenant.users WHERE tenant_id = $1 AND user_id = $2"
COUNT_USERS = "SELECT count(*) FROM tenant.users WHERE tenant_id = $1"
COUNT_OTHER_OWNERS = "SELECT count(*) FROM tenant.users WHERE tenant_id = $1 AND role = 'OWNER' AND user_id <> $2"
INSERT_USER = """
INSERT INTO tenant.users (tenant_id, email, role) VALUES ($1, $2, $3) RETURNING user_id, email, role, create_time
"""
SET_ROLE = "UPDATE tenant.users SET role = $3 WHERE tenant_id = $1 AND user_id = $2 RETURNING user_id, email, role, create_time"
LIST_USERS = """
SELECT user_id, email, role, create_time FROM tenant.users
WHERE tenant_id = $1 AND ($2::uuid IS NULL OR user_id > $2) ORDER BY user_id LIMIT $3
"""
DELETE_USER = "DELETE FROM tenant.users WHERE tenant_id = $1 AND user_id = $2"


class PostgresUsers:
    """The user store on the service's own role."""

    def __init__(self, database: TenantDatabase) -> None:
        self._database = database

    async def put_user(self, tenant_id: TenantId, email: str, role: UserRole, max_users: int, actor: Actor) -> User | UserRefusal:
        """Adds the user, or changes its role."""
        async with self._database.transaction(tenant_id) as connection:
            await connection.execute(LOCK_TENANT, tenant_id)
            row = await connection.fetchrow(FIND_BY_EMAIL, tenant_id, email)
            if row is None:
                if await connection.fetchval(COUNT_USERS, tenant_id) >= max_users:
                    return UserRefusal.FULL
                added = _user(await connection.fetchrow(INSERT_USER, tenant_id, email, role))
                await append_audit(connection, tenant_id, "USER_ADDED", f"user:{added.user_id}", actor)
                return added
            user = _user(row)
            if user.role is role:
                return user
            if await _is_last_owner(connection, tenant_id, user):
                return UserRefusal.LAST_OWNER
            await append_audit(connection, tenant_id, "USER_CHANGED", f"user:{user.user_id}", actor)
            return _user(await connection.fetchrow(SET_ROLE, tenant_id, user.user_id, role))

    async def list_users(self, tenant_id: TenantId, after: UUID | None, limit: int) -> Sequence[User]:
        """Returns users younger than the position, oldest first: ids rise with time."""
        async with self._database.transaction(tenant_id) as connection:
            return [_user(row) for row in await connection.fetch(LIST_USERS, tenant_id, after, limit)]

    async def remove_user(self, tenant_id: TenantId, user_id: UUID, actor: Actor) -> UserRefusal | None:
        """Removes the user; None when it is done."""
        async with self._database.transaction(tenant_id) as connection:
            await connection.execute(LOCK_TENANT, tenant_id)
            row = await connection.fetchrow(FIND_BY_ID, tenant_id, user_id)
            if row is None:
                return UserRefusal.ABSENT
            if await _is_last_owner(connection, tenant_id, _user(row)):
                return UserRefusal.LAST_OWNER
            await connection.execute(DELETE_USER, tenant_id, user_id)
            await append_audit(connection, tenant_id, "USER_REMOVED", f"user:{user_id}", actor)
            return None


async def _is_last_owner(connection: Connection, tenant_id: TenantId, user: User) -> bool:
    return user.role is UserRole.OWNER and not await connection.fetchval(COUNT_OTHER_OWNERS, tenant_id, user.user_id)


def _user(row: asyncpg.Record) -> User:
    return User(row["user_id"], row["email"], UserRole(row["role"]), row["create_time"])
