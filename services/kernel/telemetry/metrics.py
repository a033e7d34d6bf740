"""Counters of a process, exported over OTLP when an endpoint is set; otherwise they cost nothing. Never labelled with a tenant."""

from opentelemetry import metrics
from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import OTLPMetricExporter
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import MetricReader, PeriodicExportingMetricReader
from opentelemetry.sdk.resources import Resource

from services.kernel.settings import is_loopback

_NAME = "tenantry"
_EXPORT_EVERY_MILLISECONDS = 10_000


class Counter:
    """Counts events, told apart by labels of few values."""

    def __init__(self, counter: metrics.Counter) -> None:
        self._counter = counter

    def add(self, amount: int, **labels: str) -> None:
        """Counts `amount` more."""
        self._counter.add(amount, labels)


class Counters:
    """Makes counters and owns what exports them; without a reader they go nowhere."""

    def __init__(self, service: str, reader: MetricReader | None) -> None:
        self._provider: MeterProvider | None = None
        self._meter: metrics.Meter = metrics.NoOpMeter(_NAME)
        if reader is not None:
            resource = Resource.create({"service.name": service, "service.namespace": _NAME})
            self._provider = MeterProvider([reader], resource)
            self._meter = self._provider.get_meter(_NAME)

    def counter(self, name: str, description: str) -> Counter:
        """Returns a new counter."""
        return Counter(self._meter.create_counter(name, description=description))

    def close(self) -> None:
        """Exports what is left and stops."""
        if self._provider is not None:
            self._provider.shutdown()


def otlp_counters(service: str, endpoint: str) -> Counters:
    """Returns counters that are sent to an OTLP/gRPC endpoint, in plaintext on loopback alone; to none when it is empty."""
    if not endpoint:
        return Counters(service, None)
    insecure = not endpoint.startswith("https://") and is_loopback(endpoint.split("//")[-1])
    exporter = OTLPMetricExporter(endpoint=endpoint, insecure=insecure)
    return Counters(service, PeriodicExportingMetricReader(exporter, export_interval_millis=_EXPORT_EVERY_MILLISECONDS))
