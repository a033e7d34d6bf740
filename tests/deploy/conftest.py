"""The tools of the check, or the reason why its tests are skipped."""

import shutil
from pathlib import Path

import pytest

from deploy.check.checks import K8S
from deploy.check.tools import ToolMissing, Tools, find_tools


@pytest.fixture(scope="session")
def tools() -> Tools:
    """Kustomize and kubeconform."""
    try:
        return find_tools()
    except ToolMissing as error:
        pytest.skip(str(error))


@pytest.fixture
def k8s(tmp_path: Path) -> Path:
    """A copy of the manifests that a test may spoil."""
    return Path(shutil.copytree(K8S, tmp_path / "k8s"))
