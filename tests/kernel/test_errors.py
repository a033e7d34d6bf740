"""An error arrives at the caller as it was raised."""

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2
from hypothesis import given
from hypothesis import strategies as st

from mesh.common.v1 import error_reason_pb2
from mesh.common.v1.error_reason_pb2 import ErrorReason
from services.kernel.errors import (
    AlreadyExists,
    ContentConflict,
    DeadlineExceeded,
    FieldViolation,
    Forbidden,
    InvalidRequest,
    LimitExceeded,
    MeshError,
    NotFound,
    NotSliceable,
    QuotaViolation,
    ReservationLost,
    Unauthenticated,
    Unavailable,
    WrongState,
    reason_from_name,
)
from services.kernel.rpc.wire_status import decode, decode_rpc_error, encode

TEXT = st.text(st.characters(codec="utf-8"), max_size=40)
CODES = st.sampled_from([code for code in grpc.StatusCode if code is not grpc.StatusCode.OK])
ERRORS = st.builds(
    MeshError,
    CODES,
    st.sampled_from(ErrorReason.values()),
    TEXT,
    metadata=st.dictionaries(TEXT, TEXT, max_size=4),
    retry_after_seconds=st.none() | st.integers(0, 10**6).map(lambda milliseconds: milliseconds / 1000),
    field_violations=st.lists(st.builds(FieldViolation, TEXT, TEXT), max_size=3),
    quota_violations=st.lists(st.builds(QuotaViolation, TEXT, TEXT), max_size=3),
)


@given(ERRORS)
def test_nothing_is_lost_on_the_wire(error: MeshError) -> None:
    """Code, reason, message, metadata, retry time and violations survive encoding."""
    read = decode(encode(error))
    assert read is not None
    assert vars(read) == vars(error)


def test_the_wire_form_is_that_of_google_rpc() -> None:
    """Any client that knows google.rpc.Status finds ErrorInfo, QuotaFailure and RetryInfo."""
    error = LimitExceeded(
        error_reason_pb2.ERROR_REASON_PLAN_LIMIT,
        "wait",
        0.25,
        [QuotaViolation("tenant:1", "requests_per_minute")],
        rule="requests_per_minute",
    )
    status = status_pb2.Status.FromString(encode(error))
    info, quota, retry = error_details_pb2.ErrorInfo(), error_details_pb2.QuotaFailure(), error_details_pb2.RetryInfo()
    assert [status.details[0].Unpack(info), status.details[1].Unpack(quota), status.details[2].Unpack(retry)] == [True] * 3
    assert (info.reason, info.domain, dict(info.metadata)) == ("PLAN_LIMIT", "mesh", {"rule": "requests_per_minute"})
    assert quota.violations[0].subject == "tenant:1"
    assert retry.retry_delay.ToMilliseconds() == 250


@pytest.mark.parametrize(
    ("error", "code", "reason"),
    [
        (InvalidRequest("name", "is empty"), "INVALID_ARGUMENT", "INVALID_REQUEST"),
        (Unauthenticated(error_reason_pb2.ERROR_REASON_CONTEXT_INVALID, "m"), "UNAUTHENTICATED", "CONTEXT_INVALID"),
        (Forbidden(error_reason_pb2.ERROR_REASON_SCOPE_MISSING, "m", scope="a"), "PERMISSION_DENIED", "SCOPE_MISSING"),
        (NotFound("document"), "NOT_FOUND", "NOT_FOUND"),
        (AlreadyExists("tenant", "slug", "taken"), "ALREADY_EXISTS", "ALREADY_EXISTS"),
        (ContentConflict("call", "m"), "ALREADY_EXISTS", "CONTENT_CONFLICT"),
        (WrongState("call", "SETTLED", "m"), "FAILED_PRECONDITION", "WRONG_STATE"),
        (NotSliceable("ai_interviews", "durable", "m"), "FAILED_PRECONDITION", "NOT_SLICEABLE"),
        (LimitExceeded(error_reason_pb2.ERROR_REASON_BUDGET, "m", 1.0), "RESOURCE_EXHAUSTED", "BUDGET"),
        (Unavailable("redis"), "UNAVAILABLE", "DEPENDENCY_UNAVAILABLE"),
        (ReservationLost("1", "m"), "ABORTED", "RESERVATION_LOST"),
        (DeadlineExceeded("queue"), "DEADLINE_EXCEEDED", "DEADLINE_EXCEEDED"),
    ],
)
def test_each_case_has_its_code_and_reason(error: MeshError, code: str, reason: str) -> None:
    """The subclasses stand for the pairs the contract lists."""
    assert (error.code.name, error.reason_name) == (code, reason)
    assert str(error).startswith(f"{code} {reason}: ")


@pytest.mark.parametrize("code", [code for code in grpc.StatusCode if code is not grpc.StatusCode.OK])
def test_a_bare_status_becomes_the_nearest_error(code: grpc.StatusCode) -> None:
    """A peer that answers without details is still a MeshError, and one that is gone names the dependency."""
    error = decode_rpc_error(grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(), "text"), "metering")
    if code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED):
        assert (error.code, error.metadata) == (grpc.StatusCode.UNAVAILABLE, {"dependency": "metering"})
    else:
        assert error.code is code


def test_details_that_are_not_of_the_mesh_are_not_read() -> None:
    """Broken bytes, another domain and an unknown reason do no harm."""
    foreign = status_pb2.Status(code=5)
    foreign.details.add().Pack(error_details_pb2.ErrorInfo(reason="X", domain="elsewhere"))
    assert decode(b"\xff\xff") is None
    assert decode(foreign.SerializeToString()) is None
    assert reason_from_name("OF_A_LATER_VERSION") == error_reason_pb2.ERROR_REASON_INTERNAL
    trailers = grpc.aio.Metadata(("grpc-status-details-bin", b"\xff\xff"))
    error = grpc.aio.AioRpcError(grpc.StatusCode.NOT_FOUND, grpc.aio.Metadata(), trailers)
    assert decode_rpc_error(error, "peer").reason_name == "NOT_FOUND"
