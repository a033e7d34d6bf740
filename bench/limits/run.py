"""Decisions a second of one ratelimit process: unary, in batches and from slices, in one run with their floors and with other limiters.

Under 1, 5 and 15 rules, with 1 and with 100,000 tenants. The floors: Redis running the very same script with the same arguments, a
gRPC call of the same size that decides nothing, and a budget that only this process knows. Everything of a shape is measured in turn,
round after round, and each figure is that of its best round: whatever else the machine does makes it worse. Exit code 1 when a target
is missed; `missed` says which.
"""

import argparse
import asyncio
import json
import platform
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import grpc

from bench.bare_hop import METHOD
from bench.latency import Call
from bench.limits import leased, rest
from bench.limits.demands import Shape
from bench.limits.leased import LeasedRow
from bench.limits.others import FixedWindows, MovingWindows
from bench.limits.raw_redis import Decisions, RawPool
from bench.limits.row import Row, measure
from bench.limits.service_load import ServiceLoad
from bench.limits.verdicts import TARGET_BYTES, Verdict, missed_bytes, verdicts
from bench.limits.world import World, running_world
from devstack.ports import LOOPBACK
from services.ratelimit.adapters.scripts import load_script

CONCURRENCY = 64
BATCH = 256
BATCHES_AT_ONCE = 4
# As many demands of one tenant as the service puts into one script call.
DECISIONS_A_SCRIPT = 50
# Of very many tenants, those that are called in one run: as many as a process keeps the rules of, with room.
WORKING_SET = 2_000
RESTING = 10


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run compares."""

    rounds: int
    seconds: float
    rule_counts: Sequence[int]
    tenant_counts: Sequence[int]
    others: bool
    rest: bool


@dataclass(frozen=True, slots=True)
class Round:
    """Every way of deciding, once."""

    rows: dict[str, Row]
    leased: LeasedRow
    touch: dict[str, float]


@dataclass(frozen=True, slots=True)
class Compared:
    """One shape, measured."""

    name: str
    figures: dict[str, object]
    verdicts: dict[str, Verdict]

    def missed(self) -> list[str]:
        """What is missed in it, in words."""
        return [text for way, verdict in self.verdicts.items() for text in verdict.missed(f"{way}, {self.name}")]


async def run(plan: Plan) -> tuple[dict[str, object], bool]:
    """Starts a world of its own, measures every shape, and stops it; returns the result, and whether no target is missed."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="tenantry-bench-") as folder:
        async with running_world(Path(folder)) as world:
            await world.link.send("SCRIPT", "LOAD", load_script("reserve").text)
            resting = Shape.of(5, RESTING)
            used_bytes = await rest.use(world, resting)
            shapes: list[Compared] = []
            for tenant_count in sorted(plan.tenant_counts):
                await _populate(world, tenant_count)
                shapes += [await _compare(world, plan, rule_count, tenant_count) for rule_count in plan.rule_counts]
            rest_bytes = await rest.at_rest(world, resting) if plan.rest else None
    missed = [text for shape in shapes for text in shape.missed()]
    missed += missed_bytes(rest_bytes) if plan.rest else []
    result: dict[str, object] = {
        "bench": "limits",
        "python": platform.python_version(),
        "rounds": plan.rounds,
        "seconds_per_row": plan.seconds,
        "seconds": round(time.monotonic() - began),
        "concurrency": CONCURRENCY,
        "batch": BATCH,
        "shapes": [shape.figures for shape in shapes],
        "tenant_bytes": {"rules": 5, "in_use": used_bytes, "at_rest": rest_bytes, "target": TARGET_BYTES},
        "missed": missed,
        "holds": not missed,
    }
    return result, not missed


async def grpc_echo(world: World, load: ServiceLoad, seconds: float) -> Row:
    """A call with the metadata and the sizes of a Reserve, to a server of its own whose CPU stands in the place of the service's."""
    size = str(await load.answer_bytes())
    process = await asyncio.create_subprocess_exec(sys.executable, "-m", "bench.bare_hop", size, stdout=asyncio.subprocess.PIPE)
    try:
        if process.stdout is None:
            raise RuntimeError("the server's output is a pipe")
        port = int(await process.stdout.readline())
        async with grpc.aio.insecure_channel(f"{LOOPBACK}:{port}") as channel:
            echo: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(METHOD)

            async def call(number: int) -> None:
                await load.unary_by(echo, number)

            return await measure(world, call, concurrency=CONCURRENCY, seconds=seconds, service_pid=process.pid)
    finally:
        process.kill()
        await process.wait()


async def _populate(world: World, tenant_count: int) -> None:
    """The tenants that are not called while the others are: they lie in Redis with counters of their own."""
    idle = tenant_count - min(tenant_count, WORKING_SET)
    if idle:
        shape = Shape.of(5, idle)
        await world.load(shape.tenant_ids, shape.terms)


