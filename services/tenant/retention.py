"""Retention: once a day each tenant loses the conversations its plan does not keep. Documents are what the tenant knows, and stay."""

import asyncio
import random
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Protocol

import structlog

from services.kernel.errors import MeshError
from services.kernel.ids import TenantId
from services.kernel.tenant_context import TenantContext
from services.tenant.context_minting import PROVISIONING_SUBJECT, ContextMinter, Grant

log = structlog.get_logger(__name__)

BATCH = 50


class RetentionTerms(Protocol):
    """How long a tenant's conversations are kept."""

    async def days(self, tenant_id: TenantId) -> int:
        """Returns the days after the last turn; 0 keeps them for ever."""
        ...


class PurgeCalendar(Protocol):
    """When each tenant was last purged."""

    async def due(self, limit: int) -> Sequence[TenantId]:
        """Returns tenants in use whose day has come."""
        ...

    async def take(self, tenant_id: TenantId) -> bool:
        """Takes the tenant's purge for an hour; False when another replica was first."""
        ...

    async def done(self, tenant_id: TenantId, removed_count: int) -> None:
        """Notes the purge; the next is due in a day."""
        ...


class PurgingPeer(Protocol):
    """A service that may keep something by time."""

    async def purge(self, context: TenantContext, older_than: datetime) -> tuple[int, bool]:
        """Removes a batch; returns how many records, and whether there may be more. Raises: MeshError."""
        ...


class RetentionRunner:
    """One loop for `BackgroundTasks`: `run`."""

    def __init__(
        self,
        calendar: PurgeCalendar,
        terms: RetentionTerms,
        peers: Mapping[str, PurgingPeer],
        minter: ContextMinter,
        *,
        clock: Callable[[], datetime],
        poll_seconds: float,
    ) -> None:
        self._calendar = calendar
        self._terms = terms
        self._peers = peers
        self._minter = minter
        self._clock = clock
        self._poll_seconds = poll_seconds

    async def run(self) -> None:
        """Purges what is due until cancelled; a tenant that fails is tried again within the hour."""
        while True:
            try:
                found = await self.purge_due()
            except MeshError as error:
                found = 0
                log.warning("retention_failed", reason=error.reason_name)
            if found < BATCH:
                await asyncio.sleep(self._poll_seconds * random.uniform(0.8, 1.2))  # noqa: S311 - jitter

    async def purge_due(self) -> int:
        """Purges one batch of tenants and returns how many were due."""
        tenant_ids = await self._calendar.due(BATCH)
        for tenant_id in tenant_ids:
            if await self._calendar.take(tenant_id):
                try:
                    await self._calendar.done(tenant_id, await self._purge(tenant_id))
                except MeshError as error:
                    log.warning("tenant_not_purged", tenant_id=str(tenant_id), reason=error.reason_name)
        return len(tenant_ids)

    async def _purge(self, tenant_id: TenantId) -> int:
        days = await self._terms.days(tenant_id)
        if days <= 0:
            return 0
        older_than, removed = self._clock() - timedelta(days=days), 0
        for peer in self._peers.values():
            more = True
            while more:
                # Minted anew: a token lives 300 s, and a first purge may take longer than that.
                context = self._minter.mint(Grant(tenant_id, None, PROVISIONING_SUBJECT, frozenset()))
                count, more = await peer.purge(context, older_than)
                removed += count
        if removed:
            log.info("tenant_purged", tenant_id=str(tenant_id), records=removed)
        return removed
