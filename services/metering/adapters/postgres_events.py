"""Events in Postgres: each method is one SQL function, one round trip and one transaction for a whole batch over tenants."""

from collections.abc import Sequence

import asyncpg

from services.kernel.errors import Unavailable
from services.kernel.ids import TenantId
from services.kernel.tenant_database import TenantDatabase
from services.metering.adapters.postgres_ledger import run_again
from services.metering.adapters.sorted_batch import slices_of
from services.metering.event import Event, LedgerEvent, Recorded, RecordOutcome, Reversal, Reversed, ReverseOutcome
from services.metering.event_log import EventPosition

RECORD_EVENTS = """
SELECT item, outcome, event_id, digest FROM metering.record_events($1::uuid[], $2::integer[], $3::integer[], $4::metering.event_item[])
"""
REVERSE_EVENTS = """
SELECT item, outcome, event_id FROM metering.reverse_events($1::uuid[], $2::integer[], $3::integer[], $4::text[], $5::text[], $6::uuid[],
    $7::text[])
"""
_EVENT = """
SELECT event_id, record_time, product, source, id, event_type, quantity, occurred_at, user_name, feature, reverses, metadata::text
FROM metering.events
"""
SELECT_FIRST_EVENTS = _EVENT + "WHERE tenant_id = $1 ORDER BY record_time DESC, event_id DESC LIMIT $2"
SELECT_NEXT_EVENTS = (
    _EVENT + "WHERE tenant_id = $1 AND (record_time, event_id) < ($3, $4) ORDER BY record_time DESC, event_id DESC LIMIT $2"
)
# Looked up once and not for each event.
_RECORDED = RecordOutcome.RECORDED


class PostgresEvents:
    """The service role's view of events and their claims."""

    def __init__(self, database: TenantDatabase) -> None:
        self._database = database

    async def record(self, events: Sequence[Event]) -> Sequence[Recorded]:
        """Records events of any tenants, each name once for ever."""
        batch = sorted(events)
        # Rows, whose fields are an event's in their order: of columns the driver would look twice at each element.
        rows = await self._run(RECORD_EVENTS, *slices_of([event.tenant_id for event in batch]), [event[1:] for event in batch])
        if not rows:
            return [Recorded(_RECORDED, event.event_id, b"") for event in events]
        stood = {
            batch[row["item"] - 1].event_id: Recorded(RecordOutcome(row["outcome"]), str(row["event_id"]), row["digest"]) for row in rows
        }
        return [stood.get(event.event_id) or Recorded(_RECORDED, event.event_id) for event in events]

    async def reverse(self, reversals: Sequence[Reversal]) -> Sequence[Reversed]:
        """Takes events back, each once for ever."""
        batch = sorted(reversals)
        tenants, sources, ids, event_ids, reasons = zip(*batch, strict=True)
        rows = await self._run(REVERSE_EVENTS, *slices_of(tenants), sources, ids, event_ids, reasons)
        answers = {event_ids[row["item"] - 1]: _reversed(row) for row in rows}
        return [answers[reversal.event_id] for reversal in reversals]

    async def page(self, tenant_id: TenantId, after: EventPosition | None, size: int) -> Sequence[LedgerEvent]:
        """Returns up to `size` events of a tenant, last recorded first."""
        async with self._database.transaction(tenant_id) as connection:
            if after is None:
                rows = await connection.fetch(SELECT_FIRST_EVENTS, tenant_id, size)
            else:
                rows = await connection.fetch(SELECT_NEXT_EVENTS, tenant_id, size, after.record_time, after.event_id)
        return [LedgerEvent(*row) for row in rows]

    async def _run(self, sql: str, *args: object) -> Sequence[asyncpg.Record]:
        try:
            return await run_again(lambda: self._database.call(None, sql, *args))
        except asyncpg.CheckViolationError as error:
            if error.constraint_name is not None:
                raise
            # No partition takes the row: the month was not made ahead.
            raise Unavailable("postgres", "this month of events is not made yet: run `python -m services.metering migrate`") from None


def _reversed(row: asyncpg.Record) -> Reversed:
    return Reversed(ReverseOutcome(row["outcome"]), "" if row["event_id"] is None else str(row["event_id"]))
