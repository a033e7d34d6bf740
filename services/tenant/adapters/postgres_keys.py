"""A tenant's API keys in Postgres, each change with its audit record."""

import json
from collections.abc import Sequence
from datetime import datetime

import asyncpg

from services.kernel.ids import TenantId
from services.kernel.tenant_database import Connection, TenantDatabase
from services.tenant.actor import Actor
from services.tenant.adapters.postgres_audit import append_audit
from services.tenant.adapters.postgres_changes import announce
from services.tenant.api_key import ApiKeyText
from services.tenant.api_key_record import ApiKeyRecord
from services.tenant.change_hub import ChangeKind
from services.tenant.key_change import changed_paths
from services.tenant.key_ring import Decide, NewKeyTerms, Rotation, RotationRefusal, RotationWish

# The tenant's row serialises the tenant's key making, so that a hundred-and-first key cannot slip in beside the hundredth.
LOCK_TENANT = "SELECT tenant_id FROM tenant.tenants WHERE tenant_id = $1 FOR UPDATE"
COUNT_LIVE = """
SELECT count(*) FROM tenant.api_keys WHERE tenant_id = $1 AND revoke_time IS NULL AND (expire_time IS NULL OR expire_time > now())
"""
INSERT_DIRECTORY = "INSERT INTO tenant.api_key_directory (tenant_id, key_id) VALUES ($1, $2)"
_COLUMNS = """
key_id, display_name, scopes, create_time, expire_time, revoke_time, last_use_time, allowed_cidrs, coalesce(replaced_by, '') AS replaced_by
"""
INSERT_KEY = f"""
INSERT INTO tenant.api_keys (tenant_id, key_id, secret_sha256, display_name, scopes, expire_time, allowed_cidrs)
VALUES ($1, $2, $3, $4, $5, $6, $7) RETURNING {_COLUMNS}
"""  # noqa: S608 - joined from constants
LIST_NEWEST = f"""
SELECT {_COLUMNS} FROM tenant.api_keys WHERE tenant_id = $1 ORDER BY create_time DESC, key_id DESC LIMIT $2
"""  # noqa: S608 - as above
LIST_OLDER = f"""
SELECT {_COLUMNS} FROM tenant.api_keys
WHERE tenant_id = $1 AND (create_time, key_id) < ($3, $4) ORDER BY create_time DESC, key_id DESC LIMIT $2
"""  # noqa: S608 - as above
REVOKE_LIVE = f"""
UPDATE tenant.api_keys SET revoke_time = clock_timestamp() WHERE tenant_id = $1 AND key_id = $2 AND revoke_time IS NULL
RETURNING {_COLUMNS}
"""  # noqa: S608 - as above
GET_KEY = f"SELECT {_COLUMNS} FROM tenant.api_keys WHERE tenant_id = $1 AND key_id = $2"  # noqa: S608 - as above
LOCK_KEY = f"{GET_KEY} FOR UPDATE"
UPDATE_KEY = "UPDATE tenant.api_keys SET display_name = $3, expire_time = $4, allowed_cidrs = $5 WHERE tenant_id = $1 AND key_id = $2"
STATE_OF_KEY = """
SELECT CASE WHEN revoke_time IS NOT NULL THEN 'REVOKED' WHEN replaced_by IS NOT NULL THEN 'REPLACED'
            WHEN expire_time <= clock_timestamp() THEN 'EXPIRED' ELSE 'LIVE' END
FROM tenant.api_keys WHERE tenant_id = $1 AND key_id = $2
"""
FIND_ROTATION = """
SELECT s.key_id, s.rotation_digest, o.key_id AS replaced_key_id
FROM tenant.api_keys s JOIN tenant.api_keys o ON o.tenant_id = s.tenant_id AND o.replaced_by = s.key_id
WHERE s.tenant_id = $1 AND s.rotation_request_id = $2
"""
# As long as the old key was made to live, from now; to the last second that a timestamp on the wire has, and for ever without an end.
INSERT_SUCCESSOR = """
INSERT INTO tenant.api_keys (
    tenant_id, key_id, secret_sha256, display_name, scopes, expire_time, allowed_cidrs, rotation_request_id, rotation_digest
)
SELECT tenant_id, $3, $4, display_name, scopes,
       CASE WHEN expire_time IS NOT NULL THEN least(clock_timestamp() + (expire_time - create_time), '9999-12-31 23:59:59+00') END,
       allowed_cidrs, $5, $6
FROM tenant.api_keys WHERE tenant_id = $1 AND key_id = $2
"""
# least() passes over NULL: a key without an end of its own gets the overlap's.
END_AFTER_OVERLAP = """
UPDATE tenant.api_keys SET replaced_by = $3, expire_time = least(expire_time, clock_timestamp() + $4) WHERE tenant_id = $1 AND key_id = $2
"""
RENEW_UNUSED = """
UPDATE tenant.api_keys SET secret_sha256 = $3
WHERE tenant_id = $1 AND key_id = $2 AND last_use_time IS NULL AND revoke_time IS NULL RETURNING key_id
"""


