"""A server guards every method in one order, says how it is, and ends without cutting anyone off."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from typing import Any

import grpc
import h2.config
import h2.connection
import h2.events
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from mesh.common.v1 import lifecycle_service_pb2 as pb
from services.kernel.errors import MeshError
from services.kernel.rpc.auth import AuthInterceptor
from services.kernel.rpc.deadline import DeadlineInterceptor
from services.kernel.rpc.interceptor import MeshInterceptor
from services.kernel.rpc.policy import PolicyInterceptor
from services.kernel.rpc.status import StatusInterceptor
from services.kernel.rpc.trace import TraceInterceptor
from services.kernel.rpc.validation import ValidationInterceptor
from tests.kernel.mesh import LIFECYCLE, Mesh, running_mesh
from tests.kernel.test_auth import PROVISION, SERVICE

ORDER: list[tuple[type[MeshInterceptor], str]] = [
    (TraceInterceptor, "outermost: it opens the scope all others write to, and a refused call is traced too"),
    (DeadlineInterceptor, "before status: the mapping of a timeout asks whether the call's own deadline has passed"),
    (StatusInterceptor, "around all that may refuse: an exception outside of it would reach the caller as text"),
    (AuthInterceptor, "inside status because it refuses, before policy because policy judges proven callers only"),
    (PolicyInterceptor, "before validation: a stranger must not make this process read or check a message"),
    (ValidationInterceptor, "innermost: the servicer gets a message, all others see bytes"),
]


def test_interceptors_stand_in_their_order(shared_mesh: Mesh) -> None:
    """Each interceptor stands where it stands for a reason."""
    assert [type(interceptor) for interceptor in shared_mesh.server.interceptors] == [kind for kind, _ in ORDER]


async def test_handlers_are_wrapped_once(mesh: Mesh) -> None:
    """The second call of a method reuses the first one's handler and asks no inner interceptor again."""
    await mesh.provision()
    first = [interceptor._handlers[PROVISION] for interceptor in mesh.server.interceptors]
    await mesh.provision()
    assert [interceptor._handlers[PROVISION] for interceptor in mesh.server.interceptors] == first


async def test_calls_are_waited_for_by_no_name() -> None:
    """Of grpc's own requests one alone is at hand, for calls of no known method: one of each would be waited for anew with every call."""
    others = asyncio.all_tasks()
    async with running_mesh() as own:
        await own.provision()
        waiting = [getattr(task.get_coro(), "__qualname__", "") for task in asyncio.all_tasks() - others]
    assert [name for name in waiting if name.endswith("_request_call")]
    assert not [name for name in waiting if name.endswith("_request_registered_call")]


async def test_health_and_reflection_need_no_identity(mesh: Mesh) -> None:
    """Probes and grpcurl work without credentials; each servicer has its own health."""
    health = health_pb2_grpc.HealthStub(mesh.raw)
    for service in ("", LIFECYCLE):
        answer = await health.Check(health_pb2.HealthCheckRequest(service=service))
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
    with pytest.raises(grpc.aio.AioRpcError) as unknown:
        await health.Check(health_pb2.HealthCheckRequest(service="mesh.common.v1.Nothing"))
    assert unknown.value.code() is grpc.StatusCode.NOT_FOUND
    call = reflection_pb2_grpc.ServerReflectionStub(mesh.raw).ServerReflectionInfo()
    await call.write(reflection_pb2.ServerReflectionRequest(list_services=""))
    listed = await call.read()
    await call.done_writing()
    call.cancel()
    assert LIFECYCLE in {service.name for service in listed.list_services_response.service}


