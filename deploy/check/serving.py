"""What holds for a service's Deployment: ports, probes, addresses and the end of a pod agree with its settings."""

from collections.abc import Iterator
from dataclasses import dataclass

from pydantic import ValidationError

from deploy.check.manifests import Manifests, Workload, labels, number, selects, text, tree, trees
from deploy.check.mesh import Service, longest_stream_seconds, port_of
from services.kernel.settings import ServiceSettings

# What closing pools and flushing spans may take after the last call.
_CLOSING_SECONDS = 10.0
# Below it clients still find a pod that no longer listens.
_LEAST_REMOVAL_SECONDS = 5.0
_PROBES = ("startupProbe", "readinessProbe", "livenessProbe")
_NAMESPACE = "tenantry"


@dataclass(frozen=True, slots=True)
class Deployed:
    """One service beside its Deployment."""

    service: Service
    workload: Workload
    manifests: Manifests
    services: dict[str, Service]

    def settings(self) -> ServiceSettings:
        """The settings the manifest makes."""
        return self.service.configured(self.workload.literals)


def starts(deployed: Deployed) -> Iterator[str]:
    """Yields why the service would refuse to start with the environment of the manifest."""
    try:
        deployed.settings()
    except ValidationError as error:
        for problem in error.errors():
            yield f"{'.'.join(str(part) for part in problem['loc']) or 'settings'}: {problem['msg']}"


def ports(deployed: Deployed) -> Iterator[str]:
    """Yields ports that differ from where the service listens by its settings."""
    wanted = deployed.service.port
    literals = deployed.workload.literals
    listens = port_of(literals.get("TENANTRY_LISTEN_ADDRESS", ""))
    health = port_of(literals.get("TENANTRY_HEALTH_ADDRESS", ""))
    declared = deployed.workload.ports
    if listens != wanted:
        yield f"TENANTRY_LISTEN_ADDRESS has port {listens}, {deployed.service.settings.__name__} has {wanted}"
    if declared.get("grpc") != wanted:
        yield f"container port grpc is {declared.get('grpc')}, {deployed.service.settings.__name__} listens on {wanted}"
    if not health or declared.get("health") != health:
        yield f"container port health is {declared.get('health')}, TENANTRY_HEALTH_ADDRESS has {health}"
    if declared.keys() != {"grpc", "health"}:
        yield f"container ports are {sorted(declared)}, expected grpc and health"


def probes(deployed: Deployed) -> Iterator[str]:
    """Yields probes that are missing, not gRPC, on another port than health, or of a service the server does not register."""
    health = port_of(deployed.workload.literals.get("TENANTRY_HEALTH_ADDRESS", ""))
    for name in _PROBES:
        probe = tree(deployed.workload.container, name, "grpc")
        if not probe:
            yield f"{name} is no gRPC probe"
            continue
        if number(probe, "port") != health:
            yield f"{name} asks port {number(probe, 'port')}, health is on {health}"
        asked = text(probe, "service")
        if asked and asked not in deployed.service.registered:
            yield f"{name} asks for {asked}, which the server does not register"


def certificates(deployed: Deployed) -> Iterator[str]:
    """Yields TLS files that are not in the mounted Secret of this service."""
    wanted = f"{deployed.service.name}-tls"
    volumes = {text(item, "name"): text(item, "secret", "secretName") for item in trees(deployed.workload.pod, "volumes")}
    mounts = {text(item, "mountPath"): volumes.get(text(item, "name"), "") for item in trees(deployed.workload.container, "volumeMounts")}
    for field, key in (("TLS_CERT_FILE", "tls.crt"), ("TLS_KEY_FILE", "tls.key"), ("TLS_CA_FILE", "ca.crt")):
        directory, _, file_name = deployed.workload.literals.get(f"TENANTRY_{field}", "").rpartition("/")
        if mounts.get(directory) != wanted or file_name != key:
            yield f"TENANTRY_{field} is not {key} of Secret {wanted}"


