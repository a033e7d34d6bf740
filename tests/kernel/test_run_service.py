"""A service as a process: it starts, logs, serves both kinds of handlers, and ends on SIGTERM with everything closed."""

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest

from mesh.common.v1 import lifecycle_service_pb2 as pb
from mesh.common.v1 import lifecycle_service_pb2_grpc as pb_grpc
from services.kernel.context_token import ContextTokenVerifier
from services.kernel.ids import TenantId, new_uuid7
from services.kernel.rpc.channel import MeshChannel
from services.kernel.rpc.server import MeshServer, run_service
from tests.kernel.mesh import LIFECYCLE, KeyringResolver, Keys, settings_of


class WritingLifecycle(pb_grpc.TenantLifecycleServiceServicer):
    """Streams through `context.write` instead of yielding."""

    async def ProvisionTenant(self, request: Any, context: Any) -> Any:
        return pb.ProvisionTenantResponse(resources=["made"])

    async def EraseTenant(self, request: Any, context: Any) -> Any:
        return pb.EraseTenantResponse()

    async def ExportTenant(self, request: Any, context: Any) -> None:  # type: ignore[override] # grpc.aio allows both forms
        for kind in ("one", "two"):
            await context.write(pb.ExportTenantResponse(kind=kind))


class App:
    """The smallest composition root."""

    def __init__(self) -> None:
        keys = Keys()
        self.server = MeshServer(
            settings_of(log_level="DEBUG"),
            servicers=[(pb_grpc.add_TenantLifecycleServiceServicer_to_server, WritingLifecycle(), LIFECYCLE)],
            resolver=KeyringResolver(),
            verifier=ContextTokenVerifier(keys),
        )
        self.token = keys.token(TenantId(new_uuid7()))

    async def close(self) -> None:
        """Says that it was closed."""
        print(json.dumps({"event": "app_closed"}), file=sys.stderr, flush=True)  # noqa: T201


async def build() -> App:
    """Builds the app, starts it and tells the port and a token to whoever reads its output."""
    app = App()
    await app.server.start()
    print(json.dumps({"port": app.server.bound_port, "token": app.token}), flush=True)  # noqa: T201
    return app


@asynccontextmanager
async def process() -> AsyncIterator[asyncio.subprocess.Process]:
    """Runs this module as a service."""
    pipe = asyncio.subprocess.PIPE
    child = await asyncio.create_subprocess_exec(sys.executable, "-m", "tests.kernel.test_run_service", stdout=pipe, stderr=pipe)
    try:
        yield child
    finally:
        if child.returncode is None:
            child.kill()
            await child.wait()


@pytest.mark.skipif(not hasattr(os, "SCHED_BATCH"), reason="only Linux knows threads that interrupt nobody")
async def test_grpcs_threads_interrupt_nobody_and_the_loops_thread_is_as_any() -> None:
    """Once it serves, every thread but the loop's own is batch work."""
    async with process() as child:
        assert child.stdout is not None
        await asyncio.wait_for(child.stdout.readline(), 20)
        policies = {int(thread): os.sched_getscheduler(int(thread)) for thread in os.listdir(f"/proc/{child.pid}/task")}
        assert policies.pop(child.pid) == os.SCHED_OTHER
        assert set(policies.values()) == {os.SCHED_BATCH}


async def test_a_process_serves_and_ends_on_sigterm() -> None:
    """Exit code 0, calls logged at DEBUG with their ids, the app closed last."""
    async with process() as child:
        assert child.stdout is not None
        told = json.loads(await asyncio.wait_for(child.stdout.readline(), 20))
        channel = MeshChannel(f"127.0.0.1:{told['port']}", settings=settings_of(), target_service="peer")
        stub = pb_grpc.TenantLifecycleServiceStub(channel.channel)
        metadata = (*channel.metadata(None, "none"), ("x-tenant-context", told["token"]))
        answer = await stub.ProvisionTenant(pb.ProvisionTenantRequest(), metadata=metadata)
        assert list(answer.resources) == ["made"]
        assert [item.kind async for item in stub.ExportTenant(pb.ExportTenantRequest(), metadata=metadata)] == ["one", "two"]
        with pytest.raises(grpc.aio.AioRpcError):
            await stub.ProvisionTenant(pb.ProvisionTenantRequest())
        await channel.close()
        child.send_signal(signal.SIGTERM)
        _, errors = await asyncio.wait_for(child.communicate(), 20)
    lines = [json.loads(line) for line in errors.decode().splitlines()]
    assert child.returncode == 0
    assert lines[-1] == {"event": "app_closed"}
    finished = [(line["method"].rpartition("/")[2], line["code"]) for line in lines if line["event"] == "rpc_finished"]
    assert finished == [("ProvisionTenant", "OK"), ("ExportTenant", "OK"), ("ProvisionTenant", "UNAUTHENTICATED")]
    assert all(line["trace_id"] for line in lines if line["event"] == "rpc_finished")
    assert told["token"] not in errors.decode()


if __name__ == "__main__":
    run_service(build, settings_of(log_level="DEBUG"))
