"""What each store has on its books once a run is over, read past every service: the provider's ledger, ours, and the limits' Redis."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple, cast
from uuid import UUID

import asyncpg
import redis.asyncio

from devstack.provider_stub.ledger import fold
from services.ratelimit.packing import unpacked

CALLS = """
    SELECT c.tenant_id, c.reservation_id, c.call_id, c.state, c.bound_tokens, c.bound_nano_usd, c.model, c.price_version, c.reserve_time
    FROM metering.calls c WHERE c.product_unit IS NULL AND ($1::uuid IS NULL OR c.tenant_id = $1)"""
ENTRIES = """
    SELECT e.tenant_id, e.reservation_id, e.model, e.price_version, e.input_tokens, e.output_tokens, e.cache_read_tokens,
           e.cache_write_5m_tokens, e.cache_write_1h_tokens, e.total_tokens, e.cost_nano_usd, e.reserve_time
    FROM metering.entries e WHERE $1::uuid IS NULL OR e.tenant_id = $1"""
EVENTS = """
    SELECT e.tenant_id, e.id, e.quantity, e.occurred_at FROM metering.events e WHERE $1::uuid IS NULL OR e.tenant_id = $1"""
UNITS = """
    SELECT u.tenant_id, u.reservation_id, u.quantity, u.reserve_time FROM metering.unit_entries u
    WHERE $1::uuid IS NULL OR u.tenant_id = $1"""
PRICES = """
    SELECT p.version, p.model, p.input_nano_usd, p.output_nano_usd, p.cache_read_nano_usd, p.cache_write_5m_nano_usd,
           p.cache_write_1h_nano_usd
    FROM metering.prices p"""
WAITING = """
    SELECT (SELECT count(*) FROM metering.outbox o WHERE $1::uuid IS NULL OR o.tenant_id = $1)
         + (SELECT count(*) FROM metering.call_leases l WHERE $1::uuid IS NULL OR l.tenant_id = $1)"""
OPEN, SETTLED, VOID, UNRESOLVED, RECONCILED = 1, 2, 3, 4, 5
_HELD, _PINNED = 1, 2
_TOKEN_PRICE_UNIT = 10**6


class Tokens(NamedTuple):
    """Tokens by price class."""

    input: int
    output: int
    cache_read: int = 0
    cache_write_5m: int = 0
    cache_write_1h: int = 0


Prices = dict[tuple[str, str], Tokens]


def cost_nano_usd(tokens: Tokens, prices: Tokens) -> int:
    """What the tokens cost: each class rounded once, half to even. Exact rationals, so that it shares no arithmetic with the ledger."""
    return sum(round(Fraction(count * price, _TOKEN_PRICE_UNIT)) for count, price in zip(tokens, prices, strict=True))


@dataclass(frozen=True, slots=True)
class Billed:
    """A call on the provider's ledger. Where the provider was killed while it answered, its output is not on it."""

    call_id: str
    model: str
    tokens: Tokens


@dataclass(frozen=True, slots=True)
class Call:
    """An attempt on our ledger; `call_id` is None where only a tombstone is left."""

    tenant_id: str
    reservation_id: str
    call_id: str | None
    state: int
    bound_tokens: int
    bound_nano_usd: int
    model: str
    price_version: str
    reserve_time: datetime | None


@dataclass(frozen=True, slots=True)
class Entry:
    """A bill on our ledger."""

    tenant_id: str
    reservation_id: str
    model: str
    price_version: str
    tokens: Tokens
    total_tokens: int
    cost_nano_usd: int
    reserve_time: datetime


@dataclass(frozen=True, slots=True)
class Use:
    """A use of units, or an event of the product: its id, and what it counts. Of a reversal the event's id, and a negative quantity."""

    tenant_id: str
    id: str
    quantity: int
    time: datetime


@dataclass(frozen=True, slots=True)
class Ledger:
    """Our ledger, of all tenants, at `now`. `waiting`: rows of the outbox and leases."""

    now: datetime
    calls: Sequence[Call]
    entries: Sequence[Entry]
    units: Sequence[Use]
    events: Sequence[Use]
    prices: Prices
    waiting: int


@dataclass(frozen=True, slots=True)
class Hold:
    """A hold of the limits that has not ended."""

    reservation_id: str
    pinned: bool
    tokens: int
    cost_nano_usd: int


@dataclass(frozen=True, slots=True)
class Limits:
    """What the limits keep of a tenant: holds and running leases, and what is used by the name of the rule."""

    holds: Sequence[Hold]
    lease_count: int
    used: dict[str, int]


def read_provider(path: Path) -> list[Billed]:
    """Reads what the provider billed."""
    return [_billed(cast("dict[str, Any]", line)) for line in fold(path)]


def _billed(line: dict[str, Any]) -> Billed:
    tokens = Tokens(line["input_tokens"], line["output_tokens"], line["cache_read"], line["cache_creation_5m"], line["cache_creation_1h"])
    return Billed(str(line["call_id"]), line["model"], tokens)


async def read_ledger(dsn: str, tenant_id: str | None = None) -> Ledger:
    """Reads our ledger at one moment, as the superuser: of one tenant, or of all."""
    connection = await asyncpg.connect(dsn)
    try:
        async with connection.transaction(isolation="repeatable_read", readonly=True):
            return Ledger(
                await connection.fetchval("SELECT now()"),
                [_call(row) for row in await connection.fetch(CALLS, tenant_id)],
                [_entry(row) for row in await connection.fetch(ENTRIES, tenant_id)],
                [_use(row) for row in await connection.fetch(UNITS, tenant_id)],
                [_use(row) for row in await connection.fetch(EVENTS, tenant_id)],
                {(row["version"], row["model"]): Tokens(*list(row.values())[2:]) for row in await connection.fetch(PRICES)},
                await connection.fetchval(WAITING, tenant_id),
            )
    finally:
        await connection.close()


def _call(row: Any) -> Call:
    call_id = None if row["call_id"] is None else str(row["call_id"])
    return Call(
        str(row["tenant_id"]),
        str(row["reservation_id"]),
        call_id,
        row["state"],
        row["bound_tokens"] or 0,
        row["bound_nano_usd"] or 0,
        row["model"] or "",
        row["price_version"] or "",
        row["reserve_time"],
    )


def _entry(row: Any) -> Entry:
    tokens = Tokens(
        row["input_tokens"], row["output_tokens"], row["cache_read_tokens"], row["cache_write_5m_tokens"], row["cache_write_1h_tokens"]
    )
    return Entry(
        str(row["tenant_id"]),
        str(row["reservation_id"]),
        row["model"],
        row["price_version"],
        tokens,
        row["total_tokens"],
        row["cost_nano_usd"],
        row["reserve_time"],
    )


def _use(row: Any) -> Use:
    tenant_id, name, quantity, time = row.values()
    return Use(str(tenant_id), str(name), quantity, time)


async def read_holds(url: str, tenant_id: str) -> tuple[list[Hold], int]:
    """Reads what Redis keeps of a tenant's holds, and how many leases there are."""
    async with redis.asyncio.from_url(url) as client:
        records = cast("dict[bytes, bytes]", await client.hgetall(f"{{{tenant_id}}}:reservations"))
        lease_count = cast("int", await client.zcard(f"{{{tenant_id}}}:leases"))
    holds = []
    for key, packed in records.items():
        state, _, _, tokens, cost, *_ = cast("list[int]", unpacked(packed))
        if state in (_HELD, _PINNED):
            holds.append(Hold(str(UUID(bytes=key)), state == _PINNED, tokens, cost))
    return holds, lease_count
