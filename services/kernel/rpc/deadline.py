"""Reads the caller's deadline into the call's scope; grpc does not pass it on, so outbound calls take it from there."""

import time
from typing import Any

from services.kernel.request_context import required_scope
from services.kernel.rpc.interceptor import Behavior, Deserializer, MeshInterceptor, Method


class DeadlineInterceptor(MeshInterceptor):
    """Sets `current_deadline()`. Ending a call that overruns is grpc's own work: it cancels the handler."""

    def wrap(self, method: Method, inner: Behavior, deserialize: Deserializer | None) -> Behavior:
        """Returns the behaviour with its deadline on time.monotonic()."""

        async def timed(request: Any, context: Any) -> Any:
            remaining = context.time_remaining()
            if remaining is not None:
                required_scope().deadline = time.monotonic() + remaining
            return await inner(request, context)

        return timed
