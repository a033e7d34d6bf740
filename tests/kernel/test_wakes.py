"""grpc's events wake the loop once, however many there are."""

import asyncio
import json
import os
import socket
import sys

import grpc
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from services.kernel.rpc.wakes import _emptied_pairs, wake_behind_the_loop, woken_once


def test_a_wake_takes_all_bytes_there_are() -> None:
    """Five events have written five bytes: what reads one for the first has read those of all; pairs of others are as ever."""
    with _emptied_pairs():
        reader, writer = socket.socketpair()
    with reader, writer:
        writer.send(b"11111")
        assert reader.recv(1) == b"11111"
    reader, writer = socket.socketpair()
    with reader, writer:
        writer.send(b"11111")
        assert reader.recv(1) == b"1"


async def test_grpc_is_woken_by_such_a_pair() -> None:
    """In a process of its own: grpc waits at a socket that is emptied at once, and answers calls."""
    pipe = asyncio.subprocess.PIPE
    child = await asyncio.create_subprocess_exec(sys.executable, "-m", "tests.kernel.test_wakes", stdout=pipe, stderr=pipe)
    output, errors = await asyncio.wait_for(child.communicate(), 30)
    assert child.returncode == 0, errors.decode()
    assert json.loads(output) == {"readers": ["_EmptiedSocket"], "answers": [1, 1, 1]}


def test_where_threads_are_hidden_or_the_policy_is_forbidden_all_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sandbox costs what the policy saves, and nothing else."""
    tried: list[str] = []
    for name in ("sched_setscheduler", "listdir"):

        def forbidden(*_: object, name: str = name) -> None:
            tried.append(name)
            raise PermissionError

        monkeypatch.setattr(os, name, forbidden)
        wake_behind_the_loop()
    # A process of one thread has none to set: then only the looking was forbidden.
    assert tried[-1:] == ["listdir"]


class _Loop(asyncio.SelectorEventLoop):
    readers: list[str]

    def add_reader(self, fd: object, callback: object, *args: object) -> None:  # type: ignore[override] # any form of it
        self.readers = [*getattr(self, "readers", []), type(fd).__name__]
        super().add_reader(fd, callback, *args)  # type: ignore[arg-type]


async def _calls() -> None:
    with woken_once():
        server = grpc.aio.server()
        servicer = health.aio.HealthServicer()
        await servicer.set("", health_pb2.HealthCheckResponse.SERVING)
        health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            answers = [(await stub.Check(health_pb2.HealthCheckRequest())).status for _ in range(3)]
        await server.stop(None)
    loop = asyncio.get_running_loop()
    assert isinstance(loop, _Loop)
    print(json.dumps({"readers": loop.readers, "answers": answers}))  # noqa: T201


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=_Loop) as runner:
        runner.run(_calls())