async def test_an_unknown_method_is_unimplemented(mesh: Mesh) -> None:
    """A method nobody serves is answered without asking who calls."""
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await mesh.raw_call("/mesh.common.v1.TenantLifecycleService/Nothing", b"", {})
    assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_sigterm_lets_a_stream_finish_and_takes_no_new_call() -> None:
    """Health says NOT_SERVING, the open stream delivers its last item, new calls are refused."""
    async with running_mesh() as mesh:
        begun, go = asyncio.Event(), asyncio.Event()

        async def export(request: Any, context: Any) -> AsyncIterator[pb.ExportTenantResponse]:
            yield pb.ExportTenantResponse(kind="first")
            begun.set()
            await go.wait()
            yield pb.ExportTenantResponse(kind="last")

        mesh.lifecycle.export = export
        got: list[str] = []

        async def consume() -> None:
            async with mesh.as_tenant.stream(
                mesh.stub.ExportTenant, pb.ExportTenantRequest(), timeout_seconds=20.0, tenant=mesh.tenant
            ) as responses:
                async for response in responses:
                    got.append(response.kind)

        async with asyncio.TaskGroup() as group:
            serving = group.create_task(mesh.server.serve_until_signal())
            consuming = group.create_task(consume())
            await begun.wait()
            os.kill(os.getpid(), signal.SIGTERM)
            with pytest.raises(MeshError) as refused:
                while True:
                    await mesh.provision(timeout_seconds=1.0)
            assert refused.value.code.name in ("UNAVAILABLE", "DEADLINE_EXCEEDED")
            assert not serving.done()
            go.set()
            await consuming
        assert got == ["first", "last"]


async def test_a_stream_longer_than_the_grace_time_is_cut() -> None:
    """The end comes, whatever a caller does."""
    async with running_mesh(drain_seconds=0.1) as mesh:
        begun = asyncio.Event()

        async def endless(request: Any, context: Any) -> Any:
            begun.set()
            await asyncio.sleep(60)

        mesh.lifecycle.provision = endless
        async with asyncio.TaskGroup() as group:
            calling = group.create_task(_fails(mesh))
            await begun.wait()
            await mesh.server.stop()
        assert calling.result() in ("UNAVAILABLE", "INTERNAL")


async def test_probes_have_a_port_of_their_own() -> None:
    """With `health_address` set, health alone is served there in plaintext."""
    async with running_mesh(health_address="127.0.0.1:0") as mesh:
        assert mesh.server.bound_port > 0


@pytest.mark.parametrize("value", [b"\xff\xfe", b"caf\xc3\xa9", b"caf\xe9"])
async def test_metadata_that_is_not_ascii_is_refused_and_the_service_lives(mesh: Mesh, value: bytes) -> None:
    """Bytes no gRPC library would send end that call, typed, and nothing else."""
    status, reason = await raw_http2(mesh.server.bound_port, [(b"x-tenant-id", value)])
    assert status in (b"3", b"rst"), (status, reason)
    await mesh.provision()


async def _fails(mesh: Mesh) -> str:
    try:
        await mesh.provision(timeout_seconds=20.0)
    except MeshError as error:
        return error.code.name
    return "OK"


async def raw_http2(port: int, extra: list[tuple[bytes, bytes]]) -> tuple[bytes, bytes]:
    """Makes one unary call by hand and returns grpc-status and grpc-message; `rst` when the stream was reset."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    connection = h2.connection.H2Connection(h2.config.H2Configuration(header_encoding=None, validate_outbound_headers=False))
    connection.initiate_connection()
    headers = [(b":method", b"POST"), (b":scheme", b"http"), (b":path", PROVISION.encode()), (b":authority", b"localhost")]
    headers += [(b"content-type", b"application/grpc"), (b"te", b"trailers")]
    headers += [(key.encode(), value.encode()) for key, value in SERVICE.items()]
    connection.send_headers(1, headers + extra)
    connection.send_data(1, bytes(5), end_stream=True)
    writer.write(connection.data_to_send())
    found: dict[bytes, bytes] = {}
    try:
        async with asyncio.timeout(5):
            while b"grpc-status" not in found:
                data = await reader.read(65536)
                for event in connection.receive_data(data) if data else [h2.events.ConnectionTerminated()]:
                    if isinstance(event, h2.events.ResponseReceived | h2.events.TrailersReceived):
                        found.update(event.headers)
                    elif isinstance(event, h2.events.StreamReset | h2.events.ConnectionTerminated):
                        found.setdefault(b"grpc-status", b"rst")
                writer.write(connection.data_to_send())
    finally:
        writer.close()
        await writer.wait_closed()
    return found[b"grpc-status"], found.get(b"grpc-message", b"")
