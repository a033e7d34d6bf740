"""Sealed secrets beside the tenant's records, and their sealing again under a new key. Writers and rotations wait for each other."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import asyncpg

from services.kernel.errors import NotFound
from services.kernel.ids import TenantId
from services.kernel.tenant_database import Connection, TenantDatabase
from services.tenant.actor import Actor
from services.tenant.adapters.postgres_audit import append_audit
from services.tenant.provider_keys import PURPOSE, ProviderKeyInfo, Seal
from services.tenant.tenant_wish import SEALED_STORES

# Shared by writers and readers, exclusive for the sealing anew. Taken before the keys are asked for: who comes after a rotation began
# seals with its key, and who came before it is committed when the rotation looks.
LOCK_SECRETS_SHARED = "SELECT pg_advisory_xact_lock_shared(hashtextextended('tenant.secrets:' || $1::uuid::text, 0))"
LOCK_SECRETS = "SELECT pg_advisory_xact_lock(hashtextextended('tenant.secrets:' || $1::uuid::text, 0))"
UPSERT_PROVIDER_KEY = """
INSERT INTO tenant.provider_keys (tenant_id, sealed_key, fingerprint) VALUES ($1, $2, $3)
ON CONFLICT (tenant_id) DO UPDATE
SET sealed_key = excluded.sealed_key, fingerprint = excluded.fingerprint, update_time = clock_timestamp()
RETURNING fingerprint, update_time
"""
DELETE_PROVIDER_KEY = "DELETE FROM tenant.provider_keys WHERE tenant_id = $1 RETURNING fingerprint"
SELECT_INFO = "SELECT fingerprint, update_time FROM tenant.provider_keys WHERE tenant_id = $1"
SELECT_SEALED = "SELECT sealed_key FROM tenant.provider_keys WHERE tenant_id = $1"
ANNOUNCE = "SELECT tenant.announce($1, 'DATA_KEY')"
IS_RECORDED = "SELECT EXISTS (SELECT FROM tenant.audit WHERE tenant_id = $1 AND action = $2 AND target = $3)"


@dataclass(frozen=True, slots=True)
class SealedColumn:
    """A column that holds at most one sealed secret a tenant, and the purpose it is sealed for."""

    purpose: str
    select: str
    update: str


# The addresses of a tenant's own stores open as nothing else.
PLACEMENT_PURPOSE = "placement"
# Every secret sealed with the SecretBox has its line here: without it a rotation would leave it behind unreadable.
SEALED_COLUMNS = (
    SealedColumn(
        PURPOSE,
        "SELECT sealed_key FROM tenant.provider_keys WHERE tenant_id = $1 FOR UPDATE",
        "UPDATE tenant.provider_keys SET sealed_key = $2 WHERE tenant_id = $1",
    ),
    SealedColumn(
        PLACEMENT_PURPOSE,
        "SELECT stores FROM tenant.placements WHERE tenant_id = $1 FOR UPDATE",
        "UPDATE tenant.placements SET stores = $2 WHERE tenant_id = $1",
    ),
    SealedColumn(
        PLACEMENT_PURPOSE,
        "SELECT following_stores FROM tenant.placements WHERE tenant_id = $1 FOR UPDATE",
        "UPDATE tenant.placements SET following_stores = $2 WHERE tenant_id = $1",
    ),
    SealedColumn(
        SEALED_STORES,
        """SELECT decode(nullif(content ->> 'sealed_stores', ''), 'base64') FROM tenant.sagas
        WHERE tenant_id = $1 AND kind = 'PROVISION' FOR UPDATE""",
        """UPDATE tenant.sagas SET content = content || jsonb_build_object('sealed_stores', encode($2, 'base64'))
        WHERE tenant_id = $1 AND kind = 'PROVISION'""",
    ),
)


class PostgresSecrets:
    """Provider keys, and what happens to data keys as the tenant's records tell it."""

    def __init__(self, database: TenantDatabase) -> None:
        self._database = database

    async def put(self, tenant_id: TenantId, fingerprint: str, seal: Seal, actor: Actor) -> ProviderKeyInfo:
        """Stores what `seal` returns."""
        async with self._database.transaction(tenant_id) as connection:
            await lock_secrets(connection, tenant_id)
            try:
                row = await connection.fetchrow(UPSERT_PROVIDER_KEY, tenant_id, await seal(), fingerprint)
            except asyncpg.ForeignKeyViolationError:
                raise NotFound("tenant") from None
            await append_audit(connection, tenant_id, "PROVIDER_KEY_PUT", f"provider_key:{fingerprint}", actor)
            await connection.execute(ANNOUNCE, tenant_id)
        return ProviderKeyInfo(row["fingerprint"], row["update_time"])

    async def delete(self, tenant_id: TenantId, actor: Actor) -> None:
        """Removes it."""
        async with self._database.transaction(tenant_id) as connection:
            fingerprint = await connection.fetchval(DELETE_PROVIDER_KEY, tenant_id)
            if fingerprint is not None:
                await append_audit(connection, tenant_id, "PROVIDER_KEY_DELETED", f"provider_key:{fingerprint}", actor)
                await connection.execute(ANNOUNCE, tenant_id)

    async def info(self, tenant_id: TenantId) -> ProviderKeyInfo | None:
        """Returns what is told of it."""
        async with self._database.transaction(tenant_id) as connection:
            row = await connection.fetchrow(SELECT_INFO, tenant_id)
        return None if row is None else ProviderKeyInfo(row["fingerprint"], row["update_time"])

    async def sealed(self, tenant_id: TenantId, use: Callable[[bytes], Awaitable[bytes]]) -> bytes | None:
        """Uses the sealed key under the shared lock: its data key is not retired meanwhile."""
        async with self._database.transaction(tenant_id) as connection:
            await lock_secrets(connection, tenant_id)
            sealed = await connection.fetchval(SELECT_SEALED, tenant_id)
            return None if sealed is None else await use(sealed)

    async def reseal(self, tenant_id: TenantId, reseal: Callable[[str, bytes], Awaitable[bytes]]) -> int:
        """Seals every secret of the tenant again; returns how many."""
        count = 0
        async with self._database.transaction(tenant_id) as connection:
            await connection.execute(LOCK_SECRETS, tenant_id)
            for column in SEALED_COLUMNS:
                sealed = await connection.fetchval(column.select, tenant_id)
                if sealed is not None:
                    await connection.execute(column.update, tenant_id, await reseal(column.purpose, sealed))
                    count += 1
        return count

    async def note(self, tenant_id: TenantId, action: str, target: str, actor: Actor) -> None:
        """Puts a change of keys on record, once, and announces it, each time: the keys are in another database, and a crash may part us."""
        async with self._database.transaction(tenant_id) as connection:
            await connection.execute(LOCK_SECRETS, tenant_id)
            if not await connection.fetchval(IS_RECORDED, tenant_id, action, target):
                await append_audit(connection, tenant_id, action, target, actor)
            await connection.execute(ANNOUNCE, tenant_id)


async def lock_secrets(connection: Connection, tenant_id: TenantId) -> None:
    """Keeps rotations away until the transaction ends. Comes before the sealing, in the transaction that writes the sealed value."""
    await connection.execute(LOCK_SECRETS_SHARED, tenant_id)
