"""Provisions, pseudonymises and exports a tenant in Postgres, many rows at a time, never all at once."""

from collections.abc import AsyncIterator, Mapping, Sequence
from datetime import UTC, datetime
from uuid import UUID

from services.kernel.ids import TenantId
from services.kernel.tenant_database import JobsDatabase, TenantDatabase
from services.kernel.tenant_scan import ScannedStore, scan_schema
from services.metering.tenant_records import (
    ALERTS,
    BILLING_TABLES,
    BUDGETS,
    CALLS,
    CREDITS,
    ENDPOINTS,
    ENTRIES,
    EVENT_SUMS,
    EVENTS,
    INVOICES,
    RERATING_TABLES,
    RERATINGS,
    SUBSCRIPTIONS,
    UNITS,
    USAGE,
)

CHUNK = 500
_BEFORE_ALL = UUID(int=0)
_BEFORE_ALL_TIMES = datetime(1970, 1, 1, tzinfo=UTC)
_BEFORE_ALL_EVENTS = (_BEFORE_ALL_TIMES, _BEFORE_ALL)

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
BLANK_EVENTS = """
WITH chosen AS MATERIALIZED (
    SELECT record_time, event_id FROM metering.events
    WHERE tenant_id = $1 AND (record_time, event_id) > ($2, $3)
      AND (user_name <> '' OR feature <> '' OR (metadata IS NOT NULL AND reverses IS NULL))
    ORDER BY record_time, event_id LIMIT $4 FOR UPDATE
), blanked AS (
    UPDATE metering.events e SET user_name = '', feature = '', metadata = CASE WHEN e.reverses IS NOT NULL THEN e.metadata END
    FROM chosen c WHERE e.tenant_id = $1 AND e.record_time = c.record_time AND e.event_id = c.event_id
    RETURNING e.record_time, e.event_id
)
SELECT record_time, event_id FROM blanked ORDER BY record_time, event_id
"""
BLANK_EVENT_SUMS = """
WITH chosen AS MATERIALIZED (
    SELECT use_time, sum_id FROM metering.event_sums
    WHERE tenant_id = $1 AND (use_time, sum_id) > ($2, $3) AND (user_name <> '' OR feature <> '')
    ORDER BY use_time, sum_id LIMIT $4 FOR UPDATE
), blanked AS (
    UPDATE metering.event_sums s SET user_name = '', feature = ''
    FROM chosen c WHERE s.tenant_id = $1 AND s.use_time = c.use_time AND s.sum_id = c.sum_id
    RETURNING s.use_time, s.sum_id
)
SELECT use_time, sum_id FROM blanked ORDER BY use_time, sum_id
"""
# A name could be guessed and tried against the digest of an event that held it.
BLANK_DIGESTS = """
WITH chosen AS MATERIALIZED (
    SELECT source, id FROM metering.event_claims
    WHERE tenant_id = $1 AND (source, id) > ($2, $3) AND digest <> ''
    ORDER BY source, id LIMIT $4 FOR UPDATE
), blanked AS (
    UPDATE metering.event_claims k SET digest = ''
    FROM chosen c WHERE k.tenant_id = $1 AND k.source = c.source AND k.id = c.id
    RETURNING k.source, k.id
)
SELECT source, id FROM blanked ORDER BY source, id
"""
LOCK_TENANT = "SELECT pg_advisory_xact_lock(metering.tenant_lock($1))"
INSERT_TOMBSTONE = "INSERT INTO metering.erased_tenants (tenant_id) VALUES ($1) ON CONFLICT DO NOTHING"
# Nobody folds meanwhile: what is in the log is blanked there, what is in the sums below.
LOCK_SUMS = "SELECT pg_advisory_xact_lock(7405, 0)"
PSEUDONYMISE_PENDING = """
UPDATE metering.usage_pending SET user_name = '', feature = '', prompt_version = '', refusal_rule = ''
WHERE tenant_id = $1 AND (user_name <> '' OR feature <> '' OR prompt_version <> '' OR refusal_rule <> '')
"""
# A series is made of names and could be guessed: a blanked row, and the latencies that go with it, get one that is nobody's.
PSEUDONYMISE_SUMS = """
WITH chosen AS MATERIALIZED (
    SELECT grain, start_time, series, gen_random_uuid() AS nobodys FROM metering.usage_rollups
    WHERE tenant_id = $1 AND (grain, start_time, series) > ($2::smallint, $3::timestamptz, $4::uuid)
      AND (user_name <> '' OR feature <> '' OR prompt_version <> '' OR refusal_rule <> '')
    ORDER BY grain, start_time, series LIMIT $5
), timed AS (
    UPDATE metering.usage_latencies l SET series = c.nobodys
    FROM chosen c WHERE c.grain = 2 AND l.tenant_id = $1 AND l.start_time = c.start_time AND l.series = c.series
), blanked AS (
    UPDATE metering.usage_rollups u SET user_name = '', feature = '', prompt_version = '', refusal_rule = '', series = c.nobodys
    FROM chosen c WHERE u.tenant_id = $1 AND u.grain = c.grain AND u.start_time = c.start_time AND u.series = c.series
)
SELECT grain, start_time, series FROM chosen ORDER BY grain, start_time, series
"""
# Budgets and receivers are nobody's any more, and their names the tenant's words. What fired stays, without names.
DELETE_MARKS = "DELETE FROM metering.budget_marks WHERE tenant_id = $1"
DELETE_BUDGETS = "DELETE FROM metering.budgets WHERE tenant_id = $1"
DELETE_DELIVERIES = "DELETE FROM metering.webhook_deliveries WHERE tenant_id = $1"
DELETE_ENDPOINTS = "DELETE FROM metering.webhook_endpoints WHERE tenant_id = $1"
BLANK_ALERTS = """
UPDATE metering.budget_alerts SET user_name = '', feature = '', metadata = NULL
WHERE tenant_id = $1 AND (user_name <> '' OR feature <> '' OR metadata IS NOT NULL)
"""
PSEUDONYMISE_LEVELS = """
WITH named AS MATERIALIZED (
    SELECT DISTINCT grain, start_time, series FROM metering.usage_levels
    WHERE tenant_id = $1 AND (user_name <> '' OR feature <> '') LIMIT $2
), chosen AS MATERIALIZED (
    SELECT *, gen_random_uuid() AS nobodys FROM named
), blanked AS (
    UPDATE metering.usage_levels l SET user_name = '', feature = '', series = c.nobodys
    FROM chosen c WHERE l.tenant_id = $1 AND l.grain = c.grain AND l.start_time = c.start_time AND l.series = c.series
)
SELECT series FROM chosen
"""
PSEUDONYMISE_REFUSALS = """
WITH named AS MATERIALIZED (
    SELECT minute, replica, series, gen_random_uuid() AS nobodys FROM metering.refusals
    WHERE tenant_id = $1 AND (user_name <> '' OR feature <> '' OR rule <> '') LIMIT $2
), blanked AS (
    UPDATE metering.refusals r SET user_name = '', feature = '', rule = '', series = n.nobodys
    FROM named n WHERE r.tenant_id = $1 AND r.minute = n.minute AND r.replica = n.replica AND r.series = n.series
)
SELECT series FROM named
"""
# The books stay, with the id and without names; what is still under way ends in them.
KEPT = frozenset(
    (
        "calls",
        "entries",
        "unit_entries",
        "tenant_epochs",
        "call_leases",
        "outbox",
        "erased_tenants",
        "events",
        "event_claims",
        "event_sums",
        "summed_event_months",
        "stripe_customers",
        "export_outbox",
        *BILLING_TABLES,
        *RERATING_TABLES,
        *USAGE,
        "budget_alerts",
    ),
)
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
           input_tokens, output_tokens, cache_read_tokens, cache_write_5m_tokens, cache_write_1h_tokens, total_tokens, cost_nano_usd,
           rerating_id
    FROM metering.entries WHERE tenant_id = $1 AND (reservation_id, number) > ($2, $3::smallint) ORDER BY reservation_id, number LIMIT $4
) r ORDER BY r.reservation_id, r.number
"""
EXPORT_RERATINGS = """
SELECT r.rerating_id AS reservation_id, 1::smallint AS number, row_to_json(r)::text AS record FROM (
    SELECT t.tenant_id, t.rerating_id, t.start_time, t.end_time, t.price_versions, t.right_version, t.cutoff_time, t.begin_time,
           e.finish_time
    FROM metering.reratings t
    LEFT JOIN metering.rerating_ends e ON e.tenant_id = t.tenant_id AND e.rerating_id = t.rerating_id
    WHERE t.tenant_id = $1 AND (t.rerating_id, 1::smallint) > ($2, $3::smallint) ORDER BY t.rerating_id LIMIT $4
) r ORDER BY r.rerating_id
"""
EXPORT_UNITS = """
SELECT r.reservation_id, 1::smallint AS number, row_to_json(r)::text AS record FROM (
    SELECT tenant_id, reservation_id, entry_id, product_unit, quantity, reserve_time, record_time, epoch
    FROM metering.unit_entries WHERE tenant_id = $1 AND (reservation_id, 1::smallint) > ($2, $3::smallint) ORDER BY reservation_id LIMIT $4
) r ORDER BY r.reservation_id
"""
# Whole invoices: each with its closing, its lines, what credits paid and what was taken back.
EXPORT_INVOICES = """
SELECT '00000000-0000-0000-0000-000000000000'::uuid AS reservation_id, r.number, row_to_json(r)::text AS record FROM (
    SELECT i.tenant_id, i.number, c.invoice_id, c.period_start, c.period_end, c.close_time, c.tier_plan, i.charges_nano_usd,
           i.carried_in_nano_usd, i.credits_nano_usd, i.due_nano_usd, i.carried_out_nano_usd, encode(i.digest, 'hex') AS digest,
           (SELECT json_agg(row_to_json(l) ORDER BY l.line_number) FROM metering.invoice_lines l
            WHERE l.tenant_id = i.tenant_id AND l.number = i.number) AS lines,
           (SELECT json_agg(row_to_json(u) ORDER BY u.position) FROM metering.credit_uses u
            WHERE u.tenant_id = i.tenant_id AND u.number = i.number) AS credit_uses,
           (SELECT json_agg(row_to_json(n) ORDER BY n.issue_time) FROM metering.credit_notes n
            WHERE n.tenant_id = i.tenant_id AND n.number = i.number) AS credit_notes
    FROM metering.invoices i JOIN metering.invoice_closings c ON c.tenant_id = i.tenant_id AND c.number = i.number
    WHERE i.tenant_id = $1 AND $2::uuid IS NOT NULL AND i.number > $3::integer ORDER BY i.number LIMIT $4
) r ORDER BY r.number
"""
EXPORT_CREDITS = """
SELECT r.credit_id AS reservation_id, 1::smallint AS number, row_to_json(r)::text AS record FROM (
    SELECT tenant_id, credit_id, amount_nano_usd, priority, effective_time, expire_time, reason, record_time
    FROM metering.credits WHERE tenant_id = $1 AND (credit_id, 1::smallint) > ($2, $3::smallint) ORDER BY credit_id LIMIT $4
) r ORDER BY r.credit_id
"""
EXPORT_SUBSCRIPTIONS = """
SELECT r.subscription_id AS reservation_id, 1::smallint AS number, row_to_json(r)::text AS record FROM (
    SELECT tenant_id, subscription_id, number, plan, effective_time, anchor_day, record_time
    FROM metering.subscriptions WHERE tenant_id = $1 AND (subscription_id, 1::smallint) > ($2, $3::smallint)
    ORDER BY subscription_id LIMIT $4
) r ORDER BY r.subscription_id
"""
EXPORT_EVENTS = """
SELECT r.record_time, r.event_id, row_to_json(r)::text AS record FROM (
    SELECT tenant_id, event_id, product, source, id, event_type, quantity, occurred_at, record_time, user_name, feature, reverses, metadata
    FROM metering.events WHERE tenant_id = $1 AND (record_time, event_id) > ($2, $3) ORDER BY record_time, event_id LIMIT $4
) r ORDER BY r.record_time, r.event_id
"""
# What is left of events that are kept no longer.
EXPORT_EVENT_SUMS = """
SELECT r.use_time, r.sum_id, row_to_json(r)::text AS record FROM (
    SELECT s.tenant_id, s.sum_id, s.month, s.product, s.event_type, s.level, s.quantity, s.event_count, s.use_time, s.record_time,
           s.user_name, s.feature
    FROM metering.event_sums s
    WHERE s.tenant_id = $1 AND (s.use_time, s.sum_id) > ($2, $3)
      AND EXISTS (SELECT FROM metering.dropped_event_months d WHERE d.month = s.month)
    ORDER BY s.use_time, s.sum_id LIMIT $4
) r ORDER BY r.use_time, r.sum_id
"""
EXPORT_BUDGETS = """
SELECT r.budget_id AS reservation_id, 1::smallint AS number, row_to_json(r)::text AS record FROM (
    SELECT tenant_id, budget_id, name, measure, product_unit, user_name, feature, each_user, each_feature, amount, period, action,
           thresholds, update_time
    FROM metering.budgets WHERE tenant_id = $1 AND (budget_id, 1::smallint) > ($2, $3::smallint) ORDER BY budget_id LIMIT $4
) r ORDER BY r.budget_id
"""
EXPORT_ALERTS = """
SELECT r.fire_time, r.alert_id, row_to_json(r)::text AS record FROM (
    SELECT tenant_id, budget_id, period_start, threshold, alert_id, measure, product_unit, user_name, feature, metadata, amount, action,
           period_end, used, fire_time
    FROM metering.budget_alerts WHERE tenant_id = $1 AND (fire_time, alert_id) > ($2, $3) ORDER BY fire_time, alert_id LIMIT $4
) r ORDER BY r.fire_time, r.alert_id
"""
# Without secrets. What is sent there is made of alerts.
EXPORT_ENDPOINTS = """
SELECT r.endpoint_id AS reservation_id, 1::smallint AS number, row_to_json(r)::text AS record FROM (
    SELECT tenant_id, endpoint_id, url, create_time
    FROM metering.webhook_endpoints WHERE tenant_id = $1 AND (endpoint_id, 1::smallint) > ($2, $3::smallint) ORDER BY endpoint_id LIMIT $4
) r ORDER BY r.endpoint_id
"""
# Each kind with what finds it from a position on, which is the first columns of a row, and the position before all rows.
_EXPORTS: tuple[tuple[str, str, tuple[object, ...]], ...] = (
    (CALLS, EXPORT_CALLS, (_BEFORE_ALL, 0)),
    (ENTRIES, EXPORT_ENTRIES, (_BEFORE_ALL, 0)),
    (RERATINGS, EXPORT_RERATINGS, (_BEFORE_ALL, 0)),
    (UNITS, EXPORT_UNITS, (_BEFORE_ALL, 0)),
    (EVENTS, EXPORT_EVENTS, _BEFORE_ALL_EVENTS),
    (EVENT_SUMS, EXPORT_EVENT_SUMS, _BEFORE_ALL_EVENTS),
    (SUBSCRIPTIONS, EXPORT_SUBSCRIPTIONS, (_BEFORE_ALL, 0)),
    (CREDITS, EXPORT_CREDITS, (_BEFORE_ALL, 0)),
    (INVOICES, EXPORT_INVOICES, (_BEFORE_ALL, 0)),
    (BUDGETS, EXPORT_BUDGETS, (_BEFORE_ALL, 0)),
    (ALERTS, EXPORT_ALERTS, _BEFORE_ALL_EVENTS),
    (ENDPOINTS, EXPORT_ENDPOINTS, (_BEFORE_ALL, 0)),
)


class PostgresTenantRecords:
    """Works as the service role, each step in a short transaction of its tenant."""

    def __init__(self, database: TenantDatabase, jobs: JobsDatabase) -> None:
        self._database = database
        self._jobs = jobs

    async def provision(self, tenant_id: TenantId) -> None:
        """Makes the tenant's first epoch, unless it is there."""
        async with self._database.transaction(tenant_id) as connection:
            await connection.execute(INSERT_EPOCH, tenant_id)

    async def pseudonymise(self, tenant_id: TenantId) -> Mapping[str, int]:
        """Blanks names and metadata of calls, events and alerts, now and to come; removes budgets and receivers. Counts the first two."""
        async with self._database.transaction(tenant_id) as connection:
            await connection.execute(LOCK_TENANT, tenant_id)
            await connection.execute(INSERT_TOMBSTONE, tenant_id)
            for sql in (DELETE_MARKS, DELETE_BUDGETS, DELETE_DELIVERIES, DELETE_ENDPOINTS, BLANK_ALERTS):
                await connection.execute(sql, tenant_id)
        counts = {CALLS: await self._blank_all(PSEUDONYMISE, tenant_id, _BEFORE_ALL)}
        counts[EVENTS] = await self._blank_all(BLANK_EVENTS, tenant_id, *_BEFORE_ALL_EVENTS)
        await self._blank_all(BLANK_EVENT_SUMS, tenant_id, *_BEFORE_ALL_EVENTS)
        await self._blank_all(BLANK_DIGESTS, tenant_id, "", "")
        await self._pseudonymise_sums(tenant_id)
        return counts

    async def _pseudonymise_sums(self, tenant_id: TenantId) -> None:
        position: tuple[int, datetime, UUID] = (0, _BEFORE_ALL_TIMES, _BEFORE_ALL)
        while True:
            async with self._database.transaction(tenant_id) as connection:
                await connection.execute(LOCK_SUMS)
                # In each step: what was under way when the calls were blanked may have written names behind it.
                await connection.execute(PSEUDONYMISE_PENDING, tenant_id)
                levels = await connection.fetch(PSEUDONYMISE_LEVELS, tenant_id, CHUNK)
                refusals = await connection.fetch(PSEUDONYMISE_REFUSALS, tenant_id, CHUNK)
                rows = await connection.fetch(PSEUDONYMISE_SUMS, tenant_id, *position, CHUNK)
            if max(len(rows), len(levels), len(refusals)) < CHUNK:
                return
            if rows:
                position = (rows[-1]["grain"], rows[-1]["start_time"], rows[-1]["series"])

    async def scan(self, tenant_id: TenantId, canaries: Sequence[str]) -> Sequence[ScannedStore]:
        """Counts what holds the tenant's id or one of the strings; the jobs role sees the books of every tenant."""
        return await scan_schema(self._database, self._jobs, "metering", tenant_id, canaries, kept=KEPT)

    async def export(self, tenant_id: TenantId) -> AsyncIterator[tuple[str, str]]:
        """Yields each record's kind and its JSON object."""
        for kind, sql, start in _EXPORTS:
            position = start
            while True:
                async with self._database.transaction(tenant_id) as connection:
                    rows = await connection.fetch(sql, tenant_id, *position, CHUNK)
                for row in rows:
                    yield kind, row["record"]
                if len(rows) < CHUNK:
                    break
                position = tuple(rows[-1])[:-1]

    async def _blank_all(self, sql: str, tenant_id: TenantId, *position: object) -> int:
        """Blanks a chunk at a time, from position to position, until there is less than one; returns how many rows there were in all."""
        blanked = 0
        while True:
            async with self._database.transaction(tenant_id) as connection:
                await connection.execute(FORGET_UNCOUNTED)
                rows = await connection.fetch(sql, tenant_id, *position, CHUNK)
            blanked += len(rows)
            if len(rows) < CHUNK:
                return blanked
            position = tuple(rows[-1])
