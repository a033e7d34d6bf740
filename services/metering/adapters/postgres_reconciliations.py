"""Reports of reconciliations in Postgres, written and read as the jobs role: they are of all tenants together."""

from collections.abc import Sequence
from dataclasses import astuple
from datetime import datetime

import asyncpg

from services.kernel.tenant_database import JobsDatabase
from services.metering.call import TokenUsage
from services.metering.reconciliation.bucket import Bucket
from services.metering.reconciliation.ledger_call import ReportPosition
from services.metering.reconciliation.report import Counts, Report, ReportKind, ReportLine

# One report is replaced by one writer at a time, also while it is not there yet.
LOCK_REPORT = "SELECT pg_advisory_xact_lock(hashtextextended($1, 7405))"
SELECT_DRIFT = """
SELECT drift_nano_usd FROM metering.reconciliations
WHERE provider = $1 AND account = $2 AND bucket_start = $3 AND bucket_end = $4 AND is_drifting
"""
UPSERT_REPORT = """
INSERT INTO metering.reconciliations (provider, account, bucket_start, bucket_end, kind, is_complete, run_time, settled_nano_usd,
    unresolved_nano_usd, feed_nano_usd, drift_nano_usd, is_drifting, reconciled_count, unresolved_count, unfinished_count, ambiguous_count,
    unknown_count, missing_count, differing_count, set_aside_count)
VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16, $17, $18, $19, $20)
ON CONFLICT (provider, account, bucket_start, bucket_end) DO UPDATE SET
    kind = EXCLUDED.kind, is_complete = EXCLUDED.is_complete, run_time = EXCLUDED.run_time, settled_nano_usd = EXCLUDED.settled_nano_usd,
    unresolved_nano_usd = EXCLUDED.unresolved_nano_usd, feed_nano_usd = EXCLUDED.feed_nano_usd, drift_nano_usd = EXCLUDED.drift_nano_usd,
    is_drifting = EXCLUDED.is_drifting, reconciled_count = EXCLUDED.reconciled_count, unresolved_count = EXCLUDED.unresolved_count,
    unfinished_count = EXCLUDED.unfinished_count, ambiguous_count = EXCLUDED.ambiguous_count, unknown_count = EXCLUDED.unknown_count,
    missing_count = EXCLUDED.missing_count, differing_count = EXCLUDED.differing_count, set_aside_count = EXCLUDED.set_aside_count
WHERE reconciliations.run_time <= EXCLUDED.run_time
RETURNING true
"""
DELETE_LINES = """
DELETE FROM metering.reconciliation_lines WHERE provider = $1 AND account = $2 AND bucket_start = $3 AND bucket_end = $4
"""
INSERT_LINE = """
INSERT INTO metering.reconciliation_lines (provider, account, bucket_start, bucket_end, model, settled_tokens, feed_tokens)
VALUES ($1, $2, $3, $4, $5, $6, $7)
"""
SELECT_REPORTS = """
SELECT provider, account, bucket_start, bucket_end, kind, is_complete, run_time, settled_nano_usd, unresolved_nano_usd, feed_nano_usd,
       drift_nano_usd, is_drifting, reconciled_count, unresolved_count, unfinished_count, ambiguous_count, unknown_count, missing_count,
       differing_count, set_aside_count
FROM metering.reconciliations
WHERE (NOT $1 OR is_drifting)
  AND ($2::timestamptz IS NULL OR bucket_start < $2
       OR (bucket_start = $2 AND (bucket_end < $3 OR (bucket_end = $3 AND (provider, account) > ($4, $5)))))
ORDER BY bucket_start DESC, bucket_end DESC, provider, account LIMIT $6
"""
SELECT_LINES = """
SELECT provider, account, bucket_start, bucket_end, model, settled_tokens, feed_tokens FROM metering.reconciliation_lines
WHERE bucket_start >= $1 AND bucket_start <= $2 ORDER BY model
"""
SELECT_COMPLETE = """
SELECT bucket_start, bucket_end FROM metering.reconciliations
WHERE provider = $1 AND account = ANY ($2::text[]) AND is_complete AND bucket_start >= $3 AND bucket_start < $4
GROUP BY bucket_start, bucket_end HAVING count(*) = cardinality($2::text[])
"""


