"""Who is served next, and who has to wait for how long."""

from __future__ import annotations

import asyncio
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.inference.admission import AdmissionGate
from services.inference.fair_queue import FairQueue
from services.kernel.errors import LimitExceeded

A, B, C = UUID(int=1), UUID(int=2), UUID(int=3)


def drain(queue: FairQueue[str], count: int) -> str:
    """The tenants of the next items: items are named by their tenant's letter and a number."""
    return "".join((queue.pop() or "-")[0] for _ in range(count))


def test_a_burst_does_not_starve_a_late_tenant() -> None:
    """A tenant that arrives behind another's hundred calls is served next but one, not after the hundred."""
    queue: FairQueue[str] = FairQueue()
    for number in range(100):
        queue.push(f"a{number}", "a", cost=100, weight=1)
    assert drain(queue, 3) == "aaa"
    queue.push("b0", "b", cost=100, weight=1)
    assert "b" in drain(queue, 2)


def test_service_follows_weight() -> None:
    """Of two backlogged tenants the one of weight 3 is served three times as often."""
    queue: FairQueue[str] = FairQueue()
    for number in range(40):
        queue.push(f"a{number}", "a", cost=100, weight=3)
        queue.push(f"b{number}", "b", cost=100, weight=1)
    assert drain(queue, 40).count("a") == 30


def test_service_follows_cost() -> None:
    """A tenant whose calls are four times as large gets a quarter as many of them."""
    queue: FairQueue[str] = FairQueue()
    for number in range(40):
        queue.push(f"a{number}", "a", cost=400, weight=1)
        queue.push(f"b{number}", "b", cost=100, weight=1)
    assert drain(queue, 50).count("a") == 10


def test_idle_tenants_save_up_no_credit() -> None:
    """A tenant that was silent for long gets its share from now on, not all it did not use."""
    queue: FairQueue[str] = FairQueue()
    for number in range(60):
        queue.push(f"a{number}", "a", cost=100, weight=1)
    drain(queue, 40)
    for number in range(20):
        queue.push(f"b{number}", "b", cost=100, weight=1)
    assert 9 <= drain(queue, 20).count("b") <= 11


def test_a_removed_item_is_never_served() -> None:
    """Items taken out are passed over, however many."""
    queue: FairQueue[str] = FairQueue()
    for number in range(300):
        queue.push(f"a{number}", "a", cost=1, weight=1)
    for number in range(299):
        queue.remove(f"a{number}")
    assert (len(queue), queue.pop(), queue.pop()) == (1, "a299", None)


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 1000), st.integers(0, 5)), max_size=60), st.integers(0, 60))
def test_every_item_is_served_exactly_once(pushed: list[tuple[str, int, int]], before: int) -> None:
    """Whatever comes in goes out once, and each tenant's items in their order."""
    queue: FairQueue[tuple[str, int]] = FairQueue()
    served: list[tuple[str, int]] = []
    for number, (tenant, cost, weight) in enumerate(pushed):
        queue.push((tenant, number), tenant, cost=cost, weight=weight)
        if number < before and (item := queue.pop()) is not None:
            served.append(item)
    while (item := queue.pop()) is not None:
        served.append(item)
    assert sorted(number for _, number in served) == list(range(len(pushed)))
    for tenant in "abc":
        own = [number for name, number in served if name == tenant]
        assert own == sorted(own)


class Calls:
    """Calls that hold a slot until they are told to end."""

    def __init__(self, gate: AdmissionGate) -> None:
        self.gate = gate
        self.admitted: list[str] = []
        self.ends: dict[str, asyncio.Event] = {}

    async def run(self, name: str, tenant: UUID, *, remaining_seconds: float = 60.0) -> None:
        self.ends[name] = asyncio.Event()
        async with self.gate.slot(tenant, weight=1, expected_tokens=100, remaining_seconds=remaining_seconds):
            self.admitted.append(name)
            await self.ends[name].wait()


