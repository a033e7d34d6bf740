"""Every way a call can fail, as one exception family that knows its status code, reason and next step.

Raise one where the fact is known; the status interceptor puts it on the wire and `rpc.wire_status` takes it off again.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import grpc

from mesh.common.v1 import error_reason_pb2
from mesh.common.v1.error_reason_pb2 import ErrorReason

if TYPE_CHECKING:
    from uuid import UUID

_PREFIX = "ERROR_REASON_"
_EMPTY: Mapping[str, str] = {}


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """One field that breaks a rule: its path, such as `messages[0].text`, and the rule."""

    field: str
    description: str


@dataclass(frozen=True, slots=True)
class QuotaViolation:
    """One limit that is used up: what it counts against, such as `tenant:0190…`, and the rule."""

    subject: str
    description: str


class MeshError(Exception):
    """A refusal or failure that callers can branch on by `reason`."""

    def __init__(
        self,
        code: grpc.StatusCode,
        reason: ErrorReason.ValueType,
        message: str,
        *,
        metadata: Mapping[str, str] = _EMPTY,
        retry_after_seconds: float | None = None,
        field_violations: Sequence[FieldViolation] = (),
        quota_violations: Sequence[QuotaViolation] = (),
    ) -> None:
        super().__init__(message)
        self.code = code
        self.reason: ErrorReason.ValueType = reason
        self.message = message
        self.metadata: Mapping[str, str] = dict(metadata)
        self.retry_after_seconds = retry_after_seconds
        self.field_violations = tuple(field_violations)
        self.quota_violations = tuple(quota_violations)

    @property
    def reason_name(self) -> str:
        """The reason as it stands on the wire: the enum's name without its prefix."""
        return reason_name(self.reason)

    def __str__(self) -> str:
        return f"{self.code.name} {self.reason_name}: {self.message}"


class InvalidRequest(MeshError):
    """The request breaks a rule of its contract."""

    def __init__(
        self,
        field: str,
        description: str,
        *,
        reason: ErrorReason.ValueType = error_reason_pb2.ERROR_REASON_INVALID_REQUEST,
        metadata: Mapping[str, str] = _EMPTY,
    ) -> None:
        super().__init__(
            grpc.StatusCode.INVALID_ARGUMENT,
            reason,
            f"{field}: {description}" if field else description,
            metadata={"field": field, **metadata},
            field_violations=(FieldViolation(field, description),),
        )


class Unauthenticated(MeshError):
    """The caller did not prove who it is."""

    def __init__(self, reason: ErrorReason.ValueType, message: str, **metadata: str) -> None:
        super().__init__(grpc.StatusCode.UNAUTHENTICATED, reason, message, metadata=metadata)

    @classmethod
    def context_missing(cls) -> "Unauthenticated":
        """Builds the refusal of a call that acts for a tenant and proves none."""
        return cls(error_reason_pb2.ERROR_REASON_CREDENTIAL_MISSING, "the method acts for a tenant and none was proven")


class Forbidden(MeshError):
    """The caller is known and may not do this."""

    def __init__(self, reason: ErrorReason.ValueType, message: str, **metadata: str) -> None:
        super().__init__(grpc.StatusCode.PERMISSION_DENIED, reason, message, metadata=metadata)


class NotFound(MeshError):
    """Absent, or another tenant's: the two look alike."""

    def __init__(self, resource: str, message: str = "") -> None:
        """`message` is for what no tenant's credential leads to, such as a plan; it never says more than that the resource is absent."""
        super().__init__(
            grpc.StatusCode.NOT_FOUND,
            error_reason_pb2.ERROR_REASON_NOT_FOUND,
            message or f"no such {resource}; check its id and the tenant of your credential",
            metadata={"resource": resource},
        )


class AlreadyExists(MeshError):
    """The name is taken."""

    def __init__(self, resource: str, field: str, message: str) -> None:
        super().__init__(
            grpc.StatusCode.ALREADY_EXISTS,
            error_reason_pb2.ERROR_REASON_ALREADY_EXISTS,
            message,
            metadata={"resource": resource, "field": field},
        )


class ContentConflict(MeshError):
    """The same id was used before with other content."""

    def __init__(self, resource: str, message: str, **metadata: str) -> None:
        super().__init__(
            grpc.StatusCode.ALREADY_EXISTS,
            error_reason_pb2.ERROR_REASON_CONTENT_CONFLICT,
            message,
            metadata={"resource": resource, **metadata},
        )


class SumOutOfRange(MeshError):
    """A sum is beyond what the answer can hold; `narrower` says what to ask for instead."""

    def __init__(self, measure: str, narrower: str) -> None:
        super().__init__(
            grpc.StatusCode.OUT_OF_RANGE,
            error_reason_pb2.ERROR_REASON_SUM_OUT_OF_RANGE,
            f"the {measure} asked for adds up to more than 9223372036854775807: {narrower}",
            metadata={"measure": measure},
        )


