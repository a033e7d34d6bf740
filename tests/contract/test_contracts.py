"""What every contract promises: a policy for each method, words for each name, and reasons that are really given."""

import ast
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from google.protobuf.descriptor import MethodDescriptor

from mesh.common.v1 import error_reason_pb2, policy_pb2
from services.kernel.migrate import read_migrations
from services.tenant.scopes import OPERATOR_SCOPES, TENANT_SCOPES
from tests.contract.contracts import files, methods, services

ROOT = Path(__file__).parents[2]
CALLERS = {"external", "tenant", "ratelimit", "inference", "retrieval", "metering"}


@pytest.mark.parametrize("method", list(methods()), ids=lambda method: method.full_name)
def test_every_method_says_who_may_call_it(method: MethodDescriptor) -> None:
    """A method has a tenant requirement, known callers, and scopes whenever outsiders may call it."""
    policy = method.GetOptions().Extensions[policy_pb2.policy]
    assert policy.tenant != policy_pb2.TENANT_REQUIREMENT_UNSPECIFIED
    assert policy.callers
    assert set(policy.callers) <= CALLERS
    assert set(policy.scopes) <= set(TENANT_SCOPES) | set(OPERATOR_SCOPES)
    assert bool(policy.scopes) == ("external" in policy.callers)


def test_every_service_is_served_by_its_own_app() -> None:
    """Each service's composition root registers every rpc service of its package, and the lifecycle."""
    for name in ("tenant", "ratelimit", "inference", "retrieval", "metering"):
        root = ROOT / "services" / name / "app"
        modules = sorted(root.glob("*.py")) if root.is_dir() else [root.with_suffix(".py")]
        app = "\n".join(module.read_text() for module in modules)
        for service in services():
            if service.file.package == f"mesh.{name}.v1":
                assert f"add_{service.name}Servicer_to_server" in app, service.full_name
        assert "add_TenantLifecycleServiceServicer_to_server" in app, name


@pytest.mark.parametrize("reason", [name for name, number in error_reason_pb2.ErrorReason.items() if number], ids=str)
def test_every_error_reason_is_raised_somewhere(reason: str) -> None:
    """A reason that no code gives is a promise nobody keeps."""
    assert reason in reasons_given()


@cache
def reasons_given() -> frozenset[str]:
    """Every error reason that stands in the services' code, comments and texts aside."""
    found: set[str] = set()
    for path in (ROOT / "services").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute | ast.Name):
                found.add(node.attr if isinstance(node, ast.Attribute) else node.id)
            elif isinstance(node, ast.ImportFrom):
                found |= {alias.name for alias in node.names}
    return frozenset(found)


def test_every_comment_states_a_fact() -> None:
    """Each error reason's comment names its status code and its metadata."""
    text = (ROOT / "protos/mesh/common/v1/error_reason.proto").read_text()
    for number in error_reason_pb2.ErrorReason.values():
        if number:
            name = error_reason_pb2.ErrorReason.Name(number)
            comment = text[: text.index(f"  {name} =")].rsplit("\n  ERROR_REASON_", 1)[-1]
            assert re.search(r"// [A-Z_]+[.,]", comment), name
            assert "{" in comment or "Metadata as" in comment, name


def test_stubs_match_their_contracts(tmp_path: Path) -> None:
    """Generating again gives exactly the stubs that are checked in."""
    protos = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "protos/mesh").rglob("*.proto"))
    command = [sys.executable, "-m", "grpc_tools.protoc", "-I", "protos", "-I", "protos/third_party"]
    subprocess.run([*command, f"--python_out={tmp_path}", f"--grpc_python_out={tmp_path}", *protos], cwd=ROOT, check=True)
    for made in tmp_path.rglob("*.py"):
        kept = ROOT / "protos/gen" / made.relative_to(tmp_path)
        assert kept.read_text() == made.read_text(), kept.name
    assert len(list(files())) == len(protos)


@pytest.mark.parametrize("name", ["tenant", "inference", "retrieval", "metering"])
def test_migrations_are_numbered_without_gaps(name: str) -> None:
    """Each service's migrations run 0001, 0002, … and can be read."""
    assert read_migrations(ROOT / "services" / name / "migrations")