def addresses(deployed: Deployed, allowed_peers: frozenset[str]) -> Iterator[str]:
    """Yields addresses of peers that lead elsewhere than to their headless Service, and peers no contract lets it call."""
    if deployed.service.peers != allowed_peers:
        odd = sorted(deployed.service.peers ^ allowed_peers)
        yield f"settings and contracts disagree about calls to {odd}"
    for peer in sorted(deployed.service.peers & deployed.services.keys()):
        wanted = f"dns:///{peer}.{_NAMESPACE}.svc.cluster.local:{deployed.services[peer].port}"
        found = deployed.workload.literals.get(f"TENANTRY_{peer.upper()}_ADDRESS", "")
        if found != wanted:
            yield f"TENANTRY_{peer.upper()}_ADDRESS is {found or '(none)'}, expected {wanted}"


def headless(deployed: Deployed) -> Iterator[str]:
    """Yields a Service that is missing, has an address of its own, selects other pods, or forwards to another port."""
    name = deployed.service.name
    service = deployed.manifests.named("Service", name)
    selector = labels(service, "spec", "selector")
    if text(service, "spec", "clusterIP") != "None":
        yield f"Service {name} is not headless"
    matched = [item.name for item in deployed.manifests.workloads() if selector and selects(selector, item.labels)]
    if matched != [name]:
        yield f"Service {name} selects the pods of {matched}"
    found = [(number(item, "port"), text(item, "targetPort")) for item in trees(service, "spec", "ports")]
    if found != [(deployed.service.port, "grpc")]:
        yield f"Service {name} has ports {found}, expected {deployed.service.port} to grpc"


def disruption(deployed: Deployed) -> Iterator[str]:
    """Yields a PodDisruptionBudget that is missing, selects other pods, or lets none go."""
    budget = deployed.manifests.named("PodDisruptionBudget", deployed.service.name)
    selector = labels(budget, "spec", "selector", "matchLabels")
    if not selector or [item.name for item in deployed.manifests.workloads() if selects(selector, item.labels)] != [deployed.service.name]:
        yield "the PodDisruptionBudget does not select exactly the service's pods"
    if text(budget, "spec", "maxUnavailable") != "1":
        yield "the PodDisruptionBudget does not say maxUnavailable: 1"


def ends(deployed: Deployed) -> Iterator[str]:
    """Yields a pod's end that would cut a call: too short a grace period, drain or endpoint removal."""
    try:
        settings = deployed.settings()
    except ValidationError:
        yield "unknown while the settings are refused"
        return
    container = deployed.workload.container
    hook = number(container, "lifecycle", "preStop", "sleep", "seconds")
    if tree(container, "lifecycle") and not hook:
        yield "the lifecycle hook's length is unknown: use TENANTRY_ENDPOINT_REMOVAL_SECONDS"
    removal = settings.endpoint_removal_seconds + hook
    if removal < _LEAST_REMOVAL_SECONDS:
        yield f"the pod stops listening {removal:g} s after it is told to end, before clients know"
    longest = longest_stream_seconds(settings)
    if settings.drain_seconds <= longest:
        yield f"draining takes {settings.drain_seconds:g} s, a call may take {longest:g} s"
    grace = number(deployed.workload.pod, "terminationGracePeriodSeconds")
    needed = removal + settings.drain_seconds + _CLOSING_SECONDS
    if grace < needed:
        yield f"terminationGracePeriodSeconds is {grace}, ending takes up to {needed:g} s"


def telemetry(deployed: Deployed) -> Iterator[str]:
    """Yields an OTLP endpoint the exporter would not reach: beyond loopback it speaks TLS and must be told the port."""
    endpoint = deployed.workload.literals.get("TENANTRY_OTLP_ENDPOINT", "")
    if endpoint and (not endpoint.startswith("https://") or not port_of(endpoint)):
        yield f"TENANTRY_OTLP_ENDPOINT is {endpoint}, expected https://host:port"