class WrongState(MeshError):
    """The resource is not in the state the call needs."""

    def __init__(self, resource: str, state: str, message: str) -> None:
        super().__init__(
            grpc.StatusCode.FAILED_PRECONDITION,
            error_reason_pb2.ERROR_REASON_WRONG_STATE,
            message,
            metadata={"resource": resource, "state": state},
        )


class PriceBookUnusable(MeshError):
    """The price book is doubtful; `message` says where and what to write. Nothing of it was loaded."""

    def __init__(self, message: str) -> None:
        super().__init__(grpc.StatusCode.FAILED_PRECONDITION, error_reason_pb2.ERROR_REASON_PRICE_BOOK_REFUSED, message)


class PriceMissing(MeshError):
    """A model has no price in a version."""

    def __init__(self, version: str, provider: str, model: str) -> None:
        super().__init__(
            grpc.StatusCode.FAILED_PRECONDITION,
            error_reason_pb2.ERROR_REASON_PRICE_MISSING,
            f"version {version} has no price for {provider} {model}: load one that has",
            metadata={"version": version, "provider": provider, "model": model},
        )


class NotSliceable(MeshError):
    """A rule of the unit needs each use by itself; `cause` is a word for programs, `why` a clause for people."""

    def __init__(self, product_unit: str, cause: str, why: str) -> None:
        super().__init__(
            grpc.StatusCode.FAILED_PRECONDITION,
            error_reason_pb2.ERROR_REASON_NOT_SLICEABLE,
            f"{product_unit} is not used in slices ({why}): call Consume for each use",
            metadata={"product_unit": product_unit, "cause": cause},
        )


class WrongCell(MeshError):
    """The tenant's data lives in another region; `cell` is where to call, empty when this cell does not know."""

    def __init__(self, region: str, cell: str) -> None:
        where = f"call {cell}" if cell else "ask the operator for that region's address"
        super().__init__(
            grpc.StatusCode.FAILED_PRECONDITION,
            error_reason_pb2.ERROR_REASON_WRONG_CELL,
            f"the tenant's data lives in the region {region}, which another cell serves: {where}",
            metadata={"region": region, "cell": cell},
        )


class LimitExceeded(MeshError):
    """A limit refuses the call for now; `retry_after_seconds` says when it may pass."""

    def __init__(
        self,
        reason: ErrorReason.ValueType,
        message: str,
        retry_after_seconds: float | None = None,
        quota: Sequence[QuotaViolation] = (),
        **metadata: str,
    ) -> None:
        super().__init__(
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            reason,
            message,
            metadata=metadata,
            retry_after_seconds=retry_after_seconds,
            quota_violations=quota,
        )


class Unavailable(MeshError):
    """Something this call needs does not answer."""

    def __init__(
        self,
        dependency: str,
        message: str | None = None,
        retry_after_seconds: float | None = 1.0,
        reason: ErrorReason.ValueType = error_reason_pb2.ERROR_REASON_DEPENDENCY_UNAVAILABLE,
        **metadata: str,
    ) -> None:
        super().__init__(
            grpc.StatusCode.UNAVAILABLE,
            reason,
            message or f"{dependency} does not answer; try again shortly",
            metadata={"dependency": dependency, **metadata},
            retry_after_seconds=retry_after_seconds,
        )


class ReservationLost(MeshError):
    """The reservation ended or predates a rebuild: start the call again with a new one."""

    def __init__(self, reservation_id: "UUID | str", message: str) -> None:
        super().__init__(
            grpc.StatusCode.ABORTED,
            error_reason_pb2.ERROR_REASON_RESERVATION_LOST,
            message,
            metadata={"reservation_id": str(reservation_id)},
        )


class DeadlineExceeded(MeshError):
    """The call's time ran out in the named phase, such as `queue`."""

    def __init__(self, phase: str) -> None:
        super().__init__(
            grpc.StatusCode.DEADLINE_EXCEEDED,
            error_reason_pb2.ERROR_REASON_DEADLINE_EXCEEDED,
            f"the call's deadline passed during {phase}; allow it more time",
            metadata={"phase": phase},
        )


def reason_name(reason: ErrorReason.ValueType) -> str:
    """The wire name of a reason, without `ERROR_REASON_`."""
    return ErrorReason.Name(reason).removeprefix(_PREFIX)


def reason_from_name(name: str) -> ErrorReason.ValueType:
    """Reads a wire name; a reason this version does not know is INTERNAL."""
    try:
        return ErrorReason.Value(_PREFIX + name)
    except ValueError:
        return error_reason_pb2.ERROR_REASON_INTERNAL
