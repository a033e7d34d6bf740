"""Events and calls a second into the ledger, through the whole service, beside asyncpg alone on the same table in the same run.

The ways take turns, and ratios are of one round: the machine may be shared. Rates stand by the clock, costs as CPU microseconds an event of
the service, Postgres and this client, with the folding of what was recorded; a way begins when everything before it is folded.

A load is a size of batches and how many callers send them, each waiting for an answer before it sends the next; asyncpg writes batches of
that size over as many connections, and over one. The aim of 50,000 events a second is held against four callers with batches of 1,000, and
against sixteen with batches of 100: 500 calls a second are of many senders. Four callers with batches of 100 stand beside. The aim of half
of asyncpg's rate is held against one connection. Exit code 1 when a target is missed; the object names which.
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
CONCURRENCY = 64
WARM_EVENTS = 5_000


@dataclass(frozen=True, slots=True, order=True)
class Load:
    """Events in a batch, and how many callers send batches at once."""

    batch: int
    callers: int

    def __str__(self) -> str:
        return f"{self.batch}_by_{self.callers}"


AIMED = (Load(100, 16), Load(1_000, 4))
BESIDE = (Load(100, 4),)


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run measures: rounds of every way, events of each, the loads, and how many are stored in comparison."""

    rounds: int
    events: int
    loads: Sequence[Load]
    seconds: float
    stored: Sequence[int]


@dataclass(frozen=True, slots=True)
class Round:
    """What each way did within one round, by name."""

    ways: dict[str, Measured]

    def of_raw(self, load: Load, connections: int) -> float:
        """The service's rate for each event a second of asyncpg alone over so many connections, by the clock."""
        return self.ways[f"events_{load}"].per_second / self.ways[f"unnest_{Load(load.batch, connections)}"].per_second

    def cpu_of_raw(self, load: Load) -> float:
        """The CPU that an event takes through the service for each microsecond it takes by asyncpg alone over as many connections."""
        return self.ways[f"events_{load}"].cpu_us / self.ways[f"unnest_{load}"].cpu_us


async def run(plan: Plan) -> dict[str, object]:
    """Starts a mesh of its own, measures and stops it; returns the result."""
    async with running_world() as world:
        for load in plan.loads:
            await in_batches(world, WARM_EVENTS, load.batch, load.callers)
        rounds = [await _round(world, plan) for _ in range(plan.rounds)]
        single, p50, p99 = await one_by_one(world, plan.seconds, CONCURRENCY)
        pairs = await opened_and_settled(world, max(plan.events // 8, 1_024))
        stored = [await _with_stored(world, plan, count) for count in sorted(plan.stored)]
    figures: dict[str, object] = {name: _figures([one.ways[name] for one in rounds]) for name in rounds[0].ways}
    ratios = {
        str(load): {
            "rate_of_raw": round(median(one.of_raw(load, 1) for one in rounds), 3),
            "rate_of_raw_by_as_many": round(median(one.of_raw(load, load.callers) for one in rounds), 3),
            "cpu_of_raw_by_as_many": round(median(one.cpu_of_raw(load) for one in rounds), 2),
        }
        for load in plan.loads
    }
    result = {
        "bench": "ingest",
        "python": platform.python_version(),
        "rounds": plan.rounds,
        "events_a_way_and_round": plan.events,
        "ways": figures,
        "ratios": ratios,
        "single": {"concurrency": CONCURRENCY, "p50_ms": round(p50, 2), "p99_ms": round(p99, 2)} | _figures([single]),
        "pairs": _figures([pairs]),
        "stored": stored,
    }
    return result | {"missed": _missed(rounds, pairs, stored)}


async def _round(world: World, plan: Plan) -> Round:
    ways: dict[str, Measured] = {}
    for batch in sorted({load.batch for load in plan.loads}):
        ways[f"copy_{batch}"] = await by_copy(world, plan.events, batch)
        ways[f"unnest_{Load(batch, 1)}"] = await by_unnest(world, plan.events, batch, 1)
    for load in plan.loads:
        ways[f"events_{load}"] = await in_batches(world, plan.events, load.batch, load.callers)
        ways[f"unnest_{load}"] = await by_unnest(world, plan.events, load.batch, load.callers)
    return Round(ways)


async def _with_stored(world: World, plan: Plan, count: int) -> dict[str, float]:
    seconds, load = await fill_up_to(world, count), AIMED[-1]
    # The pages of the filling are not in memory as those of events that came one after the other are: first some that are not measured.
    await in_batches(world, WARM_EVENTS, load.batch, load.callers)
    costs = [await in_batches(world, plan.events, load.batch, load.callers) for _ in range(plan.rounds)]
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
    for load in AIMED:
        batches = f"batches of {load.batch} by {load.callers} callers"
        rate = median(one.ways[f"events_{load}"].per_second for one in rounds)
        if rate < TARGET_EVENTS:
            missed.append(f"{rate:.0f} events/s in {batches}, not {TARGET_EVENTS}")
        share = median(one.of_raw(load, 1) for one in rounds)
        if share < TARGET_OF_RAW:
            missed.append(f"{share:.2f} of asyncpg's rate over one connection in {batches}, not {TARGET_OF_RAW}")
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
    parser.add_argument("--callers", type=int, nargs="*", default=[], help="further numbers of callers that send batches of 100 at once")
    parser.add_argument("--seconds", type=float, default=5.0, help="how long events are recorded one by one")
    parser.add_argument("--stored", type=int, nargs="*", default=[], help="numbers of stored events to compare, such as 1000000 20000000")
    options = parser.parse_args(arguments)
    loads = sorted({*AIMED, *BESIDE, *(Load(100, callers) for callers in options.callers)})
    result = asyncio.run(run(Plan(options.rounds, options.events, loads, options.seconds, options.stored)))
    print(json.dumps(result))
    sys.exit(1 if result["missed"] else 0)
