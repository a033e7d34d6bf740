"""Who may say that a wall is down: an assertion of a test, and nothing that broke on the way to it."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.isolation.mutation import EVERY_MUTATION, StaleMutation, applied, stale
from tests.isolation.mutations import Edit, Mutation
from tests.isolation.verdicts import Failure, is_assertion, killer, read

NOTICED = Failure("test_a", "call", True, "AssertionError: 1 row")
STUMBLED = Failure("test_b", "call", False, "AioRpcError: UNAVAILABLE")
NOT_STARTED = Failure("test_c", "setup", True, "AssertionError: no mesh")

ROOT = Path(__file__).parents[2]


def _did_not_raise() -> None:
    with pytest.raises(ValueError, match="refused"):
        pass


def _assertion() -> None:
    raise AssertionError


def _stopped() -> None:
    pytest.fail("Timeout (>400.0s) from pytest-timeout.")


def _stumble() -> None:
    raise KeyError("tenant_id")


def _both() -> None:
    raise ExceptionGroup("attacks", [AssertionError("one row"), KeyError("tenant_id")])


def _several() -> None:
    raise ExceptionGroup("attacks", [AssertionError("one row"), ExceptionGroup("more", [AssertionError("two rows")])])


@pytest.mark.parametrize(
    ("happening", "is_one"),
    [(_did_not_raise, True), (_assertion, True), (_several, True), (_stopped, False), (_stumble, False), (_both, False)],
)
def test_only_an_assertion_is_a_finding(happening: Callable[[], None], is_one: bool) -> None:
    """An assertion that failed and a refusal that did not come are findings; a test that was stopped or stumbled found nothing."""
    caught: BaseException | None = None
    try:
        happening()
    except BaseException as error:
        caught = error
    assert caught is not None
    assert is_assertion(caught) is is_one


def test_the_first_failure_decides() -> None:
    """A mutation is killed by the first test that fails, if its own assertion did, and not while it was set up."""
    assert killer([NOTICED, STUMBLED]) == "test_a"
    assert killer([STUMBLED, NOTICED]) == ""
    assert killer([NOT_STARTED]) == ""
    assert killer([]) == ""


def test_a_run_that_wrote_nothing_found_nothing(tmp_path: Path) -> None:
    """A run that never came to a test has no failures to tell."""
    assert read(tmp_path / "none.jsonl") == []


def test_a_mutation_that_changes_nothing_is_stale(tmp_path: Path) -> None:
    """A text that is not in its file exactly once, or is put back as it was, takes no wall down, and is an error."""
    (tmp_path / "wall.py").write_text("if wrong:\n    refuse()\n")
    for find, put in (("absent", ""), ("e", "x"), ("wrong", "wrong")):
        mutation = Mutation("a wall", (), (Edit("wall.py", find, put),))
        with pytest.raises(StaleMutation), applied(tmp_path, mutation):
            pass
    with applied(tmp_path, Mutation("a wall", (), (Edit("wall.py", "wrong", "False"),))):
        assert (tmp_path / "wall.py").read_text() == "if False:\n    refuse()\n"
    assert (tmp_path / "wall.py").read_text() == "if wrong:\n    refuse()\n"


def test_every_mutation_fits_the_code() -> None:
    """Each edit of a mutation finds its text exactly once: a wall that is built anew is taken down anew."""
    for mutation in EVERY_MUTATION:
        for edit in mutation.edits:
            assert (ROOT / edit.path).read_text().count(edit.find) == 1, mutation.name


def test_every_mutation_edits_what_stands_last() -> None:
    """No mutation edits a statement of a migration that a later one says anew or takes away: it would take nothing down."""
    assert stale(EVERY_MUTATION) == []
