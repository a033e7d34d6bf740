"""The check is green for the manifests as they are, and red, by name, for each way of spoiling them."""

from pathlib import Path

import pytest

from deploy.check.__main__ import main
from deploy.check.checks import run
from deploy.check.tools import Tools
from tests.deploy.spoilings import SPOILINGS


def lines_until(tools: Tools, k8s: Path, *wanted: str) -> list[str]:
    """Returns the base's failed checks, up to the first line that holds all of `wanted`; raises when there is none."""
    lines: list[str] = []
    for result in run(tools, k8s, ("base",)):
        if result.problems:
            lines.append(result.line())
            if all(words in lines[-1] for words in wanted):
                return lines
    raise AssertionError(f"no failed check says {wanted}: {lines}")


def test_k8s_check_is_green(tools: Tools, capsys: pytest.CaptureFixture[str]) -> None:
    """The manifests build, are valid in every vendored version of Kubernetes, and agree with the code."""
    assert tools
    assert main([]) == 0
    assert capsys.readouterr().out.endswith(" passed, 0 failed\n")


@pytest.mark.parametrize("name", SPOILINGS)
def test_spoiled_manifest_is_refused_by_name(name: str, tools: Tools, k8s: Path) -> None:
    """Each way of spoiling a manifest turns the check of that fact red, and the check says what is wrong."""
    spoiling = SPOILINGS[name]
    path = k8s / spoiling.file
    assert spoiling.old in path.read_text()
    path.write_text(path.read_text().replace(spoiling.old, spoiling.new))
    lines_until(tools, k8s, spoiling.check, spoiling.says)


def test_contained_secret_is_refused(tools: Tools, k8s: Path) -> None:
    """A Secret in the manifests fails twice: it has no schema here, and it is named as contained."""
    network = k8s / "base" / "network.yaml"
    network.write_text(network.read_text() + "---\napiVersion: v1\nkind: Secret\nmetadata:\n  name: tenant-settings\nstringData: {}\n")
    lines = lines_until(tools, k8s, "Secret tenant-settings is contained")
    assert any("valid in Kubernetes" in line and "Secret" in line for line in lines)


def test_overlay_is_checked_like_the_base(tools: Tools, k8s: Path) -> None:
    """What an overlay spoils turns the overlay's own check red and leaves the base's green."""
    patch = k8s / "overlays" / "dev" / "deployment.yaml"
    patch.write_text(patch.read_text().replace("TENANTRY_LOG_LEVEL", "TENANTRY_LOGLEVEL"))
    failed = [result.name for result in run(tools, k8s) if result.problems]
    assert failed
    assert all(name.startswith("overlays/dev: ") and name.endswith("environment names are settings") for name in failed)


def test_check_without_tools_says_how_to_get_them(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Without its tools the check names the target that installs them; it exits 3, and 1 where skipping would be a lie."""
    monkeypatch.setattr("deploy.check.tools.ROOT", tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CI", raising=False)
    assert main([]) == 3
    assert "run `make tools`" in capsys.readouterr().out
    assert main(["--require-tools"]) == 1
    monkeypatch.setenv("CI", "true")
    assert main([]) == 1
