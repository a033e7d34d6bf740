"""A tenant's beginning and end in the ledger: what is made, forgotten and handed out. Amounts are kept for ever."""

from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Protocol

from services.kernel.ids import TenantId
from services.kernel.tenant_scan import ScannedStore

CALLS = "postgres:metering.calls"
ENTRIES = "postgres:metering.entries"
UNITS = "postgres:metering.unit_entries"
EVENTS = "postgres:metering.events"
EVENT_SUMS = "postgres:metering.event_sums"
EPOCHS = "postgres:metering.tenant_epochs"
SUBSCRIPTIONS = "postgres:metering.subscriptions"
CREDITS = "postgres:metering.credits"
INVOICES = "postgres:metering.invoices"
RERATINGS = "postgres:metering.reratings"
BUDGETS = "postgres:metering.budgets"
ALERTS = "postgres:metering.budget_alerts"
ENDPOINTS = "postgres:metering.webhook_endpoints"
# What was billed is the operator's book: kept for ever, with the id alone.
BILLING_TABLES = ("subscriptions", "credits", "invoice_closings", "invoices", "invoice_lines", "credit_uses", "credit_notes")
# Why entries were corrected: no names, and kept with them.
RERATING_TABLES = ("reratings", "rerating_ends")
# What the log and the sums of use are kept in: made of calls, units and events, so they are not exported, and blanked with them. Refusals
# are counts and nothing else.
USAGE = ("usage_pending", "usage_rollups", "usage_latencies", "usage_levels", "refusals")


class TenantRecords(Protocol):
    """All that the ledger keeps of a tenant."""

    async def provision(self, tenant_id: TenantId) -> None:
        """Makes the tenant's first epoch, unless it is there."""
        ...

    async def pseudonymise(self, tenant_id: TenantId) -> Mapping[str, int]:
        """Blanks names and metadata of calls, events and alerts, now and to come; removes budgets and receivers. Counts the first two."""
        ...

    async def scan(self, tenant_id: TenantId, canaries: Sequence[str]) -> Sequence[ScannedStore]:
        """Counts in every table what holds the tenant's id or one of the strings."""
        ...

    def export(self, tenant_id: TenantId) -> AsyncIterator[tuple[str, str]]:
        """Yields each record's kind and its JSON object.

        Of calls, entries, re-ratings, units, events and sums of dropped ones, plans, credits, whole invoices, budgets, alerts, receivers.
        """
        ...
