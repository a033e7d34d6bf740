"""Price versions in Postgres: read by the service, written once, by `migrate` as the owner or by the jobs role for operators."""

from collections.abc import Sequence
from dataclasses import fields

import asyncpg

from services.kernel.tenant_database import Connection, JobsDatabase, TenantDatabase
from services.metering.price_book import PriceVersion
from services.metering.price_loading import VersionChange, changes_to_load
from services.metering.rating import BatchPrices, ClassPrices

SELECT_VERSIONS = """
SELECT v.version, v.effective_time, v.source, v.retrieved, v.digest, p.provider, p.model, p.input_nano_usd, p.output_nano_usd,
       p.cache_read_nano_usd, p.cache_write_5m_nano_usd, p.cache_write_1h_nano_usd, p.batch_input_nano_usd, p.batch_output_nano_usd,
       p.batch_cache_read_nano_usd, p.batch_cache_write_5m_nano_usd, p.batch_cache_write_1h_nano_usd
FROM metering.price_versions v JOIN metering.prices p ON p.version = v.version
ORDER BY v.effective_time, p.provider, p.model
"""
BECOME_OWNER = "SET LOCAL ROLE metering_owner"
# Two who load at once take turns; the lock ends with the transaction.
LOCK_BOOK = "SELECT pg_advisory_xact_lock(hashtextextended('price_book', 7405))"
INSERT_VERSION = """
INSERT INTO metering.price_versions (version, effective_time, source, retrieved, digest) VALUES ($1, $2, $3, $4, $5)
"""
INSERT_PRICE = """
INSERT INTO metering.prices (version, provider, model, input_nano_usd, output_nano_usd, cache_read_nano_usd, cache_write_5m_nano_usd,
    cache_write_1h_nano_usd, batch_input_nano_usd, batch_output_nano_usd, batch_cache_read_nano_usd, batch_cache_write_5m_nano_usd,
    batch_cache_write_1h_nano_usd) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13)
"""
_BATCH_CLASSES = tuple(field.name for field in fields(BatchPrices))


class PostgresPrices:
    """Reads all versions."""

    def __init__(self, database: TenantDatabase) -> None:
        self._database = database

    async def versions(self) -> Sequence[PriceVersion]:
        """Returns every version, oldest first."""
        return _versions(await self._database.call(None, SELECT_VERSIONS))


class PostgresPriceBook:
    """Loads versions for operators, as the jobs role: it may add to the book and change nothing of it."""

    def __init__(self, jobs: JobsDatabase) -> None:
        self._jobs = jobs

    async def load(self, versions: Sequence[PriceVersion], *, validate_only: bool) -> Sequence[VersionChange]:
        """Stores versions that are not stored yet, all or nothing, unless only to be validated. Raises: PriceBookRefused."""
        async with self._jobs.transaction() as connection:
            return await (_changes if validate_only else _store)(connection, versions)


async def load_price_book(admin: JobsDatabase, versions: Sequence[PriceVersion]) -> Sequence[VersionChange]:
    """Stores versions that are not stored yet, all or nothing, and returns them. Idempotent. Raises: PriceBookRefused."""
    async with admin.transaction() as connection:
        await connection.execute(BECOME_OWNER)
        return await _store(connection, versions)


async def price_book_changes(admin: JobsDatabase, versions: Sequence[PriceVersion]) -> Sequence[VersionChange]:
    """Returns what loading would add, and adds nothing. Raises: PriceBookRefused."""
    async with admin.transaction() as connection:
        return await _changes(connection, versions)


async def _changes(connection: Connection, versions: Sequence[PriceVersion]) -> Sequence[VersionChange]:
    rows = await connection.fetch(SELECT_VERSIONS)
    digests = {row["version"]: bytes(row["digest"]) for row in rows}
    return changes_to_load(versions, _versions(rows), digests, await connection.fetchval("SELECT clock_timestamp()"))


async def _store(connection: Connection, versions: Sequence[PriceVersion]) -> Sequence[VersionChange]:
    await connection.execute(LOCK_BOOK)
    changes = await _changes(connection, versions)
    for change in changes:
        version = change.version
        await connection.execute(INSERT_VERSION, version.version, version.effective_time, version.source, version.retrieved, version.digest)
        await connection.executemany(INSERT_PRICE, [_row(version.version, *name, prices) for name, prices in version.prices.items()])
    return changes


def _row(version: str, provider: str, model: str, prices: ClassPrices) -> tuple[object, ...]:
    batch = prices.batch or BatchPrices()
    return (
        *(version, provider, model),
        *(prices.input, prices.output, prices.cache_read, prices.cache_write_5m, prices.cache_write_1h),
        *(getattr(batch, name) for name in _BATCH_CLASSES),
    )


def _versions(rows: Sequence[asyncpg.Record]) -> list[PriceVersion]:
    found: dict[str, PriceVersion] = {}
    prices: dict[str, dict[tuple[str, str], ClassPrices]] = {}
    for row in rows:
        name = row["version"]
        if name not in found:
            prices[name] = {}
            found[name] = PriceVersion(name, row["effective_time"], row["source"], row["retrieved"], prices[name])
        prices[name][row["provider"], row["model"]] = _prices(row)
    return list(found.values())


def _prices(row: asyncpg.Record) -> ClassPrices:
    batch = BatchPrices(*(row[f"batch_{name}_nano_usd"] for name in _BATCH_CLASSES))
    return ClassPrices(
        row["input_nano_usd"],
        row["output_nano_usd"],
        row["cache_read_nano_usd"],
        row["cache_write_5m_nano_usd"],
        row["cache_write_1h_nano_usd"],
        None if batch == BatchPrices() else batch,
    )
