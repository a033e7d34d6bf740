"""Re-ratings in Postgres, as the service role: each batch is one transaction, under the tenant's shared lock and its calls' own."""

from collections.abc import Sequence
from uuid import UUID

import asyncpg

from services.kernel.ids import TenantId, new_uuid7
from services.kernel.tenant_database import Connection, TenantDatabase
from services.metering.adapters.postgres_ledger import run_again
from services.metering.call import TokenUsage
from services.metering.rerating import Differ, ModelDifference, RatedCall, RatePosition, RerateLook, RerateOrder, Rerating

_BEFORE_ALL = UUID(int=0)

# A statement of its own before any read, as in the ledger's functions: then whatever has an earlier time is committed and seen.
LOCK_TENANT = "SELECT pg_advisory_xact_lock(metering.tenant_lock($1))"
SHARE_TENANT = "SELECT pg_advisory_xact_lock_shared(metering.tenant_lock($1))"
SELECT_LOOK = """
SELECT clock_timestamp() AS read_time, coalesce((SELECT max(r.number) FROM metering.reratings r WHERE r.tenant_id = $1), 0) AS last_number,
       (SELECT r.rerating_id FROM metering.reratings r WHERE r.tenant_id = $1 AND NOT EXISTS (
          SELECT FROM metering.rerating_ends e WHERE e.tenant_id = $1 AND e.rerating_id = r.rerating_id)
        ORDER BY r.number LIMIT 1) AS under_way,
       (SELECT r.digest FROM metering.reratings r WHERE r.tenant_id = $1 AND r.rerating_id = $2) AS digest,
       EXISTS (SELECT FROM metering.rerating_ends e WHERE e.tenant_id = $1 AND e.rerating_id = $2) AS is_done
"""
INSERT_RERATING = """
INSERT INTO metering.reratings (
    tenant_id, rerating_id, number, start_time, end_time, price_versions, right_version, cutoff_time, digest, begin_time)
VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, clock_timestamp())
ON CONFLICT DO NOTHING RETURNING rerating_id
"""
# Billed calls with an entry of one of the versions, by the time of reservation. Which are rated by one now is looked at below.
SELECT_PAGE = """
SELECT k.reserve_time, k.reservation_id FROM metering.calls k
WHERE k.tenant_id = $1 AND k.reserve_time >= $2 AND k.reserve_time < $3 AND k.product_unit IS NULL AND k.state IN (2, 5)
  AND (k.reserve_time, k.reservation_id) > ($4, $5)
  AND EXISTS (SELECT FROM metering.entries n
              WHERE n.tenant_id = $1 AND n.reservation_id = k.reservation_id AND n.price_version = ANY ($6::text[]))
ORDER BY k.reserve_time, k.reservation_id LIMIT $7
"""
LOCK_CALLS = """
SELECT k.reservation_id FROM metering.calls k
WHERE k.tenant_id = $1 AND k.reservation_id = ANY ($2::uuid[]) ORDER BY k.reservation_id FOR UPDATE
"""
# A call is rated by the version of its last entry. One that something was recorded of since the cutoff is another re-rating's.
SELECT_RATED = """
SELECT k.reservation_id, k.provider, k.model, s.price_version, k.input_tokens, k.output_tokens, k.cache_read_tokens,
       k.cache_write_5m_tokens, k.cache_write_1h_tokens, k.cost_nano_usd
FROM metering.calls k
CROSS JOIN LATERAL (
    SELECT n.price_version, n.record_time FROM metering.entries n WHERE n.tenant_id = $1 AND n.reservation_id = k.reservation_id
    ORDER BY n.record_time DESC, n.number DESC LIMIT 1) s
WHERE k.tenant_id = $1 AND k.reservation_id = ANY ($2::uuid[]) AND s.price_version = ANY ($3::text[]) AND s.record_time < $4
"""
# The calls' cost is what balances, sums of use and the limits of users and features are made of; its trigger logs what changes.
WRITE_ADJUSTMENTS = """
WITH rated AS MATERIALIZED (
    SELECT d.reservation_id, d.entry_id, d.difference, k.provider, k.model, k.reserve_time
    FROM unnest($2::uuid[], $3::uuid[], $4::bigint[]) AS d (reservation_id, entry_id, difference)
    JOIN metering.calls k ON k.tenant_id = $1 AND k.reservation_id = d.reservation_id
), written AS (
    INSERT INTO metering.entries (
        tenant_id, reservation_id, number, entry_id, kind, price_version, provider, model, reserve_time, record_time, epoch, input_tokens,
        output_tokens, cache_read_tokens, cache_write_5m_tokens, cache_write_1h_tokens, total_tokens, cost_nano_usd, rerating_id)
    SELECT $1, r.reservation_id,
           (SELECT greatest(3, max(n.number) + 1) FROM metering.entries n WHERE n.tenant_id = $1 AND n.reservation_id = r.reservation_id),
           r.entry_id, 3, $5::text, r.provider, r.model, r.reserve_time, clock_timestamp(),
           coalesce((SELECT e.epoch FROM metering.tenant_epochs e WHERE e.tenant_id = $1), 0), 0, 0, 0, 0, 0, 0, r.difference, $6::uuid
    FROM rated r
)
UPDATE metering.calls k SET cost_nano_usd = k.cost_nano_usd + r.difference
FROM rated r WHERE k.tenant_id = $1 AND k.reservation_id = r.reservation_id AND r.difference <> 0
"""
SELECT_POSITION = """
SELECT n.reserve_time, n.reservation_id FROM metering.entries n WHERE n.tenant_id = $1 AND n.rerating_id = $2
ORDER BY n.reserve_time DESC, n.reservation_id DESC LIMIT 1
"""
SELECT_OUTSTANDING = """
SELECT count(*) FROM metering.calls k
WHERE k.tenant_id = $1 AND k.reserve_time >= $2 AND k.reserve_time < $3 AND k.product_unit IS NULL AND k.state IN (1, 4)
  AND k.price_version = ANY ($4::text[])
"""
SELECT_DIFFERENCES = """
SELECT n.provider, n.model, count(*) AS call_count, sum(n.cost_nano_usd)::bigint AS difference_nano_usd
FROM metering.entries n WHERE n.tenant_id = $1 AND n.rerating_id = $2 GROUP BY n.provider, n.model ORDER BY n.provider, n.model
"""
FINISH = "SELECT metering.finish_rerating($1, $2)"


