"""kustomize and kubeconform, from .tools or the PATH. Nothing is fetched: the schemas lie beside this file."""

import json
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from deploy.check.mesh import ROOT

SCHEMAS = Path(__file__).parent / "schemas"
_LOCATION = "{{.NormalizedKubernetesVersion}}/{{.ResourceKind}}{{.KindSuffix}}.json"
_LIMIT_SECONDS = 60


class ToolMissing(Exception):
    """A tool is not installed; the message says how to get it."""


class BuildFailed(Exception):
    """kustomize refused; the message is its own."""


@dataclass(frozen=True, slots=True)
class Tools:
    """Where the two are."""

    kustomize: str
    kubeconform: str

    def build(self, kustomization: Path) -> str:
        """Returns the objects of a kustomization as YAML. Raises: BuildFailed."""
        done = _run([self.kustomize, "build", str(kustomization)])
        if done.returncode != 0:
            raise BuildFailed(" ".join(done.stderr.split()))
        return done.stdout

    def invalid(self, built: str, kubernetes_version: str) -> Iterator[str]:
        """Yields the objects that are not valid in this version: unknown kinds, unknown or wrong fields."""
        command = [self.kubeconform, "-strict", "-output", "json", "-summary", "-kubernetes-version", kubernetes_version.removeprefix("v")]
        done = _run([*command, "-schema-location", f"{SCHEMAS}/{_LOCATION}", "-"], built)
        try:
            report = json.loads(done.stdout)
        except ValueError:
            yield f"kubeconform answered {done.returncode}: {done.stderr.strip()}"
            return
        for item in report["resources"] or ():
            message = " ".join(str(item["msg"]).split()).partition("json#' - ")
            yield f"{item['kind']} {item['name']}: {message[2] or message[0]}"
        judged = sum(report["summary"][outcome] for outcome in ("valid", "invalid", "errors"))
        # A validator that skips what it does not know is green for everything.
        if judged != 1 + built.count("\n---\n"):
            yield f"not every object was looked at: {report['summary']}"


def find_tools() -> Tools:
    """Finds both. Raises: ToolMissing."""
    return Tools(_find("kustomize"), _find("kubeconform"))


def schema_versions() -> list[str]:
    """Returns the Kubernetes versions whose schemas are here, oldest first."""
    return sorted((path.name for path in SCHEMAS.glob("v*")), key=lambda name: [int(part) for part in name[1:].split(".")])


def _find(name: str) -> str:
    own = ROOT / ".tools" / name
    found = str(own) if own.is_file() else shutil.which(name)
    if found is None:
        raise ToolMissing(f"{name} is not installed: run `make tools`, which needs Go")
    return found


def _run(command: list[str], given: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, input=given, capture_output=True, text=True, timeout=_LIMIT_SECONDS, check=False)  # noqa: S603 - no shell
