"""How calls are taken in: several at once, by requests of each method's own.

grpc.aio asks for one call at a time. It asks for the next when the last one has come through two threads and three turns of the loop, so
that calls which arrived together are begun one after another, each in turns of its own, and share nothing: no wake of the loop, no write,
no trip to a store. Here `AT_HAND` requests of each method lie with grpc, each waited for by its own task. A call pays neither for the
number of methods nor for the number of requests. What no method is registered for is answered UNIMPLEMENTED without a look at its path:
grpc.aio reads it as UTF-8 in the task that serves, and one path of other bytes would end the server.
"""

import asyncio
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import grpc
from grpc._cython import cygrpc  # type: ignore[attr-defined] # grpc types none of it

from services.kernel.rpc.interceptor import Handler, MeshInterceptor

# More take a burst in sooner, fewer leave smaller ones at rest. From 16 to 64 a call of 64 at once cost 2 % less, from 4 to 16 8 %.
AT_HAND = 16

# Of a call whose method nobody serves.
_UNKNOWN = ""

_Calls = set["asyncio.Task[None]"]


def _ignore(failure: BaseException) -> None:
    pass


def accepting_server(
    interceptors: Sequence[MeshInterceptor], options: Sequence[tuple[str, int]], on_failure: Callable[[BaseException], object] = _ignore
) -> grpc.aio.Server:
    """Returns grpc.aio's server, which takes calls in so. `on_failure` is told what keeps it from taking in any more."""
    with _server_type():
        server = grpc.aio.server(interceptors=interceptors, options=options)
    server._server._on_failure = on_failure  # type: ignore[attr-defined] # grpc types none of it
    return server


class _AcceptingServer(cygrpc.AioServer):  # type: ignore[misc]
    """grpc's server with other requests for calls; what becomes of a call is its own code."""

    def __init__(self, loop: asyncio.AbstractEventLoop, thread_pool: Any, handlers: Any, interceptors: Any, *others: Any) -> None:
        super().__init__(loop, thread_pool, handlers, interceptors, *others)
        self._own_loop = loop
        self._own_interceptors = tuple(interceptors or ())
        self._handlers: dict[str, Handler] = {}
        self._resolver = cygrpc._MethodResolver([], self._handlers)
        # The loop itself holds its tasks weakly.
        self._calls: _Calls = set()
        self._on_failure: Callable[[BaseException], object] = _ignore

    def add_registered_method_handlers(self, handlers: Mapping[str, Handler]) -> None:
        """Registers methods by their paths."""
        super().add_registered_method_handlers(handlers)
        self._handlers.update(handlers)

    def _serving_task_crash_handler(self, task: "asyncio.Task[None]") -> None:
        super()._serving_task_crash_handler(task)
        failure = None if task.cancelled() else task.exception()
        if failure is not None and not isinstance(failure, cygrpc._RequestCallError):
            self._on_failure(failure)

    def _make_request_call_future(self, method: bytes | None) -> Any:
        """Begins to ask for calls of a method. grpc's own loop asks for this once, and sleeps until it fails: it ends the server then."""
        accepting = self._accept_unknown() if method is None else self._accept_many(method)
        return self._own_loop.create_task(accepting, name="grpc.accept")

    async def _accept_many(self, method: bytes) -> None:
        async with asyncio.TaskGroup() as group:
            for _ in range(AT_HAND):
                group.create_task(self._accept(method))
        # As grpc's own request does when the server stops.
        raise cygrpc._RequestCallError

    async def _accept(self, method: bytes) -> None:
        path = method.decode()
        while True:
            try:
                state = await self._request_registered_call(method)
            except cygrpc._RequestCallError:
                if not self.is_running():
                    return
                continue
            self._begin(path, self._own_interceptors, state)

    async def _accept_unknown(self) -> None:
        # Every method of a generated servicer is registered: what comes here is none of them.
        while True:
            try:
                state = await super()._make_request_call_future(None)
            except cygrpc._RequestCallError:
                if not self.is_running():
                    raise
                continue
            self._begin(_UNKNOWN, (), state)

    def _begin(self, path: str, interceptors: tuple[MeshInterceptor, ...], state: Any) -> None:
        handled = cygrpc._handle_rpc(path, self._resolver, interceptors, state, self._own_loop, False)
        task = self._own_loop.create_task(cygrpc._schedule_rpc_coro(handled, state, self._own_loop, path))
        self._calls.add(task)
        task.add_done_callback(self._calls.discard)


@contextmanager
def _server_type() -> Iterator[None]:
    # The server is made of what grpc finds under this name, and has no other way to be given one.
    plain = cygrpc.AioServer
    cygrpc.AioServer = _AcceptingServer
    try:
        yield
    finally:
        cygrpc.AioServer = plain
