"""Provisions, pseudonymises and exports a tenant in Postgres, many rows at a time, never all at once."""

from collections.abc import AsyncIterator, Sequence
from datetime import UTC, datetime
from uuid import UUID

from services.kernel.ids import TenantId
from services.kernel.tenant_database import JobsDatabase, TenantDatabase
from services.kernel.tenant_scan import ScannedStore, scan_schema
from services.metering.tenant_records import CALLS, ENTRIES, UNITS, USAGE

CHUNK = 500
_BEFORE_ALL = UUID(int=0)
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

INSERT_EPOCH = "INSERT INTO metering.tenant_epochs (tenant_id, epoch) VALUES ($1, 0) ON CONFLICT DO NOTHING"
# States, leases and outbox stay as they are: a call under way when its tenant is erased is still settled and told to the limits.
PSEUDONYMISE = """
WITH chosen AS MATERIALIZED (
    SELECT reservation_id FROM metering.calls
    WHERE tenant_id = $1 AND reservation_id > $2 AND (user_name <> '' OR feature <> '' OR prompt_version <> '')
    ORDER BY reservation_id LIMIT $3 FOR UPDATE
), blanked AS (
    UPDATE metering.calls k SET user_name = '', feature = '', prompt_version = ''
    FROM chosen c WHERE k.tenant_id = $1 AND k.reservation_id = c.reservation_id
    RETURNING k.reservation_id
)
SELECT reservation_id FROM blanked ORDER BY reservation_id
"""
# What is blanked changes no amount: see metering.count_calls.
FORGET_UNCOUNTED = "SELECT set_config('metering.forgets_names', 'on', true)"
# Exclusive against batches that open calls: what was opened before is blanked below, what is opened later is blanked by its trigger.
LOCK_TENANT = "SELECT pg_advisory_xact_lock(metering.tenant_lock($1))"
INSERT_TOMBSTONE = "INSERT INTO metering.erased_tenants (tenant_id) VALUES ($1) ON CONFLICT DO NOTHING"
# Nobody folds meanwhile: what is in the log is blanked there, what is in the sums below.
LOCK_SUMS = "SELECT pg_advisory_xact_lock(7405, 0)"
PSEUDONYMISE_PENDING = """
UPDATE metering.usage_pending SET user_name = '', feature = '', prompt_version = ''
WHERE tenant_id = $1 AND (user_name <> '' OR feature <> '' OR prompt_version <> '')
"""
# A series is made of names and could be guessed: a blanked row, and the latencies that go with it, get one that is nobody's.
PSEUDONYMISE_SUMS = """
WITH chosen AS MATERIALIZED (
    SELECT grain, start_time, series, gen_random_uuid() AS nobodys FROM metering.usage_rollups
    WHERE tenant_id = $1 AND (grain, start_time, series) > ($2::smallint, $3::timestamptz, $4::uuid)
      AND (user_name <> '' OR feature <> '' OR prompt_version <> '')
    ORDER BY grain, start_time, series LIMIT $5
), timed AS (
    UPDATE metering.usage_latencies l SET series = c.nobodys
    FROM chosen c WHERE c.grain = 2 AND l.tenant_id = $1 AND l.start_time = c.start_time AND l.series = c.series
), blanked AS (
    UPDATE metering.usage_rollups u SET user_name = '', feature = '', prompt_version = '', series = c.nobodys
    FROM chosen c WHERE u.tenant_id = $1 AND u.grain = c.grain AND u.start_time = c.start_time AND u.series = c.series
)
SELECT grain, start_time, series FROM chosen ORDER BY grain, start_time, series
"""
# The books stay, with the id and without names; what is still under way ends in them.
KEPT = frozenset({"calls", "entries", "unit_entries", "tenant_epochs", "call_leases", "outbox", "erased_tenants", *USAGE})
EXPORT_CALLS = """
SELECT r.reservation_id, 1::smallint AS number, row_to_json(r)::text AS record FROM (
    SELECT tenant_id, reservation_id, state, call_id, attempt, open_epoch, reserve_time, open_time, dispatch_deadline, bound_tokens,
           bound_nano_usd, price_version, provider, model, feature, user_name, prompt_version, unresolved_time, end_time, settled_epoch,
           entry_id, input_tokens, output_tokens, cache_read_tokens, cache_write_5m_tokens, cache_write_1h_tokens, cost_nano_usd,
           end_cause, provider_request_id, first_token_ms, total_ms, product_unit, quantity
    FROM metering.calls WHERE tenant_id = $1 AND (reservation_id, 1::smallint) > ($2, $3::smallint) ORDER BY reservation_id LIMIT $4
) r ORDER BY r.reservation_id
"""
EXPORT_ENTRIES = """
SELECT r.reservation_id, r.number, row_to_json(r)::text AS record FROM (
    SELECT tenant_id, reservation_id, number, entry_id, kind, price_version, provider, model, reserve_time, record_time, epoch,
           input_tokens, output_tokens, cache_read_tokens, cache_write_5m_tokens, cache_write_1h_tokens, total_tokens, cost_nano_usd
    FROM metering.entries WHERE tenant_id = $1 AND (reservation_id, number) > ($2, $3::smallint) ORDER BY reservation_id, number LIMIT $4
) r ORDER BY r.reservation_id, r.number
"""
EXPORT_UNITS = """
SELECT r.reservation_id, 1::smallint AS number, row_to_json(r)::text AS record FROM (
    SELECT tenant_id, reservation_id, entry_id, product_unit, quantity, reserve_time, record_time, epoch
    FROM metering.unit_entries WHERE tenant_id = $1 AND (reservation_id, 1::smallint) > ($2, $3::smallint) ORDER BY reservation_id LIMIT $4
) r ORDER BY r.reservation_id
"""


