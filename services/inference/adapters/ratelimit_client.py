"""The limits port over the ratelimit service."""

from collections.abc import Sequence
from uuid import UUID

from mesh.ratelimit.v1 import rate_limit_service_pb2 as pb
from mesh.ratelimit.v1.rate_limit_service_pb2_grpc import RateLimitServiceStub
from services.inference.call import CallRef, LimitLeft, Reservation
from services.kernel.ids import ReservationId, TenantId
from services.kernel.rpc.channel import MeshChannel
from services.kernel.tenant_context import TenantContext
from services.kernel.timestamps import from_timestamp

RESERVE_SECONDS = 2.0
RENEW_SECONDS = 2.0
RELEASE_SECONDS = 1.0
_MAX_BATCH = 10_000


class RatelimitLimits:
    """Holds, renews and releases over one channel."""

    def __init__(self, channel: MeshChannel) -> None:
        self._channel = channel
        self._stub = RateLimitServiceStub(channel.channel)

    async def reserve(self, tenant: TenantContext, reservation_id: ReservationId, tokens: int, cost_nano_usd: int) -> Reservation:
        """Holds the worst case. Raises: LimitExceeded naming the rule, Unavailable, ReservationLost."""
        request = pb.ReserveRequest(reservation_id=str(reservation_id), amounts=pb.Amounts(tokens=tokens, cost_nano_usd=cost_nano_usd))
        response = await self._channel.unary(self._stub.Reserve, request, timeout_seconds=RESERVE_SECONDS, tenant=tenant, idempotent=True)
        return Reservation(
            reservation_id=reservation_id,
            epoch=response.epoch,
            reserve_time=from_timestamp(response.reserve_time),
            limits=tuple(LimitLeft(limit.rule, limit.limit, limit.remaining) for limit in response.limits),
        )

    async def renew(self, refs: Sequence[CallRef]) -> Sequence[CallRef]:
        """Prolongs leases and returns those that no longer live."""
        lost: list[CallRef] = []
        for start in range(0, len(refs), _MAX_BATCH):
            request = pb.RenewRequest(
                reservations=[
                    pb.ReservationRef(tenant_id=ref.tenant_id.bytes, reservation_id=ref.reservation_id.bytes)
                    for ref in refs[start : start + _MAX_BATCH]
                ]
            )
            response = await self._channel.unary(self._stub.Renew, request, timeout_seconds=RENEW_SECONDS)
            lost += [CallRef(TenantId(UUID(bytes=ref.tenant_id)), ReservationId(UUID(bytes=ref.reservation_id))) for ref in response.lost]
        return lost

    async def release(self, tenant: TenantContext, reservation_id: ReservationId, epoch: int) -> None:
        """Lets a hold go."""
        request = pb.ReleaseRequest(reservation_id=str(reservation_id), epoch=epoch)
        await self._channel.unary(self._stub.Release, request, timeout_seconds=RELEASE_SECONDS, tenant=tenant, idempotent=True)
