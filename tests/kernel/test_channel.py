"""A call out carries on what the call in brought: its deadline, its trace, its id; and ends when it ends."""

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest

from mesh.common.v1 import lifecycle_service_pb2 as pb
from services.kernel.errors import MeshError, NotFound, Unavailable
from services.kernel.ids import new_uuid7
from services.kernel.request_context import bind_call_id, bind_tenant, client_call_id, current_deadline, remaining_seconds, required_scope
from services.kernel.rpc.channel import MeshChannel
from tests.kernel.mesh import Mesh, settings_of
from tests.support.steadiness import steadily

EMPTY = pb.ProvisionTenantResponse()


def counting(*errors: MeshError | None) -> tuple[list[float], Any]:
    """A handler that fails as listed, then succeeds; and when it was called."""
    called: list[float] = []

    async def handler(request: Any, context: Any) -> Any:
        called.append(time.monotonic())
        error = errors[len(called) - 1] if len(called) <= len(errors) else None
        if error is not None:
            raise error
        return EMPTY

    return called, handler


async def test_the_deadline_is_passed_on(mesh: Mesh) -> None:
    """A call inside a call gets what is left of it, however long its own limit is; a shorter own limit wins."""
    seen: list[float] = []

    async def inner(request: Any, context: Any) -> Any:
        seen.append(remaining_seconds(99.0))
        return EMPTY

    mesh.lifecycle.provision = inner
    with bind_tenant(mesh.tenant, deadline=time.monotonic() + 1.0):
        await mesh.provision(timeout_seconds=60.0)
        await mesh.provision(timeout_seconds=0.5)
    await mesh.provision(timeout_seconds=60.0)
    assert 0.5 < seen[0] <= 1.01
    assert seen[1] <= 0.51
    # grpc rounds a timeout up when it writes it into the header.
    assert 1.0 < seen[2] <= 61.0


async def test_a_call_without_deadline_has_none(mesh: Mesh) -> None:
    """The default given by the code that waits is used then."""
    seen: list[object] = []

    async def inner(request: Any, context: Any) -> Any:
        seen.extend((current_deadline(), remaining_seconds(7.0)))
        return EMPTY

    mesh.lifecycle.provision = inner
    await mesh.stub.ProvisionTenant(pb.ProvisionTenantRequest(), metadata=mesh.as_tenant.metadata(mesh.tenant, "none"))
    assert seen == [None, 7.0]


async def test_a_passed_deadline_is_not_even_sent(mesh: Mesh) -> None:
    """Nothing leaves this process for a call that is over."""
    called, mesh.lifecycle.provision = counting()
    with bind_tenant(mesh.tenant, deadline=time.monotonic() - 0.001), pytest.raises(MeshError) as late:
        await mesh.provision()
    assert late.value.reason_name == "DEADLINE_EXCEEDED"
    assert called == []


async def test_a_peer_that_overruns_its_hop_is_unavailable_and_its_handler_is_cancelled(mesh: Mesh) -> None:
    """While the caller still has time, a peer that hangs is UNAVAILABLE by name, and the work at the peer stops."""
    stopped = asyncio.Event()

    async def slow(request: Any, context: Any) -> Any:
        try:
            await asyncio.sleep(60)
        finally:
            stopped.set()

    mesh.lifecycle.provision = slow
    with pytest.raises(MeshError) as late:
        await mesh.provision(timeout_seconds=0.1)
    assert (late.value.code.name, late.value.metadata) == ("UNAVAILABLE", {"dependency": "peer"})
    async with asyncio.timeout(5):
        await stopped.wait()


async def test_a_caller_whose_own_time_ran_out_is_told_so(mesh: Mesh) -> None:
    """When the caller's deadline ends the hop, it is DEADLINE_EXCEEDED with the peer's name."""

    async def slow(request: Any, context: Any) -> Any:
        await asyncio.sleep(60)

    mesh.lifecycle.provision = slow
    with bind_tenant(mesh.tenant, deadline=time.monotonic() + 0.2), pytest.raises(MeshError) as late:
        await mesh.provision(timeout_seconds=5.0)
    assert (late.value.code.name, late.value.metadata) == ("DEADLINE_EXCEEDED", {"phase": "peer"})


