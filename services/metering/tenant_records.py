"""A tenant's beginning and end in the ledger: what is made, forgotten and handed out. Amounts are kept for ever."""

from collections.abc import AsyncIterator, Sequence
from typing import Protocol

from services.kernel.ids import TenantId
from services.kernel.tenant_scan import ScannedStore

CALLS = "postgres:metering.calls"
ENTRIES = "postgres:metering.entries"
UNITS = "postgres:metering.unit_entries"
EPOCHS = "postgres:metering.tenant_epochs"
# What the log and the sums of use are kept in: made of calls and units, so they are not exported, and blanked with them.
USAGE = ("usage_pending", "usage_rollups", "usage_latencies")


class TenantRecords(Protocol):
    """All that the ledger keeps of a tenant."""

    async def provision(self, tenant_id: TenantId) -> None:
        """Makes the tenant's first epoch, unless it is there."""
        ...

    async def pseudonymise(self, tenant_id: TenantId) -> int:
        """Blanks users, features and prompt names of all its calls, and of those to come; returns how many calls had any."""
        ...

    async def scan(self, tenant_id: TenantId, canaries: Sequence[str]) -> Sequence[ScannedStore]:
        """Counts in every table what holds the tenant's id or one of the strings."""
        ...

    def export(self, tenant_id: TenantId) -> AsyncIterator[tuple[str, str]]:
        """Yields each record's kind and its JSON object: calls, then entries, then entries of units, each in order of reservation."""
        ...
