"""Reports failed authentications to the limits."""

from collections.abc import Mapping

from mesh.ratelimit.v1 import rate_limit_service_pb2 as messages
from mesh.ratelimit.v1.rate_limit_service_pb2_grpc import RateLimitServiceStub
from services.kernel.ids import TenantId
from services.kernel.rpc.channel import MeshChannel

REPORT_TIMEOUT_SECONDS = 1.0
_MOST_FAILURES = 1_000_000


class GrpcAbuseListener:
    """Implements AbuseListener."""

    def __init__(self, channel: MeshChannel) -> None:
        self._channel = channel
        self._stub = RateLimitServiceStub(channel.channel)

    async def report(self, failures: Mapping[TenantId, int]) -> None:
        """Counts failed authentications. Raises: MeshError."""
        reports = [
            messages.AbuseReport(tenant_id=tenant_id.bytes, auth_failures=min(count, _MOST_FAILURES))
            for tenant_id, count in failures.items()
        ]
        await self._channel.unary(
            self._stub.ReportAbuse, messages.ReportAbuseRequest(reports=reports), timeout_seconds=REPORT_TIMEOUT_SECONDS
        )
