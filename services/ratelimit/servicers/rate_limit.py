"""RateLimitService: messages in, reservations asked, messages out."""

from mesh.ratelimit.v1 import rate_limit_service_pb2 as messages
from mesh.ratelimit.v1 import rate_limit_service_pb2_grpc
from services.kernel.ids import ReservationId, TenantId, parse_uuid, uuid_from_bytes
from services.kernel.request_context import current_tenant
from services.ratelimit.limits import Amounts
from services.ratelimit.reservation import CommitKind, Reservations, Settlement
from services.ratelimit.servicers.limit_messages import amounts_of, duration, limit_messages, timestamp

_KINDS = {
    messages.COMMIT_KIND_SETTLED: CommitKind.SETTLED,
    messages.COMMIT_KIND_VOID: CommitKind.VOID,
    messages.COMMIT_KIND_PIN: CommitKind.PIN,
}


class RateLimitServicer(rate_limit_service_pb2_grpc.RateLimitServiceServicer):
    """Serves mesh.ratelimit.v1.RateLimitService."""

    def __init__(self, reservations: Reservations, lease_seconds: float) -> None:
        self._reservations = reservations
        self._lease = duration(lease_seconds)

    async def Reserve(self, request: messages.ReserveRequest, context: object) -> messages.ReserveResponse:
        """Holds the worst case of a call."""
        reservation_id = ReservationId(parse_uuid(request.reservation_id, "reservation_id"))
        held = await self._reservations.reserve(current_tenant(), reservation_id, amounts_of(request.amounts))
        return messages.ReserveResponse(
            epoch=held.epoch, reserve_time=timestamp(held.reserve_us), lease=self._lease, limits=limit_messages(held.limits)
        )

    async def Renew(self, request: messages.RenewRequest, context: object) -> messages.RenewResponse:
        """Prolongs leases."""
        alive = await self._reservations.renew([_ids(ref) for ref in request.reservations])
        return messages.RenewResponse(lost=[ref for ref, lives in zip(request.reservations, alive, strict=True) if not lives])

    async def Release(self, request: messages.ReleaseRequest, context: object) -> messages.ReleaseResponse:
        """Lets a hold go."""
        reservation_id = ReservationId(parse_uuid(request.reservation_id, "reservation_id"))
        await self._reservations.release(current_tenant(), reservation_id, request.epoch)
        return messages.ReleaseResponse()

    async def Commit(self, request: messages.CommitRequest, context: object) -> messages.CommitResponse:
        """Applies what the ledger says of calls."""
        done = await self._reservations.commit([_settlement(item) for item in request.commits])
        return messages.CommitResponse(outcomes=[messages.COMMIT_OUTCOME_DONE if item else messages.COMMIT_OUTCOME_RETRY for item in done])

    async def Check(self, request: messages.CheckRequest, context: object) -> messages.CheckResponse:
        """Tells whether a call of this size would be admitted now."""
        look = await self._reservations.check(current_tenant(), amounts_of(request.amounts))
        response = messages.CheckResponse(admitted=look.refusal is None, limits=limit_messages(look.limits))
        if look.refusal is not None:
            response.refusing_rule = look.refusal.status.rule.value
            if look.refusal.retry_after_seconds is not None:
                response.retry_after.CopyFrom(duration(look.refusal.retry_after_seconds))
        return response

    async def ListLimits(
        self,
        request: messages.ListLimitsRequest,
        context: object,
    ) -> messages.ListLimitsResponse:
        """Lists every limited rule as it stands."""
        look = await self._reservations.check(current_tenant(), Amounts(0, 0))
        return messages.ListLimitsResponse(limits=limit_messages(look.limits))


def _ids(ref: messages.ReservationRef) -> tuple[TenantId, ReservationId]:
    return TenantId(uuid_from_bytes(ref.tenant_id, "tenant_id")), ReservationId(uuid_from_bytes(ref.reservation_id, "reservation_id"))


def _settlement(commit: messages.Commit) -> Settlement:
    tenant_id, reservation_id = _ids(commit.reservation)
    kind = _KINDS[commit.kind]
    # Only SETTLED carries amounts; whatever comes with another kind is not counted.
    actual = amounts_of(commit.actual) if kind is CommitKind.SETTLED else Amounts(0, 0)
    return Settlement(tenant_id, reservation_id, commit.epoch, kind, actual)
