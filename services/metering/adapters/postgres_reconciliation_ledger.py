"""The ledger of all tenants as reconciliation reads and closes it, in Postgres, as the jobs role.

Calls are read tenant by tenant through the index of open times: a call is opened within the hour after its reservation, by clocks that
may differ by half a minute.
"""

from collections.abc import Sequence
from uuid import UUID

import asyncpg

from services.kernel.tenant_database import JobsDatabase
from services.metering.adapters.postgres_ledger import run_again
from services.metering.adapters.sorted_batch import SortedBatch, type_uuid
from services.metering.call import CallState, PriceKey, TokenUsage
from services.metering.outbox import CallEnd, EndKind
from services.metering.reconciliation.bucket import Bucket
from services.metering.reconciliation.comparing import too_many
from services.metering.reconciliation.ledger_call import LedgerCall, LedgerSum, RatedClosing

MOST_CALLS = 100_000
_TENANTS_PER_STATEMENT = 500
_BEFORE_ALL = UUID(int=0)
_CAUSE = "provider_report"
# Tenants that have calls, one look into the index for each: how many calls they have does not matter.
SELECT_TENANTS = """
WITH RECURSIVE found AS (
    (SELECT tenant_id FROM metering.calls WHERE tenant_id > $1 ORDER BY tenant_id LIMIT 1)
    UNION ALL
    SELECT (SELECT k.tenant_id FROM metering.calls k WHERE k.tenant_id > f.tenant_id ORDER BY k.tenant_id LIMIT 1)
    FROM found f WHERE f.tenant_id IS NOT NULL
)
SELECT tenant_id FROM found WHERE tenant_id IS NOT NULL LIMIT $2
"""
# A billed call is rated by the version of its last entry, which is another one than that of its open once it was rated anew.
SELECT_CALLS = """
SELECT k.* FROM unnest($1::uuid[]) AS t (tenant_id) CROSS JOIN LATERAL (
    SELECT c.tenant_id, c.reservation_id, c.call_id, c.state, c.provider_account, c.bills_tenant_account, c.provider, c.model,
           coalesce((SELECT n.price_version FROM metering.entries n WHERE n.tenant_id = c.tenant_id AND n.reservation_id = c.reservation_id
                     ORDER BY n.record_time DESC, n.number DESC LIMIT 1), c.price_version) AS price_version,
           c.reserve_time, c.dispatch_deadline, c.provider_request_id, c.input_tokens, c.output_tokens, c.cache_read_tokens,
           c.cache_write_5m_tokens, c.cache_write_1h_tokens, c.cost_nano_usd, c.bound_nano_usd
    FROM metering.calls c
    WHERE c.tenant_id = t.tenant_id
      AND c.open_time >= $2::timestamptz - interval '30 seconds' AND c.open_time < $3::timestamptz + interval '1 hour'
      AND c.reserve_time >= $2 AND c.reserve_time < $3 AND c.provider = $4 AND c.state <> 3
) k LIMIT $5
"""
SELECT_SUMS = """
SELECT k.provider_account, k.model,
       coalesce(sum(k.input_tokens) FILTER (WHERE k.is_billed), 0)::bigint AS input_tokens,
       coalesce(sum(k.output_tokens) FILTER (WHERE k.is_billed), 0)::bigint AS output_tokens,
       coalesce(sum(k.cache_read_tokens) FILTER (WHERE k.is_billed), 0)::bigint AS cache_read_tokens,
       coalesce(sum(k.cache_write_5m_tokens) FILTER (WHERE k.is_billed), 0)::bigint AS cache_write_5m_tokens,
       coalesce(sum(k.cache_write_1h_tokens) FILTER (WHERE k.is_billed), 0)::bigint AS cache_write_1h_tokens,
       coalesce(sum(k.cost_nano_usd) FILTER (WHERE k.is_billed), 0)::bigint AS cost_nano_usd,
       count(*) FILTER (WHERE k.state = 5) AS reconciled_count,
       count(*) FILTER (WHERE NOT k.is_billed) AS unresolved_count,
       coalesce(sum(k.bound_nano_usd) FILTER (WHERE NOT k.is_billed), 0)::bigint AS bound_nano_usd
FROM unnest($1::uuid[]) AS t (tenant_id) CROSS JOIN LATERAL (
    SELECT c.provider_account, c.model, c.state, c.state IN (2, 5) AS is_billed, c.input_tokens, c.output_tokens, c.cache_read_tokens,
           c.cache_write_5m_tokens, c.cache_write_1h_tokens, c.cost_nano_usd, c.bound_nano_usd
    FROM metering.calls c
    WHERE c.tenant_id = t.tenant_id
      AND c.open_time >= $2::timestamptz - interval '30 seconds' AND c.open_time < $3::timestamptz + interval '1 hour'
      AND c.reserve_time >= $2 AND c.reserve_time < $3 AND c.provider = $4 AND c.state <> 3 AND NOT c.bills_tenant_account
) k GROUP BY k.provider_account, k.model
"""
RECONCILE_CALLS = """
SELECT item, told_epoch FROM metering.reconcile_calls($1::uuid[], $2::uuid[], $3::uuid[], $4::bigint[], $5::bigint[], $6::bigint[],
    $7::bigint[], $8::bigint[], $9::bigint[], $10::text[], $11::text)
"""


