"""The call protocol holds, every rule in it is needed, and the states taken for one really are one."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from functools import cache

import pytest

from tests.protocol.ahead import Ahead
from tests.protocol.explore import as_it_is, explore, first_run
from tests.protocol.model import successors
from tests.protocol.reduce import quiet
from tests.protocol.world import Choices, Protocol, Rules, State, beginning

# Data losses and extensions of one call.
REDUCED = ((1, 0), (0, 2), pytest.param(1, 1, marks=pytest.mark.slow))
BUDGETS = tuple(Protocol(calls=2, flushes=0, limit=limit) for limit in (1, 2, 4))
TWO_CALLS = (Protocol(calls=2, flushes=1), Protocol(calls=2, flushes=0, extensions=1))
OTHERWISE = tuple(Protocol(choices=Choices(**{choice: False}), calls=2, flushes=1) for choice in Choices._fields)


@pytest.fixture(scope="module", autouse=True)
def _no_collector() -> Iterator[None]:
    """Millions of live tuples and no cycles: a collector pass only costs time."""
    gc.disable()
    yield
    _reached.cache_clear()
    gc.enable()


@pytest.mark.parametrize(("calls", "flushes", "extensions"), [(1, 0, 0), (1, 1, 0), (1, 2, 0), (2, 0, 0), (1, 0, 2), (1, 1, 1)])
def test_protocol_holds_in_every_order_of_every_step(calls: int, flushes: int, extensions: int) -> None:
    """Whatever is killed, lost, late or repeated: no overspending, no billed call unknown, no phantom hold, none settled twice."""
    assert explore(Protocol(calls=calls, flushes=flushes, extensions=extensions)).broken is None


def test_protocol_holds_without_taking_states_for_one() -> None:
    """The answer does not rest on the reduction: one call and one data loss, every state told apart."""
    assert explore(Protocol(calls=1, flushes=1), as_it_is).broken is None


@pytest.mark.parametrize("rule", Rules._fields)
def test_every_rule_is_needed(rule: str) -> None:
    """A protocol without any one of its rules has a run that breaks an invariant."""
    found = first_run(Protocol(Rules(**{rule: False})))
    assert found.broken is not None, f"nothing goes wrong without {rule}"
    assert found.run


@pytest.mark.parametrize("choice", Choices._fields)
def test_free_choices_are_free(choice: str) -> None:
    """What is written down as free to decide either way breaks nothing when decided the other way."""
    assert explore(Protocol(choices=Choices(**{choice: False}), flushes=2)).broken is None


@pytest.mark.parametrize("world", [*BUDGETS[:2], pytest.param(BUDGETS[2], marks=[pytest.mark.slow, pytest.mark.timeout(600)])])
def test_budget_of_any_size_holds(ahead: Ahead, world: Protocol) -> None:
    """A budget too small for a call, for just one, and for two at once is kept like the one for a call and a half."""
    assert ahead.explored(world).broken is None


@pytest.mark.parametrize(("flushes", "extensions"), REDUCED)
def test_reduction_loses_and_invents_no_state(flushes: int, extensions: int) -> None:
    """The reduced exploration visits exactly the reduced images of the states the full one visits."""
    x = Protocol(calls=1, flushes=flushes, extensions=extensions)
    assert _reached(x, reduced=True) == {quiet(s) for s in _reached(x, reduced=False)}


@pytest.mark.parametrize(("flushes", "extensions"), REDUCED)
def test_a_state_and_its_reduction_rest_together(flushes: int, extensions: int) -> None:
    """A state from which something must still happen, other than messages nobody acts on, stays so when reduced."""
    x = Protocol(calls=1, flushes=flushes, extensions=extensions)
    for s in _reached(x, reduced=False):
        assert _must_go_on(s, x) == _must_go_on(quiet(s), x)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("world", TWO_CALLS, ids=("a loss of data", "an extension"))
def test_protocol_holds_for_two_calls(ahead: Ahead, world: Protocol) -> None:
    """Two calls of one tenant, with one loss of the reservations or one extension at any moment."""
    assert ahead.explored(world).broken is None


@pytest.mark.parametrize("limit", [2, 4])
def test_extension_without_room_is_refused_and_with_it_is_kept_to(limit: int) -> None:
    """A budget that is full with the call itself is never passed, and one with room to spare is not either."""
    assert explore(Protocol(calls=1, flushes=0, extensions=2, limit=limit)).broken is None


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("world", OTHERWISE, ids=Choices._fields)
def test_free_choices_are_free_for_two_calls(ahead: Ahead, world: Protocol) -> None:
    """The free choices stay free with two calls and a data loss."""
    assert ahead.explored(world).broken is None


def test_a_hold_may_lie_unopened_for_as_long_as_it_likes() -> None:
    """Between the answer to a Reserve and the Open everything else may happen; whatever did, I may open, release or die."""
    x = Protocol(calls=1, flushes=1)
    lying = [s for s in _reached(x, reduced=False) if s.i[0] == "reserving" and any(m.kind == "reserve_ok" for m in s.net)]
    happening: set[str] = set()
    for s in lying:
        labels = {label for label, _, _ in successors(s, x)}
        assert labels >= {"I0 sends Open", "I0 cancels before Open", "I0 is killed"}
        happening |= labels
    assert happening >= {
        "R: lease of call 0 ends, asks M",
        "M answers: call 0 is void",
        "R lets go of call 0",
        "Reserve of call 0 expires",
        "R forgets call 0",
        "R loses its data",
        "R asks M for a snapshot",
        "M begins an epoch, sends a snapshot",
        "R loads the snapshot of epoch 1",
    }


@cache
def _reached(x: Protocol, *, reduced: bool) -> frozenset[State]:
    alike = quiet if reduced else as_it_is
    seen = {alike(beginning(x))}
    waiting = list(seen)
    while waiting:
        for _, step, _ in successors(waiting.pop(), x):
            if (nxt := alike(step)) not in seen:
                seen.add(nxt)
                waiting.append(nxt)
    return frozenset(seen)


def _must_go_on(s: State, x: Protocol) -> bool:
    return any(must and quiet(step) != quiet(s) for _, step, must in successors(s, x))
