"""A servicer sees only requests that keep their contract, and no bytes can do worse than be refused."""

from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mesh.common.v1 import lifecycle_service_pb2 as pb
from mesh.ratelimit.v1 import rate_limit_service_pb2 as rate_pb
from mesh.tenant.v1 import authentication_service_pb2 as auth_pb
from services.kernel.errors import MeshError
from services.kernel.rpc.interceptor import Method
from services.kernel.rpc.validation import ValidationInterceptor, parse_valid
from tests.kernel.mesh import BEARERS, Mesh
from tests.kernel.test_auth import PROVISION, SERVICE

AUTHENTICATE = "/mesh.tenant.v1.AuthenticationService/Authenticate"
INFERENCE = {"x-mesh-service": "inference", "x-mesh-service-token": BEARERS["inference"]}


def refusal(raw: bytes, message: Any = auth_pb.AuthenticateRequest) -> MeshError:
    """How these bytes are refused."""
    with pytest.raises(MeshError) as refused:
        parse_valid(raw, message.FromString)
    assert refused.value.code is grpc.StatusCode.INVALID_ARGUMENT
    return refused.value


def test_a_broken_rule_names_its_field_and_every_other() -> None:
    """Violations of the contract's rules come back together, each with its field."""
    raw = auth_pb.AuthenticateRequest(claimed_tenant_id=b"short", operator_reason="r" * 501).SerializeToString()
    error = refusal(raw)
    assert error.reason_name == "INVALID_REQUEST"
    assert {violation.field for violation in error.field_violations} == {"credential", "claimed_tenant_id", "operator_reason"}
    assert error.metadata["field"] == error.field_violations[0].field


def test_unknown_fields_are_refused_at_any_depth() -> None:
    """A field of a later version is not silently dropped; the message type that carries it is named."""
    raw = auth_pb.AuthenticateRequest(credential="x").SerializeToString()
    assert refusal(raw + b"\xfa\x3f\x01a").reason_name == "UNKNOWN_FIELDS"
    inner = pb.ErasedRecords(kind="a").SerializeToString() + b"\xfa\x3f\x01a"
    nested = b"\x0a" + bytes([len(inner)]) + inner
    assert refusal(nested, pb.EraseTenantResponse).metadata == {"message_type": "mesh.common.v1.ErasedRecords"}


def test_another_encoding_of_known_fields_is_no_unknown_field() -> None:
    """A repeated scalar field or an overlong length is legal protobuf: the last value counts."""
    raw = b"\x0a\x01a" + b"\x0a\x81\x00b"
    message = parse_valid(raw, auth_pb.AuthenticateRequest.FromString)
    assert message == auth_pb.AuthenticateRequest(credential="b")


def test_text_that_is_not_utf8_is_refused() -> None:
    """Invalid UTF-8 is the caller's fault, told as such."""
    assert refusal(b"\x0a\x02\xff\xfe").reason_name == "INVALID_REQUEST"


@given(st.binary(max_size=64))
@settings(max_examples=300)
def test_no_bytes_do_worse_than_be_refused(raw: bytes) -> None:
    """Arbitrary bytes are read or refused with INVALID_ARGUMENT; nothing else is raised."""
    try:
        parse_valid(raw, auth_pb.AuthenticateRequest.FromString)
    except MeshError as error:
        assert error.code is grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize("body", [b"\xff\xff\xff", b"\x0a\x02\xff\xfe", b"\x0a\x05a", b""])
async def test_the_service_lives_after_broken_bytes(mesh: Mesh, body: bytes) -> None:
    """Over the wire the answer is typed, never INTERNAL, and the next call works."""
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await mesh.raw_call(AUTHENTICATE, body, INFERENCE)
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    await mesh.provision()


async def test_a_stranger_makes_nobody_read_a_message(mesh: Mesh) -> None:
    """Who is not admitted is refused as such, whatever the bytes are."""
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await mesh.raw_call(AUTHENTICATE, b"\xff\xff", {})
    assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED


async def test_an_oversized_message_is_refused_and_the_service_lives(mesh: Mesh) -> None:
    """Above the limit grpc itself answers RESOURCE_EXHAUSTED."""
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await mesh.raw_call(PROVISION, bytes(5 * 1024 * 1024), SERVICE)
    assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    await mesh.provision()


async def test_each_message_of_a_request_stream_is_held_to_the_contract() -> None:
    """Good messages reach the servicer in order; the first bad one ends the call."""
    got: list[str] = []

    async def servicer(requests: AsyncIterator[auth_pb.AuthenticateRequest], context: Any) -> None:
        async for request in requests:
            got.append(request.credential)

    async def sent() -> AsyncIterator[bytes]:
        yield auth_pb.AuthenticateRequest(credential="good").SerializeToString()
        yield b"\x0a\x00"

    method = Method("/a/B", "a", "B", request_streaming=True, response_streaming=False)
    behavior = ValidationInterceptor().wrap(method, servicer, auth_pb.AuthenticateRequest.FromString)
    with pytest.raises(MeshError) as refused:
        await behavior(sent(), None)
    assert (got, refused.value.metadata) == (["good"], {"field": "credential"})


async def test_a_servicer_that_checks_for_itself_gets_what_breaks_a_rule_and_nothing_unknown() -> None:
    """Only the rules are left to it, and only for its own method: bytes that are no such message are refused before it."""
    got: list[str] = []

    async def servicer(request: auth_pb.AuthenticateRequest, context: Any) -> None:
        got.append(request.credential)

    interceptor = ValidationInterceptor(own_checks=("/a/Own",))
    own, other = (
        interceptor.wrap(Method(f"/a/{name}", "a", name, False, False), servicer, auth_pb.AuthenticateRequest.FromString)
        for name in ("Own", "Other")
    )
    await own(b"", None)
    assert got == [""]
    for behavior, raw, reason in (
        (other, b"", "INVALID_REQUEST"),
        (own, b"\xff", "INVALID_REQUEST"),
        (own, b"\xf8\x3f\x01", "UNKNOWN_FIELDS"),
    ):
        with pytest.raises(MeshError) as refused:
            await behavior(raw, None)
        assert refused.value.reason_name == reason
    assert got == [""]


def test_a_violation_inside_a_list_names_its_place() -> None:
    """The path has the index of the item, so that a caller with a batch knows which one."""
    good, bad = rate_pb.ReservationRef(tenant_id=bytes(16), reservation_id=bytes(16)), rate_pb.ReservationRef(tenant_id=b"x")
    raw = rate_pb.RenewRequest(reservations=[good, bad]).SerializeToString()
    assert "reservations[1].tenant_id" in {violation.field for violation in refusal(raw, rate_pb.RenewRequest).field_violations}


def test_a_method_without_a_request_type_cannot_be_served() -> None:
    """Nothing can be checked about bytes of no type."""
    with pytest.raises(TypeError):
        ValidationInterceptor().wrap(Method("/a/B", "a", "B", False, False), _nothing, None)


async def _nothing(request: Any, context: Any) -> None:
    return None
