"""Tells the limits of failed authentications that named a tenant: counted in memory, told once a second, lost rather than waited for."""

import asyncio
from collections.abc import Mapping
from typing import Protocol

import structlog

from services.kernel.errors import MeshError
from services.kernel.ids import TenantId
from services.tenant.authentication import AuditAction, UsageTrail

log = structlog.get_logger(__name__)

REPORT_SECONDS = 1.0
MOST_REPORTS = 1_000
_MOST_TENANTS = 10_000
_FAILURES = (AuditAction.CREDENTIAL_REFUSED, AuditAction.KEY_USE_REFUSED)


class AbuseListener(Protocol):
    """Wants to know."""

    async def report(self, failures: Mapping[TenantId, int]) -> None:
        """Counts failed authentications, of at most `MOST_REPORTS` tenants. Raises: MeshError."""
        ...


class AbuseReports:
    """Implements UsageTrail around another: everything goes on to it, failures are counted on the way."""

    def __init__(self, trail: UsageTrail, listener: AbuseListener) -> None:
        self._listener = listener
        self._trail = trail
        self._failures: dict[TenantId, int] = {}
        self._pending = asyncio.Event()
        self.key_used = trail.key_used

    def audit(self, tenant_id: TenantId, action: AuditAction, subject: str, target: str, peer_address: str) -> None:
        """Passes it on; counts it where it is a failed authentication of a known tenant."""
        self._trail.audit(tenant_id, action, subject, target, peer_address)
        if action in _FAILURES and tenant_id.int and (tenant_id in self._failures or len(self._failures) < _MOST_TENANTS):
            self._failures[tenant_id] = self._failures.get(tenant_id, 0) + 1
            self._pending.set()

    async def run(self) -> None:
        """Reports until cancelled."""
        while True:
            await self._pending.wait()
            await asyncio.sleep(REPORT_SECONDS)
            self._pending.clear()
            counted, self._failures = list(self._failures.items()), {}
            for start in range(0, len(counted), MOST_REPORTS):
                await self._report(dict(counted[start : start + MOST_REPORTS]))

    async def _report(self, failures: Mapping[TenantId, int]) -> None:
        try:
            await self._listener.report(failures)
        except MeshError as error:
            log.info("abuse_not_reported", tenants=len(failures), reason=error.reason_name)
