"""Inference's own store: prompts, conversations, turns. Every statement names its tenant and runs as that tenant.

Texts of turns and names of users are sealed when the tenant's context says so, and opened whenever they are sealed.
"""

from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from datetime import datetime
from typing import Any

import asyncpg
import orjson

from services.inference.adapters.postgres_sealing import REQUIRE_VERSION, text_identity, turn_identity, user_identity
from services.inference.call import Memory
from services.inference.conversation import Conversation, KeptTurn, Prompt
from services.inference.prompt_assembly import Turn
from services.kernel.errors import NotFound
from services.kernel.ids import CallId, TenantId
from services.kernel.placement import HOME
from services.kernel.sealed_writes import write_sealed
from services.kernel.sealing import TenantKeys
from services.kernel.tenant_cipher import TenantCipher
from services.kernel.tenant_database import Connection, TenantDatabase
from services.kernel.tenant_scan import ScannedStore, scan_schema

RECALL = (
    "SELECT prompt_version, prompt_text, conversation_known, roles, texts, sealed_texts, call_ids, call_positions FROM recall($1, $2, $3)"
)
REMEMBER = "SELECT remember($1, $2, $3, $4, $5, $6, $7, $8)"
PUT_PROMPT = "SELECT version, text, create_time FROM put_prompt($1, $2, $3)"
NEWEST_PROMPT = "SELECT version, text, create_time FROM prompts WHERE tenant_id = $1 ORDER BY version DESC LIMIT 1"
INSERT_CONVERSATION = (
    "INSERT INTO conversations (tenant_id, conversation_id, user_name, sealed_user_name, key_version) "
    "VALUES ($1, $2, $3, $4, $5) RETURNING create_time"
)
CONVERSATION_EXISTS = "SELECT true FROM conversations WHERE tenant_id = $1 AND conversation_id = $2"
LIST_TURNS = (
    "SELECT sequence, role, text, call_id, create_time, sealed_text, call_position FROM turns "
    "WHERE tenant_id = $1 AND conversation_id = $2 AND sequence > $3 ORDER BY sequence LIMIT $4"
)
DELETE_CONVERSATION = "DELETE FROM conversations WHERE tenant_id = $1 AND conversation_id = $2"
ERASE = {
    "postgres:inference.turns": "DELETE FROM turns WHERE tenant_id = $1",
    "postgres:inference.conversations": "DELETE FROM conversations WHERE tenant_id = $1",
    "postgres:inference.prompts": "DELETE FROM prompts WHERE tenant_id = $1",
    "postgres:inference.inference_sealing": "DELETE FROM inference_sealing WHERE tenant_id = $1",
}
# Alone in its transaction with the removal: writers that passed are waited for, later ones find the tombstone.
LOCK_ERASURE = "SELECT pg_advisory_xact_lock(inference.erasure_lock($1))"
# Of an erased tenant: its tombstone, and what is on its way to the audit log, which keeps it, or was refused there.
KEPT = frozenset({"erased_tenants", "audit_outbox", "audit_set_aside"})
INSERT_TOMBSTONE = "INSERT INTO inference.erased_tenants (tenant_id) VALUES ($1) ON CONFLICT DO NOTHING"
LOCK_OLD = """
SELECT c.conversation_id FROM conversations c
WHERE c.tenant_id = $1 AND c.create_time < $2
  AND NOT EXISTS (SELECT FROM turns t WHERE t.tenant_id = $1 AND t.conversation_id = c.conversation_id AND t.create_time >= $2)
ORDER BY c.conversation_id LIMIT $3 FOR UPDATE
"""
# Looks again, now under the locks that writers of turns wait for: a conversation that got a turn meanwhile stays.
PURGE_TURNS = """
DELETE FROM turns d WHERE d.tenant_id = $1 AND d.conversation_id = ANY ($3::text[])
  AND NOT EXISTS (SELECT FROM turns t WHERE t.tenant_id = $1 AND t.conversation_id = d.conversation_id AND t.create_time >= $2)
"""
PURGE_CONVERSATIONS = """
DELETE FROM conversations c WHERE c.tenant_id = $1 AND c.conversation_id = ANY ($2::text[])
  AND NOT EXISTS (SELECT FROM turns t WHERE t.tenant_id = $1 AND t.conversation_id = c.conversation_id)
"""
_PURGE_BATCH = 500
EXPORT_PROMPTS = "SELECT version, text, create_time FROM prompts WHERE tenant_id = $1 AND version > $2 ORDER BY version LIMIT $3"
EXPORT_CONVERSATIONS = (
    "SELECT conversation_id, user_name, create_time, sealed_user_name FROM conversations "
    "WHERE tenant_id = $1 AND conversation_id > $2 ORDER BY conversation_id LIMIT $3"
)
_EXPORT_PAGE = 200


