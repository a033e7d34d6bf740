"""The outbox, the leases and the sums of use of all tenants, as the jobs role."""

from collections.abc import Awaitable, Callable, Sequence

import asyncpg

from services.kernel.tenant_database import JobsDatabase
from services.metering.adapters.postgres_ledger import run_again
from services.metering.adapters.sorted_batch import type_uuid
from services.metering.outbox import CallEnd, EndKind

SWEEP = "SELECT tenant_id, reservation_id, epoch FROM metering.sweep_leases($1::integer)"
NEXT_LAPSE = """
SELECT extract(epoch FROM min(l.lease_until) - clock_timestamp())::float8 FROM metering.call_leases l WHERE l.tenant_id IS NOT NULL
"""
FOLD_USAGE = "SELECT metering.fold_usage($1::integer)"
DELETE_DONE = """
DELETE FROM metering.outbox o USING unnest($1::uuid[], $2::uuid[], $3::smallint[]) AS d (tenant_id, reservation_id, kind)
WHERE o.tenant_id = d.tenant_id AND o.reservation_id = d.reservation_id AND o.kind = d.kind
"""
SELECT_DUE = """
SELECT o.tenant_id, o.reservation_id, o.kind, o.epoch, o.tokens, o.cost_nano_usd, coalesce(c.output_tokens, 0) AS output_tokens
FROM metering.outbox o
LEFT JOIN metering.calls c ON c.tenant_id = o.tenant_id AND c.reservation_id = o.reservation_id
WHERE o.tenant_id IS NOT NULL AND o.due_time <= clock_timestamp()
ORDER BY o.due_time LIMIT $1::integer FOR UPDATE OF o SKIP LOCKED
"""
# A quarter of a second, doubled each time, at most 5 s: an end that waits for a rebuild must not hide the others behind it.
PUT_OFF = """
UPDATE metering.outbox o
SET send_count = o.send_count + 1,
    due_time = clock_timestamp() + least(interval '5 seconds', interval '250 milliseconds' * 2 ^ least(o.send_count, 6))
FROM unnest($1::uuid[], $2::uuid[], $3::smallint[]) AS d (tenant_id, reservation_id, kind)
WHERE o.tenant_id = d.tenant_id AND o.reservation_id = d.reservation_id AND o.kind = d.kind
"""
HASTEN = """
UPDATE metering.outbox o SET send_count = 0, due_time = clock_timestamp()
FROM unnest($1::uuid[]) AS t (tenant_id) WHERE o.tenant_id = t.tenant_id AND o.due_time > clock_timestamp()
"""


class PostgresJobs:
    """What runs over all tenants: the lease sweep, the relay's table and the sums of use."""

    def __init__(self, database: JobsDatabase) -> None:
        self._database = database

    async def sweep(self, most: int) -> Sequence[CallEnd]:
        """Leaves lapsed calls unresolved and returns their pins."""
        rows = await run_again(lambda: self._database.call(SWEEP, most))
        return [CallEnd(row["tenant_id"].bytes, row["reservation_id"].bytes, EndKind.PIN, row["epoch"]) for row in rows]

    async def next_lapse_seconds(self) -> float | None:
        """Returns in how many seconds the nearest lease ends, negative when it has; None without any lease."""
        seconds: float | None = await self._database.fetch_value(NEXT_LAPSE)
        return seconds

    async def fold_usage(self, most: int) -> int:
        """Folds changes of use into the sums and returns how many; 0 while another replica folds."""
        folded: int = await run_again(lambda: self._database.fetch_value(FOLD_USAGE, most))
        return folded

    async def delete(self, ends: Sequence[CallEnd]) -> None:
        """Removes ends that are done."""
        await self._database.call(DELETE_DONE, *_keys(ends))

    async def hasten(self, tenant_ids: Sequence[bytes]) -> None:
        """Makes what was put off for these tenants due, as if it had never been sent."""
        await self._database.call(HASTEN, [type_uuid(tenant_id) for tenant_id in tenant_ids])

    async def relay_due(self, most: int, send: Callable[[Sequence[CallEnd]], Awaitable[Sequence[bool]]]) -> tuple[int, int]:
        """Sends due rows under their locks, so that no other relay sends them, deletes those done and puts off the others."""
        async with self._database.transaction() as connection:
            ends = [_end(row) for row in await connection.fetch(SELECT_DUE, most)]
            if not ends:
                return 0, 0
            answers = await send(ends)
            done = [end for end, is_done in zip(ends, answers, strict=True) if is_done]
            rest = [end for end, is_done in zip(ends, answers, strict=True) if not is_done]
            if done:
                await connection.execute(DELETE_DONE, *_keys(done))
            if rest:
                await connection.execute(PUT_OFF, *_keys(rest))
            return len(ends), len(done)


def _end(row: asyncpg.Record) -> CallEnd:
    tenant_id, reservation_id = row["tenant_id"].bytes, row["reservation_id"].bytes
    return CallEnd(tenant_id, reservation_id, EndKind(row["kind"]), row["epoch"], row["tokens"], row["cost_nano_usd"], row["output_tokens"])


def _keys(ends: Sequence[CallEnd]) -> tuple[list[object], list[object], list[int]]:
    return (
        [type_uuid(end.tenant_id) for end in ends],
        [type_uuid(end.reservation_id) for end in ends],
        [int(end.kind) for end in ends],
    )