class PostgresKeys:
    """The key store on the service's own role."""

    def __init__(self, database: TenantDatabase) -> None:
        self._database = database

    async def add_key(self, tenant_id: TenantId, key: ApiKeyText, terms: NewKeyTerms, max_live: int, actor: Actor) -> ApiKeyRecord | None:
        """Stores the key; None when the tenant has `max_live` live keys already."""
        async with self._database.transaction(tenant_id) as connection:
            await connection.execute(LOCK_TENANT, tenant_id)
            if await connection.fetchval(COUNT_LIVE, tenant_id) >= max_live:
                return None
            await connection.execute(INSERT_DIRECTORY, tenant_id, key.key_id)
            row = await connection.fetchrow(
                INSERT_KEY,
                tenant_id,
                key.key_id,
                key.secret_sha256(),
                terms.display_name,
                list(terms.scopes),
                terms.expire_time,
                list(terms.allowed_cidrs),
            )
            await append_audit(connection, tenant_id, "KEY_CREATED", f"key:{key.key_id}", actor)
            return _record(row)

    async def list_keys(self, tenant_id: TenantId, after: tuple[datetime, str] | None, limit: int) -> Sequence[ApiKeyRecord]:
        """Returns keys older than the position, newest first."""
        async with self._database.transaction(tenant_id) as connection:
            if after is None:
                rows = await connection.fetch(LIST_NEWEST, tenant_id, limit)
            else:
                rows = await connection.fetch(LIST_OLDER, tenant_id, limit, *after)
            return [_record(row) for row in rows]

    async def get_key(self, tenant_id: TenantId, key_id: str) -> ApiKeyRecord | None:
        """Returns the key; None when the tenant has no such key."""
        async with self._database.transaction(tenant_id) as connection:
            row = await connection.fetchrow(GET_KEY, tenant_id, key_id)
            return None if row is None else _record(row)

    async def change_key(
        self, tenant_id: TenantId, key_id: str, decide: Decide, actor: Actor
    ) -> tuple[ApiKeyRecord, tuple[str, ...]] | None:
        """Keeps what is decided, and returns it with the paths that changed; None when the tenant has no such key."""
        async with self._database.transaction(tenant_id) as connection:
            # The tenant's row as well: a key that is about to end must not come back beside the hundredth.
            await connection.execute(LOCK_TENANT, tenant_id)
            row = await connection.fetchrow(LOCK_KEY, tenant_id, key_id)
            if row is None:
                return None
            before = _record(row)
            after = decide(before)
            paths = changed_paths(before, after)
            if paths:
                await connection.execute(UPDATE_KEY, tenant_id, key_id, after.display_name, after.expire_time, list(after.allowed_cidrs))
                # Which fields, and not their words: the audit log outlives its tenant.
                await append_audit(
                    connection, tenant_id, "KEY_CHANGED", f"key:{key_id}", actor, detail=json.dumps({"changed_paths": paths})
                )
                await announce(connection, tenant_id, ChangeKind.KEY)
            return after, paths

    async def rotate_key(
        self, tenant_id: TenantId, wish: RotationWish, key: ApiKeyText, max_live: int, actor: Actor
    ) -> Rotation | RotationRefusal:
        """Stores the key as the successor and ends the old one, or gives the successor this wish made before the new secret."""
        async with self._database.transaction(tenant_id) as connection:
            await connection.execute(LOCK_TENANT, tenant_id)
            before = await connection.fetchrow(FIND_ROTATION, tenant_id, wish.request_id)
            if before is None:
                refused = await _replace(connection, tenant_id, wish, key, max_live)
                if refused is not None:
                    return refused
                successor_id, kept = key.key_id, True
                await append_audit(connection, tenant_id, "KEY_ROTATED", f"key:{wish.key_id}", actor)
                await append_audit(connection, tenant_id, "KEY_CREATED", f"key:{successor_id}", actor)
                await announce(connection, tenant_id, ChangeKind.KEY)
            elif before["rotation_digest"] != wish.digest() or before["replaced_key_id"] != wish.key_id:
                return RotationRefusal.OTHER_CONTENT
            else:
                successor_id = before["key_id"]
                renewed = await connection.fetchval(RENEW_UNUSED, tenant_id, successor_id, key.secret_sha256())
                kept = renewed is not None
                if kept:
                    # Nobody remembers the text it ends: a text that was never used was never answered for.
                    await append_audit(connection, tenant_id, "KEY_TEXT_REPLACED", f"key:{successor_id}", actor)
            replaced = _record(await connection.fetchrow(GET_KEY, tenant_id, wish.key_id))
            return Rotation(replaced, _record(await connection.fetchrow(GET_KEY, tenant_id, successor_id)), kept)

    async def revoke_key(self, tenant_id: TenantId, key_id: str, actor: Actor) -> ApiKeyRecord | None:
        """Revokes the key unless it is revoked; None when the tenant has no such key."""
        async with self._database.transaction(tenant_id) as connection:
            row = await connection.fetchrow(REVOKE_LIVE, tenant_id, key_id)
            if row is not None:
                await append_audit(connection, tenant_id, "KEY_REVOKED", f"key:{key_id}", actor)
                await announce(connection, tenant_id, ChangeKind.KEY)
                return _record(row)
            row = await connection.fetchrow(GET_KEY, tenant_id, key_id)
            return None if row is None else _record(row)