class PostgresReratings:
    """Reads and adjusts a tenant's billed calls."""

    def __init__(self, database: TenantDatabase) -> None:
        self._database = database

    async def look(self, tenant_id: TenantId, rerating_id: UUID) -> RerateLook:
        """Waits for every change that is under way, and reads the time."""
        async with self._database.transaction(tenant_id) as connection:
            await connection.execute(LOCK_TENANT, tenant_id)
            row = await connection.fetchrow(SELECT_LOOK, tenant_id, rerating_id)
        return RerateLook(row["read_time"], row["last_number"], row["under_way"], row["digest"], row["is_done"])

    async def calls(
        self, tenant_id: TenantId, rerating: Rerating, after: RatePosition | None, size: int
    ) -> tuple[Sequence[RatedCall], RatePosition | None]:
        """Returns calls that are rated by one of the versions, and where to go on; None at the end."""
        async with self._database.transaction(tenant_id) as connection:
            page = await _page(connection, tenant_id, rerating.order, after, size)
            rated = await _rated(connection, tenant_id, rerating, page)
        return rated, _following(page, size)

    async def outstanding(self, tenant_id: TenantId, order: RerateOrder) -> int:
        """Counts the calls of the period that are open or unresolved and will be rated by one of the versions."""
        async with self._database.transaction(tenant_id) as connection:
            versions = list(order.price_versions)
            return int(await connection.fetchval(SELECT_OUTSTANDING, tenant_id, order.start_time, order.end_time, versions))

    async def begin(self, tenant_id: TenantId, rerating: Rerating, number: int) -> bool:
        """Writes the re-rating down; False when another one took its number."""
        order, digest = rerating.order, rerating.digest
        async with self._database.transaction(tenant_id) as connection:
            return (
                await connection.fetchval(
                    *(INSERT_RERATING, tenant_id, rerating.rerating_id, number, order.start_time, order.end_time),
                    *(sorted(order.price_versions), order.right_version, rerating.cutoff_time, digest),
                )
                is not None
            )

    async def position(self, tenant_id: TenantId, rerating_id: UUID) -> RatePosition | None:
        """Returns the last call it rated anew; None before the first."""
        async with self._database.transaction(tenant_id) as connection:
            row = await connection.fetchrow(SELECT_POSITION, tenant_id, rerating_id)
        return None if row is None else RatePosition(*row)

    async def adjust(
        self, tenant_id: TenantId, rerating: Rerating, after: RatePosition | None, size: int, differ: Differ
    ) -> RatePosition | None:
        """Writes the adjustments of up to `size` calls in one transaction and returns where to go on; None at the end."""
        return await run_again(lambda: self._adjust(tenant_id, rerating, after, size, differ))

    async def _adjust(
        self, tenant_id: TenantId, rerating: Rerating, after: RatePosition | None, size: int, differ: Differ
    ) -> RatePosition | None:
        async with self._database.transaction(tenant_id) as connection:
            await connection.execute(SHARE_TENANT, tenant_id)
            page = await _page(connection, tenant_id, rerating.order, after, size)
            # Then a statement of its own, which sees what another process wrote of these calls before they were ours.
            await connection.fetch(LOCK_CALLS, tenant_id, [row["reservation_id"] for row in page])
            rated = await _rated(connection, tenant_id, rerating, page)
            found = [(call.reservation_id, difference) for call in rated if (difference := differ(call)) is not None]
            if found:
                reservations, differences = zip(*found, strict=True)
                entries = [new_uuid7() for _ in found]
                await connection.execute(
                    WRITE_ADJUSTMENTS, tenant_id, reservations, entries, differences, rerating.order.right_version, rerating.rerating_id
                )
        return _following(page, size)

    async def finish(self, tenant_id: TenantId, rerating_id: UUID) -> None:
        """Marks it done, once, and has the limits count anew where they have to."""
        async with self._database.transaction(tenant_id) as connection:
            await connection.execute(FINISH, tenant_id, rerating_id)

    async def differences(self, tenant_id: TenantId, rerating_id: UUID) -> Sequence[ModelDifference]:
        """Adds up what it wrote, by provider and model."""
        async with self._database.transaction(tenant_id) as connection:
            return [ModelDifference(*row) for row in await connection.fetch(SELECT_DIFFERENCES, tenant_id, rerating_id)]


