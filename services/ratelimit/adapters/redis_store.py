"""The counters of every tenant in Redis: each method is one script, so one atomic step. Keys start with the tenant in braces: one slot."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Protocol, cast
from uuid import UUID

import structlog
from redis.exceptions import NoScriptError

from services.kernel.errors import Unavailable
from services.kernel.ids import ReservationId, TenantId
from services.kernel.tenant_scan import ScannedStore, spellings
from services.ratelimit.adapters.redis_link import Link
from services.ratelimit.adapters.scripts import Script, load_script
from services.ratelimit.fencing import ExpiredHolds, FenceVerdict
from services.ratelimit.limits import Amounts, Limits
from services.ratelimit.rebuild import Begin, Snapshot
from services.ratelimit.reservation import LARGEST_ID_AGE_SECONDS, Answer, Settlement, Verdict
from services.ratelimit.window import MICROSECONDS, Usage, moment

log = structlog.get_logger(__name__)

Argument = str | bytes | int

KINDS = ("meta", "reservations", "leases", "window", "ended")
_SCRIPTS = ("reserve", "look", "release", "renew", "commit", "sweep", "fenced", "begin", "load", "erase", "export")
_DONE = {1: True, 2: False, 3: True}
_OVER = 3
# Bounds how long one script keeps the store from others: well under a millisecond.
_SETTLEMENTS_A_SCRIPT = 50
_LEASES_A_SCRIPT = 200
_CALLS_A_SCRIPT = 100
# Another's request for a snapshot is respected this long; an unanswered one lives this long.
_YOUNG_NONCE_US = MICROSECONDS
_NONCE_LIFE_MILLISECONDS = 10_000
# Longer than a context token of the tenant can still be shown, with room for clocks that differ.
_TOMBSTONE_MILLISECONDS = 330_000


class RedisStore:
    """Implements the stores of reservations, fences and rebuilds. `bulk` carries what may take longer than a decision."""

    def __init__(
        self,
        link: Link,
        bulk: Link,
        *,
        window_seconds: float = 60.0,
        lease_seconds: float = 5.0,
        forget_seconds: float = 2.0 * LARGEST_ID_AGE_SECONDS,
    ) -> None:
        self.window_us = int(window_seconds * MICROSECONDS)
        self._link = link
        self._bulk = bulk
        self._lease_us = int(lease_seconds * MICROSECONDS)
        self._forget_us = int(forget_seconds * MICROSECONDS)
        self._scripts = {name: load_script(name) for name in _SCRIPTS}
        self._scan_cursor: object = None

    async def reserve(self, tenant_id: TenantId, reservation_id: ReservationId, minted_us: int, amounts: Amounts, limits: Limits) -> Answer:
        """Takes a hold, or says why not and changes nothing."""
        return _answer(
            await self._run(
                "reserve",
                tenant_id,
                reservation_id.bytes.hex(),
                minted_us,
                amounts.tokens,
                amounts.cost_nano_usd,
                self._lease_us,
                self.window_us,
                self._forget_us,
                LARGEST_ID_AGE_SECONDS * MICROSECONDS,
                *limits.in_order(),
            ),
        )

    async def look(self, tenant_id: TenantId, amounts: Amounts, limits: Limits) -> Answer:
        """Says what is used and whether a call of this size would be held. Writes nothing."""
        return _answer(await self._run("look", tenant_id, amounts.tokens, amounts.cost_nano_usd, self.window_us, *limits.in_order()))

    async def release(self, tenant_id: TenantId, reservation_id: ReservationId, epoch: int) -> None:
        """Lets a hold of this epoch go; ignores any other."""
        await self._run("release", tenant_id, reservation_id.bytes.hex(), epoch)

    async def renew(self, reservations: Sequence[tuple[TenantId, ReservationId]]) -> list[bool]:
        """Prolongs leases; tells of each whether it lives. Raises: Unavailable when it cannot be told of one."""
        alive = [False] * len(reservations)

        async def renew_some(tenant_id: TenantId, places: Sequence[int]) -> None:
            ids = [reservations[place][1].bytes.hex() for place in places]
            answers = cast("list[int]", await self._run("renew", tenant_id, self._lease_us, *ids))
            for place, answer in zip(places, answers, strict=True):
                alive[place] = answer == 1

        await _each_tenant([tenant_id for tenant_id, _ in reservations], _LEASES_A_SCRIPT, renew_some)
        return alive

    async def commit(self, settlements: Sequence[Settlement]) -> list[bool]:
        """Applies settlements; tells of each whether it is done. A store that does not answer leaves its items undone."""
        done = [False] * len(settlements)

        async def commit_some(tenant_id: TenantId, places: Sequence[int]) -> None:
            items = [settlements[place] for place in places]
            arguments = [value for item in items for value in _settlement_arguments(item)]
            try:
                answers = cast("list[int]", await self._run("commit", tenant_id, self.window_us, self._forget_us, *arguments, bulk=True))
            except Unavailable:
                return
            for place, item, answer in zip(places, items, answers, strict=True):
                done[place] = _DONE[answer]
                if answer == _OVER:
                    _log_excess(item)

        await _each_tenant([item.tenant_id for item in settlements], _SETTLEMENTS_A_SCRIPT, commit_some)
        return done

    async def expired(self, tenant_ids: Sequence[TenantId], at_most: int) -> list[ExpiredHolds]:
        """Lists ended leases and forgets what no rule counts any more."""
        found: list[ExpiredHolds] = []

        async def sweep(tenant_id: TenantId, _: Sequence[int]) -> None:
            answer = await self._run("sweep", tenant_id, self.window_us, self._forget_us, at_most, bulk=True)
            epoch, lease_count, *ids = cast("list[int | bytes]", answer)
            reservation_ids = [ReservationId(UUID(cast("bytes", item).decode())) for item in ids]
            found.append(ExpiredHolds(tenant_id, None if epoch == -1 else int(epoch), int(lease_count), reservation_ids))

        await _each_tenant(list(tenant_ids), 1, sweep)
        return found

    async def apply_fences(self, tenant_id: TenantId, epoch: int, verdicts: Sequence[tuple[ReservationId, FenceVerdict]]) -> int:
        """Releases VOID and SETTLED_BEFORE, pins UNRESOLVED, where epoch and state still fit; SETTLED waits. Returns how many changed."""
        arguments: list[Argument] = []
        for reservation_id, verdict in verdicts:
            # SETTLED in this epoch: its commit is on its way, and it alone knows the amount.
            if verdict is not FenceVerdict.SETTLED:
                pins = verdict is FenceVerdict.UNRESOLVED
                arguments += (reservation_id.bytes.hex(), FenceVerdict.UNRESOLVED.value if pins else FenceVerdict.VOID.value)
        if not arguments:
            return 0
        return cast("int", await self._run("fenced", tenant_id, epoch, *arguments, bulk=True))

    async def tenants_with_leases(self) -> Sequence[TenantId]:
        """Looks at the next thousand keys or so for tenants that have leases; goes round and round."""
        self._scan_cursor, found = await self._bulk.scan("{*}:leases", self._scan_cursor)
        return [tenant_id for key in found if (tenant_id := _tenant_of(key)) is not None]

    async def begin(self, tenant_id: TenantId, nonce: str) -> Begin:
        """Writes down the nonce of the only snapshot that may be loaded, unless there is an epoch or another asked just now."""
        answer = await self._run("begin", tenant_id, nonce, _YOUNG_NONCE_US, _NONCE_LIFE_MILLISECONDS)
        return Begin(cast("bytes", answer).decode())

    async def load(self, tenant_id: TenantId, nonce: str, snapshot: Snapshot) -> bool:
        """Replaces everything by the snapshot; False when another request was made since."""
        sums: list[Argument] = []
        for day, tokens in snapshot.settled_tokens_by_day.items():
            sums += (f"tokens_used:{day}", tokens)
        for month, nano_usd in snapshot.settled_nano_usd_by_month.items():
            sums += (f"cost_used:{month}", nano_usd)
        starts = range(0, max(1, len(snapshot.calls)), _CALLS_A_SCRIPT)
        for part, start in enumerate(starts):
            calls: list[Argument] = []
            for item in snapshot.calls[start : start + _CALLS_A_SCRIPT]:
                packed = f"{item.state.value} {snapshot.epoch} {item.reserve_us} {item.tokens} {item.cost_nano_usd}"
                calls += (item.reservation_id.bytes.hex(), packed)
            head = (nonce, snapshot.epoch, self._lease_us, self.window_us, part, int(part == len(starts) - 1), len(sums) // 2)
            if await self._run("load", tenant_id, *head, *sums, *calls, bulk=True) != 1:
                return False
            sums = []
        return True

    async def ping(self) -> None:
        """Returns when the store answers. Raises: Unavailable."""
        await self._link.send("PING")

    async def erase(self, tenant_id: TenantId) -> dict[str, int]:
        """Removes all that is kept of the tenant, whatever its key is called; returns what was found by kind.

        A tombstone stays for 330 s: until then a token of the tenant could have its counters rebuilt.
        """
        counts = cast("list[int]", await self._run("erase", tenant_id, _TOMBSTONE_MILLISECONDS, bulk=True))
        erased = dict(zip(KINDS, counts, strict=True))
        cursor: object = None
        while True:
            cursor, found = await self._bulk.scan(f"{_prefix(tenant_id)}*", cursor)
            for key in found:
                kind = key.decode().removeprefix(_prefix(tenant_id))
                if kind == "meta":
                    continue
                erased[kind] = erased.get(kind, 0) + cast("int", await self._bulk.send("DEL", key))
            if cursor is None:
                return erased

    async def scan(self, tenant_id: TenantId, canaries: Sequence[str]) -> list[ScannedStore]:
        """Counts keys of the whole store that carry the tenant's id, and those of them that hold one of the strings."""
        needles, found, hits, tombstones = [text.encode() for text in canaries], set[bytes](), 0, 0
        for spelling in spellings(tenant_id):
            cursor: object = None
            while True:
                cursor, keys = await self._bulk.scan(f"*{spelling}*", cursor)
                found.update(keys)
                if cursor is None:
                    break
        for key in found:
            if key == f"{_prefix(tenant_id)}meta".encode() and await self._bulk.send("HEXISTS", key, "erased") == 1:
                tombstones += 1
                continue
            # The store's own serialisation holds short strings as they are.
            dump = cast("bytes | None", await self._bulk.send("DUMP", key)) or b""
            hits += any(needle in dump or needle in key for needle in needles)
        return [
            ScannedStore("redis:keys", len(found) - tombstones, hits, kept=False, sight="all"),
            ScannedStore("redis:tombstone", tombstones, 0, kept=True, sight="all"),
        ]

    async def export(self, tenant_id: TenantId) -> AsyncIterator[tuple[str, dict[str, str]]]:
        """Yields every record: its kind, and its fields in words. Reads only."""
        cursor = b"0"
        while True:
            reply = await self._run("export", tenant_id, cursor, bulk=True)
            cursor, meta, found = cast("tuple[bytes, list[bytes], list[bytes]]", reply)
            if meta:
                yield "redis:meta", {meta[i].decode(): meta[i + 1].decode() for i in range(0, len(meta), 2)}
            for i in range(0, len(found), 2):
                yield "redis:reservations", _record(found[i], found[i + 1])
            if cursor == b"0":
                return

    async def _run(self, name: str, tenant_id: TenantId, *arguments: Argument, bulk: bool = False) -> object:
        script: Script = self._scripts[name]
        link = self._bulk if bulk else self._link
        prefix = _prefix(tenant_id)
        keys = [prefix + kind for kind in KINDS]
        try:
            return await link.send("EVALSHA", script.sha, len(keys), *keys, *arguments)
        except NoScriptError:
            return await link.send("EVAL", script.text, len(keys), *keys, *arguments)


