"""Maps every exception of a handler to a status, once. An unexpected one is logged whole and answered with a fixed text.

Without this, grpc.aio sends the text of an unmapped exception to the caller.
"""

import asyncio
from collections.abc import Iterator
from typing import Any

import grpc
import structlog

from mesh.common.v1 import error_reason_pb2
from services.kernel.errors import DeadlineExceeded, MeshError
from services.kernel.request_context import remaining_seconds
from services.kernel.rpc.interceptor import Behavior, Deserializer, MeshInterceptor, Method
from services.kernel.rpc.trace import current_trace_id
from services.kernel.rpc.wire_status import DETAILS_KEY, encode

log = structlog.get_logger("rpc")

# HTTP/2 peers commonly cap all trailers at 8 KiB; above it the caller would see a transport error instead of this one.
_MAX_DETAILS_BYTES = 4096
_MAX_MESSAGE_LENGTH = 1000
# Of the message as it goes in the trailers: all but printable ASCII is three bytes a byte there.
_MAX_MESSAGE_BYTES = 2000


class StatusInterceptor(MeshInterceptor):
    """Answers failures with google.rpc.Status."""

    def wrap(self, method: Method, inner: Behavior, deserialize: Deserializer | None) -> Behavior:
        """Returns the behaviour whose every failure is a typed status."""

        async def mapped(request: Any, context: Any) -> Any:
            try:
                return await inner(request, context)
            except (asyncio.CancelledError, grpc.aio.AbortError):
                raise
            except Exception as error:
                failure = to_mesh_error(error, method.path)
            # Outside of the except block, so that the abort's own exception does not drag the traceback along.
            return await _answer(context, failure)

        return mapped


def to_mesh_error(error: Exception, path: str) -> MeshError:
    """Finds the MeshError in an exception or group; anything unexpected in it makes the whole INTERNAL and is logged."""
    leaves = list(_leaves(error))
    unexpected = [leaf for leaf in leaves if not isinstance(leaf, MeshError)]
    if not unexpected:
        known: MeshError = leaves[0]  # type: ignore[assignment] # every leaf is one
        return known
    if all(isinstance(leaf, TimeoutError) for leaf in unexpected) and remaining_seconds(1.0) <= 0.0:
        return DeadlineExceeded("handling")
    log.error("rpc_failed_unexpectedly", method=path, exc_info=error)
    return MeshError(
        grpc.StatusCode.INTERNAL,
        error_reason_pb2.ERROR_REASON_INTERNAL,
        f"internal error; tell the operator the trace id {current_trace_id()}",
    )


def _leaves(error: BaseException) -> Iterator[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from _leaves(inner)
    else:
        yield error


async def _answer(context: Any, failure: MeshError) -> Any:
    message = _fitting(failure.message[:_MAX_MESSAGE_LENGTH])
    details = encode(failure)
    if len(details) > _MAX_DETAILS_BYTES:
        details = encode(MeshError(failure.code, failure.reason, message, retry_after_seconds=failure.retry_after_seconds))
    await context.abort(failure.code, message, ((DETAILS_KEY, details),))


def _fitting(message: str) -> str:
    left = _MAX_MESSAGE_BYTES
    for place, character in enumerate(message):
        left -= 1 if " " <= character <= "~" and character != "%" else 3 * len(character.encode())
        if left < 0:
            return message[:place]
    return message
