"""The suite on trial: one wall is taken down in a copy of the tree at a time, and the tests that lean on it must fail.

`python -m tests.isolation.mutation [--only PATTERN] [--jobs 2] [--list]`. Changes nothing in the working tree. A mutation whose text is not
found exactly once, or is of a statement that a later migration says anew, is an error. A mutation is killed by a test whose own assertion
fails; one that breaks a start, an import or a fixture is not. The last line counts.
"""

import argparse
import asyncio
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.isolation.identity_mutations import IDENTITY_MUTATIONS
from tests.isolation.metering_mutations import METERING_MUTATIONS
from tests.isolation.mutations import MUTATIONS, Edit, Mutation
from tests.isolation.placement_mutations import PLACEMENT_MUTATIONS
from tests.isolation.store_mutations import STORE_MUTATIONS
from tests.isolation.superseded import superseded
from tests.isolation.verdicts import REPORT_PATH, killer, read
from tests.protocol.mutations import PROTOCOL_MUTATIONS

ROOT = Path(__file__).parents[2]
EVERY_MUTATION = (
    *MUTATIONS,
    *STORE_MUTATIONS,
    *METERING_MUTATIONS,
    *IDENTITY_MUTATIONS,
    *PLACEMENT_MUTATIONS,
    *PROTOCOL_MUTATIONS,
)
RUN_SECONDS = 600.0
REPORT = ".mutation-report.jsonl"
COMPILED = ("services", "protos/gen", "devstack")
# Less than a run may take, so that a test that hangs is named.
TEST_SECONDS = 400
BASELINE_SECONDS = 1_800.0
_TESTS_FAILED = 1


class StaleMutation(Exception):
    """A mutation that does not fit the code any more."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a mutation: killed by a test, or not and why."""

    mutation: Mutation
    killed_by: str
    seconds: float
    why_not: str = ""


