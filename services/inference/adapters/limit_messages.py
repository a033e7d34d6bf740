"""What is said to the ratelimit service and what it answers, as messages and as values. Decides nothing."""

from datetime import datetime

from google.protobuf.duration_pb2 import Duration

from mesh.common.v1 import error_reason_pb2, limit_rule_pb2
from mesh.ratelimit.v1 import rate_limit_service_pb2 as pb
from services.inference.call import HoldToTake, LimitLeft, Reservation
from services.inference.refusals import LimitRefused
from services.inference.worst_case import Hold
from services.kernel.errors import Forbidden, InvalidRequest, MeshError, QuotaViolation, Unavailable, reason_from_name
from services.kernel.ids import ReservationId, TenantId
from services.kernel.rpc.wire_status import decode
from services.kernel.timestamps import from_timestamp


def reserve_request(wanted: HoldToTake, max_wait_seconds: float) -> pb.ReserveRequest:
    """Asks for the hold; an answer may be shortened down to what its caller can use."""
    question, hold = wanted.question, wanted.hold
    request = pb.ReserveRequest(
        reservation_id=str(wanted.reservation_id),
        amounts=amounts(hold),
        user=question.user,
        feature=question.feature,
        attempt=wanted.attempt,
        shorten=pb.Shorten(
            max_output_tokens=hold.max_output_tokens,
            min_output_tokens=hold.max_output_tokens if wanted.whole else min(question.min_output_tokens, hold.max_output_tokens),
            output_nano_usd_per_million=question.price.output,
        ),
        provider_account=question.provider_account,
        input_tokens=hold.input_tokens,
    )
    if max_wait_seconds > 0:
        request.max_wait.FromNanoseconds(int(max_wait_seconds * 1e9))
    return request


def amounts(hold: Hold) -> pb.Amounts:
    """All that is held."""
    return pb.Amounts(tokens=hold.tokens, cost_nano_usd=hold.cost_nano_usd)


def reservation(reservation_id: ReservationId, request: pb.ReserveRequest, response: pb.ReserveResponse) -> Reservation:
    """Reads what is held. An answer that names no amounts holds what was asked for."""
    granted = response.granted if response.HasField("granted") else request.amounts
    return Reservation(
        reservation_id=reservation_id,
        epoch=response.epoch,
        reserve_time=from_timestamp(response.reserve_time),
        limits=tuple(_left(limit) for limit in response.limits if limit.mode != limit_rule_pb2.LIMIT_MODE_SHADOW),
        tokens=granted.tokens,
        cost_nano_usd=granted.cost_nano_usd,
        output_tokens=response.granted_output_tokens or request.shorten.max_output_tokens,
        waited_seconds=_seconds(response.waited),
        degraded=response.degraded,
    )


def outcome(
    tenant_id: TenantId, reservation_id: ReservationId, request: pb.ReserveRequest, answer: pb.ReserveBatchOutcome
) -> Reservation | MeshError:
    """Reads what came of one item of a batch, just as it would have been answered alone."""
    match answer.WhichOneof("outcome"):
        case "held":
            return reservation(reservation_id, request, answer.held)
        case "refused":
            return refusal(tenant_id, answer.refused)
        case "error_status":
            return decode(answer.error_status) or Unavailable("ratelimit")
        case _:
            return Unavailable("ratelimit")


def refusal(tenant_id: TenantId, refused: pb.Refusal) -> MeshError:
    """Reads a refusal with everything that it says."""
    reason, status = reason_from_name(refused.reason), refused.status
    metadata = _metadata(refused)
    if reason == error_reason_pb2.ERROR_REASON_REQUEST_TOO_LARGE:
        return InvalidRequest("", refused.message, reason=reason, metadata=metadata | {"requested": str(refused.needed)})
    if reason == error_reason_pb2.ERROR_REASON_FEATURE:
        return Forbidden(reason, refused.message, **metadata)
    retry_after_seconds = _seconds(refused.retry_after) if refused.HasField("retry_after") else None
    text = f"{status.rule}: {status.used} of {status.limit} in use, {refused.needed} needed"
    quota = [QuotaViolation(f"tenant:{tenant_id}", text)] if refused.HasField("status") else []
    return LimitRefused(reason, refused.message, retry_after_seconds, quota, metadata, status.unit)


def _metadata(refused: pb.Refusal) -> dict[str, str]:
    metadata, status = {}, refused.status
    if refused.HasField("status"):
        metadata = {"rule": status.rule, "limit": str(status.limit), "used": str(status.used), "remaining": str(status.remaining)}
    if status.HasField("reset_time"):
        metadata["reset_time"] = _written(from_timestamp(status.reset_time))
    if refused.HasField("decide_time"):
        metadata["decide_time"] = _written(from_timestamp(refused.decide_time))
    if refused.lifting_plan:
        metadata["lifting_plan"] = refused.lifting_plan
    return metadata


def _left(limit: pb.LimitStatus) -> LimitLeft:
    return LimitLeft(limit.rule, limit.limit, limit.remaining, limit.unit)


def _seconds(duration: Duration) -> float:
    return float(duration.ToNanoseconds()) / 1e9


def _written(moment: datetime) -> str:
    return moment.isoformat().replace("+00:00", "Z")