class _ForTenant(Protocol):
    async def __call__(self, tenant_id: TenantId, places: Sequence[int], /) -> None: ...


async def _each_tenant(tenant_ids: Sequence[TenantId], at_most: int, work: _ForTenant) -> None:
    # Chunks may overtake each other: what the scripts do to one reservation ends the same in any order.
    places: dict[TenantId, list[int]] = {}
    for place, tenant_id in enumerate(tenant_ids):
        places.setdefault(tenant_id, []).append(place)
    chunks = [(tenant_id, own[start : start + at_most]) for tenant_id, own in places.items() for start in range(0, len(own), at_most)]
    if len(chunks) == 1:
        await work(*chunks[0])
        return
    try:
        async with asyncio.TaskGroup() as group:
            for tenant_id, own in chunks:
                group.create_task(work(tenant_id, own))
    except* Unavailable as failed:
        raise Unavailable("redis") from failed.exceptions[0]


def _prefix(tenant_id: TenantId) -> str:
    return f"{{{tenant_id}}}:"


def _tenant_of(key: bytes) -> TenantId | None:
    try:
        return TenantId(UUID(key[1:37].decode()))
    except ValueError:
        return None


def _answer(reply: object) -> Answer:
    verdict, *figures = cast("list[bytes | int]", reply)
    return Answer(Verdict(cast("bytes", verdict).decode()), Usage(*cast("list[int]", figures)) if figures else None)


def _settlement_arguments(item: Settlement) -> tuple[Argument, ...]:
    return (item.reservation_id.bytes.hex(), item.epoch, item.kind.value, item.actual.tokens, item.actual.cost_nano_usd)


def _record(reservation_id: bytes, packed: bytes) -> dict[str, str]:
    state, epoch, reserve_us, tokens, cost = packed.decode().split()
    return {
        "reservation_id": str(UUID(reservation_id.decode())),
        "state": state,
        "epoch": epoch,
        "reserve_time": moment(int(reserve_us)).isoformat(),
        "tokens": tokens,
        "cost_nano_usd": cost,
    }


def _log_excess(item: Settlement) -> None:
    # All of it is charged: the hold was a bound that the provider did not keep.
    log.warning(
        "actual_exceeds_hold",
        tenant_id=str(item.tenant_id),
        reservation_id=str(item.reservation_id),
        tokens=item.actual.tokens,
        cost_nano_usd=item.actual.cost_nano_usd,
    )
