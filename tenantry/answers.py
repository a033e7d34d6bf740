"""What the limits answer to a use, as product code needs it: admitted or not, and if not, why and for how long."""

from dataclasses import dataclass

import grpc
from google.rpc import error_details_pb2, status_pb2

_DETAILS = "grpc-status-details-bin"
# The one refusal that is no RESOURCE_EXHAUSTED: no waiting helps.
_TOO_LARGE = "REQUEST_TOO_LARGE"


@dataclass(frozen=True, slots=True)
class UseAnswer:
    """Whether a use is admitted. True as a condition when it is.

    `local`: decided here, from a slice. `degraded`: admitted by the service without its store. The rest is of refusals: `reason` is
    the name of an ErrorReason, `retry_after_seconds` is None when waiting does not help.
    """

    admitted: bool
    local: bool = False
    degraded: bool = False
    reason: str = ""
    rule: str = ""
    message: str = ""
    retry_after_seconds: float | None = None

    def __bool__(self) -> bool:
        return self.admitted


ADMITTED = UseAnswer(True)
ADMITTED_LOCALLY = UseAnswer(True, local=True)
ADMITTED_WITHOUT_STORE = UseAnswer(True, degraded=True)


@dataclass(frozen=True, slots=True)
class Failure:
    """What an error of the mesh carries."""

    reason: str = ""
    rule: str = ""
    retry_after_seconds: float | None = None


def failure_of(error: grpc.aio.AioRpcError) -> Failure:
    """The reason, rule and time to wait of an error; empty where it has none."""
    details = [value for key, value in error.trailing_metadata() or () if key == _DETAILS]
    if not details:
        return Failure()
    info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
    told = False
    for detail in status_pb2.Status.FromString(details[0]).details:
        detail.Unpack(info)
        told = detail.Unpack(retry) or told
    return Failure(info.reason, info.metadata.get("rule", ""), retry.retry_delay.ToMicroseconds() / 1e6 if told else None)


def refusal_of(error: grpc.aio.AioRpcError) -> UseAnswer | None:
    """The refusal that an error is; None for one that is a failure."""
    failure = failure_of(error)
    if error.code() is not grpc.StatusCode.RESOURCE_EXHAUSTED and failure.reason != _TOO_LARGE:
        return None
    return UseAnswer(
        False, reason=failure.reason, rule=failure.rule, message=error.details() or "", retry_after_seconds=failure.retry_after_seconds
    )
