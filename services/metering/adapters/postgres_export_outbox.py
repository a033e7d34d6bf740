"""What is to be told, in Postgres: written by triggers with the records, told over all tenants by the jobs role."""

from collections.abc import Mapping, Sequence

import asyncpg

from services.kernel.ids import TenantId
from services.kernel.tenant_database import JobsDatabase
from services.metering.exports.outgoing import Outgoing, OutgoingKey, Sink, Source, TellFailed

# What was sent and not answered may have arrived; what the row says before this attempt is what is known of those before.
TAKE_DUE = """
WITH due AS (
    SELECT tenant_id, sink, usage_id, meter, send_time FROM metering.export_outbox
    WHERE tenant_id IS NOT NULL AND sink = $1::smallint AND NOT is_dead AND due_time <= clock_timestamp()
      AND (lease_until IS NULL OR lease_until <= clock_timestamp())
    ORDER BY due_time LIMIT $2 FOR UPDATE SKIP LOCKED
)
UPDATE metering.export_outbox o
SET attempts = o.attempts + 1, lease_until = clock_timestamp() + interval '60 seconds', send_time = coalesce(o.send_time, clock_timestamp())
FROM due d WHERE o.tenant_id = d.tenant_id AND o.sink = d.sink AND o.usage_id = d.usage_id AND o.meter = d.meter
RETURNING o.tenant_id, o.sink, o.usage_id, o.meter, o.source, o.event_name, o.quantity, o.use_time, o.record_time, o.reservation_id,
    o.attempts, d.send_time,
    coalesce((SELECT c.customer_id FROM metering.stripe_customers c WHERE c.tenant_id = o.tenant_id), '') AS customer_id
"""
DELETE_DELIVERED = """
DELETE FROM metering.export_outbox o
USING unnest($1::uuid[], $2::smallint[], $3::uuid[], $4::text[]) AS d (tenant_id, sink, usage_id, meter)
WHERE o.tenant_id = d.tenant_id AND o.sink = d.sink AND o.usage_id = d.usage_id AND o.meter = d.meter
"""
NOTE_FAILURE = """
UPDATE metering.export_outbox
SET last_error = $5, lease_until = NULL, is_dead = $6::float8 IS NULL,
    due_time = clock_timestamp() + coalesce($6::float8, 0) * interval '1 second', send_time = CASE WHEN $7 THEN send_time ELSE $8 END
WHERE tenant_id = $1 AND sink = $2 AND usage_id = $3 AND meter = $4
"""
# No user and no metadata: what is about persons stays here.
SELECT_CALL = """
SELECT n.kind, n.entry_id, n.reservation_id, k.call_id, n.number, n.reserve_time AS use_time, n.provider, n.model, n.price_version,
       k.feature, k.prompt_version, k.tier, n.input_tokens, n.output_tokens, n.cache_read_tokens, n.cache_write_5m_tokens,
       n.cache_write_1h_tokens, n.cost_nano_usd, n.rerating_id
FROM metering.entries n JOIN metering.calls k ON k.tenant_id = n.tenant_id AND k.reservation_id = n.reservation_id
WHERE n.tenant_id = $1 AND n.reservation_id = $2 AND n.entry_id = $3
"""
SELECT_UNITS = """
SELECT u.entry_id, u.reservation_id, u.product_unit, u.quantity, u.reserve_time AS use_time, k.feature, k.tier
FROM metering.unit_entries u JOIN metering.calls k ON k.tenant_id = u.tenant_id AND k.reservation_id = u.reservation_id
WHERE u.tenant_id = $1 AND u.reservation_id = $2
"""
SELECT_EVENT = """
SELECT event_id, product, event_type, source, id, quantity, occurred_at AS use_time, feature, reverses FROM metering.events
WHERE tenant_id = $1 AND record_time = $2 AND event_id = $3
"""


class PostgresExportOutbox:
    """The outbox and the records behind it, as the jobs role."""

    def __init__(self, jobs: JobsDatabase) -> None:
        self._jobs = jobs

    async def take_due(self, sinks: Sequence[Sink], most: int) -> Sequence[Outgoing]:
        """Takes up to `most` for each receiver of what is due, each under a lease of 60 s."""
        # One receiver at a time: their rows stand apart in the index.
        return [_outgoing(row) for sink in sinks for row in await self._jobs.call(TAKE_DUE, int(sink), most)]

    async def delivered(self, keys: Sequence[OutgoingKey]) -> None:
        """Forgets what its receiver has."""
        tenants, sinks, ids, meters = zip(*((key.tenant_id, int(key.sink), key.usage_id, key.meter) for key in sorted(keys)), strict=True)
        await self._jobs.call(DELETE_DELIVERED, tenants, sinks, ids, meters)

    async def failed(self, item: Outgoing, error: TellFailed, pause_seconds: float | None) -> None:
        """Notes why not, and when to try again; None gives it up."""
        key = item.key
        said = (str(error)[:300], pause_seconds, error.may_have_arrived, item.send_time)
        await self._jobs.call(NOTE_FAILURE, key.tenant_id, int(key.sink), key.usage_id, key.meter, *said)

    async def read(self, item: Outgoing) -> Mapping[str, object] | None:
        """Returns a record's columns without names of people."""
        tenant_id, usage_id = item.key.tenant_id, item.key.usage_id
        match item.source:
            case Source.CALL:
                row = await self._jobs.fetch_row(SELECT_CALL, tenant_id, item.reservation_id, usage_id)
            case Source.UNIT:
                row = await self._jobs.fetch_row(SELECT_UNITS, tenant_id, item.reservation_id)
            case Source.EVENT:
                row = await self._jobs.fetch_row(SELECT_EVENT, tenant_id, item.record_time, usage_id)
        return None if row is None else dict(row)


def outgoing_key(row: asyncpg.Record) -> OutgoingKey:
    """Reads a key."""
    return OutgoingKey(TenantId(row["tenant_id"]), Sink(row["sink"]), row["usage_id"], row["meter"])


def _outgoing(row: asyncpg.Record) -> Outgoing:
    return Outgoing(
        outgoing_key(row),
        Source(row["source"]),
        row["event_name"],
        row["customer_id"],
        row["quantity"],
        row["use_time"],
        row["record_time"],
        row["reservation_id"],
        row["attempts"],
        row["send_time"],
    )
