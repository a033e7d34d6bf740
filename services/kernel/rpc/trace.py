"""Traces at the edges, by hand: a SERVER span around each handled call, a CLIENT span around each outbound one.

A span is made only when spans are exported; the trace's identity is carried on in every case. No tenant id in baggage, ever.
"""

# grpc is generic in its stubs only: subscripting it at run time fails.
from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import grpc
import structlog
from opentelemetry import context as otel_context
from opentelemetry import trace
from opentelemetry.trace import NonRecordingSpan, Span, SpanContext, SpanKind, Status, StatusCode, TraceFlags

from services.kernel.request_context import RequestScope, enter_scope, required_scope, scope
from services.kernel.rpc.interceptor import Behavior, Continuation, Deserializer, Handler, MeshInterceptor, Method
from services.kernel.rpc.metadata import TRACEPARENT
from services.kernel.telemetry import names
from services.kernel.telemetry.trace_parent import TraceParent, new_trace_parent, parse_trace_parent
from services.kernel.telemetry.tracing import is_recording, tracer

log = structlog.get_logger("rpc")

_OK = grpc.StatusCode.OK
# The caller's faults leave the server's span unset: they are answers, not failures of this service.
_SERVER_FAULTS = frozenset(
    (
        grpc.StatusCode.UNKNOWN,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.UNIMPLEMENTED,
        grpc.StatusCode.INTERNAL,
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.DATA_LOSS,
    ),
)
_CODES = {code.value[0]: code for code in grpc.StatusCode}


class TraceInterceptor(MeshInterceptor):
    """Opens the call's scope, and its span when spans go anywhere."""

    def __init__(self, *, log_calls: bool = False) -> None:
        super().__init__()
        self._log_calls = log_calls

    async def intercept_service(self, continuation: Continuation, handler_call_details: grpc.HandlerCallDetails) -> Handler | None:
        """Opens the scope, which the handler's task is in already, and returns the wrapped handler.

        Here and not in the behaviour: grpc builds the metadata anew each time that a context is asked for it.
        """
        # `Any`: only values of keys that end in -bin are bytes, and none of those is read.
        raw: Any = handler_call_details.invocation_metadata
        pairs = dict(raw)
        parent = parse_trace_parent(value) if (value := pairs.get(TRACEPARENT)) else None
        enter_scope(RequestScope(handler_call_details.method, pairs, raw, trace=parent))
        return await super().intercept_service(continuation, handler_call_details)

    def wrap(self, method: Method, inner: Behavior, deserialize: Deserializer | None) -> Behavior:
        """Returns the behaviour inside a scope and a span."""

        async def traced(request: Any, context: Any) -> Any:
            call = required_scope()
            parent = call.trace
            # The caller's decision holds for the whole trace: unsampled, there is no span to make.
            if is_recording() and (parent is None or parent.sampled):
                with _server_span(method, call, context):
                    return await handled(request, context, call)
            if parent is None:
                call.trace = new_trace_parent()
            return await handled(request, context, call)

        async def handled(request: Any, context: Any, call: RequestScope) -> Any:
            if not self._log_calls:
                return await inner(request, context)
            with _logged(call, context):
                return await inner(request, context)

        return traced


@contextmanager
def client_span(method: str, target: str) -> Iterator[str]:
    """Yields the `traceparent` to send with an outbound call, inside a CLIENT span when spans go anywhere."""
    call = scope()
    if not is_recording() or (call is not None and call.trace is not None and not call.trace.sampled):
        yield (call.trace if call is not None and call.trace is not None else new_trace_parent()).header
        return
    service, _, name = method.lstrip("/").rpartition("/")
    attributes = {
        names.RPC_SYSTEM: names.RPC_SYSTEM_GRPC,
        names.RPC_SERVICE: service,
        names.RPC_METHOD: name,
        names.SERVER_ADDRESS: target,
    }
    # Not start_as_current_span: a stream's span may end in another context than it began in.
    span = tracer().start_span(f"{service}/{name}", kind=SpanKind.CLIENT, attributes=attributes)
    try:
        yield _header(span.get_span_context())
    except grpc.aio.AioRpcError as error:
        _end(span, error.code(), failed=True)
        raise
    except BaseException as error:
        span.set_attribute(names.ERROR_TYPE, type(error).__name__)
        _end(span, grpc.StatusCode.CANCELLED, failed=isinstance(error, Exception))
        raise
    else:
        _end(span, _OK, failed=False)