class PostgresMemory:
    """Reads and writes one tenant at a time."""

    def __init__(self, database: TenantDatabase, cipher: TenantCipher) -> None:
        self._database = database
        self._cipher = cipher

    async def recall(self, tenant_id: TenantId, conversation_id: str, history_bytes: int) -> Memory:
        """Reads the newest prompt and the conversation's last turns in one round trip. Raises: NotFound."""
        row = await self._database.fetch_row(tenant_id, RECALL, tenant_id, conversation_id, history_bytes)
        if row is None or row["prompt_version"] is None:
            raise NotFound("prompt")
        if not row["conversation_known"]:
            raise NotFound("conversation")
        places = zip(row["sealed_texts"], row["call_ids"], row["call_positions"], strict=True)
        identities = [b"" if sealed is None else text_identity(conversation_id, call.bytes, place) for sealed, call, place in places]
        texts = await self._opened(tenant_id, row["texts"], row["sealed_texts"], identities)
        history = tuple(Turn(role, text) for role, text in zip(row["roles"], texts, strict=True))
        return Memory(row["prompt_text"], row["prompt_version"], history)

    async def remember(self, tenant_id: TenantId, conversation_id: str, call_id: CallId, turns: Sequence[Turn]) -> None:
        """Adds a call's turns to its conversation; repeatable by call id. A conversation deleted meanwhile stays deleted."""
        # Postgres keeps every character but NUL.
        roles, texts = [turn.role for turn in turns], [turn.text.replace("\x00", "\ufffd") for turn in turns]
        arguments = (tenant_id, conversation_id, call_id, roles)
        if not self._cipher.is_sealing(tenant_id):
            nothing = [None] * len(texts)
            await self._database.call(tenant_id, REMEMBER, *arguments, texts, nothing, nothing, None)
            return

        async def write(keys: TenantKeys) -> None:
            plain = [text.encode() for text in texts]
            sealed = [keys.seal(text, text_identity(conversation_id, call_id.bytes, place)) for place, text in enumerate(plain, 1)]
            sizes = [len(text) for text in plain]
            await self._database.call(tenant_id, REMEMBER, *arguments, [""] * len(texts), sealed, sizes, keys.active_version)

        await write_sealed(self._cipher, tenant_id, write)

    async def put_prompt(self, tenant_id: TenantId, text: str, *, only_first: bool) -> Prompt:
        """Stores a new version unless the text is the newest already, or, with `only_first`, unless there is any."""
        row = await self._database.fetch_row(tenant_id, PUT_PROMPT, tenant_id, text, only_first)
        if row is None:
            raise NotFound("prompt")
        return Prompt(row["version"], row["text"], row["create_time"])

    async def newest_prompt(self, tenant_id: TenantId) -> Prompt:
        """Returns the newest version. Raises: NotFound."""
        async with self._database.transaction(tenant_id) as connection:
            row = await connection.fetchrow(NEWEST_PROMPT, tenant_id)
        if row is None:
            raise NotFound("prompt")
        return Prompt(row["version"], row["text"], row["create_time"])

    async def add_conversation(self, tenant_id: TenantId, conversation_id: str, user: str) -> Conversation:
        """Begins a conversation."""

        async def write(keys: TenantKeys | None) -> datetime:
            async with self._database.transaction(tenant_id) as connection:
                made: tuple[str, bytes | None, int | None] = (user, None, None)
                if keys is not None:
                    await connection.execute(REQUIRE_VERSION, tenant_id, keys.active_version)
                    made = ("", keys.seal(user.encode(), user_identity(conversation_id)), keys.active_version)
                create_time: datetime = await connection.fetchval(INSERT_CONVERSATION, tenant_id, conversation_id, *made)
                return create_time

        sealing = self._cipher.is_sealing(tenant_id)
        return Conversation(conversation_id, user, await (write_sealed(self._cipher, tenant_id, write) if sealing else write(None)))

    async def turns(self, tenant_id: TenantId, conversation_id: str, after: int, count: int) -> Sequence[KeptTurn]:
        """Returns the turns after a sequence number, oldest first. Raises: NotFound."""
        async with self._database.transaction(tenant_id) as connection:
            if not await connection.fetchval(CONVERSATION_EXISTS, tenant_id, conversation_id):
                raise NotFound("conversation")
            rows = await connection.fetch(LIST_TURNS, tenant_id, conversation_id, after, count)
        texts = await self._texts_of(tenant_id, conversation_id, rows)
        kept = zip(rows, texts, strict=True)
        return [KeptTurn(row["sequence"], row["role"], text, row["call_id"], row["create_time"]) for row, text in kept]

    async def delete_conversation(self, tenant_id: TenantId, conversation_id: str) -> None:
        """Removes a conversation with its turns. Idempotent."""
        async with self._database.transaction(tenant_id) as connection:
            await connection.execute(DELETE_CONVERSATION, tenant_id, conversation_id)

    async def erase(self, tenant_id: TenantId) -> Mapping[str, int]:
        """Removes everything of the tenant, for ever, wherever it lives; returns how many rows of each table. Idempotent."""
        # The tombstone stands at home, whose tables are all that outlives the tenant: a place of its own is dropped whole.
        async with self._database.transaction_at(HOME, tenant_id, walled=False) as connection:
            await connection.execute(LOCK_ERASURE, tenant_id)
            await connection.execute(INSERT_TOMBSTONE, tenant_id)
            removed = await _remove(connection, tenant_id)
        try:
            async with self._database.transaction(tenant_id) as connection:
                elsewhere = await _remove(connection, tenant_id)
        except NotFound:
            # Nobody knows a place of its own any more: it was dropped with all that was in it.
            elsewhere = {}
        return {kind: count + elsewhere.get(kind, 0) for kind, count in removed.items()}

    async def purge(self, tenant_id: TenantId, older_than: datetime) -> tuple[Mapping[str, int], bool]:
        """Removes a batch of conversations without a turn since then; returns counts by kind, and whether there may be more."""
        async with self._database.transaction(tenant_id) as connection:
            ids = [row["conversation_id"] for row in await connection.fetch(LOCK_OLD, tenant_id, older_than, _PURGE_BATCH)]
            turns = await connection.execute(PURGE_TURNS, tenant_id, older_than, ids)
            conversations = await connection.execute(PURGE_CONVERSATIONS, tenant_id, ids)
        tags = {"postgres:inference.turns": turns, "postgres:inference.conversations": conversations}
        return {kind: int(tag.split()[-1]) for kind, tag in tags.items()}, len(ids) == _PURGE_BATCH

    async def scan(self, tenant_id: TenantId, canaries: Sequence[str]) -> Sequence[ScannedStore]:
        """Counts what holds the tenant's id or one of the strings, in the tenant's own rows: no role of this service sees others'."""
        return await scan_schema(self._database, None, "inference", tenant_id, canaries, kept=KEPT)

    async def export(self, tenant_id: TenantId) -> AsyncGenerator[tuple[str, bytes], None]:
        """Yields every record of the tenant as its kind and one JSON object."""
        async for row in self._pages(tenant_id, EXPORT_PROMPTS, 0):
            yield "postgres:inference.prompts", orjson.dumps(row)
        async for row in self._pages(tenant_id, EXPORT_CONVERSATIONS, ""):
            sealed, name = row.pop("sealed_user_name"), str(row["user_name"])
            [user] = await self._opened(tenant_id, [name], [sealed], [user_identity(str(row["conversation_id"]))])
            yield "postgres:inference.conversations", orjson.dumps(row | {"user_name": user})
            async for turn in self._turns_of(tenant_id, str(row["conversation_id"])):
                yield "postgres:inference.turns", turn

    async def _pages(self, tenant_id: TenantId, sql: str, start: int | str) -> AsyncIterator[dict[str, Any]]:
        # By key and not by cursor: a slow reader must not keep a transaction open.
        after = start
        while True:
            async with self._database.transaction(tenant_id) as connection:
                rows = await connection.fetch(sql, tenant_id, after, _EXPORT_PAGE)
            for row in rows:
                yield dict(row)
            if len(rows) < _EXPORT_PAGE:
                return
            after = rows[-1][0]

    async def _turns_of(self, tenant_id: TenantId, conversation_id: str) -> AsyncIterator[bytes]:
        after = 0
        while True:
            async with self._database.transaction(tenant_id) as connection:
                rows = await connection.fetch(LIST_TURNS, tenant_id, conversation_id, after, _EXPORT_PAGE)
            for row, text in zip(rows, await self._texts_of(tenant_id, conversation_id, rows), strict=True):
                told = {name: row[name] for name in ("sequence", "role", "call_id", "create_time")}
                yield orjson.dumps({"conversation_id": conversation_id, **told, "text": text}, default=str)
            if len(rows) < _EXPORT_PAGE:
                return
            after = rows[-1]["sequence"]

    async def _texts_of(self, tenant_id: TenantId, conversation_id: str, rows: Sequence[asyncpg.Record]) -> list[str]:
        sealed = [row["sealed_text"] for row in rows]
        identities = [b"" if row["sealed_text"] is None else turn_identity(conversation_id, row) for row in rows]
        return await self._opened(tenant_id, [row["text"] for row in rows], sealed, identities)

    async def _opened(
        self, tenant_id: TenantId, texts: Sequence[str], sealed: Sequence[bytes | None], identities: Sequence[bytes]
    ) -> list[str]:
        """Returns the texts, with those that are sealed opened; without any, no key is asked for."""
        items = [(value, identity) for value, identity in zip(sealed, identities, strict=True) if value is not None]
        opened = iter(await self._cipher.open_all(tenant_id, items))
        return [text if value is None else next(opened).decode() for text, value in zip(texts, sealed, strict=True)]


async def _remove(connection: Connection, tenant_id: TenantId) -> dict[str, int]:
    # The driver answers with the command's tag, such as "DELETE 3".
    return {kind: int((await connection.execute(sql, tenant_id)).split()[-1]) for kind, sql in ERASE.items()}