async def test_only_an_idempotent_call_is_repeated(mesh: Mesh) -> None:
    """UNAVAILABLE is tried at most three times in all, and once where repeating could do harm."""
    called, mesh.lifecycle.provision = counting(Unavailable("redis", retry_after_seconds=0.01), Unavailable("redis"))
    await mesh.provision(idempotent=True)
    assert len(called) == 3
    called, mesh.lifecycle.provision = counting(*[Unavailable("redis")] * 5)
    with pytest.raises(MeshError):
        await mesh.provision(idempotent=True)
    assert len(called) == 3
    called, mesh.lifecycle.provision = counting(Unavailable("redis"))
    with pytest.raises(MeshError):
        await mesh.provision()
    assert len(called) == 1


async def test_a_refusal_is_not_repeated(mesh: Mesh) -> None:
    """Only UNAVAILABLE may pass by itself."""
    called, mesh.lifecycle.provision = counting(NotFound("x"))
    with pytest.raises(MeshError):
        await mesh.provision(idempotent=True)
    assert len(called) == 1


@steadily
async def test_a_repeat_that_does_not_fit_the_deadline_is_not_made(mesh: Mesh) -> None:
    """The answer is the last failure, within the time allowed."""
    _, mesh.lifecycle.provision = counting(*[Unavailable("redis")] * 5)
    started = time.monotonic()
    with pytest.raises(MeshError) as failed:
        await mesh.provision(idempotent=True, timeout_seconds=0.02)
    assert failed.value.code.name in ("UNAVAILABLE", "DEADLINE_EXCEEDED")
    assert time.monotonic() - started < 1.0


async def test_a_peer_that_is_not_there_is_unavailable() -> None:
    """No listener answers as the dependency's name, not as a transport's text."""
    channel = MeshChannel("127.0.0.1:1", settings=settings_of(), target_service="metering")
    method = channel.channel.unary_unary("/a/B", pb.ProvisionTenantRequest.SerializeToString, EMPTY.FromString)
    with pytest.raises(MeshError) as failed:
        await channel.unary(method, pb.ProvisionTenantRequest(), timeout_seconds=2.0)
    assert failed.value.metadata == {"dependency": "metering"}
    await channel.close()


async def test_plaintext_leaves_loopback_never() -> None:
    """A channel to another machine without TLS cannot be built."""
    with pytest.raises(ValueError, match="needs TLS"):
        MeshChannel("10.0.0.1:7401", settings=settings_of(), target_service="tenant")


async def test_the_call_id_and_trace_are_passed_on(mesh: Mesh) -> None:
    """The peer's call has the id and the trace of the call that caused it."""
    seen: list[object] = []

    async def inner(request: Any, context: Any) -> Any:
        trace = required_scope().trace
        seen.append((client_call_id(), trace.trace_id if trace else None))
        return EMPTY

    async def outer(request: Any, context: Any) -> Any:
        mesh.lifecycle.provision = inner
        trace = required_scope().trace
        expected.append((call_id, trace.trace_id if trace else None))
        bind_call_id(call_id)
        return await mesh.provision()

    call_id, expected = new_uuid7(), list[object]()
    mesh.lifecycle.provision = outer
    await mesh.provision()
    assert seen == expected


async def test_an_abandoned_stream_ends_at_the_peer(mesh: Mesh) -> None:
    """Leaving the block cancels the call, and the peer's generator runs its finally."""
    stopped = asyncio.Event()

    async def endless(request: Any, context: Any) -> AsyncIterator[pb.ExportTenantResponse]:
        try:
            while True:
                yield pb.ExportTenantResponse(kind="x")
                await asyncio.sleep(0.01)
        finally:
            stopped.set()

    mesh.lifecycle.export = endless
    async with mesh.as_tenant.stream(
        mesh.stub.ExportTenant, pb.ExportTenantRequest(), timeout_seconds=30.0, tenant=mesh.tenant
    ) as responses:
        async for _ in responses:
            break
    async with asyncio.timeout(5):
        await stopped.wait()
    assert stopped.is_set()


async def test_a_stream_whose_time_is_over_is_not_begun(mesh: Mesh) -> None:
    """The deadline of the call in hand bounds streams as well."""
    with bind_tenant(mesh.tenant, deadline=time.monotonic() - 1.0):
        responses = mesh.as_tenant.stream(mesh.stub.ExportTenant, pb.ExportTenantRequest(), timeout_seconds=5.0)
    with pytest.raises(MeshError) as late:
        async for _ in responses:
            pass
    assert late.value.reason_name == "DEADLINE_EXCEEDED"
