"""The ledger in Postgres: each method is one SQL function, one round trip and one transaction for a whole batch over tenants."""

from collections.abc import Awaitable, Callable, Sequence
from datetime import timedelta
from typing import TypeVar

import asyncpg
import structlog

from services.kernel.errors import Unavailable
from services.kernel.tenant_database import TenantDatabase
from services.metering.adapters.sorted_batch import SortedBatch, type_uuid
from services.metering.call import (
    BatchItem,
    CallKey,
    CallState,
    Ended,
    Ending,
    ExtendOutcome,
    Extension,
    Fenced,
    FenceOutcome,
    Fencing,
    Opened,
    Opening,
    OpenOutcome,
    PriceKey,
    RatedSettlement,
    Settled,
    SettleOutcome,
)
from services.metering.unit_use import Recorded, RecordUnitsOutcome, UnitUse

log = structlog.get_logger(__name__)

OPEN_CALLS = """
SELECT item, outcome, state FROM metering.open_calls($1::uuid[], $2::integer[], $3::integer[], $4::uuid[], $5::uuid[], $6::smallint[],
    $7::bigint[], $8::bigint[], $9::bigint[], $10::bigint[], $11::bigint[], $12::text[], $13::text[], $14::text[], $15::text[], $16::text[],
    $17::text[], $18::text[], $19::text[], $20::boolean[], $21::interval)
"""
EXTEND_CALLS = """
SELECT item FROM metering.extend_calls($1::uuid[], $2::integer[], $3::integer[], $4::uuid[], $5::bigint[], $6::bigint[])
"""
RECORD_UNITS = """
SELECT item, outcome, told_epoch FROM metering.record_units($1::uuid[], $2::integer[], $3::integer[], $4::uuid[], $5::uuid[], $6::bigint[],
    $7::bigint[], $8::text[], $9::bigint[], $10::text[], $11::text[], $12::text[])
"""
CALL_PRICES = "SELECT item, price_version, provider, model FROM metering.call_prices($1::uuid[], $2::integer[], $3::integer[], $4::uuid[])"
SETTLE_CALLS = """
SELECT item, outcome, cost_nano_usd, entry_id, told_epoch FROM metering.settle_calls($1::uuid[], $2::integer[], $3::integer[], $4::uuid[],
    $5::uuid[], $6::boolean[], $7::bigint[], $8::bigint[], $9::bigint[], $10::bigint[], $11::bigint[], $12::bigint[], $13::text[],
    $14::text[], $15::bigint[], $16::bigint[])
"""
VOID_CALLS = """
SELECT item, state, told_epoch FROM metering.void_calls($1::uuid[], $2::integer[], $3::integer[], $4::uuid[], $5::smallint[], $6::text[],
    $7::bigint[], $8::bigint[], $9::bigint[], $10::bigint[], $11::bigint[])
"""
RENEW_CALLS = "SELECT item FROM metering.renew_calls($1::uuid[], $2::integer[], $3::integer[], $4::uuid[], $5::interval)"
FENCE_CALLS = """
SELECT item, outcome, told_epoch FROM metering.fence_calls($1::uuid[], $2::integer[], $3::integer[], $4::uuid[], $5::bigint[])
"""

_ATTEMPTS = 4
_NO_ENTRY = b""
T = TypeVar("T")
V = TypeVar("V", bound=BatchItem)


