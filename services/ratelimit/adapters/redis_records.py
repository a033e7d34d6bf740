"""All that is kept of a tenant in Redis: erased, looked for, exported."""

from collections.abc import AsyncIterator, Sequence
from typing import cast
from uuid import UUID

from services.kernel.ids import TenantId
from services.kernel.tenant_scan import ScannedStore, spellings
from services.ratelimit.adapters.redis_shares import RedisShares
from services.ratelimit.adapters.tenant_scripts import KINDS, TenantScripts, prefix_of
from services.ratelimit.calendar_periods import moment
from services.ratelimit.packing import unpacked

# Longer than a context token of the tenant can still be shown, with room for clocks that differ.
_TOMBSTONE_MILLISECONDS = 330_000
_STATES = {1: "held", 2: "pinned", 3: "settled", 4: "void", 5: "released", 6: "sliced"}
_FIELDS = ("state", "epoch", "reserve_time", "tokens", "cost_nano_usd", "quantity", "user", "feature", "attempt", "product_unit")


class RedisRecords:
    """Implements the records of a tenant's lifecycle."""

    def __init__(self, scripts: TenantScripts, shares: RedisShares | None = None, accounts: Sequence[str] = ()) -> None:
        self._scripts = scripts
        self._shares = shares
        self._accounts = accounts if shares is not None else ()

    async def ping(self) -> None:
        """Returns when the store answers. Raises: Unavailable."""
        await self._scripts.link.send("PING")

    async def erase(self, tenant_id: TenantId) -> dict[str, int]:
        """Removes all that is kept of the tenant, whatever its key is called; returns what was found by kind.

        A tombstone stays for 330 s: until then a token of the tenant could have its counters rebuilt.
        """
        counts = cast("list[int]", await self._scripts.run("erase", tenant_id, _TOMBSTONE_MILLISECONDS, bulk=True))
        erased = dict(zip(KINDS, counts, strict=True))
        prefix, bulk = prefix_of(tenant_id), self._scripts.bulk
        cursor: object = None
        while True:
            cursor, found = await bulk.scan(f"{prefix}*", cursor)
            for key in found:
                kind = key.decode().removeprefix(prefix)
                if kind == "meta":
                    continue
                erased[kind] = erased.get(kind, 0) + cast("int", await bulk.send("DEL", key))
            if cursor is None:
                break
        if self._shares is not None and self._accounts:
            erased["accounts"] = sum([await self._shares.forget(account, tenant_id) for account in self._accounts])
        return erased

    async def scan(self, tenant_id: TenantId, canaries: Sequence[str]) -> list[ScannedStore]:
        """Counts keys of the whole store that carry the tenant's id, and those of them that hold one of the strings."""
        needles, found, hits, tombstones = [text.encode() for text in canaries], set[bytes](), 0, 0
        bulk = self._scripts.bulk
        for spelling in spellings(tenant_id):
            cursor: object = None
            while True:
                cursor, keys = await bulk.scan(f"*{spelling}*", cursor)
                found.update(keys)
                if cursor is None:
                    break
        for key in found:
            if key == f"{prefix_of(tenant_id)}meta".encode() and await bulk.send("HEXISTS", key, "erased") == 1:
                tombstones += 1
                continue
            # The store's own serialisation holds short strings as they are.
            dump = cast("bytes | None", await bulk.send("DUMP", key)) or b""
            hits += any(needle in dump or needle in key for needle in needles)
        in_accounts = [self._shares is not None and await self._shares.holds(account, tenant_id) for account in self._accounts]
        accounts = [ScannedStore("redis:accounts", sum(in_accounts), 0, kept=False, sight="all")] if self._accounts else []
        return [
            *accounts,
            ScannedStore("redis:keys", len(found) - tombstones, hits, kept=False, sight="all"),
            ScannedStore("redis:tombstone", tombstones, 0, kept=True, sight="all"),
        ]

    async def export(self, tenant_id: TenantId) -> AsyncIterator[tuple[str, dict[str, str]]]:
        """Yields every record: its kind, and its fields in words. Reads only."""
        for kind in ("reservations", "uses"):
            async for found in self._exported(tenant_id, kind):
                yield found

    async def _exported(self, tenant_id: TenantId, kind: str) -> AsyncIterator[tuple[str, dict[str, str]]]:
        cursor = b"0"
        while True:
            reply = await self._scripts.run("export", tenant_id, cursor, kind, bulk=True)
            cursor, meta, found, counters = cast("tuple[bytes, list[bytes], list[bytes], list[bytes]]", reply)
            if meta:
                yield "redis:meta", {name: value.decode() for name, value in _pairs(meta)}
            if counters:
                yield "redis:counters", {name: _counter(value) for name, value in _pairs(counters)}
            for i in range(0, len(found), 2):
                yield f"redis:{kind}", record_in_words(found[i], found[i + 1])
            if cursor == b"0":
                return


def record_in_words(reservation_id: bytes, data: bytes) -> dict[str, str]:
    """A record's fields as people read them."""
    values = cast("list[int | bytes]", unpacked(data))
    words = {name: _word(value) for name, value in zip(_FIELDS, values, strict=False)}
    words["state"] = _STATES[cast("int", values[0])]
    words["reserve_time"] = moment(cast("int", values[2])).isoformat()
    return {"reservation_id": str(UUID(bytes=reservation_id)), **words}


def _word(value: int | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _pairs(flat: list[bytes]) -> list[tuple[str, bytes]]:
    return [(flat[i].decode(), flat[i + 1]) for i in range(0, len(flat), 2)]


def _counter(value: bytes) -> str:
    # A calendar's counter is a number in digits; a window's log is a list of its first time, then distances and amounts by turns.
    if value.isdigit():
        return value.decode()
    first, *entries = cast("list[int]", unpacked(value))
    parts = [f"{moment(first + entries[i]).isoformat()} {entries[i + 1]}" for i in range(0, len(entries), 2)]
    return "; ".join(parts)
