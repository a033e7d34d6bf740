"""What the six interceptors share: wrapping a handler once per method, whatever its kind.

A servicer's method, generator or coroutine, becomes one coroutine function `(request, context) -> response`; a streaming one writes
its responses through `context.write`. Only the first call of a method builds closures.
"""

# grpc is generic in its stubs only: subscripting it at run time fails.
from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass
from inspect import isasyncgenfunction
from typing import Any, TypeAlias

import grpc

from services.kernel.rpc.encoded import Serializer

Behavior = Callable[[Any, Any], Awaitable[Any]]
Deserializer = Callable[[bytes], Any]
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
Continuation: TypeAlias = "Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]]"

# Answered by libraries, needed by probes and tools that have no identity: exempt from every interceptor.
EXEMPT_SERVICES = frozenset(
    (
        "grpc.health.v1.Health",
        "grpc.reflection.v1alpha.ServerReflection",
        "grpc.reflection.v1.ServerReflection",
        "grpc.channelz.v1.Channelz",
    ),
)


@dataclass(frozen=True, slots=True)
class Method:
    """One rpc: `/package.Service/Name`, its parts and its kind."""

    path: str
    service: str
    name: str
    request_streaming: bool
    response_streaming: bool


class MeshInterceptor(grpc.aio.ServerInterceptor, ABC):
    """One concern around every handler."""

    def __init__(self) -> None:
        self._handlers: dict[str, Handler] = {}

    async def intercept_service(self, continuation: Continuation, handler_call_details: grpc.HandlerCallDetails) -> Handler | None:
        """Returns the wrapped handler; from the second call on without asking the inner interceptors again."""
        path = handler_call_details.method
        cached = self._handlers.get(path)
        if cached is not None:
            return cached
        handler = await continuation(handler_call_details)
        if handler is None:
            return handler
        service, _, name = path.lstrip("/").rpartition("/")
        if service not in EXEMPT_SERVICES:
            method = Method(path, service, name, bool(handler.request_streaming), bool(handler.response_streaming))
            handler = self._rebuild(method, handler)
        self._handlers[path] = handler
        return handler

    @abstractmethod
    def wrap(self, method: Method, inner: Behavior, deserialize: Deserializer | None) -> Behavior:
        """Returns the behaviour with this concern around it."""

    def deserializer(self, current: Deserializer | None) -> Deserializer | None:
        """Returns what turns bytes into the request before this interceptor; the inner one's unless this one does it itself."""
        return current

    def serializer(self, current: Serializer | None) -> Serializer | None:
        """Returns what turns the response into bytes after this interceptor; the inner one's unless this one does it itself."""
        return current

    def _rebuild(self, method: Method, handler: Handler) -> Handler:
        inner, make = _parts(handler)
        current: Deserializer | None = handler.request_deserializer
        behavior = self.wrap(method, _as_coroutine(inner), current)
        rebuilt: Handler = make(behavior, self.deserializer(current), self.serializer(handler.response_serializer))
        return rebuilt


def _parts(handler: Any) -> tuple[Any, Any]:
    if handler.request_streaming:
        if handler.response_streaming:
            return handler.stream_stream, grpc.stream_stream_rpc_method_handler
        return handler.stream_unary, grpc.stream_unary_rpc_method_handler
    if handler.response_streaming:
        return handler.unary_stream, grpc.unary_stream_rpc_method_handler
    return handler.unary_unary, grpc.unary_unary_rpc_method_handler


def _as_coroutine(inner: Any) -> Behavior:
    if not isasyncgenfunction(inner):
        behavior: Behavior = inner
        return behavior

    async def write_all(request: Any, context: Any) -> None:
        responses: AsyncIterator[Any]
        # Closed here and not by the garbage collector, so that a servicer's `finally` runs inside its own call.
        async with aclosing(inner(request, context)) as responses:
            async for response in responses:
                await context.write(response)

    return write_all
