"""What is kept for a while, in Postgres as the jobs role: what is due of all tenants, and its sums."""

from collections.abc import Sequence
from datetime import date, datetime

from services.kernel.tenant_database import JobsDatabase
from services.metering.adapters.postgres_ledger import run_again
from services.metering.retention import DueMonth

SELECT_DUE = "SELECT month, holding, held_by FROM metering.event_months_due($1::timestamptz)"
SUM_EVENTS = "SELECT metering.sum_event_month($1::date, $2::integer)"
SUM_REFUSALS = "SELECT metering.sum_refusals($1::timestamptz, $2::integer)"


class PostgresRetention:
    """Implements RetainedRows; each part is one transaction, so that whoever dies leaves whole parts."""

    def __init__(self, jobs: JobsDatabase) -> None:
        self._jobs = jobs

    async def due(self, before: datetime) -> Sequence[DueMonth]:
        """Returns the months of events that ended by then, first first."""
        return [DueMonth(row["month"], row["holding"], row["held_by"]) for row in await self._jobs.call(SELECT_DUE, before)]

    async def sum_events(self, month: date, most: int) -> int:
        """Adds up to `most` events of a month up; returns how many, 0 when all are, -1 while another replica does."""
        summed: int = await run_again(lambda: self._jobs.fetch_value(SUM_EVENTS, month, most))
        return summed

    async def sum_refusals(self, before: datetime, most: int) -> int:
        """Adds up to `most` counts of earlier minutes up by the hour; returns how many."""
        summed: int = await run_again(lambda: self._jobs.fetch_value(SUM_REFUSALS, before, most))
        return summed