class PostgresReconciliations:
    """The reports, one an account and bucket."""

    def __init__(self, jobs: JobsDatabase) -> None:
        self._jobs = jobs

    async def put(self, report: Report) -> bool:
        """Stores a report in the place of the one before, unless that is of a later run.

        Returns whether its alarm is news: none was raised, or of another amount.
        """
        key = (report.provider, report.account, report.bucket.start, report.bucket.end)
        async with self._jobs.transaction() as connection:
            await connection.execute(LOCK_REPORT, "|".join(map(str, key)))
            before = await connection.fetchval(SELECT_DRIFT, *key)
            if not await connection.fetchval(UPSERT_REPORT, *key, *_columns(report)):
                return False
            await connection.execute(DELETE_LINES, *key)
            rows = [(*key, line.model, list(astuple(line.settled)), list(astuple(line.feed))) for line in report.lines]
            await connection.executemany(INSERT_LINE, rows)
        return report.is_drifting and before != report.drift_nano_usd

    async def page(self, after: ReportPosition | None, size: int, *, drifting_only: bool) -> Sequence[Report]:
        """Returns up to `size` reports after a position, last bucket first."""
        position = (None,) * 4 if after is None else (after.bucket.start, after.bucket.end, after.provider, after.account)
        async with self._jobs.transaction() as connection:
            rows = await connection.fetch(SELECT_REPORTS, drifting_only, *position, size)
            lines = await connection.fetch(SELECT_LINES, rows[-1]["bucket_start"], rows[0]["bucket_start"]) if rows else []
        by_report: dict[tuple[object, ...], list[ReportLine]] = {}
        for line in lines:
            settled, fed = TokenUsage(*line["settled_tokens"]), TokenUsage(*line["feed_tokens"])
            by_report.setdefault(_key(line), []).append(ReportLine(line["model"], settled, fed))
        return [_report(row, by_report.get(_key(row), [])) for row in rows]

    async def complete(self, provider: str, accounts: Sequence[str], start: datetime, end: datetime) -> Sequence[Bucket]:
        """Returns the buckets within the stretch that every one of the accounts has a complete report of."""
        rows = await self._jobs.call(SELECT_COMPLETE, provider, list(accounts), start, end)
        return [Bucket(row["bucket_start"], row["bucket_end"]) for row in rows]


def _key(row: asyncpg.Record) -> tuple[object, ...]:
    return row["provider"], row["account"], row["bucket_start"], row["bucket_end"]


def _columns(report: Report) -> tuple[object, ...]:
    return (
        int(report.kind),
        report.is_complete,
        report.run_time,
        report.settled_nano_usd,
        report.unresolved_nano_usd,
        report.feed_nano_usd,
        report.drift_nano_usd,
        report.is_drifting,
        *astuple(report.counts),
        report.set_aside_count,
    )


def _report(row: asyncpg.Record, lines: Sequence[ReportLine]) -> Report:
    names = ("reconciled", "unresolved", "unfinished", "ambiguous", "unknown", "missing", "differing")
    return Report(
        provider=row["provider"],
        account=row["account"],
        bucket=Bucket(row["bucket_start"], row["bucket_end"]),
        kind=ReportKind(row["kind"]),
        is_complete=row["is_complete"],
        run_time=row["run_time"],
        settled_nano_usd=row["settled_nano_usd"],
        unresolved_nano_usd=row["unresolved_nano_usd"],
        feed_nano_usd=row["feed_nano_usd"],
        drift_nano_usd=row["drift_nano_usd"],
        is_drifting=row["is_drifting"],
        counts=Counts(*(row[f"{name}_count"] for name in names)),
        lines=lines,
        set_aside_count=row["set_aside_count"],
    )
