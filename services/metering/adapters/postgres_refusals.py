"""Counts of refusals in Postgres, all of a request in one transaction."""

from collections.abc import Sequence

from services.kernel.tenant_database import TenantDatabase
from services.metering.adapters.postgres_ledger import run_again
from services.metering.adapters.sorted_batch import slices_of, type_uuid
from services.metering.refusal import RefusalCount

RECORD = "SELECT metering.record_refusals($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12)"


class PostgresRefusals:
    """Writes as the service role, which sees the tenant of each slice alone."""

    def __init__(self, database: TenantDatabase) -> None:
        self._database = database

    async def record(self, replica_id: bytes, counts: Sequence[RefusalCount]) -> None:
        """Keeps the highest count of each name, minute and replica, in one transaction."""
        items = sorted(counts, key=lambda count: count.tenant_id)
        columns = zip(*((c.minute_us, c.reason, c.rule, c.model, c.feature, c.user, c.tier, c.count) for c in items), strict=True)
        arguments = [*slices_of([item.tenant_id for item in items]), type_uuid(replica_id), *map(list, columns)]
        await run_again(lambda: self._database.call(None, RECORD, *arguments))