def copy_tree(target: Path) -> None:
    """Copies what git knows of or would take up, compiled: every test starts a dozen processes that would each compile it."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    for name in filter(None, listed.stdout.decode().split("\0")):
        source = ROOT / name
        if source.is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target / name)
    # Believed by the hash of its source: a file that was changed and restored within a second is as old as before.
    compiling = (sys.executable, "-m", "compileall", "-q", "--invalidation-mode", "checked-hash", *COMPILED)
    subprocess.run(compiling, cwd=target, check=True)


def stale(mutations: Sequence[Mutation]) -> list[str]:
    """Names every edit whose text is not in its file exactly once, or is not the last word of the migrations, and says why."""
    return [f"{mutation.name}: {why}" for mutation in mutations for edit in mutation.edits if (why := _why_stale(edit))]


def _why_stale(edit: Edit) -> str:
    count = (ROOT / edit.path).read_text().count(edit.find)
    return f"{edit.path} holds the text {count} times" if count != 1 else superseded(ROOT, edit)


@contextmanager
def applied(tree: Path, mutation: Mutation) -> Iterator[None]:
    """The tree with one wall down."""
    before = {edit.path: (tree / edit.path).read_text() for edit in mutation.edits}
    after = dict(before)
    for edit in mutation.edits:
        if after[edit.path].count(edit.find) != 1 or edit.put == edit.find:
            raise StaleMutation(f"{mutation.name}: {edit.path} would not change in one place")
        after[edit.path] = after[edit.path].replace(edit.find, edit.put)
    _write(tree, after)
    try:
        yield
    finally:
        _write(tree, before)


def _write(tree: Path, texts: Mapping[str, str]) -> None:
    for name, text in texts.items():
        (tree / name).write_text(text)


async def run_tests(tree: Path, tests: Sequence[str], *options: str, within_seconds: float) -> tuple[int | None, str]:
    """Runs tests in the tree; the code is None when they did not end in time."""
    # The copy comes before the installed tree, in the tests and in every service they start. They write no bytecode: it would go by age.
    environment = os.environ | {
        "PYTHONPATH": f"{tree}{os.pathsep}{tree / 'protos/gen'}",
        "PYTHONDONTWRITEBYTECODE": "1",
        REPORT_PATH: str(tree / REPORT),
    }
    (tree / REPORT).unlink(missing_ok=True)
    pytest = ("-m", "pytest", "-q", "--tb=line", "-p", "no:cacheprovider", "-p", "tests.isolation.verdicts", f"--timeout={TEST_SECONDS}")
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *pytest,
        *options,
        *tests,
        cwd=tree,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        async with asyncio.timeout(within_seconds):
            output, _ = await process.communicate()
    except TimeoutError:
        return None, ""
    finally:
        # Also when this run is given up: the tests' meshes end with them.
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGKILL)
            await process.wait()
    return process.returncode, output.decode(errors="replace")


async def judge(tree: Path, mutation: Mutation) -> Outcome:
    """Takes the wall down and tells which test noticed."""
    began = time.monotonic()
    with applied(tree, mutation):
        code, output = await run_tests(tree, mutation.tests, "-x", within_seconds=RUN_SECONDS)
    seconds, failures = time.monotonic() - began, read(tree / REPORT)
    if code == _TESTS_FAILED and (noticed := killer(failures)):
        return Outcome(mutation, noticed, seconds)
    if code is None:
        return Outcome(mutation, "", seconds, f"the tests did not end within {RUN_SECONDS:.0f} s")
    if code == 0:
        return Outcome(mutation, "", seconds, "no test noticed")
    return Outcome(mutation, "", seconds, f"something else broke: {failures or output[-400:]}")


async def try_all(mutations: Sequence[Mutation], jobs: int) -> list[Outcome]:
    """Judges every mutation, some at a time, each worker in a copy of its own."""
    waiting, outcomes = deque(mutations), list[Outcome]()

    async def work(tree: Path) -> None:
        copy_tree(tree)
        while waiting:
            outcome = await judge(tree, waiting.popleft())
            outcomes.append(outcome)
            verdict = f"killed by {outcome.killed_by}" if outcome.killed_by else f"SURVIVED: {outcome.why_not}"
            say(f"{len(outcomes):>3}/{len(mutations)} {outcome.mutation.name}: {verdict} ({outcome.seconds:.0f} s)")

    with tempfile.TemporaryDirectory(prefix="tenantry-mutation-") as folder:
        # Postgres runs as a user of its own where this runs as root.
        Path(folder).chmod(0o755)
        async with asyncio.TaskGroup() as workers:
            for number in range(jobs):
                workers.create_task(work(Path(folder) / str(number)))
    return outcomes


async def holds_unchanged(mutations: Sequence[Mutation]) -> bool:
    """Runs the chosen tests on an unchanged copy: a test that fails anyway kills nothing."""
    tests = sorted({test for mutation in mutations for test in mutation.tests})
    with tempfile.TemporaryDirectory(prefix="tenantry-mutation-") as folder:
        Path(folder).chmod(0o755)
        copy_tree(Path(folder))
        code, output = await run_tests(Path(folder), tests, within_seconds=BASELINE_SECONDS)
    say(f"unchanged: {output.strip().splitlines()[-1] if output.strip() else 'the tests did not end'}")
    if code != 0:
        say(output[-3000:])
    return code == 0


def say(line: str) -> None:
    """Writes a line at once: a run takes minutes."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def main() -> int:
    """Returns 0 when every mutation was killed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="only mutations whose name matches this pattern")
    parser.add_argument("--jobs", type=int, default=2, help="how many meshes at a time")
    parser.add_argument("--skip-unchanged", action="store_true", help="do not run the tests on the unchanged tree first")
    parser.add_argument("--list", action="store_true", help="name the mutations and check that they fit")
    chosen = parser.parse_args()
    mutations = [mutation for mutation in EVERY_MUTATION if re.search(chosen.only, mutation.name)]
    if found := stale(mutations):
        say("\n".join(found))
        return 2
    if chosen.list:
        say("\n".join(mutation.name for mutation in mutations))
        return 0
    if not chosen.skip_unchanged and not asyncio.run(holds_unchanged(mutations)):
        return 1
    outcomes = asyncio.run(try_all(mutations, max(1, chosen.jobs)))
    killed = sum(bool(outcome.killed_by) for outcome in outcomes)
    say(f"killed {killed} of {len(mutations)}")
    return 0 if killed == len(mutations) > 0 else 1


if __name__ == "__main__":
    sys.exit(main())
