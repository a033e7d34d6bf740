"""An OTLP receiver that keeps the most recent traces in memory, so that one call can be shown as a tree."""

import asyncio
from collections import OrderedDict
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.common.v1.common_pb2 import AnyValue

from devstack.ports import LOOPBACK

KEPT_TRACES = 2_000


@dataclass(frozen=True, slots=True)
class Span:
    """One finished span. Times are Unix nanoseconds; `error` is true for an error status."""

    trace_id: str
    span_id: str
    parent_span_id: str
    service: str
    name: str
    kind: int
    start_ns: int
    end_ns: int
    error: bool
    attributes: Mapping[str, str]


class TraceReceiver(trace_service_pb2_grpc.TraceServiceServicer):
    """A gRPC server for OTLP traces; forgets the oldest trace past `KEPT_TRACES`."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._traces: OrderedDict[str, list[Span]] = OrderedDict()
        self._arrived = asyncio.Condition()
        self._server: grpc.aio.Server | None = None

    async def start(self) -> None:
        """Starts listening."""
        self._server = grpc.aio.server()
        trace_service_pb2_grpc.add_TraceServiceServicer_to_server(self, self._server)  # type: ignore[no-untyped-call]
        self._server.add_insecure_port(f"{LOOPBACK}:{self._port}")
        await self._server.start()

    async def stop(self) -> None:
        """Stops listening."""
        if self._server is not None:
            await self._server.stop(0.2)

    async def Export(
        self, request: trace_service_pb2.ExportTraceServiceRequest, context: object
    ) -> trace_service_pb2.ExportTraceServiceResponse:
        """Takes a batch of spans."""
        for resource in request.resource_spans:
            service = next((a.value.string_value for a in resource.resource.attributes if a.key == "service.name"), "unknown")
            for scope in resource.scope_spans:
                for span in scope.spans:
                    kept = Span(
                        span.trace_id.hex(),
                        span.span_id.hex(),
                        span.parent_span_id.hex(),
                        service,
                        span.name,
                        span.kind,
                        span.start_time_unix_nano,
                        span.end_time_unix_nano,
                        span.status.code == 2,
                        {a.key: _text(a.value) for a in span.attributes},
                    )
                    self._traces.setdefault(kept.trace_id, []).append(kept)
        while len(self._traces) > KEPT_TRACES:
            self._traces.popitem(last=False)
        async with self._arrived:
            self._arrived.notify_all()
        return trace_service_pb2.ExportTraceServiceResponse()

    def spans(self, trace_id: str) -> list[Span]:
        """Returns what has arrived of a trace, in order of start."""
        return sorted(self._traces.get(trace_id, ()), key=lambda span: span.start_ns)

    async def wait_for(self, trace_id: str, services: frozenset[str], *, timeout_seconds: float) -> list[Span]:
        """Waits until spans of all the named services arrived and they hang together, or the time passed; returns what is there."""
        try:
            async with asyncio.timeout(timeout_seconds), self._arrived:
                await self._arrived.wait_for(lambda: _is_whole(self._traces.get(trace_id, ()), services))
        except TimeoutError:
            pass
        return self.spans(trace_id)


def _is_whole(spans: Collection[Span], services: frozenset[str]) -> bool:
    # Each service sends what has ended when it likes: a child may be here long before its parent. Only the root's parent, which is the
    # caller's own span, never comes.
    known = {span.span_id for span in spans}
    return services <= {span.service for span in spans} and sum(span.parent_span_id not in known for span in spans) == 1


def _text(value: AnyValue) -> str:
    kind = value.WhichOneof("value")
    return "" if kind is None else str(getattr(value, kind))