async def _replace(
    connection: Connection, tenant_id: TenantId, wish: RotationWish, key: ApiKeyText, max_live: int
) -> RotationRefusal | None:
    state = await connection.fetchval(STATE_OF_KEY, tenant_id, wish.key_id)
    if state != "LIVE":
        return RotationRefusal.ABSENT if state is None else RotationRefusal(state)
    # Without an overlap the old key makes room for its successor.
    if await connection.fetchval(COUNT_LIVE, tenant_id) - (not wish.overlap) >= max_live:
        return RotationRefusal.FULL
    await connection.execute(INSERT_DIRECTORY, tenant_id, key.key_id)
    secret = key.secret_sha256()
    await connection.execute(INSERT_SUCCESSOR, tenant_id, wish.key_id, key.key_id, secret, wish.request_id, wish.digest())
    await connection.execute(END_AFTER_OVERLAP, tenant_id, wish.key_id, key.key_id, wish.overlap)
    return None


def _record(row: asyncpg.Record) -> ApiKeyRecord:
    return ApiKeyRecord(
        key_id=row["key_id"],
        display_name=row["display_name"],
        scopes=tuple(row["scopes"]),
        create_time=row["create_time"],
        expire_time=row["expire_time"],
        revoke_time=row["revoke_time"],
        last_use_time=row["last_use_time"],
        allowed_cidrs=tuple(row["allowed_cidrs"]),
        replaced_by=row["replaced_by"],
    )