class PostgresLedger:
    """The service role's view of calls, leases, entries and outbox."""

    def __init__(self, database: TenantDatabase, *, lease_seconds: float) -> None:
        self._database = database
        self._lease = timedelta(seconds=lease_seconds)

    async def open(self, items: Sequence[Opening]) -> Sequence[Opened]:
        """Records attempts."""
        batch = SortedBatch(items)
        column = batch.column
        rows = await self._run(
            OPEN_CALLS,
            *batch.slices(),
            batch.reservations,
            column(lambda item: type_uuid(item.call_id)),
            column(lambda item: item.attempt),
            column(lambda item: item.epoch),
            column(lambda item: item.reserve_us),
            column(lambda item: item.dispatch_deadline_us),
            column(lambda item: item.bound_tokens),
            column(lambda item: item.bound_nano_usd),
            column(lambda item: item.price_version),
            column(lambda item: item.provider),
            column(lambda item: item.model),
            column(lambda item: item.feature),
            column(lambda item: item.user),
            column(lambda item: item.prompt_version),
            column(lambda item: item.tier),
            column(lambda item: item.provider_account),
            column(lambda item: item.bills_tenant_account),
            self._lease,
        )
        return _in_order(batch, rows, lambda row: Opened(OpenOutcome(row["outcome"]), CallState(row["state"])))

    async def extend(self, items: Sequence[Extension]) -> Sequence[ExtendOutcome]:
        """Raises bounds of open attempts; never lowers one."""
        batch = SortedBatch(items)
        outcomes = [ExtendOutcome.NOT_OPEN] * len(items)
        rows = await self._run(
            EXTEND_CALLS,
            *batch.slices(),
            batch.reservations,
            batch.column(lambda item: item.bound_tokens),
            batch.column(lambda item: item.bound_nano_usd),
        )
        for row in rows:
            outcomes[batch.came_as(row["item"])] = ExtendOutcome.EXTENDED
        return outcomes

    async def record(self, items: Sequence[UnitUse]) -> Sequence[Recorded]:
        """Records uses of units, each with its entry and its outbox row."""
        batch = SortedBatch(items)
        column = batch.column
        rows = await self._run(
            RECORD_UNITS,
            *batch.slices(),
            batch.reservations,
            column(lambda item: type_uuid(item.entry_id)),
            column(lambda item: item.epoch),
            column(lambda item: item.reserve_us),
            column(lambda item: item.product_unit),
            column(lambda item: item.quantity),
            column(lambda item: item.user),
            column(lambda item: item.feature),
            column(lambda item: item.tier),
        )
        return _in_order(batch, rows, lambda row: Recorded(RecordUnitsOutcome(row["outcome"]), row["told_epoch"]))

    async def price_keys(self, keys: Sequence[CallKey]) -> Sequence[PriceKey | None]:
        """Returns what opened calls are rated by."""
        batch = SortedBatch(keys)
        found: list[PriceKey | None] = [None] * len(keys)
        for row in await self._run(CALL_PRICES, *batch.slices(), batch.reservations):
            found[batch.came_as(row["item"])] = PriceKey(row["price_version"], row["provider"], row["model"])
        return found

    async def settle(self, items: Sequence[RatedSettlement]) -> Sequence[Settled]:
        """Records bills, each with its entry and its outbox row."""
        batch = SortedBatch(items)
        column = batch.column
        rows = await self._run(
            SETTLE_CALLS,
            *batch.slices(),
            batch.reservations,
            column(lambda item: type_uuid(item.entry_id)),
            column(lambda item: item.cost_nano_usd is not None),
            column(lambda item: item.cost_nano_usd or 0),
            column(lambda item: item.settlement.usage.input),
            column(lambda item: item.settlement.usage.output),
            column(lambda item: item.settlement.usage.cache_read),
            column(lambda item: item.settlement.usage.cache_write_5m),
            column(lambda item: item.settlement.usage.cache_write_1h),
            column(lambda item: item.settlement.stop_reason),
            column(lambda item: item.settlement.provider_request_id),
            column(lambda item: item.settlement.first_token_ms),
            column(lambda item: item.settlement.total_ms),
        )
        return _in_order(batch, rows, _settled)

    async def end(self, items: Sequence[Ending]) -> Sequence[Ended]:
        """Ends attempts without a bill."""
        batch = SortedBatch(items)
        received = batch.column(lambda item: item.received)
        rows = await self._run(
            VOID_CALLS,
            *batch.slices(),
            batch.reservations,
            batch.column(lambda item: int(item.kind)),
            batch.column(lambda item: item.cause),
            [None if usage is None else usage.input for usage in received],
            [None if usage is None else usage.output for usage in received],
            [None if usage is None else usage.cache_read for usage in received],
            [None if usage is None else usage.cache_write_5m for usage in received],
            [None if usage is None else usage.cache_write_1h for usage in received],
        )
        return _in_order(batch, rows, lambda row: Ended(CallState(row["state"]), row["told_epoch"]))

    async def renew(self, keys: Sequence[CallKey]) -> Sequence[bool]:
        """Prolongs leases and tells of each whether its call is still open."""
        batch = SortedBatch(keys)
        standing = [True] * len(keys)
        for row in await self._run(RENEW_CALLS, *batch.slices(), batch.reservations, self._lease):
            standing[batch.came_as(row["item"])] = False
        return standing

    async def fence(self, items: Sequence[Fencing]) -> Sequence[Fenced]:
        """Decides calls whose lease at the limits ended."""
        batch = SortedBatch(items)
        rows = await self._run(FENCE_CALLS, *batch.slices(), batch.reservations, batch.column(lambda item: item.epoch))
        return _in_order(batch, rows, lambda row: Fenced(FenceOutcome(row["outcome"]), row["told_epoch"]))

    async def _run(self, sql: str, *args: object) -> Sequence[asyncpg.Record]:
        return await run_again(lambda: self._database.call(None, sql, *args))


async def run_again(run: Callable[[], Awaitable[T]]) -> T:
    """Runs an idempotent transaction again when it did not come to be through no fault of its own.

    A deadlock: batches take their locks in one order, but two of them that use the same call ids for other reservations can still wait in
    a circle. A connection that the server ended while it was idle: the driver notices only when it is used, as an error of its own.
    """
    for _ in range(_ATTEMPTS):
        try:
            return await run()
        except (asyncpg.DeadlockDetectedError, asyncpg.InternalClientError) as error:
            log.warning("ledger_transaction_repeated", error=type(error).__name__)
    raise Unavailable("postgres")


def _settled(row: asyncpg.Record) -> Settled:
    entry = row["entry_id"]
    return Settled(SettleOutcome(row["outcome"]), row["cost_nano_usd"] or 0, _NO_ENTRY if entry is None else entry.bytes, row["told_epoch"])


def _in_order(batch: SortedBatch[V], rows: Sequence[asyncpg.Record], read: Callable[[asyncpg.Record], T]) -> list[T]:
    """Puts the function's rows back into the order the items came in; every item has exactly one row."""
    found: dict[int, T] = {batch.came_as(row["item"]): read(row) for row in rows}
    return [found[index] for index in range(len(batch.items))]