def current_trace_id() -> str:
    """Returns the trace id of the call in hand, 32 hex digits; empty outside of a call."""
    call = scope()
    return call.trace.trace_id if call is not None and call.trace is not None else ""


@contextmanager
def _server_span(method: Method, call: RequestScope, context: Any) -> Iterator[None]:
    parent = None if call.trace is None else trace.set_span_in_context(NonRecordingSpan(_remote(call.trace)), otel_context.Context())
    attributes = {names.RPC_SYSTEM: names.RPC_SYSTEM_GRPC, names.RPC_SERVICE: method.service, names.RPC_METHOD: method.name}
    span = tracer().start_span(
        f"{method.service}/{method.name}",
        # An explicit empty context: what was current in the process that accepted the connection is no parent.
        context=parent if parent is not None else otel_context.Context(),
        kind=SpanKind.SERVER,
        attributes=attributes,
    )
    own = span.get_span_context()
    call.trace = TraceParent(f"{own.trace_id:032x}", f"{own.span_id:016x}", own.trace_flags.sampled)
    token = otel_context.attach(trace.set_span_in_context(span))
    code = grpc.StatusCode.CANCELLED
    try:
        yield
        code = _OK
    except grpc.aio.AbortError:
        code = _answered_code(context)
        raise
    finally:
        otel_context.detach(token)
        _describe(span, call)
        _end(span, code, failed=code in _SERVER_FAULTS)


def _describe(span: Span, call: RequestScope) -> None:
    if not span.is_recording():
        return
    if call.caller:
        span.set_attribute(names.CALLER, call.caller)
    call_id = call.call_id or call.client_call_id
    if call_id is not None:
        span.set_attribute(names.CALL_ID, str(call_id))
    if call.tenant is not None and call.tenant.tenant_id is not None:
        span.set_attribute(names.TENANT_ID, str(call.tenant.tenant_id))
        span.set_attribute(names.TENANT_TIER, call.tenant.tier)


def _end(span: Span, code: grpc.StatusCode, *, failed: bool) -> None:
    span.set_attribute(names.RPC_STATUS_CODE, code.value[0])
    if failed:
        span.set_attribute(names.ERROR_TYPE, code.name)
        span.set_status(Status(StatusCode.ERROR))
    span.end()


def _remote(parent: TraceParent) -> SpanContext:
    flags = TraceFlags(TraceFlags.SAMPLED if parent.sampled else TraceFlags.DEFAULT)
    return SpanContext(int(parent.trace_id, 16), int(parent.span_id, 16), is_remote=True, trace_flags=flags)


def _header(own: SpanContext) -> str:
    return f"00-{own.trace_id:032x}-{own.span_id:016x}-{'01' if own.trace_flags.sampled else '00'}"


def _answered_code(context: Any) -> grpc.StatusCode:
    # grpc.aio answers the code as an int or as the enum, depending on how it was set.
    code = context.code()
    return code if isinstance(code, grpc.StatusCode) else _CODES.get(code, grpc.StatusCode.UNKNOWN)


@contextmanager
def _logged(call: RequestScope, context: Any) -> Iterator[None]:
    started, code = time.monotonic(), grpc.StatusCode.CANCELLED
    try:
        yield
        code = _OK
    except grpc.aio.AbortError:
        code = _answered_code(context)
        raise
    finally:
        duration_ms = round((time.monotonic() - started) * 1000, 3)
        log.debug("rpc_finished", method=call.method, code=code.name, caller=call.caller, duration_ms=duration_ms)
