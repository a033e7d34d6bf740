"""When the sweep runs: not before one whole lease after a start or an outage, then whenever a lease ends."""

import asyncio
from collections.abc import Sequence
from itertools import pairwise

from services.kernel.errors import Unavailable
from services.metering.lease_sweeper import LeaseSweeper
from services.metering.outbox import CallEnd, EndKind

LEASE = 0.3
SWEEP = 0.02


class Sink:
    """Collects what it is told."""

    def __init__(self) -> None:
        self.ends: list[CallEnd] = []

    def send(self, ends: Sequence[CallEnd]) -> None:
        """Takes ends."""
        self.ends.extend(ends)


class ScriptedLeases:
    """Answers sweeps in turn: a number of lapsed calls, or an outage."""

    def __init__(self, script: Sequence[int | Exception], lapses: Sequence[float | Exception] = ()) -> None:
        self.script = list(script)
        self.lapses = list(lapses)
        self.times: list[float] = []
        self.asked: list[float] = []
        self.over = asyncio.Event()

    async def next_lapse_seconds(self) -> float | None:
        """Plays the next line of its own script; there is no lease after it."""
        self.asked.append(asyncio.get_running_loop().time())
        step = self.lapses.pop(0) if self.lapses else None
        if isinstance(step, Exception):
            raise step
        return step

    async def sweep(self, most: int) -> Sequence[CallEnd]:
        """Plays the next line."""
        self.times.append(asyncio.get_running_loop().time())
        step = self.script.pop(0)
        if not self.script:
            self.over.set()
            self.script.append(0)
        if isinstance(step, Exception):
            raise step
        return [CallEnd(bytes(16), index.to_bytes(16), EndKind.PIN, 0) for index in range(step)]


async def swept(script: Sequence[int | Exception]) -> tuple[list[float], Sink]:
    """Runs a sweeper through a script; the pauses before each sweep, and what it told."""
    leases, sink = ScriptedLeases(script), Sink()
    started = await _run(leases, sink, LEASE, SWEEP)
    times = [started, *leases.times]
    return [later - earlier for earlier, later in pairwise(times)], sink


async def _run(leases: ScriptedLeases, sink: Sink, lease_seconds: float, sweep_seconds: float) -> float:
    sweeper = LeaseSweeper(leases, sink, lease_seconds=lease_seconds, sweep_seconds=sweep_seconds)
    started = asyncio.get_running_loop().time()
    task = asyncio.ensure_future(sweeper.run())
    async with asyncio.timeout(10):
        await leases.over.wait()
    task.cancel()
    return started


async def test_first_sweep_waits_one_lease() -> None:
    """While the service was down nobody could renew: no call is ended for that."""
    pauses, sink = await swept([2, 1])
    assert pauses[0] >= LEASE
    assert pauses[1] >= SWEEP
    assert len(sink.ends) == 3


async def test_sweep_waits_one_lease_after_an_outage_of_the_store() -> None:
    """While the store was away nobody could renew either."""
    pauses, _ = await swept([0, Unavailable("postgres"), 0])
    assert pauses[2] >= LEASE


async def test_sweep_goes_on_while_there_is_more() -> None:
    """A full batch of lapsed calls is followed by the next one at once."""
    pauses, sink = await swept([1_000, 1_000, 5])
    assert max(pauses[1:]) < LEASE
    assert len(sink.ends) == 2_005


async def test_sweep_comes_when_the_nearest_lease_ends() -> None:
    """The pause between looks is the longest there is: a lease that ends before it is swept when it ends."""
    sweeper = LeaseSweeper(ScriptedLeases([0]), Sink(), lease_seconds=0.0, sweep_seconds=1.0)
    assert [sweeper._pause(nearest, 0.0) for nearest in (-1.0, 0.01, 0.1, 5.0)] == [0.05, 0.05, 0.1, 1.0]


async def test_the_store_is_asked_while_nothing_is_swept() -> None:
    """An outage during the wait is noticed, and a whole lease begins after the last time that the store was away."""
    leases = ScriptedLeases([0], [1.0, Unavailable("postgres"), -1.0, Unavailable("postgres"), -1.0])
    await _run(leases, Sink(), LEASE, SWEEP)
    assert leases.times[0] - leases.asked[3] >= LEASE