class PostgresTenantRecords:
    """Works as the service role, each step in a short transaction of its tenant."""

    def __init__(self, database: TenantDatabase, jobs: JobsDatabase) -> None:
        self._database = database
        self._jobs = jobs

    async def provision(self, tenant_id: TenantId) -> None:
        """Makes the tenant's first epoch, unless it is there."""
        async with self._database.transaction(tenant_id) as connection:
            await connection.execute(INSERT_EPOCH, tenant_id)

    async def pseudonymise(self, tenant_id: TenantId) -> int:
        """Blanks users, features and prompt names of all its calls, and of those to come; returns how many calls had any."""
        async with self._database.transaction(tenant_id) as connection:
            await connection.execute(LOCK_TENANT, tenant_id)
            await connection.execute(INSERT_TOMBSTONE, tenant_id)
        blanked, after = 0, _BEFORE_ALL
        while True:
            async with self._database.transaction(tenant_id) as connection:
                await connection.execute(FORGET_UNCOUNTED)
                rows = await connection.fetch(PSEUDONYMISE, tenant_id, after, CHUNK)
            blanked += len(rows)
            if len(rows) < CHUNK:
                break
            after = rows[-1]["reservation_id"]
        await self._pseudonymise_sums(tenant_id)
        return blanked

    async def _pseudonymise_sums(self, tenant_id: TenantId) -> None:
        position: tuple[int, datetime, UUID] = (0, _EPOCH, _BEFORE_ALL)
        while True:
            async with self._database.transaction(tenant_id) as connection:
                await connection.execute(LOCK_SUMS)
                # In each step: what was under way when the calls were blanked may have written names behind it.
                await connection.execute(PSEUDONYMISE_PENDING, tenant_id)
                rows = await connection.fetch(PSEUDONYMISE_SUMS, tenant_id, *position, CHUNK)
            if len(rows) < CHUNK:
                return
            position = (rows[-1]["grain"], rows[-1]["start_time"], rows[-1]["series"])

    async def scan(self, tenant_id: TenantId, canaries: Sequence[str]) -> Sequence[ScannedStore]:
        """Counts what holds the tenant's id or one of the strings; the jobs role sees the books of every tenant."""
        return await scan_schema(self._database, self._jobs, "metering", tenant_id, canaries, kept=KEPT)

    async def export(self, tenant_id: TenantId) -> AsyncIterator[tuple[str, str]]:
        """Yields each record's kind and its JSON object."""
        for kind, sql in ((CALLS, EXPORT_CALLS), (ENTRIES, EXPORT_ENTRIES), (UNITS, EXPORT_UNITS)):
            after, number = _BEFORE_ALL, 0
            while True:
                async with self._database.transaction(tenant_id) as connection:
                    rows = await connection.fetch(sql, tenant_id, after, number, CHUNK)
                for row in rows:
                    yield kind, row["record"]
                if len(rows) < CHUNK:
                    break
                after, number = rows[-1]["reservation_id"], rows[-1]["number"]
