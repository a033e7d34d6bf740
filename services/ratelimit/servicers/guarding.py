"""The guard against abuse on the wire: shown, fed, and lifted by operators."""

from datetime import UTC, datetime
from typing import Protocol

import structlog

from mesh.ratelimit.v1 import rate_limit_service_pb2 as messages
from services.kernel.audit_client import AuditEntry
from services.kernel.errors import InvalidRequest, LimitExceeded
from services.kernel.ids import TenantId, new_uuid7, uuid_from_bytes
from services.kernel.request_context import current_peer_address, current_tenant, operator_reason
from services.ratelimit.abuse_guard import AbuseGuard
from services.ratelimit.ready_counters import ReadyCounters
from services.ratelimit.servicers.limit_messages import duration, set_timestamp

log = structlog.get_logger(__name__)

LIFTED = "ABUSE_GUARD_LIFTED"


class Audit(Protocol):
    """Where operators' doings are written down."""

    async def record(self, entries: list[AuditEntry]) -> object:
        """Writes them durably. Raises: MeshError."""
        ...


class Guarding:
    """Serves what RateLimitService says of the guard."""

    def __init__(self, guard: AbuseGuard, counters: ReadyCounters, audit: Audit) -> None:
        self._guard = guard
        self._counters = counters
        self._audit = audit

    async def show(self, response: messages.ListLimitsResponse) -> None:
        """Writes until when the tenant in hand is kept out."""
        context = current_tenant()
        until_us = await self._guard.guarded_until_us(context, await self._counters.terms_of(context))
        if until_us is not None:
            set_timestamp(response.guarded_until_time, until_us)

    async def keep_out(self, response: messages.CheckResponse) -> None:
        """Writes that the tenant in hand is kept out, where it is: nothing would be admitted then, whatever its rules say."""
        context = current_tenant()
        try:
            await self._guard.admit(context, await self._counters.terms_of(context))
        except LimitExceeded as guarded:
            response.admitted, response.refusing_rule = False, ""
            response.refusal.CopyFrom(messages.Refusal(reason=guarded.reason_name, message=guarded.message))
            if guarded.retry_after_seconds is not None:
                response.refusal.retry_after.CopyFrom(duration(guarded.retry_after_seconds))
                response.retry_after.CopyFrom(response.refusal.retry_after)

    async def report(self, request: messages.ReportAbuseRequest) -> messages.ReportAbuseResponse:
        """Counts failed authentications."""
        failures: dict[TenantId, int] = {}
        for report in request.reports:
            tenant_id = TenantId(uuid_from_bytes(report.tenant_id, "tenant_id"))
            failures[tenant_id] = failures.get(tenant_id, 0) + report.auth_failures
        await self._guard.report(failures)
        return messages.ReportAbuseResponse()

    async def lift(self) -> messages.LiftGuardResponse:
        """Ends the guard of the tenant in hand; written down first, so that nothing is lifted that no log knows."""
        context = current_tenant()
        if context.tenant_id is None:
            raise InvalidRequest("x-tenant-id", "must name the tenant whose guard is to end")
        entry = AuditEntry(
            context.tenant_id, new_uuid7(), LIFTED, datetime.now(UTC), context.token, target="guard", peer_address=current_peer_address()
        )
        await self._audit.record([entry])
        was_open = await self._guard.lift(context.tenant_id)
        log.warning("abuse_guard_lifted", was_open=was_open, operator=context.subject, reason=operator_reason())
        return messages.LiftGuardResponse(was_open=was_open)
