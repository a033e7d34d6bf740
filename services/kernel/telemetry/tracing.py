"""The process's tracer: exports over OTLP when an endpoint is set, otherwise costs nothing and makes no span."""

from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ParentBased, Sampler, TraceIdRatioBased

from services.kernel.settings import ServiceSettings, is_loopback

_NAME = "tenantry"
# Soon enough to look at the trace of the call just made.
_EXPORT_EVERY_MILLISECONDS = 1_000


class _Installed:
    """What this process traces with; module state because spans are made where no constructor reaches."""

    provider: TracerProvider | None = None
    tracer: trace.Tracer = trace.NoOpTracer()
    recording: bool = False


def configure_tracing(settings: ServiceSettings) -> TracerProvider:
    """Installs the provider for this process. Without `otlp_endpoint` no span is ever sampled."""
    if not settings.otlp_endpoint:
        return install_tracing(settings.service_name, ALWAYS_OFF, None)
    endpoint = settings.otlp_endpoint
    exporter = OTLPSpanExporter(endpoint=endpoint, insecure=not endpoint.startswith("https://") and is_loopback(endpoint.split("//")[-1]))
    sampler = ParentBased(TraceIdRatioBased(settings.trace_sample_ratio))
    return install_tracing(settings.service_name, sampler, BatchSpanProcessor(exporter, schedule_delay_millis=_EXPORT_EVERY_MILLISECONDS))


def install_tracing(service: str, sampler: Sampler, processor: SpanProcessor | None) -> TracerProvider:
    """Installs a provider with the given sampler and, when spans are to go anywhere, a processor."""
    provider = TracerProvider(sampler=sampler, resource=Resource.create({"service.name": service, "service.namespace": _NAME}))
    if processor is not None:
        provider.add_span_processor(processor)
    _Installed.provider, _Installed.tracer, _Installed.recording = provider, provider.get_tracer(_NAME), processor is not None
    return provider


def tracer() -> trace.Tracer:
    """Returns the process's tracer; one that makes no spans until tracing is configured."""
    return _Installed.tracer


def is_recording() -> bool:
    """Tells whether spans go anywhere; edges skip making them when not."""
    return _Installed.recording


def annotate(name: str, value: str) -> None:
    """Adds an attribute to the span of the work at hand; nothing where there is none."""
    if _Installed.recording:
        trace.get_current_span().set_attribute(name, value)


def shutdown_tracing() -> None:
    """Flushes what is waiting and stops exporting."""
    if _Installed.provider is not None:
        _Installed.provider.shutdown()
    _Installed.provider, _Installed.tracer, _Installed.recording = None, trace.NoOpTracer(), False