async def settle_down() -> None:
    """Lets every task that can run do so."""
    for _ in range(10):
        await asyncio.sleep(0)


async def test_the_gate_admits_in_fair_order() -> None:
    """With one slot, two tenants' waiting calls take turns whoever came first."""
    calls = Calls(AdmissionGate(1, 10))
    async with asyncio.TaskGroup() as group:
        for name, tenant in (("a1", A), ("a2", A), ("a3", A), ("b1", B)):
            group.create_task(calls.run(name, tenant))
            await settle_down()
        for _ in range(4):
            calls.ends[calls.admitted[-1]].set()
            await settle_down()
    assert calls.admitted.index("b1") < calls.admitted.index("a3")
    assert (calls.gate.running, calls.gate.waiting) == (0, 0)


async def test_a_waiter_cancelled_while_a_slot_comes_free_takes_none() -> None:
    """Given up in the very turn of the loop in which another call leaves, a waiter neither takes its slot nor fails the one that left."""
    calls = Calls(AdmissionGate(1, 10))
    loop = asyncio.get_running_loop()
    running, waiting, last = (loop.create_task(calls.run(name, A)) for name in ("1", "2", "3"))
    await settle_down()
    calls.ends["1"].set()
    waiting.cancel()
    await settle_down()
    assert running.exception() is None
    assert (calls.gate.running, calls.gate.waiting, calls.admitted[-1]) == (1, 0, "3")
    calls.ends["3"].set()
    await last
    assert calls.gate.running == 0


async def test_a_cancelled_waiter_leaves_at_once_and_takes_no_slot() -> None:
    """Cancelling a waiting call frees its place; cancelling the running one admits the next."""
    calls = Calls(AdmissionGate(1, 10))
    loop = asyncio.get_running_loop()
    running, waiting, last = (loop.create_task(calls.run(name, A)) for name in ("1", "2", "3"))
    await settle_down()
    waiting.cancel()
    await settle_down()
    assert (calls.gate.running, calls.gate.waiting) == (1, 1)
    running.cancel()
    await settle_down()
    assert calls.admitted == ["1", "3"]
    calls.ends["3"].set()
    await last
    assert calls.gate.running == 0


async def test_a_waiter_cancelled_as_it_is_admitted_passes_its_slot_on() -> None:
    """A slot given to a call in the instant it is cancelled is not lost."""
    calls = Calls(AdmissionGate(1, 10))
    loop = asyncio.get_running_loop()
    first, second, third = (loop.create_task(calls.run(name, A)) for name in ("1", "2", "3"))
    await settle_down()
    first.cancel()
    await asyncio.sleep(0)
    second.cancel()
    await settle_down()
    assert calls.admitted == ["1", "3"]
    calls.ends["3"].set()
    await third


async def test_a_full_queue_says_how_long_the_wait_would_be() -> None:
    """A call that finds the queue full is refused with the expected wait; nothing waits for it."""
    calls = Calls(AdmissionGate(1, 1))
    loop = asyncio.get_running_loop()
    tasks = [loop.create_task(calls.run(name, A)) for name in ("1", "2")]
    await settle_down()
    with pytest.raises(LimitExceeded) as caught:
        await calls.run("3", B)
    assert caught.value.reason_name == "QUEUE_FULL"
    assert int(caught.value.metadata["expected_wait_ms"]) > 0
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)


async def test_a_wait_longer_than_the_deadline_is_refused_at_once() -> None:
    """A call whose deadline comes before its turn is told so instead of waiting for nothing."""
    calls = Calls(AdmissionGate(1, 10))
    task = asyncio.get_running_loop().create_task(calls.run("1", A))
    await settle_down()
    with pytest.raises(LimitExceeded):
        await calls.run("2", B, remaining_seconds=0.1)
    task.cancel()
    await asyncio.wait([task])