class PostgresReconciliationLedger:
    """Calls of all tenants: read by bucket, and closed."""

    def __init__(self, jobs: JobsDatabase) -> None:
        self._jobs = jobs

    async def calls(self, provider: str, reserved: Bucket) -> Sequence[LedgerCall]:
        """Returns the provider's calls reserved within a stretch of time. Raises: InvalidRequest when they are too many."""
        found: list[LedgerCall] = []
        after = _BEFORE_ALL
        while tenants := await self._tenants(after):
            after = tenants[-1]
            wanted = MOST_CALLS + 1 - len(found)
            found += [_call(row) for row in await self._jobs.call(SELECT_CALLS, tenants, reserved.start, reserved.end, provider, wanted)]
            if len(found) > MOST_CALLS:
                raise too_many(MOST_CALLS)
        return found

    async def sums(self, provider: str, bucket: Bucket) -> Sequence[LedgerSum]:
        """Returns the sums of the provider's calls reserved in a bucket, without those on tenants' own accounts."""
        found: list[LedgerSum] = []
        after = _BEFORE_ALL
        while tenants := await self._tenants(after):
            after = tenants[-1]
            found += [_sum(row) for row in await self._jobs.call(SELECT_SUMS, tenants, bucket.start, bucket.end, provider)]
        return found

    async def close(self, closings: Sequence[RatedClosing]) -> Sequence[CallEnd]:
        """Closes calls that are still unresolved and cannot be dispatched any more; returns the ends that were written now."""
        batch = SortedBatch(closings)
        usage = batch.column(lambda item: item.closing.usage)
        rows = await run_again(
            lambda: self._jobs.call(
                RECONCILE_CALLS,
                batch.column(lambda item: type_uuid(item.tenant_id)),
                batch.reservations,
                batch.column(lambda item: type_uuid(item.entry_id)),
                [tokens.input for tokens in usage],
                [tokens.output for tokens in usage],
                [tokens.cache_read for tokens in usage],
                [tokens.cache_write_5m for tokens in usage],
                [tokens.cache_write_1h for tokens in usage],
                batch.column(lambda item: item.cost_nano_usd),
                batch.column(lambda item: item.closing.provider_request_id),
                _CAUSE,
            )
        )
        return [_end(batch.items[row["item"] - 1], row["told_epoch"]) for row in rows]

    async def _tenants(self, after: UUID) -> list[UUID]:
        return [row["tenant_id"] for row in await self._jobs.call(SELECT_TENANTS, after, _TENANTS_PER_STATEMENT)]


def _usage(row: asyncpg.Record) -> TokenUsage:
    return TokenUsage(
        row["input_tokens"], row["output_tokens"], row["cache_read_tokens"], row["cache_write_5m_tokens"], row["cache_write_1h_tokens"]
    )


def _call(row: asyncpg.Record) -> LedgerCall:
    state = CallState(row["state"])
    is_billed = state in (CallState.SETTLED, CallState.RECONCILED)
    return LedgerCall(
        tenant_id=row["tenant_id"].bytes,
        reservation_id=row["reservation_id"].bytes,
        call_id=row["call_id"],
        state=state,
        provider_account=row["provider_account"],
        bills_tenant_account=row["bills_tenant_account"],
        price=PriceKey(row["price_version"], row["provider"], row["model"]),
        reserve_time=row["reserve_time"],
        dispatch_deadline=row["dispatch_deadline"],
        provider_request_id=row["provider_request_id"],
        usage=_usage(row) if is_billed else TokenUsage(),
        cost_nano_usd=row["cost_nano_usd"] if is_billed else 0,
        bound_nano_usd=row["bound_nano_usd"],
    )


def _sum(row: asyncpg.Record) -> LedgerSum:
    return LedgerSum(
        row["provider_account"],
        row["model"],
        _usage(row),
        row["cost_nano_usd"],
        row["reconciled_count"],
        row["unresolved_count"],
        row["bound_nano_usd"],
    )


def _end(item: RatedClosing, epoch: int) -> CallEnd:
    usage = item.closing.usage
    return CallEnd(item.tenant_id, item.reservation_id, EndKind.SETTLED, epoch, usage.total, item.cost_nano_usd, usage.output)
