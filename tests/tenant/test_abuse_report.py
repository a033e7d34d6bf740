"""Failed authentications that name a tenant are told to the limits: counted, gathered, and never waited for."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import datetime
from typing import ClassVar
from uuid import UUID

import grpc
import pytest

from mesh.ratelimit.v1 import rate_limit_service_pb2 as messages
from mesh.ratelimit.v1 import rate_limit_service_pb2_grpc
from services.kernel.background import BackgroundTasks
from services.kernel.ids import TenantId, new_uuid7
from services.kernel.rpc.channel import MeshChannel
from services.kernel.settings import ServiceSettings
from services.tenant.abuse_report import AbuseReports
from services.tenant.adapters.abuse_client import GrpcAbuseListener
from services.tenant.authentication import AuditAction
from tests.support.steadiness import steadily


class Settings(ServiceSettings):
    service_name: ClassVar[str] = "tenant"


class Limits(rate_limit_service_pb2_grpc.RateLimitServiceServicer):
    """Writes down what it is told, and when."""

    def __init__(self) -> None:
        self.told: list[tuple[float, dict[bytes, int]]] = []
        self.heard = asyncio.Event()

    async def ReportAbuse(self, request: messages.ReportAbuseRequest, context: object) -> messages.ReportAbuseResponse:
        """Hears of failures."""
        self.told.append((time.monotonic(), {report.tenant_id: report.auth_failures for report in request.reports}))
        self.heard.set()
        return messages.ReportAbuseResponse()


class Trail:
    """Where everything goes on to."""

    def __init__(self) -> None:
        self.audited: list[tuple[TenantId, AuditAction]] = []

    def key_used(self, tenant_id: TenantId, key_id: str, now: datetime) -> None:
        """Forgets."""

    def audit(self, tenant_id: TenantId, action: AuditAction, subject: str, target: str, peer_address: str) -> None:
        """Remembers."""
        self.audited.append((tenant_id, action))


@asynccontextmanager
async def reporting() -> AsyncIterator[tuple[AbuseReports, Limits, Trail]]:
    """Reports under way to a limiter on a real server."""
    limits, trail, server, background = Limits(), Trail(), grpc.aio.server(), BackgroundTasks()  # type: ignore[abstract] # one is asked
    rate_limit_service_pb2_grpc.add_RateLimitServiceServicer_to_server(limits, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    channel = MeshChannel(f"127.0.0.1:{port}", settings=Settings(), target_service="ratelimit")
    reports = AbuseReports(trail, GrpcAbuseListener(channel))
    background.start("abuse_reports", reports.run)
    try:
        yield reports, limits, trail
    finally:
        await background.close()
        await channel.close()
        await server.stop(None)


@steadily
async def test_failures_are_gathered_for_a_second_and_told_by_tenant() -> None:
    """Many failures are one message, with a count for each tenant; uses of other kinds and nobody's failures are not in it."""
    ada, bob = TenantId(new_uuid7()), TenantId(new_uuid7())
    async with reporting() as (reports, limits, trail):
        began = time.monotonic()
        for _ in range(500):
            reports.audit(ada, AuditAction.CREDENTIAL_REFUSED, "key:1", "", "")
        reports.audit(bob, AuditAction.KEY_USE_REFUSED, "key:2", "", "")
        reports.audit(bob, AuditAction.TENANT_MISMATCH, "key:2", "", "")
        reports.audit(TenantId(UUID(int=0)), AuditAction.CREDENTIAL_REFUSED, "key:3", "", "")
        assert time.monotonic() - began < 0.5
        async with asyncio.timeout(5):
            await limits.heard.wait()
        assert len(trail.audited) == 503
        ((when, told),) = limits.told
        assert told == {ada.bytes: 500, bob.bytes: 1}
        assert when - began >= 1.0


@pytest.mark.parametrize("address", ["127.0.0.1:1"])
@steadily
async def test_limits_that_do_not_answer_slow_nothing_down(address: str) -> None:
    """Reports that cannot be told are lost, and the next ones are tried as if nothing had been."""
    channel = MeshChannel(address, settings=Settings(), target_service="ratelimit")
    reports, background = AbuseReports(Trail(), GrpcAbuseListener(channel)), BackgroundTasks()
    background.start("abuse_reports", reports.run)
    try:
        began = time.monotonic()
        reports.audit(TenantId(new_uuid7()), AuditAction.CREDENTIAL_REFUSED, "key:1", "", "")
        assert time.monotonic() - began < 0.1
        await asyncio.sleep(1.5)
        assert background.running() == ("abuse_reports",)
    finally:
        await background.close()
        await channel.close()
