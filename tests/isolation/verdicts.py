"""What a test run of a mutation says for itself: which tests failed, in which phase, and whether an assertion failed or something broke.

A pytest plugin that `tests.isolation.mutation` loads into its runs. An exit code of 1 and a line with FAILED are not enough: a wall that is
taken down badly breaks an import, a start or a migration, and a test that stumbles over that has noticed nothing.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest

REPORT_PATH = "TENANTRY_MUTATION_REPORT"
_CALL = "call"
# pytest.fail raises the same for `DID NOT RAISE` and for a test that was stopped: only the first is a finding.
_TIMED_OUT = "Timeout"


@dataclass(frozen=True, slots=True)
class Failure:
    """One phase of one test that did not pass."""

    test: str
    phase: str
    is_assertion: bool
    what: str


def killer(failures: Sequence[Failure]) -> str:
    """The test that noticed: the first that failed, if it was its own assertion that did; empty when something else broke first."""
    first = next(iter(failures), None)
    return first.test if first is not None and first.phase == _CALL and first.is_assertion else ""


def read(path: Path) -> list[Failure]:
    """The failures a run wrote down, in order; none when it did not come that far."""
    return [Failure(**json.loads(line)) for line in path.read_text().splitlines()] if path.exists() else []


def is_assertion(error: BaseException) -> bool:
    """Tells an assertion that failed, and an error that was expected and did not come, from anything that broke."""
    if isinstance(error, BaseExceptionGroup):
        return all(is_assertion(inner) for inner in error.exceptions)
    if isinstance(error, pytest.fail.Exception):
        return not str(error).startswith(_TIMED_OUT)
    return isinstance(error, AssertionError)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    """Writes each failure down as it happens: a run that is killed later has said so far what it knows."""
    report = yield
    if report.failed and call.excinfo is not None and REPORT_PATH in os.environ:
        error = call.excinfo.value
        failure = Failure(item.nodeid, call.when, is_assertion(error), f"{type(error).__name__}: {error}"[:300])
        with Path(os.environ[REPORT_PATH]).open("a") as lines:
            lines.write(json.dumps(asdict(failure)) + "\n")
    return report
