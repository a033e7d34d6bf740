"""Every failure of a handler reaches the caller typed; what was not foreseen reaches it without its text."""

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import quote

import asyncpg
import grpc
import pytest
import structlog.testing

from mesh.common.v1 import lifecycle_service_pb2 as pb
from services.kernel.errors import FieldViolation, InvalidRequest, LimitExceeded, MeshError, NotFound, QuotaViolation, Unavailable
from services.kernel.request_context import required_scope
from tests.kernel.mesh import Mesh
from tests.kernel.test_auth import PROVISION, SERVICE

# What trailers carry as it is.
PRINTABLE = "".join(map(chr, range(0x20, 0x7F))).replace("%", "")
SECRET = "postgres://user:hunter2@host/db"


def raising(error: BaseException) -> Any:
    """A handler that raises it."""

    async def handler(request: Any, context: Any) -> Any:
        raise error

    return handler


async def failure(mesh: Mesh) -> MeshError:
    """What a caller gets."""
    with pytest.raises(MeshError) as failed:
        await mesh.provision()
    return failed.value


async def test_a_mesh_error_arrives_whole(mesh: Mesh) -> None:
    """Code, reason, metadata, quota and retry time are the handler's."""
    raised = LimitExceeded(30, "wait", 0.5, [QuotaViolation("tenant:1", "rpm")], rule="rpm")  # type: ignore[arg-type] # PLAN_LIMIT
    mesh.lifecycle.provision = raising(raised)
    assert vars(await failure(mesh)) == vars(raised)


@pytest.mark.parametrize(
    "error",
    [
        KeyError(SECRET),
        asyncpg.UniqueViolationError(SECRET),
        ExceptionGroup("several", [NotFound("x"), ValueError(SECRET)]),
        TimeoutError(SECRET),
        BaseExceptionGroup("several", [ValueError(SECRET)]),
    ],
)
async def test_an_unexpected_error_keeps_its_text_to_itself(mesh: Mesh, error: BaseException) -> None:
    """The caller gets INTERNAL, a fixed text and the trace id; the log gets the traceback under the same trace id."""
    mesh.lifecycle.provision = raising(error)
    with structlog.testing.capture_logs() as lines:
        failed = await failure(mesh)
    assert (failed.code, failed.reason_name, dict(failed.metadata)) == (grpc.StatusCode.INTERNAL, "INTERNAL", {})
    assert failed.message.startswith("internal error; tell the operator the trace id ")
    assert len(failed.message.split()[-1]) == 32
    assert SECRET not in failed.message
    assert [line["exc_info"] for line in lines if line["event"] == "rpc_failed_unexpectedly"] == [error]


async def test_a_mesh_error_inside_groups_is_found(mesh: Mesh) -> None:
    """What a TaskGroup wraps is unwrapped, at any depth."""
    mesh.lifecycle.provision = raising(ExceptionGroup("a", [ExceptionGroup("b", [Unavailable("redis")]), NotFound("x")]))
    assert (await failure(mesh)).metadata == {"dependency": "redis"}


async def test_a_task_group_of_a_handler_fails_typed(mesh: Mesh) -> None:
    """The first child's refusal is the answer though its siblings are cancelled."""

    async def child(seconds: float) -> None:
        await asyncio.sleep(seconds)
        raise NotFound("document")

    async def handler(request: Any, context: Any) -> Any:
        async with asyncio.TaskGroup() as group:
            group.create_task(child(0))
            group.create_task(child(60))

    mesh.lifecycle.provision = handler
    assert (await failure(mesh)).reason_name == "NOT_FOUND"


async def test_a_stream_fails_typed_after_its_first_items(mesh: Mesh) -> None:
    """Items sent before the failure arrive, then the error."""

    async def export(request: Any, context: Any) -> AsyncIterator[pb.ExportTenantResponse]:
        yield pb.ExportTenantResponse(kind="one")
        raise NotFound("rest")

    mesh.lifecycle.export = export
    got: list[str] = []
    with pytest.raises(MeshError) as failed:
        async with mesh.as_tenant.stream(
            mesh.stub.ExportTenant, pb.ExportTenantRequest(), timeout_seconds=5.0, tenant=mesh.tenant
        ) as responses:
            async for response in responses:
                got.append(response.kind)
    assert (got, failed.value.reason_name) == (["one"], "NOT_FOUND")


async def test_an_error_too_large_for_trailers_keeps_its_reason(mesh: Mesh) -> None:
    """Details that would overflow the peer's header limit are dropped before the status is."""
    huge = InvalidRequest("name", "x" * 10_000)
    huge.field_violations = tuple(FieldViolation(f"f{number}", "y" * 100) for number in range(200))
    mesh.lifecycle.provision = raising(huge)
    failed = await failure(mesh)
    assert (failed.code, failed.reason_name) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST")
    assert len(failed.message) == 1000


async def test_an_error_text_in_any_script_arrives(mesh: Mesh) -> None:
    """Text outside ASCII survives the trailers."""
    mesh.lifecycle.provision = raising(InvalidRequest("naïve", "Größe überschritten: 超过"))
    assert (await failure(mesh)).field_violations[0] == FieldViolation("naïve", "Größe überschritten: 超过")


@pytest.mark.parametrize("character", ["x", "%", "\x7f", "é", "超", "😀"])
async def test_a_long_error_text_in_any_script_fits_the_trailers(mesh: Mesh, character: str) -> None:
    """A peer that caps all trailers at 8 KiB sees the status itself, and not a transport's RESOURCE_EXHAUSTED in its place."""
    mesh.lifecycle.provision = raising(InvalidRequest("name", character * 10_000))
    metadata = {**SERVICE, "x-tenant-context": mesh.tenant.token}
    for _ in range(8):
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await mesh.raw_call(PROVISION, b"", metadata)
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    trailers = sum(len(key) + len(value) * 4 // 3 + 32 for key, value in refused.value.trailing_metadata())
    assert trailers + len(quote(refused.value.details() or "", safe=PRINTABLE)) < 8192


async def test_a_timeout_that_is_the_calls_own_deadline_is_told_as_such(mesh: Mesh) -> None:
    """A wait that ends because the call is over is DEADLINE_EXCEEDED, not a fault."""

    async def handler(request: Any, context: Any) -> Any:
        required_scope().deadline = time.monotonic()
        raise TimeoutError

    mesh.lifecycle.provision = handler
    assert (await failure(mesh)).metadata == {"phase": "handling"}
