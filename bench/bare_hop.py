"""The floor under any mesh of this kind: one empty grpc.aio unary call between two processes, as CPU time of both together.

`python -m bench.bare_hop [BYTES]` is the server's side; it prints its port, and answers so many bytes, or what it was sent.
"""

from __future__ import annotations

import asyncio
import sys
import time

import grpc
import uvloop

from bench.process_cost import CpuReading
from devstack.ports import LOOPBACK

METHOD = "/bench.BareHop/Echo"
PAYLOAD = bytes(200)
CALLS = 3_000


class _Echo(grpc.GenericRpcHandler):
    def __init__(self, answer: bytes | None) -> None:
        self._fixed = answer

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[bytes, bytes]:
        return grpc.unary_unary_rpc_method_handler(self._answer)

    async def _answer(self, request: bytes, context: object) -> bytes:
        return request if self._fixed is None else self._fixed


async def serve(answer: bytes | None) -> None:
    """Serves until killed."""
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((_Echo(answer),))
    print(server.add_insecure_port(f"{LOOPBACK}:0"), flush=True)
    await server.start()
    await server.wait_for_termination()


async def cpu_milliseconds(concurrency: int) -> float:
    """Returns the CPU milliseconds of one hop, client and server, with so many calls under way."""
    process = await asyncio.create_subprocess_exec(sys.executable, "-m", "bench.bare_hop", stdout=asyncio.subprocess.PIPE)
    try:
        if process.stdout is None:
            raise RuntimeError("the server's output is a pipe")
        port = int(await process.stdout.readline())
        async with grpc.aio.insecure_channel(f"{LOOPBACK}:{port}") as channel:
            call: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(METHOD)
            await _calls(call, 1)
            server, client = CpuReading.of({"server": process.pid}), time.process_time()
            async with asyncio.TaskGroup() as group:
                for _ in range(concurrency):
                    group.create_task(_calls(call, CALLS // concurrency))
            spent = CpuReading.of({"server": process.pid}).since(server)["server"] + time.process_time() - client
            return spent * 1000 / (CALLS // concurrency * concurrency)
    finally:
        process.kill()
        await process.wait()


async def _calls(call: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes], count: int) -> None:
    for _ in range(count):
        await call(PAYLOAD)


if __name__ == "__main__":
    uvloop.run(serve(bytes(int(sys.argv[1])) if len(sys.argv) > 1 else None))
