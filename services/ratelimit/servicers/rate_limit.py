"""RateLimitService: messages in, reservations asked, messages out."""

from mesh.ratelimit.v1 import rate_limit_service_pb2 as messages
from mesh.ratelimit.v1 import rate_limit_service_pb2_grpc
from services.kernel.errors import InvalidRequest
from services.kernel.ids import ReservationId, parse_uuid
from services.kernel.request_context import current_tenant
from services.kernel.rpc.encoded import encoded
from services.ratelimit.consumption import Consumptions, Use
from services.ratelimit.extension import Extensions
from services.ratelimit.gathered import GatheredReservations
from services.ratelimit.limits import Amounts, Demand, subject_of
from services.ratelimit.look import Looks
from services.ratelimit.reservation import Reservations
from services.ratelimit.servicers.guarding import Guarding
from services.ratelimit.servicers.held_messages import held_content
from services.ratelimit.servicers.limit_messages import (
    amounts_message,
    amounts_of,
    duration,
    ids_of,
    limit_messages,
    refusal_message,
    seconds_of,
    set_timestamp,
)
from services.ratelimit.servicers.reserve_batch import ReserveBatches
from services.ratelimit.servicers.reserve_requests import request_of
from services.ratelimit.servicers.slice_messages import slice_message, slice_request_of, slice_return_of
from services.ratelimit.settlement import CommitKind, Settlement
from services.ratelimit.slice import Slices

_KINDS = {
    messages.COMMIT_KIND_SETTLED: CommitKind.SETTLED,
    messages.COMMIT_KIND_VOID: CommitKind.VOID,
    messages.COMMIT_KIND_PIN: CommitKind.PIN,
}


class RateLimitServicer(rate_limit_service_pb2_grpc.RateLimitServiceServicer):
    """Serves mesh.ratelimit.v1.RateLimitService."""

    def __init__(
        self,
        reservations: Reservations,
        gathered: GatheredReservations,
        extensions: Extensions,
        consumptions: Consumptions,
        looks: Looks,
        batches: ReserveBatches,
        guarding: Guarding,
        slices: Slices,
        *,
        lease_seconds: float,
    ) -> None:
        self._reservations = reservations
        self._gathered = gathered
        self._extensions = extensions
        self._consumptions = consumptions
        self._looks = looks
        self._batches = batches
        self._guarding = guarding
        self._slices = slices
        self._lease = duration(lease_seconds)

    async def Reserve(self, request: messages.ReserveRequest, context: object) -> messages.ReserveResponse:
        """Holds the worst case of a call."""
        held = await self._gathered.reserve(current_tenant(), request_of(request))
        return encoded(messages.ReserveResponse, held_content(held, self._lease))

    async def ReserveBatch(self, request: messages.ReserveBatchRequest, context: object) -> messages.ReserveBatchResponse:
        """Holds the worst cases of many calls, of any tenants."""
        return encoded(messages.ReserveBatchResponse, await self._batches.reserve(request, self._lease))

    async def Extend(self, request: messages.ExtendRequest, context: object) -> messages.ExtendResponse:
        """Raises what a call holds."""
        reservation_id = ReservationId(parse_uuid(request.reservation_id, "reservation_id"))
        held = await self._extensions.extend(current_tenant(), reservation_id, request.epoch, amounts_of(request.amounts))
        response = messages.ExtendResponse(granted=amounts_message(held.answer.granted), limits=limit_messages(held.limits))
        set_timestamp(response.decide_time, held.answer.now_us)
        return response

    async def Consume(self, request: messages.ConsumeRequest, context: object) -> messages.ConsumeResponse:
        """Uses units of the product."""
        consumption_id = ReservationId(parse_uuid(request.consumption_id, "consumption_id"))
        use = Use(
            consumption_id, request.product_unit, request.quantity, subject_of(request.user, request.feature), seconds_of(request.max_wait)
        )
        used = await self._consumptions.consume(current_tenant(), use)
        response = messages.ConsumeResponse(
            limits=limit_messages(used.limits),
            shadow_refusals=[refusal_message(item) for item in used.shadow_refusals],
            degraded=used.degraded,
            waited=duration(used.waited_seconds) if used.waited_seconds else None,
        )
        set_timestamp(response.decide_time, used.answer.now_us)
        return response

    async def TakeSlice(self, request: messages.TakeSliceRequest, context: object) -> messages.TakeSliceResponse:
        """Charges units ahead of their use."""
        return slice_message(await self._slices.take(current_tenant(), slice_request_of(request)))

    async def ReturnSlices(self, request: messages.ReturnSlicesRequest, context: object) -> messages.ReturnSlicesResponse:
        """Takes back what was not used."""
        await self._slices.give_back(current_tenant(), [slice_return_of(item) for item in request.slices])
        return messages.ReturnSlicesResponse()

    async def Renew(self, request: messages.RenewRequest, context: object) -> messages.RenewResponse:
        """Prolongs leases."""
        alive = await self._reservations.renew([ids_of(ref) for ref in request.reservations])
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
        """Tells whether a call of this size, or a use of so many units, would be admitted now."""
        if not request.product_unit and not request.HasField("amounts"):
            raise InvalidRequest("amounts", "must be there unless product_unit is")
        subject = subject_of(request.user, request.feature)
        demand = Demand(attempt=0, quantity=request.quantity) if request.product_unit else Demand(amounts_of(request.amounts))
        look = await self._looks.check(current_tenant(), subject, demand, request.product_unit)
        response = messages.CheckResponse(
            admitted=look.refusal is None,
            limits=limit_messages(look.limits),
            shadow_refusals=[refusal_message(item) for item in look.shadow_refusals],
        )
        if look.refusal is not None:
            response.refusal.CopyFrom(refusal_message(look.refusal))
            response.refusing_rule = look.refusal.status.rule.name
            if look.refusal.retry_after_seconds is not None:
                response.retry_after.CopyFrom(response.refusal.retry_after)
        await self._guarding.keep_out(response)
        return response

    async def ListLimits(
        self,
        request: messages.ListLimitsRequest,
        context: object,
    ) -> messages.ListLimitsResponse:
        """Lists every rule as it stands."""
        limits = await self._looks.every(current_tenant(), subject_of(request.user, request.feature))
        response = messages.ListLimitsResponse(limits=limit_messages(limits))
        await self._guarding.show(response)
        return response

    async def ReportAbuse(self, request: messages.ReportAbuseRequest, context: object) -> messages.ReportAbuseResponse:
        """Counts failed authentications."""
        return await self._guarding.report(request)

    async def LiftGuard(self, request: messages.LiftGuardRequest, context: object) -> messages.LiftGuardResponse:
        """Ends a tenant's guard."""
        return await self._guarding.lift()


def _settlement(commit: messages.Commit) -> Settlement:
    tenant_id, reservation_id = ids_of(commit.reservation)
    kind = _KINDS[commit.kind]
    # Only SETTLED carries amounts; whatever comes with another kind is not counted.
    actual = amounts_of(commit.actual) if kind is CommitKind.SETTLED else Amounts(0, 0)
    output_tokens = commit.output_tokens if commit.HasField("output_tokens") else None
    return Settlement(tenant_id, reservation_id, commit.epoch, kind, actual, output_tokens)
