"""The house rules that a machine can hold."""

import ast
import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROOMS = ("services", "devstack", "bench", "deploy")
LONGEST_FILE = 400
LONGEST_FUNCTION = 45
UNFINISHED = re.compile(r"\b(TODO|FIXME|XXX|HACK)\b|NotImplementedError")
SQL = re.compile(r"^\s*(SELECT|INSERT|UPDATE|DELETE|WITH)\b", re.IGNORECASE)
# Reference data of all tenants: nothing in them belongs to one.
# Reference data, and the catalog's lists of schemas, databases and roles.
SHARED_TABLES = {
    "plans",
    "plan_versions",
    "plan_catalogs",
    "plan_features",
    "flags",
    "flag_changes",
    "change_turn",
    "prices",
    "price_versions",
    "billing_plan_versions",
    "event_types",
    "reconciliations",
    "reconciliation_lines",
    "export_sinks",
    "stripe_meters",
    "schema_migrations",
    "pg_namespace",
    "pg_database",
    "pg_roles",
}


def sources() -> Iterator[Path]:
    """Every Python file of the product and its tools."""
    for room in ROOMS:
        yield from sorted((ROOT / room).rglob("*.py"))


@pytest.mark.parametrize("path", list(sources()), ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_hold_one_idea(path: Path) -> None:
    """No file over 400 lines, no function over 45, a docstring on every module that says something, nothing left for later."""
    text = path.read_text()
    tree = ast.parse(text)
    assert text.count("\n") <= LONGEST_FILE
    assert not text.strip() or ast.get_docstring(tree), "a module says what it owns"
    assert not UNFINISHED.search(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert (node.end_lineno or 0) - node.lineno < LONGEST_FUNCTION, node.name


DRIVERS = {"grpc", "asyncpg", "redis", "qdrant_client", "anthropic"}
ROOTS = {"app.py", "settings.py", "__main__.py", "__init__.py"}


def nouns() -> Iterator[Path]:
    """The rules of each service: what stands beside its app or in rooms of their own, not in its adapters or servicers."""
    for path in sorted((ROOT / "services").glob("*/**/*.py")):
        service, *rooms = path.relative_to(ROOT / "services").parts[:-1]
        if service != "kernel" and path.name not in ROOTS and not {"adapters", "servicers", "app"} & set(rooms):
            yield path


def imports(path: Path) -> set[str]:
    """Every module a file imports, by full name."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports name the whole path"
            found |= {str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


@pytest.mark.parametrize("path", list(nouns()), ids=lambda path: str(path.relative_to(ROOT)))
def test_rules_know_no_driver_and_nobody_above_them(path: Path) -> None:
    """A rule imports neither a driver nor its service's adapters, servicers, app or settings."""
    service = f"services.{path.relative_to(ROOT / 'services').parts[0]}"
    above = {f"{service}.{name}" for name in ("adapters", "servicers", "app", "settings")}
    for name in imports(path):
        assert name.split(".")[0] not in DRIVERS, name
        assert not any(name == module or name.startswith(f"{module}.") for module in above), name


def is_app(path: Path) -> bool:
    """A composition root: app.py, or the rooms of a package of that name."""
    return path.name == "app.py" or path.parent.name == "app"


def test_only_apps_read_settings_and_build_adapters() -> None:
    """A service's settings and adapters are imported by its app (and its command line) alone, or by adapters themselves."""
    for path in sorted((ROOT / "services").glob("*/**/*.py")):
        service = path.relative_to(ROOT / "services").parts[0]
        if service == "kernel":
            continue
        for name in imports(path):
            if name == f"services.{service}.settings":
                assert is_app(path) or path.name == "__main__.py", path
            if name.startswith(f"services.{service}.adapters"):
                assert is_app(path) or "adapters" in path.parts, path


@cache
def statements() -> dict[str, str]:
    """Every SQL constant of the services' adapters, whole, by module and name; fragments begin with an underscore."""
    found = {}
    for path in sorted((ROOT / "services").glob("*/adapters/**/*.py")):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for name, value in vars(importlib.import_module(module)).items():
            if name.isupper() and not name.startswith("_") and isinstance(value, str) and SQL.match(value):
                found[f"{module}:{name}"] = value
    return found


@cache
def own_functions() -> set[str]:
    """The names of the functions that migrations make: statements call them without a schema where a tenant may have its own."""
    files = (ROOT / "services").glob("*/migrations/*.sql")
    return {name for path in files for name in re.findall(r"CREATE (?:OR REPLACE )?FUNCTION (?:\w+\.)?(\w+)\(", path.read_text())}


@pytest.mark.parametrize(("name", "statement"), statements().items(), ids=statements())
def test_every_statement_on_tenant_data_names_the_tenant(name: str, statement: str) -> None:
    """Row-level security is one wall, naming the tenant the other: as a column, or as a function's first argument."""
    tables = set(re.findall(r"\b(?:FROM|JOIN|INTO|(?<!DO )UPDATE)\s+(?:\w+\.)?(\w+)\b(?!\()", statement))
    functions = re.findall(rf"\b(?:(?:tenant|inference|retrieval|metering)\.\w+|{'|'.join(own_functions())})\(([^,)]*)", statement)
    by_function = bool(functions) and all(first.startswith("$1") for first in functions)
    assert "tenant_id" in statement or by_function or (not functions and tables <= SHARED_TABLES), name


def test_every_test_asserts_something() -> None:
    """A test without an assertion proves nothing."""
    silent = []
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        source = path.read_text()
        lines = source.splitlines()
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_"):
                body = "\n".join(lines[node.lineno - 1 : node.end_lineno])
                if not re.search(r"\bassert\b|pytest\.raises|assert_|expect_|\.check\(|eventually\(|\.agree\(|refused_quickly\(", body):
                    silent.append(f"{path.relative_to(ROOT)}:{node.name}")
    assert silent == []


def test_the_configuration_page_is_what_the_settings_say() -> None:
    """The tables of docs/configuration.md are generated and up to date."""
    page = ROOT / "docs/configuration.md"
    made = subprocess.run([sys.executable, "docs/generate_settings.py"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert made.strip() in page.read_text()
