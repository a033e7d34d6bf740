"""The limits port over the ratelimit service. Concurrent reservations ride together in one rpc; one that may wait goes by itself."""

from collections.abc import Sequence
from uuid import UUID

import grpc

from mesh.ratelimit.v1 import rate_limit_service_pb2 as pb
from mesh.ratelimit.v1.rate_limit_service_pb2_grpc import RateLimitServiceStub
from services.inference.adapters.limit_messages import amounts, outcome, reservation, reserve_request
from services.inference.call import CallRef, HoldToTake, Reservation
from services.inference.worst_case import Hold
from services.kernel.batching import Batcher
from services.kernel.errors import MeshError
from services.kernel.ids import ReservationId, TenantId
from services.kernel.request_context import RequestScope, enter_scope
from services.kernel.rpc.channel import MeshChannel
from services.kernel.tenant_context import TenantContext

RESERVE_SECONDS = 2.0
EXTEND_SECONDS = 0.2
RENEW_SECONDS = 2.0
RELEASE_SECONDS = 1.0
# What stays of the call's time for a refusal to reach the caller, who would else only hear that its deadline passed.
_REFUSAL_SECONDS = 0.2
_MAX_RENEWALS = 10_000
_MAX_RESERVES = 250
# Callers wait for nothing else meanwhile, so a second rpc may start beside a slow one.
_RESERVES_IN_FLIGHT = 2


class RatelimitLimits:
    """Holds, extends, renews and releases over one channel."""

    def __init__(self, channel: MeshChannel) -> None:
        self._channel = channel
        self._stub = RateLimitServiceStub(channel.channel)
        self._reserves = Batcher(self._reserve_batch, max_batch=_MAX_RESERVES, max_in_flight=_RESERVES_IN_FLIGHT)

    async def close(self) -> None:
        """Sends what was accepted."""
        await self._reserves.close()

    async def reserve(self, wanted: HoldToTake) -> Reservation:
        """Holds the worst case. Raises: LimitRefused naming the rule, Unavailable, ReservationLost."""
        question = wanted.question
        wait_seconds = min(question.max_wait_seconds, question.remaining_seconds() - _REFUSAL_SECONDS)
        if wait_seconds > 0:
            # By itself: a batch is answered as a whole, and would keep the others as long as this one waits.
            return await self._reserve_alone(wanted, wait_seconds)
        try:
            return await self._reserves.submit(wanted)
        except MeshError as error:
            if error.code is not grpc.StatusCode.UNAVAILABLE:
                raise
            # The channel repeats what a whole rpc did not reach; an item that alone was not decided is asked again the same way.
            return await self._reserve_alone(wanted, 0.0)

    async def reserve_ahead(self, wanted: Sequence[HoldToTake]) -> Sequence[Reservation | MeshError]:
        """Holds several of one tenant in one rpc, for calls that nobody waits with. Raises: MeshError when it is not known of any."""
        return await self._reserve_batch(wanted)

    async def extend(self, tenant: TenantContext, reservation: Reservation, hold: Hold) -> None:
        """Raises a living hold. Raises: as reserve."""
        request = pb.ExtendRequest(reservation_id=str(reservation.reservation_id), epoch=reservation.epoch, amounts=amounts(hold))
        await self._channel.unary(self._stub.Extend, request, timeout_seconds=EXTEND_SECONDS, tenant=tenant, idempotent=True)

    async def renew(self, refs: Sequence[CallRef]) -> Sequence[CallRef]:
        """Prolongs leases and returns those that no longer live."""
        lost: list[CallRef] = []
        for start in range(0, len(refs), _MAX_RENEWALS):
            request = pb.RenewRequest(
                reservations=[
                    pb.ReservationRef(tenant_id=ref.tenant_id.bytes, reservation_id=ref.reservation_id.bytes)
                    for ref in refs[start : start + _MAX_RENEWALS]
                ]
            )
            response = await self._channel.unary(self._stub.Renew, request, timeout_seconds=RENEW_SECONDS)
            lost += [CallRef(TenantId(UUID(bytes=ref.tenant_id)), ReservationId(UUID(bytes=ref.reservation_id))) for ref in response.lost]
        return lost

    async def release(self, tenant: TenantContext, reservation_id: ReservationId, epoch: int) -> None:
        """Lets a hold go."""
        request = pb.ReleaseRequest(reservation_id=str(reservation_id), epoch=epoch)
        await self._channel.unary(self._stub.Release, request, timeout_seconds=RELEASE_SECONDS, tenant=tenant, idempotent=True)

    async def _reserve_alone(self, wanted: HoldToTake, wait_seconds: float) -> Reservation:
        request = reserve_request(wanted, wait_seconds)
        response = await self._channel.unary(
            self._stub.Reserve,
            request,
            timeout_seconds=RESERVE_SECONDS + wait_seconds,
            tenant=wanted.question.tenant,
            idempotent=True,
        )
        return reservation(wanted.reservation_id, request, response)

    async def _reserve_batch(self, wanted: Sequence[HoldToTake]) -> Sequence[Reservation | MeshError]:
        # A batch runs in the task of whoever came first: neither its deadline nor its tenant may reach the others' items.
        enter_scope(RequestScope())
        requests = [reserve_request(one, 0.0) for one in wanted]
        response = await self._channel.unary(
            self._stub.ReserveBatch,
            pb.ReserveBatchRequest(
                items=[
                    pb.ReserveBatchItem(context_token=one.question.tenant.token, request=request)
                    for one, request in zip(wanted, requests, strict=True)
                ]
            ),
            timeout_seconds=RESERVE_SECONDS,
        )
        return [
            outcome(one.question.tenant_id, one.reservation_id, request, answer)
            for one, request, answer in zip(wanted, requests, response.outcomes, strict=True)
        ]
