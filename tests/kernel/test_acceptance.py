"""Calls that came together are taken in together, whatever their number and the number of methods."""

import asyncio
import time
from typing import Any

import grpc
import pytest
from grpc._cython import cygrpc

from mesh.common.v1 import lifecycle_service_pb2 as pb
from mesh.common.v1 import lifecycle_service_pb2_grpc as pb_grpc
from services.kernel.rpc.acceptance import AT_HAND, _AcceptingServer, accepting_server
from tests.kernel.mesh import Lifecycle, Mesh, running_mesh
from tests.kernel.test_auth import PROVISION

_MOST_TURNS = 8
_ATTEMPTS = 20


def _waiting(name: str) -> list["asyncio.Task[Any]"]:
    return [task for task in asyncio.all_tasks() if getattr(task.get_coro(), "__qualname__", "").endswith(name)]


async def test_requests_of_each_method_are_at_hand() -> None:
    """So many of each, however many calls there were; none is left when the server has stopped."""
    others = asyncio.all_tasks()
    async with running_mesh() as own:
        methods = own.server._server._server._handlers  # type: ignore[attr-defined] # grpc types none of it
        assert {PROVISION, "/grpc.health.v1.Health/Check"} < methods.keys()
        for _ in range(2):
            await own.provision()
            assert len(set(_waiting("._accept")) - others) == AT_HAND * len(methods)
    assert not set(_waiting("._accept") + _waiting("._accept_many")) - others


async def test_no_call_pays_for_the_number_of_methods() -> None:
    """What waits for all of them at once sleeps through a call: it waits at the same future as before."""
    others = set(_waiting("._server_main_loop"))
    async with running_mesh() as own:
        (serving,) = set(_waiting("._server_main_loop")) - others
        before: Any = serving._fut_waiter  # type: ignore[attr-defined] # of tasks in C
        assert before is not None
        for _ in range(3):
            await own.provision()
        assert serving._fut_waiter is before  # type: ignore[attr-defined] # see above


async def test_calls_that_came_together_are_taken_in_together(mesh: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many calls as are asked for at once begin within a few turns of the loop; one by one each would take three of its own."""
    loop, turn, begun = asyncio.get_running_loop(), 0, list[int]()
    first = mesh.server.interceptors[0]
    intercept = first.intercept_service

    async def noting(continuation: Any, details: Any) -> Any:
        begun.append(turn)
        return await intercept(continuation, details)

    def tick() -> None:
        nonlocal turn, ticking
        turn += 1
        ticking = loop.call_soon(tick)

    monkeypatch.setattr(first, "intercept_service", noting)
    await mesh.provision()
    ticking = loop.call_soon(tick)
    try:
        for attempt in range(1, _ATTEMPTS):
            turns = await _turns_of_a_burst(mesh, begun, attempt)
            if turns <= _MOST_TURNS:
                break
    finally:
        ticking.cancel()
    assert turns <= _MOST_TURNS


async def _turns_of_a_burst(mesh: Mesh, begun: list[int], attempt: int) -> int:
    begun.clear()
    async with asyncio.TaskGroup() as group:
        for _ in range(AT_HAND):
            group.create_task(mesh.provision())
        # They are on their way after a turn; then grpc's threads alone work, until all have arrived or the pause was too short.
        await asyncio.sleep(0)
        _hold_the_loop(0.02 * attempt)
    assert len(begun) == AT_HAND
    return max(begun) - min(begun)


def _hold_the_loop(seconds: float) -> None:
    time.sleep(seconds)


async def test_other_servers_are_made_as_ever() -> None:
    """Only the one server is of this kind."""
    await _stopped(accepting_server([], []))
    assert cygrpc.AioServer is not _AcceptingServer
    plain = grpc.aio.server()
    assert type(plain._server) is cygrpc.AioServer  # type: ignore[attr-defined] # grpc types none of it
    await _stopped(plain)


async def test_a_server_that_cannot_ask_for_calls_ends() -> None:
    """As grpc's own does: a server that listens and never takes a call would look healthy for ever."""
    failure = RuntimeError("no request can be made")

    async def failing(method: bytes) -> object:
        raise failure

    server = accepting_server([], [])
    pb_grpc.add_TenantLifecycleServiceServicer_to_server(Lifecycle(), server)
    inner = server._server  # type: ignore[attr-defined] # grpc types none of it
    inner._request_registered_call = failing
    await server.start()
    with pytest.raises(ExceptionGroup) as ended:
        await asyncio.wait_for(server.wait_for_termination(), 30)
    assert failure in ended.value.exceptions
    assert not inner.is_running()


async def test_a_caller_who_leaves_cancels_what_runs_for_it(mesh: Mesh) -> None:
    """The handler is told, and the server goes on."""
    begun, told = asyncio.Event(), asyncio.Event()

    async def hang(request: Any, context: Any) -> Any:
        begun.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            told.set()
            raise

    mesh.lifecycle.provision = hang
    calling = asyncio.ensure_future(mesh.provision())
    await asyncio.wait_for(begun.wait(), 30)
    calling.cancel()
    await asyncio.wait_for(told.wait(), 30)
    mesh.lifecycle.provision = type(mesh.lifecycle)().provision
    assert await mesh.provision() == pb.ProvisionTenantResponse()


async def _stopped(server: grpc.aio.Server) -> None:
    await server.stop(None)