async def _compare(world: World, plan: Plan, rule_count: int, tenant_count: int) -> Compared:
    rounds = [await _round(world, plan, rule_count, tenant_count) for _ in range(plan.rounds)]
    rows = {name: Row.best_of([one.rows[name] for one in rounds]) for name in rounds[0].rows}
    from_slices = LeasedRow.best_of([one.leased for one in rounds])
    alone_cpu_us = await leased.alone_cpu_us()
    found = verdicts(rows, from_slices, alone_cpu_us)
    figures: dict[str, object] = {
        "rules": rule_count,
        "tenants": tenant_count,
        "tenants_called": min(tenant_count, WORKING_SET),
        "tenants_leased": min(tenant_count, leased.HOLDERS),
        "first_touch": rounds[0].touch,
        "rows": {name: row.figures() for name, row in rows.items()} | {"leased": from_slices.figures()},
        "budget_alone_cpu_us": round(alone_cpu_us, 3),
        "verdicts": {way: verdict.figures() for way, verdict in found.items()},
    }
    return Compared(f"{rule_count} rules, {tenant_count} tenants", figures, found)


async def _round(world: World, plan: Plan, rule_count: int, tenant_count: int) -> Round:
    called = min(tenant_count, WORKING_SET)
    rows, touch = await _service_rows(world, plan, rule_count, called)
    rows |= await _floor_rows(world, plan, rule_count, called)
    if plan.others:
        rows |= await _other_rows(world, plan, rule_count, called)
    return Round(rows, await leased.measure(world, rule_count, tenant_count, plan.seconds), touch)


async def _service_rows(world: World, plan: Plan, rule_count: int, called: int) -> tuple[dict[str, Row], dict[str, float]]:
    shape = Shape.of(rule_count, called)
    load = ServiceLoad(world, shape, BATCH)
    touch = await load.first_touch(CONCURRENCY)
    rows = {
        "unary": await measure(world, load.unary, concurrency=CONCURRENCY, seconds=plan.seconds),
        "batch": await measure(world, load.batch, concurrency=BATCHES_AT_ONCE, seconds=plan.seconds, decisions_a_call=BATCH),
        "grpc_echo": await grpc_echo(world, load, plan.seconds),
    }
    await world.drop(shape.tenant_ids)
    return rows, touch


async def _floor_rows(world: World, plan: Plan, rule_count: int, called: int) -> dict[str, Row]:
    shape = Shape.of(rule_count, called)
    pool = await RawPool.open(world.redis.url, CONCURRENCY)
    # Demands of one tenant share a script call, those of many each have their own.
    size = DECISIONS_A_SCRIPT if called == 1 else 1

    scripts = BATCH // size
    rows = {}
    for name, a_script, a_call, at_once in (("raw_one_at_a_time", 1, 1, CONCURRENCY), ("raw_pipelined", size, scripts, BATCHES_AT_ONCE)):
        await world.load(shape.tenant_ids, shape.terms)
        # After the loading, which may take long: an id is refused when it is older than a minute.
        decisions = await Decisions.of(shape, pool, a_script)

        async def call(_: int, decisions: Decisions = decisions, a_call: int = a_call) -> None:
            await decisions.run(a_call)

        rows[name] = await measure(world, call, concurrency=at_once, seconds=plan.seconds, decisions_a_call=a_script * a_call)
        await world.drop(shape.tenant_ids)
    await pool.close()
    return rows


async def _other_rows(world: World, plan: Plan, rule_count: int, called: int) -> dict[str, Row]:
    shape = Shape.of(rule_count, called)
    pool = await RawPool.open(world.redis.url, CONCURRENCY)
    moving, fixed = MovingWindows(world.redis.url, shape), FixedWindows(pool, shape)
    calls: dict[str, Call] = {"limits_library": moving.decide, "fixed_windows": fixed.decide}
    rows = {name: await measure(world, call, concurrency=CONCURRENCY, seconds=plan.seconds) for name, call in calls.items()}
    await moving.close()
    await pool.close()
    return rows


def main(arguments: list[str]) -> None:
    """Measures and prints. Exits with 1 when a target is missed."""
    parser = argparse.ArgumentParser(prog="python -m bench limits", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="how often every way is measured, in turn")
    parser.add_argument("--seconds", type=float, default=1.5, help="of each row and round; below the 5 s that a hold lives unrenewed")
    parser.add_argument("--rules", type=int, nargs="+", default=[1, 5, 15], choices=range(1, 16), metavar="1-15")
    parser.add_argument("--tenants", type=int, nargs="+", default=[1, 100_000])
    parser.add_argument("--no-others", action="store_true", help="leave out the `limits` library and the fixed windows")
    parser.add_argument("--no-rest", action="store_true", help="do not wait, up to three minutes, for used tenants to come to rest")
    options = parser.parse_args(arguments)
    shapes = options.rules, options.tenants
    plan = Plan(options.rounds, options.seconds, *shapes, others=not options.no_others, rest=not options.no_rest)
    result, holds = asyncio.run(run(plan))
    print(json.dumps(result))
    sys.exit(0 if holds else 1)
