"""One trace through every hop, spans only when they go somewhere, and no tenant in anything that leaves with a request."""

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_ON, ParentBased
from opentelemetry.trace import SpanKind, StatusCode

from mesh.common.v1 import lifecycle_service_pb2 as pb
from services.kernel.errors import MeshError, NotFound, Unavailable
from services.kernel.request_context import required_scope
from services.kernel.telemetry.trace_parent import TraceParent, new_trace_parent, parse_trace_parent
from services.kernel.telemetry.tracing import configure_tracing, install_tracing, is_recording, shutdown_tracing, tracer
from tests.kernel.mesh import Mesh, settings_of

PARENT = TraceParent("0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331", sampled=True)
HEX = st.text("0123456789abcdef", min_size=32, max_size=32).filter(lambda text: int(text, 16))


@pytest.fixture
def spans() -> Iterator[InMemorySpanExporter]:
    """Where this process's spans go during the test."""
    exporter = InMemorySpanExporter()
    install_tracing("test", ParentBased(ALWAYS_ON), SimpleSpanProcessor(exporter))
    yield exporter
    shutdown_tracing()


def of_kind(spans: InMemorySpanExporter, kind: SpanKind) -> ReadableSpan:
    """The only finished span of the kind."""
    (span,) = [span for span in spans.get_finished_spans() if span.kind is kind]
    return span


async def test_client_and_server_spans_make_one_trace(mesh: Mesh, spans: InMemorySpanExporter) -> None:
    """The server's span is the child of the client's, with the RPC attributes, the caller and the tenant."""
    await mesh.provision()
    client, server = of_kind(spans, SpanKind.CLIENT), of_kind(spans, SpanKind.SERVER)
    assert server.parent is not None
    assert client.context is not None
    assert server.parent.span_id == client.context.span_id
    assert server.name == "mesh.common.v1.TenantLifecycleService/ProvisionTenant"
    assert dict(server.attributes or {}) == {
        "rpc.system": "grpc",
        "rpc.service": "mesh.common.v1.TenantLifecycleService",
        "rpc.method": "ProvisionTenant",
        "rpc.grpc.status_code": 0,
        "tenantry.caller": "tenant",
        "tenantry.tenant_id": str(mesh.tenant.tenant_id),
        "tenantry.tenant_tier": "free",
    }
    assert client.attributes is not None
    assert client.attributes["server.address"] == "peer"
    assert "tenantry.tenant_id" not in client.attributes


@pytest.mark.parametrize(
    ("error", "code", "failed"),
    [(NotFound("x"), 5, False), (Unavailable("redis"), 14, True), (KeyError("x"), 13, True)],
)
async def test_only_the_servers_own_faults_mark_its_span(
    mesh: Mesh, spans: InMemorySpanExporter, error: Exception, code: int, failed: bool
) -> None:
    """A refusal is an answer; the true status code is recorded in every case. For the client both are failures."""

    async def handler(request: Any, context: Any) -> Any:
        raise error

    mesh.lifecycle.provision = handler
    with pytest.raises(MeshError):
        await mesh.provision()
    client, server = of_kind(spans, SpanKind.CLIENT), of_kind(spans, SpanKind.SERVER)
    assert (server.attributes or {})["rpc.grpc.status_code"] == (client.attributes or {})["rpc.grpc.status_code"] == code
    assert server.status.status_code is (StatusCode.ERROR if failed else StatusCode.UNSET)
    assert client.status.status_code is StatusCode.ERROR


async def test_a_servicers_own_span_is_inside_the_servers(mesh: Mesh, spans: InMemorySpanExporter) -> None:
    """A step traced by a servicer belongs to its call."""

    async def handler(request: Any, context: Any) -> Any:
        with tracer().start_as_current_span("step"):
            return pb.ProvisionTenantResponse()

    mesh.lifecycle.provision = handler
    await mesh.provision()
    step, server = of_kind(spans, SpanKind.INTERNAL), of_kind(spans, SpanKind.SERVER)
    assert step.parent is not None
    assert server.context is not None
    assert step.parent.span_id == server.context.span_id


async def test_a_callers_decision_not_to_sample_is_kept(mesh: Mesh, spans: InMemorySpanExporter) -> None:
    """An unsampled trace makes no spans and goes on as itself."""
    seen = await _server_trace(mesh, TraceParent(PARENT.trace_id, PARENT.span_id, sampled=False).header)
    assert seen.trace_id == PARENT.trace_id
    assert not seen.sampled
    assert spans.get_finished_spans() == ()


async def test_without_export_the_trace_passes_through_unchanged(mesh: Mesh) -> None:
    """No span is made, and the caller's parent is the next hop's parent; a call without one gets an id for its logs."""
    assert not is_recording()
    assert await _server_trace(mesh, PARENT.header) == PARENT
    assert len((await _server_trace(mesh, "nonsense")).trace_id) == 32


def test_tracing_is_off_without_an_endpoint_and_on_with_one() -> None:
    """The endpoint alone decides whether spans are made."""
    configure_tracing(settings_of())
    assert not is_recording()
    configure_tracing(settings_of(otlp_endpoint="http://127.0.0.1:1", trace_sample_ratio=0.0))
    assert is_recording()
    shutdown_tracing()
    assert not is_recording()


@given(HEX, HEX.map(lambda text: text[:16]).filter(lambda text: int(text, 16)), st.booleans())
def test_a_traceparent_reads_back(trace_id: str, span_id: str, sampled: bool) -> None:
    """Header and value are two forms of one thing."""
    parent = TraceParent(trace_id, span_id, sampled)
    assert parse_trace_parent(parent.header) == parent
    assert parse_trace_parent(new_trace_parent().header) is not None


@pytest.mark.parametrize(
    "header",
    [
        "",
        "00",
        f"ff-{PARENT.trace_id}-{PARENT.span_id}-01",
        f"00-{PARENT.trace_id}-{PARENT.span_id}-01-extra",
        f"00-{'0' * 32}-{PARENT.span_id}-01",
        f"00-{PARENT.trace_id}-{'0' * 16}-01",
        PARENT.header.upper(),
    ],
)
def test_a_malformed_traceparent_is_as_good_as_none(header: str) -> None:
    """W3C: start anew rather than carry on something broken."""
    assert parse_trace_parent(header) is None


async def _server_trace(mesh: Mesh, header: str) -> TraceParent:
    seen: list[TraceParent | None] = []

    async def handler(request: Any, context: Any) -> Any:
        seen.append(required_scope().trace)
        return pb.ProvisionTenantResponse()

    mesh.lifecycle.provision = handler
    await mesh.stub.ProvisionTenant(pb.ProvisionTenantRequest(), metadata=mesh.as_tenant.metadata(mesh.tenant, header))
    assert seen[0] is not None
    return seen[0]
