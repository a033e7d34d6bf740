"""The wire form of a MeshError: google.rpc.Status with ErrorInfo, BadRequest, QuotaFailure and RetryInfo, both ways."""

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

from mesh.common.v1 import error_reason_pb2
from mesh.common.v1.error_reason_pb2 import ErrorReason
from services.kernel.errors import DeadlineExceeded, FieldViolation, MeshError, QuotaViolation, Unavailable, reason_from_name

DOMAIN = "mesh"
DETAILS_KEY = "grpc-status-details-bin"

_CODES = {code.value[0]: code for code in grpc.StatusCode}
_NEAREST: dict[grpc.StatusCode, ErrorReason.ValueType] = {
    grpc.StatusCode.INVALID_ARGUMENT: error_reason_pb2.ERROR_REASON_INVALID_REQUEST,
    grpc.StatusCode.UNAUTHENTICATED: error_reason_pb2.ERROR_REASON_CREDENTIAL_INVALID,
    grpc.StatusCode.PERMISSION_DENIED: error_reason_pb2.ERROR_REASON_CALLER_NOT_ALLOWED,
    grpc.StatusCode.NOT_FOUND: error_reason_pb2.ERROR_REASON_NOT_FOUND,
    grpc.StatusCode.ALREADY_EXISTS: error_reason_pb2.ERROR_REASON_ALREADY_EXISTS,
    grpc.StatusCode.FAILED_PRECONDITION: error_reason_pb2.ERROR_REASON_WRONG_STATE,
    grpc.StatusCode.RESOURCE_EXHAUSTED: error_reason_pb2.ERROR_REASON_REQUEST_TOO_LARGE,
}


def encode(error: MeshError) -> bytes:
    """Serialises the error for the `grpc-status-details-bin` trailer."""
    status = status_pb2.Status(code=error.code.value[0], message=error.message)
    status.details.add().Pack(
        error_details_pb2.ErrorInfo(reason=error.reason_name, domain=DOMAIN, metadata=dict(error.metadata)),
    )
    if error.field_violations:
        bad_request = error_details_pb2.BadRequest()
        for field in error.field_violations:
            bad_request.field_violations.add(field=field.field, description=field.description)
        status.details.add().Pack(bad_request)
    if error.quota_violations:
        quota = error_details_pb2.QuotaFailure()
        for violation in error.quota_violations:
            quota.violations.add(subject=violation.subject, description=violation.description)
        status.details.add().Pack(quota)
    if error.retry_after_seconds is not None:
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromNanoseconds(max(0, round(error.retry_after_seconds * 1e9)))
        status.details.add().Pack(retry)
    raw: bytes = status.SerializeToString()
    return raw


def decode_rpc_error(error: grpc.aio.AioRpcError, dependency: str) -> MeshError:
    """Reads a failed call: the MeshError a mesh peer sent, or the nearest one for a bare status."""
    for key, value in error.trailing_metadata() or ():
        if key == DETAILS_KEY and isinstance(value, bytes):
            decoded = decode(value)
            if decoded is not None:
                return decoded
    return _from_bare_status(error.code(), error.details() or "", dependency)


def decode(raw: bytes) -> MeshError | None:
    """Reads a `grpc-status-details-bin` trailer; None when it carries no ErrorInfo of the mesh."""
    try:
        status = status_pb2.Status.FromString(raw)
        return _from_status(status)
    except DecodeError:
        return None


def _from_status(status: status_pb2.Status) -> MeshError | None:
    info = error_details_pb2.ErrorInfo()
    bad_request, quota, retry = error_details_pb2.BadRequest(), error_details_pb2.QuotaFailure(), error_details_pb2.RetryInfo()
    retry_after: float | None = None
    for detail in status.details:
        if detail.Is(retry.DESCRIPTOR) and detail.Unpack(retry):
            retry_after = retry.retry_delay.ToNanoseconds() / 1e9
        else:
            # Unpack answers False for another type, so one of the three at most takes it.
            _ = detail.Unpack(info) or detail.Unpack(bad_request) or detail.Unpack(quota)
    if info.domain != DOMAIN:
        return None
    return MeshError(
        _CODES.get(status.code, grpc.StatusCode.UNKNOWN),
        reason_from_name(info.reason),
        status.message,
        metadata=dict(info.metadata),
        retry_after_seconds=retry_after,
        field_violations=[FieldViolation(item.field, item.description) for item in bad_request.field_violations],
        quota_violations=[QuotaViolation(item.subject, item.description) for item in quota.violations],
    )


def _from_bare_status(code: grpc.StatusCode, text: str, dependency: str) -> MeshError:
    match code:
        case grpc.StatusCode.UNAVAILABLE | grpc.StatusCode.CANCELLED:
            return Unavailable(dependency)
        case grpc.StatusCode.DEADLINE_EXCEEDED:
            return DeadlineExceeded(dependency)
        case _ if code in _NEAREST:
            return MeshError(code, _NEAREST[code], text or f"{dependency} refused the call", metadata={"dependency": dependency})
        case _:
            return MeshError(code, error_reason_pb2.ERROR_REASON_INTERNAL, f"{dependency} failed", metadata={"dependency": dependency})
