"""The one interceptor every call passes: it authenticates, keeps the request's own timeout and turns failures into statuses.

Health checks pass without a key, as in Qdrant. No exception of a handler leaves it as anything but a gRPC status.
"""

import asyncio
import inspect
import logging
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Any

import grpc
from google.protobuf.message import Message

from .access import CURRENT_ACCESS, Authenticator
from .failure import Failure, internal, unimplemented

OPEN_METHODS = frozenset({"/qdrant.Qdrant/HealthCheck", "/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/Watch"})

_log = logging.getLogger(__name__)

# grpc.aio has no generic types at run time, so contexts and handlers are Any at this one boundary.
Behaviour = Callable[[Message, Any], Awaitable[Message]]


class Gate(grpc.aio.ServerInterceptor):
    """Wraps every unary method that is not a health check."""

    def __init__(self, authenticator: Authenticator) -> None:
        self._authenticator = authenticator

    async def intercept_service(self, continuation: Callable[[Any], Awaitable[Any]], details: Any) -> Any:  # noqa: D102
        handler = await continuation(details)
        if handler is None or handler.unary_unary is None or details.method in OPEN_METHODS:
            return handler
        guarded = self._guard(details.method, handler.unary_unary)
        return grpc.unary_unary_rpc_method_handler(guarded, handler.request_deserializer, handler.response_serializer)

    def _guard(self, method: str, behaviour: Behaviour) -> Behaviour:
        async def guarded(request: Message, context: Any) -> Message:
            try:
                access = self._authenticator.authenticate(context.invocation_metadata() or (), datetime.now(UTC).timestamp())
                CURRENT_ACCESS.set(access)
                # The generated base class leaves a method nobody wrote as a plain function.
                if not inspect.iscoroutinefunction(behaviour):
                    raise unimplemented(f"Method {method}")
                return await _within_timeout(method, behaviour, request, context)
            except Failure as failure:
                refused = failure
            except Exception:
                _log.exception("unexpected failure in %s", method)
                refused = internal("unexpected failure, see the log of the server")
            await context.abort(refused.code, refused.message)
            raise AssertionError("abort returned")

        return guarded


async def _within_timeout(method: str, behaviour: Behaviour, request: Message, context: Any) -> Message:
    limit_seconds: int | None = None
    if "timeout" in request.DESCRIPTOR.fields_by_name and request.HasField("timeout"):
        limit_seconds = request.timeout  # type: ignore[attr-defined]  # present: looked up in the descriptor above
    try:
        async with asyncio.timeout(limit_seconds):
            return await behaviour(request, context)
    except TimeoutError:
        message = f"Timeout: Operation '{method}' timed out after {limit_seconds}s"
        raise Failure(grpc.StatusCode.DEADLINE_EXCEEDED, message) from None
