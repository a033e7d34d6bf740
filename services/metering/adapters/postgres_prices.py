"""Price versions in Postgres: read by the service, written once by `migrate`."""

from collections.abc import Sequence

import asyncpg

from services.kernel.tenant_database import Connection, JobsDatabase, TenantDatabase
from services.metering.price_book import PriceBookRefused, PriceVersion
from services.metering.rating import ClassPrices

SELECT_VERSIONS = """
SELECT v.version, v.effective_time, v.source, v.retrieved, p.provider, p.model, p.input_nano_usd, p.output_nano_usd, p.cache_read_nano_usd,
       p.cache_write_5m_nano_usd, p.cache_write_1h_nano_usd
FROM metering.price_versions v JOIN metering.prices p ON p.version = v.version
ORDER BY v.effective_time, p.provider, p.model
"""
SELECT_DIGEST = "SELECT digest FROM metering.price_versions WHERE version = $1"
INSERT_VERSION = """
INSERT INTO metering.price_versions (version, effective_time, source, retrieved, digest) VALUES ($1, $2, $3, $4, $5)
ON CONFLICT (version) DO NOTHING RETURNING version
"""
INSERT_PRICE = """
INSERT INTO metering.prices (version, provider, model, input_nano_usd, output_nano_usd, cache_read_nano_usd, cache_write_5m_nano_usd,
    cache_write_1h_nano_usd) VALUES ($1, $2, $3, $4, $5, $6, $7, $8)
"""


class PostgresPrices:
    """Reads all versions."""

    def __init__(self, database: TenantDatabase) -> None:
        self._database = database

    async def versions(self) -> Sequence[PriceVersion]:
        """Returns every version, oldest first."""
        found: dict[str, PriceVersion] = {}
        prices: dict[str, dict[tuple[str, str], ClassPrices]] = {}
        for row in await self._database.call(None, SELECT_VERSIONS):
            name = row["version"]
            if name not in found:
                prices[name] = {}
                found[name] = PriceVersion(name, row["effective_time"], row["source"], row["retrieved"], prices[name])
            prices[name][row["provider"], row["model"]] = _prices(row)
        return list(found.values())


async def load_price_book(admin: JobsDatabase, versions: Sequence[PriceVersion]) -> list[str]:
    """Stores versions that are not stored yet, and returns their names. All or nothing; idempotent.

    Raises: PriceBookRefused when a stored version has other content: ledger entries name it, so it cannot change.
    """
    loaded: list[str] = []
    async with admin.transaction() as connection:
        await connection.execute("SET LOCAL ROLE metering_owner")
        for version in versions:
            if await _load(connection, version):
                loaded.append(version.version)
    return loaded


async def _load(connection: Connection, version: PriceVersion) -> bool:
    try:
        inserted = await connection.fetchval(
            INSERT_VERSION, version.version, version.effective_time, version.source, version.retrieved, version.digest
        )
    except asyncpg.UniqueViolationError:
        raise PriceBookRefused(
            f"version {version.version}: another stored version takes effect at {version.effective_time}; choose another moment"
        ) from None
    if inserted is None:
        if await connection.fetchval(SELECT_DIGEST, version.version) != version.digest:
            raise PriceBookRefused(
                f"version {version.version} has other content in the database, and calls may be billed by it: add a new one"
            )
        return False
    rows = [
        (version.version, provider, model, p.input, p.output, p.cache_read, p.cache_write_5m, p.cache_write_1h)
        for (provider, model), p in version.prices.items()
    ]
    await connection.executemany(INSERT_PRICE, rows)
    return True


def _prices(row: asyncpg.Record) -> ClassPrices:
    return ClassPrices(
        row["input_nano_usd"],
        row["output_nano_usd"],
        row["cache_read_nano_usd"],
        row["cache_write_5m_nano_usd"],
        row["cache_write_1h_nano_usd"],
    )
