"""What is sealed of turns and conversations: their identities, and their sealing again under a newer key."""

from collections.abc import Sequence

import asyncpg

from services.kernel.ids import TenantId
from services.kernel.sealed_writes import write_sealed
from services.kernel.sealing import TenantKeys, row_identity
from services.kernel.tenant_cipher import TenantCipher
from services.kernel.tenant_database import Connection, TenantDatabase

BEGIN = "SELECT inference.begin_key_version($1, $2)"
REQUIRE_VERSION = "SELECT inference.require_key_version($1, $2)"
# Rows in a writer's hands are passed over: waiting for them could close a circle, and they are asked for again.
SELECT_TURNS = """
SELECT conversation_id, sequence, call_id, call_position, sealed_text FROM inference.turns
WHERE tenant_id = $1 AND key_version < $2 ORDER BY conversation_id, sequence LIMIT $3 FOR UPDATE SKIP LOCKED
"""
UPDATE_TURNS = """
UPDATE inference.turns t SET sealed_text = n.sealed_text, key_version = $2
FROM unnest($3::text[], $4::integer[], $5::bytea[]) AS n (conversation_id, sequence, sealed_text)
WHERE t.tenant_id = $1 AND t.conversation_id = n.conversation_id AND t.sequence = n.sequence
"""
SELECT_CONVERSATIONS = """
SELECT conversation_id, sealed_user_name FROM inference.conversations
WHERE tenant_id = $1 AND key_version < $2 ORDER BY conversation_id LIMIT $3 FOR UPDATE SKIP LOCKED
"""
UPDATE_CONVERSATIONS = """
UPDATE inference.conversations c SET sealed_user_name = n.sealed_user_name, key_version = $2
FROM unnest($3::text[], $4::bytea[]) AS n (conversation_id, sealed_user_name)
WHERE c.tenant_id = $1 AND c.conversation_id = n.conversation_id
"""
IS_LEFT = """
SELECT EXISTS (SELECT FROM inference.turns WHERE tenant_id = $1 AND key_version < $2)
    OR EXISTS (SELECT FROM inference.conversations WHERE tenant_id = $1 AND key_version < $2)
"""
_PAGE = 100


def turn_identity(conversation_id: str, row: asyncpg.Record) -> bytes:
    """Returns what a turn's text is bound to, from its columns call_id and call_position."""
    return text_identity(conversation_id, row["call_id"].bytes, row["call_position"])


def text_identity(conversation_id: str, call_id: bytes, position: int) -> bytes:
    """Returns what the text of a call's turn is bound to; known before the turn's place in the conversation is."""
    return row_identity("inference.turns", "text", conversation_id, call_id, str(position))


def user_identity(conversation_id: str) -> bytes:
    """Returns what the name of a conversation's user is bound to."""
    return row_identity("inference.conversations", "user_name", conversation_id)


class PostgresSealedRows:
    """The sealed rows of inference."""

    def __init__(self, database: TenantDatabase, cipher: TenantCipher) -> None:
        self._database = database
        self._cipher = cipher

    async def begin(self, tenant_id: TenantId, version: int) -> int:
        """Refuses older keys from now on."""
        await self._cipher.keys(tenant_id, with_version=version)
        least: int = await self._database.fetch_value(tenant_id, BEGIN, tenant_id, version)
        return least

    async def reseal_page(self, tenant_id: TenantId, least_version: int) -> int:
        """Seals some turns and names again."""
        return await write_sealed(self._cipher, tenant_id, lambda keys: self._reseal(tenant_id, least_version, keys))

    async def is_done(self, tenant_id: TenantId, least_version: int) -> bool:
        """Tells whether none of an older version is left."""
        async with self._database.transaction(tenant_id) as connection:
            return not await connection.fetchval(IS_LEFT, tenant_id, least_version)

    async def _reseal(self, tenant_id: TenantId, least_version: int, keys: TenantKeys) -> int:
        async with self._database.transaction(tenant_id) as connection:
            await connection.execute(REQUIRE_VERSION, tenant_id, keys.active_version)
            turns = await connection.fetch(SELECT_TURNS, tenant_id, least_version, _PAGE)
            await self._write_turns(connection, tenant_id, turns, keys)
            conversations = await connection.fetch(SELECT_CONVERSATIONS, tenant_id, least_version, _PAGE)
            await self._write_conversations(connection, tenant_id, conversations, keys)
        return len(turns) + len(conversations)

    async def _write_turns(self, connection: Connection, tenant_id: TenantId, rows: Sequence[asyncpg.Record], keys: TenantKeys) -> None:
        identities = [turn_identity(row["conversation_id"], row) for row in rows]
        sealed = await self._sealed_again(tenant_id, [row["sealed_text"] for row in rows], identities, keys)
        names, sequences = [row["conversation_id"] for row in rows], [row["sequence"] for row in rows]
        await connection.execute(UPDATE_TURNS, tenant_id, keys.active_version, names, sequences, sealed)

    async def _write_conversations(
        self, connection: Connection, tenant_id: TenantId, rows: Sequence[asyncpg.Record], keys: TenantKeys
    ) -> None:
        identities = [user_identity(row["conversation_id"]) for row in rows]
        sealed = await self._sealed_again(tenant_id, [row["sealed_user_name"] for row in rows], identities, keys)
        await connection.execute(UPDATE_CONVERSATIONS, tenant_id, keys.active_version, [row["conversation_id"] for row in rows], sealed)

    async def _sealed_again(self, tenant_id: TenantId, old: Sequence[bytes], identities: Sequence[bytes], keys: TenantKeys) -> list[bytes]:
        opened = await self._cipher.open_all(tenant_id, list(zip(old, identities, strict=True)))
        return [keys.seal(plaintext, identity) for plaintext, identity in zip(opened, identities, strict=True)]
