"""Every check, in order. One result a check; a check that fails names each problem it found."""

import tomllib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from deploy.check import dockerfile, network, pods, serving
from deploy.check.manifests import Manifests, Workload, by_name, name_of, parse, text
from deploy.check.mesh import ROOT, Service, edges, services_of_code
from deploy.check.serving import Deployed
from deploy.check.tools import BuildFailed, Tools, schema_versions

DEPLOY = ROOT / "deploy"
K8S = DEPLOY / "k8s"
# The base is what production takes; an overlay may lower replicas and name another tag.
KUSTOMIZATIONS = ("base", "overlays/dev")
_CLUSTER_WIDE = frozenset({"Namespace"})

Problems = Callable[[], Iterable[str]]


@dataclass(frozen=True, slots=True)
class Result:
    """One check and what it found."""

    name: str
    problems: tuple[str, ...]

    def line(self) -> str:
        """Returns the result in one line."""
        return f"FAIL {self.name}: {'; '.join(self.problems)}" if self.problems else f"ok   {self.name}"


def run(tools: Tools, k8s: Path = K8S, kustomizations: Iterable[str] = KUSTOMIZATIONS) -> Iterator[Result]:
    """Yields every result for the manifests below `k8s`."""
    services, versions = services_of_code(), schema_versions()
    yield _result("image", _image)
    yield Result("schemas of Kubernetes are here", () if versions else ("run python -m deploy.check.vendor_schemas",))
    for kustomization in kustomizations:
        try:
            built = tools.build(k8s / kustomization)
        except BuildFailed as error:
            yield Result(f"{kustomization}: kustomize builds it", (str(error),))
            continue
        yield Result(f"{kustomization}: kustomize builds it", ())
        for version in versions:
            yield _result(f"{kustomization}: every object is valid in Kubernetes {version}", partial(tools.invalid, built, version))
        for name, problems in semantic_checks(parse(built), services, production=kustomization == "base"):
            yield _result(f"{kustomization}: {name}", problems)


def semantic_checks(manifests: Manifests, services: dict[str, Service], *, production: bool) -> Iterator[tuple[str, Problems]]:
    """Yields each check that holds the manifests against the code."""
    deployments, jobs = by_name(manifests.workloads("Deployment")), by_name(manifests.workloads("Job"))
    migrated = {f"{name}-migration": service for name, service in services.items() if service.has_schema}
    yield "every service is deployed, and nothing else", lambda: _same(deployments.keys(), services.keys(), "Deployment")
    yield "every schema has its migration", lambda: _same(jobs.keys(), migrated.keys(), "Job")
    yield "every object is in the namespace, and none is a Secret", lambda: _placed(manifests)
    yield "default-deny isolates every pod", lambda: network.default_deny(manifests)
    for name in sorted(deployments.keys() & services.keys()):
        deployed = Deployed(services[name], deployments[name], manifests, services)
        for title, problems in (*_pod_checks(deployments[name], manifests, name, production), *_service_checks(deployed, production)):
            yield f"{name}: {title}", problems
    for name in sorted(jobs.keys() & migrated.keys()):
        for title, problems in (
            *_pod_checks(jobs[name], manifests, "migration", production),
            *_job_checks(migrated[name], jobs[name], manifests),
        ):
            yield f"{name}: {title}", problems


def _pod_checks(workload: Workload, manifests: Manifests, account: str, production: bool) -> Iterator[tuple[str, Problems]]:
    tag = _project_version() if production else None
    yield "pod is restricted, with a read-only root", lambda: pods.restricted(workload)
    yield "requests and limits are set", lambda: pods.limited(workload)
    yield "image has a fixed tag", lambda: pods.pinned(workload, tag)
    yield "mounts have their volumes", lambda: pods.mounted(workload)
    yield "service account is its own and has no token", lambda: pods.tokenless(workload, manifests, account)


def _service_checks(deployed: Deployed, production: bool) -> Iterator[tuple[str, Problems]]:
    service, workload, manifests = deployed.service, deployed.workload, deployed.manifests
    all_edges = edges(deployed.services.values())
    callees = frozenset(callee for caller, callee in all_edges if caller == service.name)
    yield "runs its own module", lambda: pods.runs(workload, service, "serve")
    yield "replicas", lambda: ["fewer than 2 replicas"] if production and workload.replicas < 2 else []
    yield "ports are those of the settings", lambda: serving.ports(deployed)
    yield "probes ask the health port for a registered service", lambda: serving.probes(deployed)
    yield "environment names are settings", lambda: pods.known_names(workload, service)
    yield "required settings are given", lambda: pods.required_names(workload, service.required_fields())
    yield "secrets are named, not contained", lambda: pods.secret_names(workload, service, migration=False)
    yield "settings accept the environment", lambda: serving.starts(deployed)
    yield "certificates are mounted", lambda: serving.certificates(deployed)
    yield "peers' addresses lead to their Services", lambda: serving.addresses(deployed, callees)
    yield "traces go out by TLS", lambda: serving.telemetry(deployed)
    yield "a pod's end cuts no call", lambda: serving.ends(deployed)
    yield "headless Service selects its pods", lambda: serving.headless(deployed)
    yield "disruption budget selects its pods", lambda: serving.disruption(deployed)
    yield "pods are spread", lambda: pods.spread(workload)
    into = network.expected_ingress(service, all_edges, workload)
    yield "ingress is what the contracts allow", lambda: network.difference("ingress", network.ingress(manifests, workload), into)
    out = network.expected_egress(service, all_edges, deployed.services, workload)
    yield "egress is what the contracts and settings need", lambda: network.difference("egress", network.egress(manifests, workload), out)


def _job_checks(service: Service, job: Workload, manifests: Manifests) -> Iterator[tuple[str, Problems]]:
    yield "runs its own module", lambda: pods.runs(job, service, "migrate")
    yield "environment names are settings", lambda: pods.known_names(job, service)
    yield "required settings are given", lambda: pods.required_names(job, service.dsn_fields)
    yield "secrets are named, not contained", lambda: pods.secret_names(job, service, migration=True)
    yield "nothing comes in", lambda: network.difference("ingress", network.ingress(manifests, job), frozenset())
    out = network.expected_migration_egress()
    yield "only Postgres is reached", lambda: network.difference("egress", network.egress(manifests, job), out)


def _placed(manifests: Manifests) -> Iterator[str]:
    known = {name_of(item) for item in manifests.of("Namespace")}
    for item in manifests.objects:
        namespace = text(item, "metadata", "namespace")
        if text(item, "kind") not in _CLUSTER_WIDE and namespace not in known:
            yield f"{text(item, 'kind')} {name_of(item)} is in namespace {namespace or '(none)'}"
        if text(item, "kind") == "Secret":
            yield f"Secret {name_of(item)} is contained"


def _same(found: Iterable[str], wanted: Iterable[str], kind: str) -> Iterator[str]:
    for name in sorted(set(wanted) - set(found)):
        yield f"there is no {kind} {name}"
    for name in sorted(set(found) - set(wanted)):
        yield f"{kind} {name} belongs to no service"


def _image() -> Iterator[str]:
    source = (DEPLOY / "Dockerfile").read_text()
    return dockerfile.problems(source, (DEPLOY / "Dockerfile.dockerignore").read_text(), ROOT)


def _project_version() -> str:
    return str(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"])


def _result(name: str, problems: Problems) -> Result:
    return Result(name, tuple(problems()))
