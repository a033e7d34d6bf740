"""Comparing costs on a machine that others use too: measured in turn, compared within a round, told with an interval.

What a second of such a machine is worth changes from one moment to the next, so two means say little. Costs of one round were paid within
milliseconds of each other: their ratios stay, and the median of many of them is not moved by the rounds that somebody disturbed.
"""

import itertools
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import isnan
from statistics import median

RESAMPLES = 1_000
CONFIDENCE = 0.95


def orders(subjects: Sequence[int], rounds: int) -> Iterator[tuple[int, ...]]:
    """Every order of the subjects, over and over: none of them always comes after the same other one, or first."""
    return itertools.islice(itertools.cycle(itertools.permutations(subjects)), rounds)


@dataclass(frozen=True, slots=True)
class Rounds:
    """What each subject cost in each round; the first subject is what the others are compared with."""

    subjects: Sequence[int]
    costs: list[Mapping[int, float]] = field(default_factory=list)

    def add(self, costs: Mapping[int, float]) -> None:
        """Keeps a round, unless something that was not to be measured fell into it: a cost is nan then."""
        if not any(map(isnan, costs.values())):
            self.costs.append(costs)

    def median_cost(self, subject: int) -> float:
        """What a subject costs, in the unit of the rounds."""
        return median(costs[subject] for costs in self.costs)

    def relative(self, subject: int) -> float:
        """What a subject costs for each unit that the first one costs."""
        return _relative(self.costs, subject, self.subjects[0])

    def spread(self) -> float:
        """By which share the dearest subject costs more than the cheapest."""
        return _spread(self.costs, self.subjects)

    def spread_interval(self) -> tuple[float, float]:
        """The interval that holds the spread with 95 % confidence, by resampling whole rounds."""
        chance = random.Random(0)
        spreads = sorted(_spread(chance.choices(self.costs, k=len(self.costs)), self.subjects) for _ in range(RESAMPLES))
        cut = round(len(spreads) * (1 - CONFIDENCE) / 2)
        return spreads[cut], spreads[-cut - 1]


def _relative(costs: Sequence[Mapping[int, float]], subject: int, base: int) -> float:
    return median(cost[subject] / cost[base] for cost in costs)


def _spread(costs: Sequence[Mapping[int, float]], subjects: Sequence[int]) -> float:
    found = [_relative(costs, subject, subjects[0]) for subject in subjects]
    return max(found) / min(found) - 1.0
