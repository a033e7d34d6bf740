"""Built manifests as values: objects by kind and name, and the pods they make. Absent parts are empty, never an exception."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import yaml

Tree = Mapping[str, object]
_EMPTY: Tree = {}


@dataclass(frozen=True, slots=True)
class SecretKey:
    """One key of a Secret, named by an environment variable."""

    secret: str
    key: str


@dataclass(frozen=True, slots=True)
class Workload:
    """A Deployment or Job, seen as the pods it makes."""

    kind: str
    name: str
    labels: Mapping[str, str]
    selector: Mapping[str, str]
    replicas: int
    pod: Tree

    @property
    def containers(self) -> Sequence[Tree]:
        """All containers, those of the start first."""
        return [*trees(self.pod, "initContainers"), *trees(self.pod, "containers")]

    @property
    def container(self) -> Tree:
        """The one that runs the service."""
        return next((item for item in trees(self.pod, "containers") if item.get("name") == "service"), _EMPTY)

    @property
    def literals(self) -> dict[str, str]:
        """The environment as written in the manifest."""
        return {text(item, "name"): text(item, "value") for item in trees(self.container, "env") if "value" in item}

    @property
    def secrets(self) -> dict[str, SecretKey]:
        """The environment that comes from Secrets."""
        references = ((text(item, "name"), tree(item, "valueFrom", "secretKeyRef")) for item in trees(self.container, "env"))
        return {name: SecretKey(text(at, "name"), text(at, "key")) for name, at in references if at}

    @property
    def ports(self) -> dict[str, int]:
        """Container ports by name."""
        return {text(item, "name"): number(item, "containerPort") for item in trees(self.container, "ports")}


@dataclass(frozen=True, slots=True)
class Manifests:
    """Everything one kustomization builds."""

    objects: tuple[Tree, ...]

    def of(self, kind: str) -> list[Tree]:
        """Returns the objects of a kind."""
        return [item for item in self.objects if item.get("kind") == kind]

    def named(self, kind: str, name: str) -> Tree:
        """Returns one object, or an empty one."""
        return next((item for item in self.of(kind) if name_of(item) == name), _EMPTY)

    def workloads(self, kind: str | None = None) -> list[Workload]:
        """Returns the Deployments and Jobs."""
        kinds = ("Deployment", "Job") if kind is None else (kind,)
        return [_workload(item) for wanted in kinds for item in self.of(wanted)]


def parse(built: str) -> Manifests:
    """Reads kustomize's output."""
    documents = (item for item in yaml.safe_load_all(built) if item is not None)
    return Manifests(tuple(item for item in documents if isinstance(item, dict)))


def name_of(item: Tree) -> str:
    """Returns the object's name."""
    return text(item, "metadata", "name")


def value(item: object, *path: str) -> object:
    """Returns what lies at the path, or None."""
    for key in path:
        item = item.get(key) if isinstance(item, Mapping) else None
    return item


def tree(item: object, *path: str) -> Tree:
    """Returns the mapping at the path, or an empty one."""
    found = value(item, *path)
    return found if isinstance(found, Mapping) else _EMPTY


def trees(item: object, *path: str) -> list[Tree]:
    """Returns the mappings listed at the path."""
    found = value(item, *path)
    return [entry for entry in found if isinstance(entry, Mapping)] if isinstance(found, list) else []


def texts(item: object, *path: str) -> list[str]:
    """Returns the texts listed at the path."""
    found = value(item, *path)
    return [str(entry) for entry in found] if isinstance(found, list) else []


def text(item: object, *path: str) -> str:
    """Returns the scalar at the path as text, or nothing."""
    found = value(item, *path)
    return "" if found is None else str(found)


def number(item: object, *path: str) -> int:
    """Returns the integer at the path, or 0."""
    found = value(item, *path)
    return found if isinstance(found, int) else 0


def labels(item: object, *path: str) -> dict[str, str]:
    """Returns the labels at the path."""
    return {str(key): str(label) for key, label in tree(item, *path).items()}


def selects(selector: Mapping[str, str], pod_labels: Mapping[str, str]) -> bool:
    """Tells whether pods with these labels match; an empty selector matches all."""
    return selector.items() <= pod_labels.items()


def by_name(workloads: Iterable[Workload]) -> dict[str, Workload]:
    """Indexes workloads."""
    return {workload.name: workload for workload in workloads}


def _workload(item: Tree) -> Workload:
    template = tree(item, "spec", "template")
    return Workload(
        kind=text(item, "kind"),
        name=name_of(item),
        labels=labels(template, "metadata", "labels"),
        selector=labels(item, "spec", "selector", "matchLabels"),
        replicas=number(item, "spec", "replicas"),
        pod=tree(template, "spec"),
    )
