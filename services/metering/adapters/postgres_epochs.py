"""Beginning epochs in Postgres: one function, one round trip."""

import asyncpg

from services.kernel.ids import TenantId
from services.kernel.tenant_database import TenantDatabase
from services.metering.call import CallState
from services.metering.epoch import CountedCall, EpochSnapshot

BEGIN_EPOCH = "SELECT section, reservation_id, state, at_time, label, tokens, cost_nano_usd FROM metering.begin_epoch($1::uuid)"
_EPOCH, _RECENT, _OUTSTANDING, _DAY, _MONTH = range(5)


class PostgresEpochs:
    """Begins epochs as the service role."""

    def __init__(self, database: TenantDatabase) -> None:
        self._database = database

    async def begin_epoch(self, tenant_id: TenantId) -> EpochSnapshot:
        """Raises the tenant's epoch and reads the snapshot in one transaction."""
        rows = await self._database.call(tenant_id, BEGIN_EPOCH, tenant_id)
        sections: dict[int, list[asyncpg.Record]] = {section: [] for section in range(5)}
        for row in rows:
            sections[row["section"]].append(row)
        head = sections[_EPOCH][0]
        return EpochSnapshot(
            epoch=head["tokens"],
            snapshot_time=head["at_time"],
            recent=[_counted(row) for row in sections[_RECENT]],
            outstanding=[_counted(row) for row in sections[_OUTSTANDING]],
            settled_tokens_by_day={row["label"]: row["tokens"] for row in sections[_DAY]},
            settled_nano_usd_by_month={row["label"]: row["cost_nano_usd"] for row in sections[_MONTH]},
        )


def _counted(row: asyncpg.Record) -> CountedCall:
    return CountedCall(row["reservation_id"].bytes, CallState(row["state"]), row["at_time"], row["tokens"], row["cost_nano_usd"])
