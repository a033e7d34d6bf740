"""Runs of the model drawn at random, and runs followed step by step."""

import random
from collections.abc import Sequence

from tests.protocol.model import successors, violation
from tests.protocol.world import Protocol, State, beginning

SHORTEST, LONGEST = 12, 45
# Of misfortunes fewer: a run in which everything dies at once shows little. By what the step's name holds; any other step weighs 1.
_WEIGHTS = {
    "expires": 0.03,
    "is killed": 0.06,
    "loses its data": 0.1,
    "cancels before": 0.1,
    "R: lease": 0.15,
    "M: lease": 0.15,
    "gives up": 0.2,
    "cannot learn": 0.3,
}


def random_run(seed: int) -> list[str]:
    """Draws a run of two calls whose limits lose their data at most twice; everything follows from the seed."""
    rng = random.Random(seed)
    x = Protocol(calls=2, flushes=rng.choice((0, 1, 1, 2)), limit=3)
    s, labels = beginning(x), list[str]()
    for _ in range(rng.randint(SHORTEST, LONGEST)):
        # In an order of their own: a set of messages has none.
        steps = sorted((step for step in successors(s, x) if step[1] != s), key=lambda step: (step[0], repr(sorted(step[1].net))))
        if not steps:
            break
        ((label, s, _),) = rng.choices(steps, [_weight(label) for label, _, _ in steps])
        labels.append(label)
    return labels


def _weight(label: str) -> float:
    return next((weight for part, weight in _WEIGHTS.items() if part in label), 1.0)


def breaks(labels: Sequence[str], x: Protocol) -> bool:
    """Tells whether the labels are a run of the protocol, and it ends in a state in which an invariant is broken."""
    reached: set[State] = {beginning(x)}
    for label in labels:
        reached = {step for s in reached for found, step, _ in successors(s, x) if found == label}
    return any(violation(s, not any(must and step != s for _, step, must in successors(s, x)), x.limit) for s in reached)
