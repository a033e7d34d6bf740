"""Goes over buckets, stores what comes of each, and raises the alarm of a drift. Stops when told to; goes on wherever it is asked to.

Any number of replicas may do the same at once: a call is closed once, and a report is a function of what both sides say.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import structlog

from services.kernel.telemetry.metrics import Counter
from services.metering.reconciliation.bucket import Bucket
from services.metering.reconciliation.comparing import Comparison
from services.metering.reconciliation.ledger_call import ReportStore
from services.metering.reconciliation.report import Report

log = structlog.get_logger(__name__)

NEXT_STEP = (
    "compare the report's lines and counts (ListReconciliations) with the provider's console, "
    "then see docs/reconciliation.md for what each of them means"
)


@dataclass(frozen=True, slots=True)
class Progress:
    """What was done; `next_start` is where to go on, None when all was."""

    bucket_count: int
    closed_count: int
    drifting_count: int
    set_aside_count: int
    next_start: datetime | None


class Reconciler:
    """Reconciles buckets one after the other."""

    def __init__(
        self,
        comparison: Comparison,
        store: ReportStore,
        drifts: Counter,
        set_aside: Counter,
        *,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._comparison = comparison
        self._store = store
        self._drifts = drifts
        self._set_aside = set_aside
        self._clock = clock

    async def run(self, wanted: Iterable[Bucket], *, until: float = float("inf")) -> Progress:
        """Reconciles buckets in order, until all are done or `until` on time.monotonic() is over; one at least.

        Raises: Unavailable, InvalidRequest; the buckets before are stored.
        """
        bucket_count = closed_count = drifting_count = set_aside_count = 0
        for bucket in wanted:
            if bucket_count and time.monotonic() >= until:
                return Progress(bucket_count, closed_count, drifting_count, set_aside_count, bucket.start)
            outcome = await self._comparison.compare(bucket, self._clock())
            for report in outcome.reports:
                if await self._store.put(report):
                    self._raise_alarm(report)
            if outcome.set_aside:
                self._tell_set_aside(bucket, outcome.set_aside)
            bucket_count += 1
            set_aside_count += len(outcome.set_aside)
            closed_count += outcome.closed_count
            drifting_count += sum(report.is_drifting for report in outcome.reports)
        return Progress(bucket_count, closed_count, drifting_count, set_aside_count, None)

    def _tell_set_aside(self, bucket: Bucket, why: Sequence[str]) -> None:
        self._set_aside.add(len(why))
        log.warning(
            "provider_rows_set_aside",
            start_time=bucket.start.isoformat(),
            end_time=bucket.end.isoformat(),
            count=len(why),
            first_why=why[0],
        )

    def _raise_alarm(self, report: Report) -> None:
        self._drifts.add(1, provider=report.provider, account=report.account)
        log.error(
            "provider_usage_drifts",
            provider=report.provider,
            account=report.account,
            start_time=report.bucket.start.isoformat(),
            end_time=report.bucket.end.isoformat(),
            drift_nano_usd=report.drift_nano_usd,
            settled_nano_usd=report.settled_nano_usd,
            unresolved_nano_usd=report.unresolved_nano_usd,
            feed_nano_usd=report.feed_nano_usd,
            unknown_count=report.counts.unknown,
            missing_count=report.counts.missing,
            differing_count=report.counts.differing,
            next_step=NEXT_STEP,
        )
