"""Counters: exported with their labels where there is a reader, silent where there is none."""

from opentelemetry.sdk.metrics.export import InMemoryMetricReader

from services.kernel.telemetry.metrics import Counters, otlp_counters


def test_a_counter_is_exported_with_its_labels() -> None:
    """Each set of labels is a sum of its own, of the service that counted."""
    reader = InMemoryMetricReader()
    counters = Counters("metering", reader)
    counter = counters.counter("tenantry.test", "tests")
    counter.add(1, account="house")
    counter.add(2, account="house")
    counter.add(4, account="other")
    exported = reader.get_metrics_data()
    assert exported is not None
    (resource,) = exported.resource_metrics
    assert resource.resource.attributes["service.name"] == "metering"
    (metric,) = resource.scope_metrics[0].metrics
    sums = {str(point.attributes["account"]): point.value for point in metric.data.data_points if point.attributes}  # type: ignore[union-attr] # a sum
    assert (metric.name, sums) == ("tenantry.test", {"house": 3, "other": 4})
    counters.close()


def test_without_an_endpoint_counting_goes_nowhere() -> None:
    """And costs nothing: there is no provider to stop."""
    counters = otlp_counters("metering", "")
    counters.counter("tenantry.test", "tests").add(1)
    counters.close()
    assert otlp_counters("metering", "http://127.0.0.1:1") is not None
