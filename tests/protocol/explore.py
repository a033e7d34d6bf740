"""Explores the call protocol exhaustively: every order of every step, until no new state appears or an invariant breaks.

python -m tests.protocol.explore [--calls N] [--flushes N] [--extensions N] [--limit N]
                                                                         states seen; exits 1 with the run that goes wrong
python -m tests.protocol.explore --variants                              removes one rule at a time and shows the run that goes wrong
States that nothing can tell apart are one (`reduce.py`), except with --plain and --variants; --large also takes like calls for each other.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from tests.protocol.model import successors, violation
from tests.protocol.reduce import canonical, quiet
from tests.protocol.world import Choices, Protocol, Rules, State, beginning

WORLDS = ((1, 0), (1, 1), (1, 2))  # calls, data losses: each removed rule goes wrong in one of them


class Found(NamedTuple):
    """What an exploration saw: how many states, what broke if anything did, and the shortest run to it."""

    states: int
    broken: str | None
    run: tuple[str, ...] = ()


def as_it_is(s: State) -> State:
    """Take no two states for one."""
    return s


def explore(x: Protocol, alike: Callable[[State], State] = quiet, most: int = 5_000_000) -> Found:
    """Go breadth first, so that the run reported is a shortest one; states for which `alike` gives one answer are one."""
    start = alike(beginning(x))
    parent: dict[State, tuple[State, str] | None] = {start: None}
    queue = deque([start])
    while queue:
        s = queue.popleft()
        must_go_on = False
        for label, step, must in successors(s, x):
            nxt = alike(step)
            if nxt == s:
                continue
            must_go_on = must_go_on or must
            if nxt not in parent:
                parent[nxt] = (s, label)
                queue.append(nxt)
        broken = violation(s, not must_go_on, x.limit)
        if broken:
            return Found(len(parent), broken, _run_to(s, parent))
        if len(parent) > most:
            return Found(len(parent), "gave up: too many states")
    return Found(len(parent), None)


def _run_to(s: State, parent: dict[State, tuple[State, str] | None]) -> tuple[str, ...]:
    run: list[str] = []
    while (step := parent[s]) is not None:
        s, label = step
        run.append(label)
    return tuple(run[::-1])


def explore_large(x: Protocol, seconds: float = float("inf")) -> Found:
    """Explore with 64-bit hashes only: far more states, no run (two states with one hash are taken for one)."""
    start = canonical(beginning(x))
    seen, waiting, stop = {hash(start)}, [start], time.monotonic() + seconds
    while waiting:
        s = waiting.pop()
        must_go_on = False
        for _, step, must in successors(s, x):
            nxt = canonical(step)
            if nxt == s:
                continue
            must_go_on = must_go_on or must
            if (name := hash(nxt)) not in seen:
                seen.add(name)
                waiting.append(nxt)
        broken = violation(s, not must_go_on, x.limit)
        if broken:
            return Found(len(seen), f"{broken} in {s}")
        if time.monotonic() > stop:
            return Found(len(seen), f"gave up after {seconds:.0f} s, {len(waiting)} states waiting")
    return Found(len(seen), None)


def first_run(x: Protocol) -> Found:
    """Look for a run that goes wrong in ever larger worlds, with an extension where its rule is gone, taking no two states for one."""
    found = Found(0, None)
    extensions = any(name.startswith("extension") and not in_force for name, in_force in x.rules._asdict().items())
    for calls, flushes in WORLDS:
        found = explore(x._replace(calls=calls, flushes=flushes, extensions=int(extensions)), as_it_is)
        if found.broken:
            break
    return found


def _say(found: Found, what: str) -> None:
    lines = [f"{what}: {found.states:,} states, {found.broken or 'all invariants hold'}", *(f"     {step}" for step in found.run)]
    sys.stdout.write("\n".join(lines) + "\n")


def _variants(limit: int) -> int:
    missed = 0
    for name in Rules._fields:
        found = first_run(Protocol(Rules(**{name: False}), limit=limit))
        _say(found, f"without {name}")
        missed += not found.run
    for name in Choices._fields:
        found = explore_large(Protocol(choices=Choices(**{name: False}), calls=2, flushes=1, limit=limit))
        _say(found, f"choosing otherwise, {name}")
        missed += found.broken is not None
    return 1 if missed else 0


def main() -> int:
    """Run the command line: 0 when the protocol holds and no removal goes unnoticed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=2)
    parser.add_argument("--flushes", type=int, default=1)
    parser.add_argument("--extensions", type=int, default=0, help="how often a call may be extended, of all calls together")
    parser.add_argument("--limit", type=int, default=3, help="the budget")
    parser.add_argument("--variants", action="store_true", help="one rule removed at a time")
    parser.add_argument("--large", action="store_true", help="hashes only: no run, many more states")
    parser.add_argument("--plain", action="store_true", help="no two states are taken for one")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="with --large: gives up after so long")
    a = parser.parse_args()
    gc.disable()  # millions of live tuples and no cycles: a collector pass only costs time
    if a.variants:
        return _variants(a.limit)
    x = Protocol(calls=a.calls, flushes=a.flushes, limit=a.limit, extensions=a.extensions)
    found = explore_large(x, a.seconds) if a.large else explore(x, alike=as_it_is if a.plain else quiet)
    _say(found, f"{a.calls} calls, {a.flushes} data losses, {a.extensions} extensions, budget {a.limit}")
    return 1 if found.broken else 0


if __name__ == "__main__":
    sys.exit(main())
