"""What holds for every pod, a service's or a migration's: restricted, limited, pinned, and without a token of the cluster."""

import re
from collections.abc import Iterator

from deploy.check.manifests import Manifests, Tree, Workload, labels, text, texts, tree, trees, value
from deploy.check.mesh import LOOPBACK_ONLY, MIGRATIONS_ONLY, PREFIX, Service, environment_name, field_of

_SCRATCH = "/tmp"  # noqa: S108 - the container's own
_PASSWORD_IN_URL = re.compile(r"://[^/@\s]*:[^/@\s]+@")


def restricted(workload: Workload) -> Iterator[str]:
    """Yields what the `restricted` Pod Security Standard, or a read-only root, misses."""
    pod = tree(workload.pod, "securityContext")
    user = value(pod, "runAsUser")
    if value(pod, "runAsNonRoot") is not True or not isinstance(user, int) or user == 0:
        yield "the pod may run as root: set runAsNonRoot and a numeric runAsUser"
    if text(pod, "seccompProfile", "type") != "RuntimeDefault":
        yield "seccompProfile is not RuntimeDefault"
    for name in ("hostNetwork", "hostPID", "hostIPC"):
        if value(workload.pod, name):
            yield f"{name} is on"
    for volume in trees(workload.pod, "volumes"):
        if "hostPath" in volume:
            yield f"volume {text(volume, 'name')} is a path of the node"
    for container in workload.containers:
        yield from _confined(container)


def _confined(container: Tree) -> Iterator[str]:
    name = text(container, "name")
    context = tree(container, "securityContext")
    if value(context, "allowPrivilegeEscalation") is not False or value(context, "privileged"):
        yield f"container {name} may gain privileges: set allowPrivilegeEscalation false"
    if value(context, "readOnlyRootFilesystem") is not True:
        yield f"container {name} may write its root: set readOnlyRootFilesystem"
    if texts(context, "capabilities", "drop") != ["ALL"] or texts(context, "capabilities", "add"):
        yield f"container {name} keeps capabilities: drop ALL and add none"
    if any(value(context, key) in (0, False) for key in ("runAsUser", "runAsNonRoot")):
        yield f"container {name} overrides the pod's user"


def limited(workload: Workload) -> Iterator[str]:
    """Yields containers without requests and limits of both cpu and memory."""
    for container in workload.containers:
        for kind in ("requests", "limits"):
            for resource in ("cpu", "memory"):
                if not text(container, "resources", kind, resource):
                    yield f"container {text(container, 'name')} has no {resource} in {kind}"


def pinned(workload: Workload, wanted_tag: str | None) -> Iterator[str]:
    """Yields images without a tag, with `latest`, or with another tag than the wanted one."""
    for container in workload.containers:
        image = text(container, "image")
        _, separator, tag = image.rpartition("/")[2].partition(":")
        if not separator or tag == "latest":
            yield f"image {image or '(none)'} has no fixed tag"
        elif wanted_tag is not None and tag != wanted_tag:
            yield f"image {image} is not the project's version {wanted_tag}"


def mounted(workload: Workload) -> Iterator[str]:
    """Yields mounts without a volume, and a root without a /tmp one may write to."""
    volumes = {text(volume, "name"): volume for volume in trees(workload.pod, "volumes")}
    mounts = {text(mount, "mountPath"): text(mount, "name") for mount in trees(workload.container, "volumeMounts")}
    for path, name in mounts.items():
        if name not in volumes:
            yield f"{path} mounts {name}, which is no volume of the pod"
    if "emptyDir" not in volumes.get(mounts.get(_SCRATCH, ""), {}):
        yield f"{_SCRATCH} is no emptyDir, and the root is read-only"


def tokenless(workload: Workload, manifests: Manifests, wanted_account: str) -> Iterator[str]:
    """Yields another service account than the wanted one, a missing one, and a mounted token."""
    account = text(workload.pod, "serviceAccountName")
    if account != wanted_account:
        yield f"serviceAccountName is {account or '(none)'}, expected {wanted_account}"
    if not manifests.named("ServiceAccount", account):
        yield f"ServiceAccount {account or '(none)'} is not in the manifests"
    if value(workload.pod, "automountServiceAccountToken") is not False:
        yield "the account's token is mounted: set automountServiceAccountToken false"


def runs(workload: Workload, service: Service, command: str) -> Iterator[str]:
    """Yields arguments that are not this service's command, and labels its selector does not match."""
    wanted = [f"services.{service.name}", command]
    if texts(workload.container, "args") != wanted:
        yield f"args are {texts(workload.container, 'args')}, expected {wanted}"
    if len(workload.containers) != 1:
        yield f"{len(workload.containers)} containers, expected one named service"
    if workload.labels.get("app.kubernetes.io/name") != service.name:
        yield f"the pods are not labelled app.kubernetes.io/name: {service.name}"
    if workload.selector and not labels_hold(workload):
        yield "the selector does not match the pods' labels"


def labels_hold(workload: Workload) -> bool:
    """Tells whether the workload selects its own pods."""
    return workload.selector.items() <= workload.labels.items()


def known_names(workload: Workload, service: Service) -> Iterator[str]:
    """Yields TENANTRY_ names that no setting of the service reads, and names given twice."""
    names = [text(item, "name") for item in trees(workload.container, "env")]
    for name in sorted({name for name in names if names.count(name) > 1}):
        yield f"{name} is given twice"
    for name in names:
        if name.startswith(PREFIX) and (field_of(name) not in service.fields or environment_name(field_of(name)) != name):
            yield f"{name} is no setting of {service.settings.__name__}"
    if trees(workload.container, "envFrom"):
        yield "envFrom hides which settings are given: name each"


def required_names(workload: Workload, required: frozenset[str]) -> Iterator[str]:
    """Yields settings that must be given and are not."""
    given = workload.secrets.keys() | {name for name, literal in workload.literals.items() if literal}
    for name in sorted(environment_name(field) for field in required):
        if name not in given:
            yield f"{name} is not set"


def secret_names(workload: Workload, service: Service, *, migration: bool) -> Iterator[str]:
    """Yields secrets written into the manifest, and secrets that have no business in this pod."""
    for name, literal in workload.literals.items():
        if field_of(name) in service.secret_fields or _PASSWORD_IN_URL.search(literal):
            yield f"{name} is written in the manifest: take it from a Secret"
    forbidden = LOOPBACK_ONLY if migration else LOOPBACK_ONLY | MIGRATIONS_ONLY
    for name in sorted(workload.literals.keys() | workload.secrets.keys()):
        if field_of(name) in forbidden:
            yield f"{name} does not belong in a {workload.kind}"
    for name, source in workload.secrets.items():
        wanted = f"{service.name}-migration" if field_of(name) in MIGRATIONS_ONLY else f"{service.name}-settings"
        key = field_of(name).replace("_", "-")
        if (source.secret, source.key) != (wanted, key):
            yield f"{name} comes from {source.secret}/{source.key}, expected {wanted}/{key}"


def spread(workload: Workload) -> Iterator[str]:
    """Yields the absence of a spread over nodes, and spreads that count other pods."""
    constraints = trees(workload.pod, "topologySpreadConstraints")
    if not any(text(item, "topologyKey") == "kubernetes.io/hostname" for item in constraints):
        yield "the pods are not spread over nodes"
    for item in constraints:
        selector = labels(item, "labelSelector", "matchLabels")
        if not selector or not selector.items() <= workload.labels.items():
            yield f"the spread over {text(item, 'topologyKey')} does not select the pods"