async def _page(
    connection: Connection, tenant_id: TenantId, order: RerateOrder, after: RatePosition | None, size: int
) -> Sequence[asyncpg.Record]:
    # From the beginning: before the first call of that time.
    start = (order.start_time, _BEFORE_ALL) if after is None else (after.reserve_time, after.reservation_id)
    versions = list(order.price_versions)
    rows: Sequence[asyncpg.Record] = await connection.fetch(
        SELECT_PAGE, tenant_id, order.start_time, order.end_time, *start, versions, size
    )
    return rows


async def _rated(connection: Connection, tenant_id: TenantId, rerating: Rerating, page: Sequence[asyncpg.Record]) -> Sequence[RatedCall]:
    ids, versions = [row["reservation_id"] for row in page], list(rerating.order.price_versions)
    rows = await connection.fetch(SELECT_RATED, tenant_id, ids, versions, rerating.cutoff_time)
    return [_call(row) for row in rows]


def _following(page: Sequence[asyncpg.Record], size: int) -> RatePosition | None:
    return RatePosition(*page[-1]) if len(page) == size else None


def _call(row: asyncpg.Record) -> RatedCall:
    usage = TokenUsage(
        row["input_tokens"], row["output_tokens"], row["cache_read_tokens"], row["cache_write_5m_tokens"], row["cache_write_1h_tokens"]
    )
    return RatedCall(row["reservation_id"], row["provider"], row["model"], row["price_version"], usage, row["cost_nano_usd"])
