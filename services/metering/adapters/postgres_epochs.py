"""Beginning epochs in Postgres: one function, one round trip."""

from collections.abc import Sequence
from datetime import timedelta

import asyncpg

from services.kernel.ids import TenantId
from services.kernel.tenant_database import TenantDatabase
from services.metering.call import CallState
from services.metering.epoch import CountedCall, CountedPeriod, CountedSum, CountedUnit, EpochSnapshot

BEGIN_EPOCH = """
SELECT section, reservation_id, state, at_time, tokens, cost_nano_usd, user_name, feature, attempt, product_unit, quantity, period
FROM metering.begin_counted_epoch($1::uuid, $2::interval, $3::smallint[], $4::text[], $5::smallint[], $6::bigint[], $7::bigint[])
"""
_EPOCH, _RECENT, _OUTSTANDING, _SUMS = range(4)


class PostgresEpochs:
    """Begins epochs as the service role."""

    def __init__(self, database: TenantDatabase) -> None:
        self._database = database

    async def begin_epoch(self, tenant_id: TenantId, periods: Sequence[CountedPeriod], recent_seconds: int) -> EpochSnapshot:
        """Raises the tenant's epoch and reads the snapshot in one transaction."""
        rows = await self._database.call(
            tenant_id,
            BEGIN_EPOCH,
            tenant_id,
            timedelta(seconds=recent_seconds),
            [int(period.unit) for period in periods],
            [period.product_unit if period.unit is CountedUnit.PRODUCT else None for period in periods],
            [int(period.scope) for period in periods],
            [period.start_us for period in periods],
            [period.end_us for period in periods],
        )
        sections: dict[int, list[asyncpg.Record]] = {section: [] for section in range(4)}
        for row in rows:
            sections[row["section"]].append(row)
        head = sections[_EPOCH][0]
        return EpochSnapshot(
            epoch=head["tokens"],
            snapshot_time=head["at_time"],
            recent=[_counted(row) for row in sections[_RECENT]],
            outstanding=[_counted(row) for row in sections[_OUTSTANDING]],
            sums=[CountedSum(row["period"], row["user_name"], row["feature"], row["tokens"]) for row in sections[_SUMS]],
        )


def _counted(row: asyncpg.Record) -> CountedCall:
    return CountedCall(
        row["reservation_id"].bytes,
        CallState(row["state"]),
        row["at_time"],
        row["tokens"],
        row["cost_nano_usd"],
        row["user_name"],
        row["feature"],
        row["attempt"] or 0,
        row["product_unit"] or "",
        row["quantity"] or 0,
    )
