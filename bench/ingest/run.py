"""Events and calls a second into the ledger, through the whole service, beside asyncpg alone on the same table in the same run.

The ways take turns, and ratios are of one round: the machine may be shared. Rates stand by the clock, costs as CPU microseconds an event of
the service, Postgres and this client. Exit code 1 when a target is missed; the object names which.
"""

import argparse
import asyncio
import json
import platform
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from bench.ingest.pairs import opened_and_settled
from bench.ingest.stored import bytes_an_event, fill_up_to
from bench.ingest.ways import Measured, by_copy, by_unnest, in_batches, one_by_one
from bench.ingest.world import World, running_world

TARGET_EVENTS, TARGET_OF_RAW, TARGET_PAIRS, TARGET_SPREAD = 50_000, 0.5, 3_000, 0.2
BATCHES = (100, 1_000)
CONCURRENCY = 64
WARM_EVENTS = 5_000


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run measures: rounds of every way, events of each, callers that send batches, and how many are stored in comparison."""

    rounds: int
    events: int
    callers: int
    seconds: float
    stored: Sequence[int]


@dataclass(frozen=True, slots=True)
class Round:
    """What each way did within one round, by name."""

    ways: dict[str, Measured]

    def of_raw(self, batch: int) -> float:
        """The service's rate for each event a second of asyncpg alone, by the clock."""
        return self.ways[f"events_{batch}"].per_second / self.ways[f"unnest_{batch}"].per_second

    def cpu_of_raw(self, batch: int) -> float:
        """The CPU that an event takes through the service for each microsecond it takes by asyncpg alone."""
        return self.ways[f"events_{batch}"].cpu_us / self.ways[f"unnest_{batch}"].cpu_us


async def run(plan: Plan) -> dict[str, object]:
    """Starts a mesh of its own, measures and stops it; returns the result."""
    async with running_world() as world:
        for batch in BATCHES:
            await in_batches(world, WARM_EVENTS, batch, plan.callers)
        rounds = [await _round(world, plan) for _ in range(plan.rounds)]
        single, p50, p99 = await one_by_one(world, plan.seconds, CONCURRENCY)
        pairs = await opened_and_settled(world, max(plan.events // 8, 1_024))
        stored = [await _with_stored(world, plan, count) for count in sorted(plan.stored)]
    figures: dict[str, object] = {name: _figures([one.ways[name] for one in rounds]) for name in rounds[0].ways}
    ratios = {
        f"batch_{batch}": {
            "rate_of_raw": round(median(one.of_raw(batch) for one in rounds), 3),
            "cpu_of_raw": round(median(one.cpu_of_raw(batch) for one in rounds), 2),
        }
        for batch in BATCHES
    }
    result = {
        "bench": "ingest",
        "python": platform.python_version(),
        "rounds": plan.rounds,
        "events_a_way_and_round": plan.events,
        "callers": plan.callers,
        "ways": figures,
        "ratios": ratios,
        "single": {"concurrency": CONCURRENCY, "p50_ms": round(p50, 2), "p99_ms": round(p99, 2)} | _figures([single]),
        "pairs": _figures([pairs]),
        "stored": stored,
    }
    return result | {"missed": _missed(rounds, pairs, stored)}


async def _round(world: World, plan: Plan) -> Round:
    ways: dict[str, Measured] = {}
    for batch in BATCHES:
        ways[f"unnest_{batch}"] = await by_unnest(world, plan.events, batch)
        ways[f"events_{batch}"] = await in_batches(world, plan.events, batch, plan.callers)
        ways[f"copy_{batch}"] = await by_copy(world, plan.events, batch)
    return Round(ways)


async def _with_stored(world: World, plan: Plan, count: int) -> dict[str, float]:
    seconds = await fill_up_to(world, count)
    # The pages of the filling are not in memory as those of events that came one after the other are: first some that are not measured.
    await in_batches(world, WARM_EVENTS, BATCHES[-1], plan.callers)
    costs = [await in_batches(world, plan.events, BATCHES[-1], plan.callers) for _ in range(plan.rounds)]
    return {
        "events": count,
        "fill_seconds": round(seconds, 1),
        "events_per_second": round(median(cost.per_second for cost in costs)),
        "ingest_cpu_us": round(median(cost.ingest_us for cost in costs), 2),
    } | await bytes_an_event(world)


def _figures(measured: Sequence[Measured]) -> dict[str, float]:
    def middle(values: Sequence[float]) -> float:
        return round(median(values), 2)

    return {
        "per_second": round(median([one.per_second for one in measured])),
        "per_cpu_second": round(median([1e6 / one.cpu_us for one in measured])),
        "metering_cpu_us": middle([one.spent.metering / one.events * 1e6 for one in measured]),
        "postgres_cpu_us": middle([one.spent.postgres / one.events * 1e6 for one in measured]),
        "client_cpu_us": middle([one.own / one.events * 1e6 for one in measured]),
    }


def _missed(rounds: Sequence[Round], pairs: Measured, stored: Sequence[dict[str, float]]) -> list[str]:
    """Names the targets that were missed, each with what was measured."""
    missed = []
    for batch in BATCHES:
        rate = median(one.ways[f"events_{batch}"].per_second for one in rounds)
        if rate < TARGET_EVENTS:
            missed.append(f"{rate:.0f} events/s in batches of {batch}, not {TARGET_EVENTS}")
        share = median(one.of_raw(batch) for one in rounds)
        if share < TARGET_OF_RAW:
            missed.append(f"{share:.2f} of asyncpg's rate in batches of {batch}, not {TARGET_OF_RAW}")
    if pairs.per_second < TARGET_PAIRS:
        missed.append(f"{pairs.per_second:.0f} opened and settled calls/s, not {TARGET_PAIRS}")
    costs = [level["ingest_cpu_us"] for level in stored]
    if costs and max(costs) / min(costs) - 1 > TARGET_SPREAD:
        missed.append(f"an event costs up to {max(costs) / min(costs) - 1:.0%} more with other numbers stored, not {TARGET_SPREAD:.0%}")
    return missed


def main(arguments: list[str]) -> None:
    """Measures and prints. Exits with 1 when a target is missed."""
    parser = argparse.ArgumentParser(prog="python -m bench ingest", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="how often every way is measured, in turn")
    parser.add_argument("--events", type=int, default=50_000, help="events of each way in a round; a multiple of 1,000")
    parser.add_argument("--callers", type=int, default=4, help="how many callers send batches at once")
    parser.add_argument("--seconds", type=float, default=5.0, help="how long events are recorded one by one")
    parser.add_argument("--stored", type=int, nargs="*", default=[], help="numbers of stored events to compare, such as 1000000 20000000")
    options = parser.parse_args(arguments)
    result = asyncio.run(run(Plan(options.rounds, options.events, options.callers, options.seconds, options.stored)))
    print(json.dumps(result))
    sys.exit(1 if result["missed"] else 0)
