"""The ledger that the bench of questions fills is one that the service could have written."""

from datetime import UTC, datetime
from uuid import uuid4

import asyncpg
import pytest

from bench import usage_ledger
from services.kernel.tenant_database import JobsDatabase, TenantDatabase
from services.metering.adapters.postgres_prices import PostgresPrices
from services.metering.adapters.postgres_verification import PostgresVerification
from services.metering.price_catalog import PriceCatalog
from services.metering.verification import Difference, Verifier
from tests.metering.mesh import migrated, settings_for
from tests.metering.peers import Peers
from tests.support.stores import PostgresStore

CONSTRAINTS = "SELECT conname, pg_get_constraintdef(oid) FROM pg_constraint WHERE connamespace = 'metering'::regnamespace ORDER BY 1"


async def test_a_filled_ledger_agrees_with_itself(postgres: PostgresStore, peers: Peers, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every sum of every grain, every count of latencies and every entry is what the calls make it; keys and indexes are back."""
    monkeypatch.setattr(usage_ledger, "DAYS", 9)
    dsn = await postgres.fresh_database()
    await migrated(dsn, peers)
    admin = await asyncpg.connect(dsn)
    try:
        schema = await _schema(admin)
        await usage_ledger.fill(dsn, uuid4(), datetime.now(UTC), entries=2_700, tenants=3, users=5)
        assert await _schema(admin) == schema
        sizes, exact = await usage_ledger.verify(admin)
    finally:
        await admin.close()
    assert exact
    assert sizes["entries"] == 2_700
    compared, differences = await _walk(dsn, peers)
    assert compared > sizes["entries"] + sizes["rollup_rows"]
    assert differences == []


async def _schema(admin: asyncpg.Connection) -> tuple[list[asyncpg.Record], list[asyncpg.Record]]:
    return await admin.fetch(usage_ledger.LIST_INDEXES, usage_ledger.TABLES), await admin.fetch(CONSTRAINTS)


async def _walk(dsn: str, peers: Peers) -> tuple[int, list[Difference]]:
    settings = settings_for(dsn, peers)
    database = await TenantDatabase.open(settings.postgres_dsn.get_secret_value(), max_size=1)
    jobs = await JobsDatabase.open(settings.postgres_jobs_dsn.get_secret_value(), max_size=1)
    verifier, position = Verifier(PostgresVerification(database, jobs, PriceCatalog(PostgresPrices(database)))), None
    compared, differences = 0, []
    try:
        while True:
            page = await verifier.page(None, position)
            compared += page.part.compared
            differences += page.part.differences
            position = page.following
            if position is None:
                return compared, differences
    finally:
        await jobs.close()
        await database.close()
