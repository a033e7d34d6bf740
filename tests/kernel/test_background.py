"""A background loop runs until it is stopped, whatever happens inside it."""

import asyncio

import pytest
import structlog.testing

from services.kernel.background import BackgroundTasks


async def test_a_crashed_loop_is_logged_and_restarted() -> None:
    """A crash costs a short pause, not the loop."""
    tasks, runs, again = BackgroundTasks(), [0], asyncio.Event()

    async def loop() -> None:
        runs[0] += 1
        if runs[0] == 1:
            raise ValueError("first time")
        again.set()
        await asyncio.Event().wait()

    with structlog.testing.capture_logs() as lines:
        tasks.start("sweep", loop)
        async with asyncio.timeout(5):
            await again.wait()
    assert [(line["event"], line["loop"]) for line in lines] == [("background_loop_crashed", "sweep")]
    assert tasks.running() == ("sweep",)
    await tasks.close()
    assert tasks.running() == ()


async def test_loops_stop_in_reverse_order() -> None:
    """What was started last may depend on what was started first, so it stops first."""
    tasks, stopped, started = BackgroundTasks(), [], []

    def loop_named(name: str) -> None:
        ready = asyncio.Event()
        started.append(ready)

        async def loop() -> None:
            ready.set()
            try:
                await asyncio.Event().wait()
            finally:
                stopped.append(name)

        tasks.start(name, loop)

    for name in ("a", "b", "c"):
        loop_named(name)
    for ready in started:
        await ready.wait()
    await tasks.close()
    assert stopped == ["c", "b", "a"]


async def test_a_loop_that_returns_is_over() -> None:
    """Returning is not crashing."""
    tasks, runs = BackgroundTasks(), []

    async def loop() -> None:
        runs.append(1)

    tasks.start("once", loop)
    async with asyncio.timeout(5):
        while tasks.running():
            await asyncio.wait(tasks._tasks.values())
    assert runs == [1]
    await tasks.close()


async def test_a_name_is_used_once_and_a_closed_owner_starts_nothing() -> None:
    """Two loops of one name would be one too many."""
    tasks = BackgroundTasks()
    tasks.start("sweep", asyncio.Event().wait)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError):
        tasks.start("sweep", asyncio.Event().wait)  # type: ignore[arg-type]
    await tasks.close()
    with pytest.raises(RuntimeError):
        tasks.start("late", asyncio.Event().wait)  # type: ignore[arg-type]


async def test_a_loop_that_ignores_its_end_does_not_hold_up_the_others() -> None:
    """Close waits a bounded time and says which loop would not stop."""
    tasks, begun, release = BackgroundTasks(), asyncio.Event(), asyncio.Event()

    async def stubborn() -> None:
        begun.set()
        while not release.is_set():
            try:
                await release.wait()
            except asyncio.CancelledError:
                continue

    tasks.start("stubborn", stubborn)
    await begun.wait()
    with structlog.testing.capture_logs() as lines:
        await tasks.close(timeout_seconds=0.05)
    assert lines[0]["event"] == "background_loop_ignored_cancellation"
    release.set()
    await asyncio.wait(tasks._tasks.values())
