"""One run for all who ask at the same time."""

import asyncio
from collections.abc import Awaitable

import pytest

from services.tenant.shared_flight import SharedFlight


async def test_who_asks_at_the_same_time_gets_one_runs_answer() -> None:
    """Three callers, one run, one answer; the next caller runs again."""
    flights: SharedFlight[str, int] = SharedFlight()
    runs, gate = [], asyncio.Event()

    async def work() -> int:
        runs.append(1)
        await gate.wait()
        return len(runs)

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(flights.run("k", work)) for _ in range(3)]
        await asyncio.sleep(0)
        gate.set()
    assert [task.result() for task in tasks] == [1, 1, 1]
    assert await flights.run("k", work) == 2


async def test_a_failure_is_told_to_its_own_caller_and_the_next_one_runs() -> None:
    """The first caller's run fails for the first caller; the waiting one runs its own."""
    flights: SharedFlight[str, str] = SharedFlight()
    gate = asyncio.Event()

    async def fail() -> str:
        await gate.wait()
        raise LookupError

    async def succeed() -> str:
        return "done"

    async with asyncio.TaskGroup() as group:
        first = group.create_task(expect_failure(flights.run("k", fail)))
        await asyncio.sleep(0)
        second = group.create_task(flights.run("k", succeed))
        await asyncio.sleep(0)
        gate.set()
    assert (first.result(), second.result()) == ("failed", "done")


async def test_a_cancelled_run_is_taken_over_and_a_cancelled_waiter_leaves_it_alone() -> None:
    """Cancelling the runner lets a waiter run; cancelling a waiter changes nothing for the runner."""
    flights: SharedFlight[str, str] = SharedFlight()
    gate = asyncio.Event()

    async def wait() -> str:
        await gate.wait()
        return "done"

    async with asyncio.TaskGroup() as group:
        runner = group.create_task(flights.run("k", wait))
        await asyncio.sleep(0)
        waiter, heir = group.create_task(flights.run("k", wait)), group.create_task(flights.run("k", wait))
        await asyncio.sleep(0)
        waiter.cancel()
        await asyncio.sleep(0)
        runner.cancel()
        await asyncio.sleep(0)
        gate.set()
    assert runner.cancelled()
    assert waiter.cancelled()
    assert heir.result() == "done"


async def expect_failure(awaitable: Awaitable[str]) -> str:
    """Answers that the call failed."""
    with pytest.raises(LookupError):
        await awaitable
    return "failed"
