"""Reconciles by itself: what has no complete report yet, as far back as it was told. Any number of replicas may run it."""

import asyncio
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta

import structlog

from services.kernel.errors import InvalidRequest, MeshError
from services.metering.reconciliation.bucket import Bucket, BucketWidth, buckets
from services.metering.reconciliation.feed import Accounts
from services.metering.reconciliation.ledger_call import ReportStore
from services.metering.reconciliation.reconciler import Reconciler

log = structlog.get_logger(__name__)


class ReconciliationJob:
    """One loop for `BackgroundTasks`: `run`."""

    def __init__(
        self,
        reconciler: Reconciler,
        store: ReportStore,
        provider: str,
        accounts: Accounts,
        *,
        width: BucketWidth,
        lookback: timedelta,
        poll_seconds: float,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._reconciler = reconciler
        self._store = store
        self._provider = provider
        self._accounts = accounts
        self._width = width
        self._lookback = lookback
        self._poll_seconds = poll_seconds
        self._clock = clock

    async def run(self) -> None:
        """Reconciles for ever; a round that fails is tried again after the pause."""
        while True:
            try:
                await self.round()
            except MeshError as error:
                log.warning("reconciliation_failed", reason=error.reason_name, why=error.message)
            await asyncio.sleep(self._poll_seconds)

    async def round(self) -> int:
        """Reconciles what has no complete report, oldest first; returns how many buckets. One that does not fit is passed over."""
        now, count = self._clock(), 0
        done = set(await self._store.complete(self._provider, self._accounts.names, now - self._lookback - self._width.length, now))
        for bucket in self._open(now, done):
            try:
                count += (await self._reconciler.run([bucket])).bucket_count
            except InvalidRequest as error:
                # It is refused in every round: those after it would never come.
                log.warning("reconciliation_bucket_passed_over", start_time=bucket.start.isoformat(), why=error.message)
        return count

    def _open(self, now: datetime, done: set[Bucket]) -> Iterator[Bucket]:
        return (bucket for bucket in buckets(now - self._lookback, now, self._width) if bucket not in done)
