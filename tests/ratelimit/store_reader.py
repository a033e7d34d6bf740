"""What the store has kept of every decision, read while it goes on: ended records are forgotten after two minutes."""

import asyncio
from typing import cast
from uuid import UUID

from services.ratelimit.adapters.redis_link import Link
from services.ratelimit.limits import Amounts
from services.ratelimit.packing import unpacked
from tests.ratelimit.decision_log import Kept

READ_SECONDS = 5.0
_CHUNK = 500
_STATES = {1: "held", 2: "pinned", 3: "settled", 4: "void", 5: "released"}


class StoreReader:
    """Reads the records of some tenants."""

    def __init__(self, link: Link, tenant_ids: list[UUID], kept: dict[UUID, Kept]) -> None:
        self._link, self._read_to, self.kept = link, dict.fromkeys(tenant_ids, 0), kept

    async def run(self) -> None:
        """Reads what has ended, every few seconds until cancelled."""
        while True:
            await self.read_ended()
            await asyncio.sleep(READ_SECONDS)

    async def read_ended(self) -> None:
        """Reads the records that ended since the last time, with the moment of their end."""
        for tenant_id, read_to in self._read_to.items():
            # The last moment again: not everything of it may have been there.
            found = await self._send(tenant_id, "ZRANGEBYSCORE", "ended", read_to, "+inf", "WITHSCORES")
            ends = {found[i]: int(float(found[i + 1])) for i in range(0, len(found), 2)}
            ids = [id for id in ends if (known := self.kept.get(UUID(bytes=id))) is None or known.end_us is None]
            for start in range(0, len(ids), _CHUNK):
                some = ids[start : start + _CHUNK]
                # What was used at once is kept apart from what was held.
                records, uses = [await self._send(tenant_id, "HMGET", kind, *some) for kind in ("reservations", "uses")]
                for id, packed, used in zip(some, records, uses, strict=True):
                    self._keep(id, packed or used, ends[id])
            self._read_to[tenant_id] = max(ends.values(), default=read_to)

    async def read_held(self) -> list[UUID]:
        """Reads what has not ended, and returns its ids."""
        held = []
        for tenant_id in self._read_to:
            flat = await self._send(tenant_id, "HGETALL", "reservations")
            for i in range(0, len(flat), 2):
                if UUID(bytes=flat[i]) not in self.kept:
                    self._keep(flat[i], flat[i + 1], None)
                    held.append(UUID(bytes=flat[i]))
        return held

    async def leased(self) -> list[UUID]:
        """The ids that have a lease, ended or not."""
        return [UUID(bytes=id) for tenant_id in self._read_to for id in await self._send(tenant_id, "ZRANGE", "leases", 0, -1)]

    async def nothing_leased(self) -> bool:
        """Whether there is no lease."""
        return not await self.leased()

    async def outstanding(self) -> int:
        """How many leases and holds there are in all."""
        count = len(await self.leased())
        for tenant_id in self._read_to:
            count += int(await self._link.send("HGET", f"{{{tenant_id}}}:meta", "outstanding") or 0)  # type: ignore[call-overload] # digits
        return count

    async def counters(self, tenant_id: UUID) -> dict[str, bytes]:
        """Every counter as it lies there."""
        flat = await self._send(tenant_id, "HGETALL", "counters")
        return {flat[i].decode(): flat[i + 1] for i in range(0, len(flat), 2)}

    def _keep(self, id: bytes, packed: bytes | None, end_us: int | None) -> None:
        assert packed is not None, "a record goes no earlier than its end is read"
        state, _, reserve_us, tokens, cost, *_ = cast("list[int]", unpacked(packed))
        self.kept[UUID(bytes=id)] = Kept(_STATES[state], reserve_us, Amounts(tokens, cost), end_us)

    async def _send(self, tenant_id: UUID, command: str, kind: str, *arguments: str | bytes | int) -> list[bytes]:
        return cast("list[bytes]", await self._link.send(command, f"{{{tenant_id}}}:{kind}", *arguments))


def counted(value: bytes, now_us: int, window_us: int) -> int:
    """What a packed log, or a plain counter (window 0), says as of now."""
    if not window_us:
        return int(value)
    first, *flat = cast("list[int]", unpacked(value))
    return sum(amount for time, amount in zip(flat[::2], flat[1::2], strict=True) if first + time > now_us - window_us)
