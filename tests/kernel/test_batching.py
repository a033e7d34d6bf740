"""A batcher loses nothing, mixes nothing up, and makes a lone caller wait for nobody."""

import asyncio
import gc
from collections.abc import Sequence
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.kernel.batching import Batcher
from services.kernel.errors import NotFound, Unavailable
from services.kernel.ids import TenantId, new_uuid7
from services.kernel.request_context import bind_tenant, current_deadline, maybe_tenant
from services.kernel.tenant_context import TenantContext
from tests.support.waiting import eventually


class Store:
    """Doubles numbers, refuses negative ones, and can be held up."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.open = asyncio.Event()
        self.open.set()
        self.flushing = asyncio.Event()

    async def flush(self, items: list[int]) -> Sequence[int | Exception]:
        self.batches.append(items)
        self.flushing.set()
        await self.open.wait()
        return [item * 2 if item >= 0 else NotFound(str(item)) for item in items]


async def test_a_lone_item_is_flushed_at_once() -> None:
    """An idle batcher does not wait for company."""
    store = Store()
    batcher = Batcher(store.flush)
    assert await batcher.submit(4) == 8
    assert store.batches == [[4]]


async def test_items_arriving_during_a_flush_make_one_next_batch() -> None:
    """Group commit: however many arrive while one flush runs, the next takes them together."""
    store = Store()
    store.open.clear()
    batcher = Batcher(store.flush)
    async with asyncio.TaskGroup() as group:
        group.create_task(batcher.submit(0))
        await store.flushing.wait()
        tasks = [group.create_task(batcher.submit(number)) for number in range(1, 50)]
        await asyncio.sleep(0)
        store.open.set()
    assert [task.result() for task in tasks] == [number * 2 for number in range(1, 50)]
    assert [len(batch) for batch in store.batches] == [1, 49]


@given(st.lists(st.integers(-50, 50), max_size=60), st.integers(1, 7), st.integers(1, 3))
async def test_every_item_gets_its_own_answer(items: list[int], max_batch: int, max_in_flight: int) -> None:
    """Results and failures go to their own submitters, in batches no larger than allowed."""
    store = Store()
    batcher = Batcher(store.flush, max_batch=max_batch, max_in_flight=max_in_flight)

    async def one(item: int) -> int | str:
        try:
            return await batcher.submit(item)
        except NotFound as error:
            return error.metadata["resource"]

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(one(item)) for item in items]
    assert [task.result() for task in tasks] == [item * 2 if item >= 0 else str(item) for item in items]
    assert all(len(batch) <= max_batch for batch in store.batches)


@given(st.lists(st.integers(1, 9), max_size=60), st.integers(1, 12), st.integers(1, 3), st.integers(1, 20))
async def test_batches_are_bounded_by_what_their_items_count(sizes: list[int], max_batch: int, max_in_flight: int, enough: int) -> None:
    """No batch counts more than it may, unless it is one item; all are flushed in the order in which they came."""
    store = Store()
    batcher = Batcher(store.flush, size=abs, max_batch=max_batch, max_in_flight=max_in_flight, enough=enough)
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(batcher.submit(size)) for size in sizes]
    assert [task.result() for task in tasks] == [size * 2 for size in sizes]
    assert [size for batch in store.batches for size in batch] == sizes
    assert all(sum(batch) <= max_batch or len(batch) == 1 for batch in store.batches)


@pytest.mark.parametrize("together", [False, True])
async def test_a_flush_begins_beside_another_only_when_enough_waits(together: bool) -> None:
    """And never beyond how many may be under way; the last of what waits is flushed when it may be, however little it is."""
    store = Store()
    store.open.clear()
    batcher = Batcher(store.flush, size=abs, max_batch=10, max_in_flight=2, enough=6)
    batches = []
    async with asyncio.TaskGroup() as group:
        for size in (1, 5, 1, 9, 9):
            group.create_task(batcher.submit_all([size]) if together else batcher.submit(size))
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            batches.append([list(batch) for batch in store.batches])
        store.open.set()
    assert batches == [[[1]], [[1]], [[1], [5, 1]], [[1], [5, 1]], [[1], [5, 1]]]
    assert store.batches == [[1], [5, 1], [9], [9]]


async def test_beside_a_flush_that_takes_long_the_next_begins_however_little_it_is() -> None:
    """Also when nobody comes any more; behind one that does not take long they gather, as before."""
    store = Store()
    store.open.clear()
    batcher = Batcher(store.flush, max_in_flight=2, enough=6, beside_seconds=0.05)

    async def two_have_begun() -> bool:
        return len(store.batches) == 2

    async with asyncio.TaskGroup() as group:
        for item in (1, 2, 3):
            group.create_task(batcher.submit(item))
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        began = [list(batch) for batch in store.batches]
        await eventually(two_have_begun, within_seconds=10)
        # The oldest is late, but there is no more room beside it.
        group.create_task(batcher.submit(4))
        await asyncio.sleep(0.1)
        assert store.batches == [[1], [2, 3]]
        store.open.set()
    assert began == [[1]]
    assert store.batches == [[1], [2, 3], [4]]
    assert await batcher.submit(5) == 10


async def test_a_cancelled_submitter_does_not_cancel_the_batch() -> None:
    """The item was accepted: it is flushed, and the others get their answers."""
    store = Store()
    store.open.clear()
    batcher = Batcher(store.flush)
    async with asyncio.TaskGroup() as group:
        impatient = group.create_task(batcher.submit(1))
        await store.flushing.wait()
        second, third = group.create_task(batcher.submit(2)), group.create_task(batcher.submit(3))
        await asyncio.sleep(0)
        impatient.cancel()
        second.cancel()
        store.open.set()
    assert impatient.cancelled()
    assert second.cancelled()
    assert third.result() == 6
    assert store.batches == [[1], [2, 3]]


async def test_a_failing_flush_fails_its_items_and_the_next_flush_works() -> None:
    """The whole batch gets the flush's error; the batcher goes on."""
    failing = [True]

    async def flush(items: list[int]) -> Sequence[int | Exception]:
        if failing.pop():
            raise Unavailable("postgres")
        return items

    batcher = Batcher(flush)
    with pytest.raises(Unavailable):
        await batcher.submit(1)
    failing.append(False)
    assert await batcher.submit(2) == 2


async def test_a_flush_that_answers_too_few_is_a_fault_not_a_mixup() -> None:
    """Rather an error for all than an answer for the wrong one."""

    async def flush(items: list[int]) -> Sequence[int | Exception]:
        return []

    with pytest.raises(RuntimeError, match="1 items answered 0"):
        await Batcher(flush).submit(1)


async def test_close_flushes_what_was_accepted_and_refuses_more() -> None:
    """Nothing accepted is lost at shutdown."""
    store = Store()
    store.open.clear()
    batcher = Batcher(store.flush, max_batch=1)
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(batcher.submit(number)) for number in range(3)]
        await store.flushing.wait()
        closing = group.create_task(batcher.close())
        await asyncio.sleep(0)
        with pytest.raises(Unavailable):
            await batcher.submit(9)
        store.open.set()
    assert closing.done()
    assert [task.result() for task in tasks] == [0, 2, 4]


async def test_an_overfull_batcher_refuses_instead_of_growing() -> None:
    """Waiting items are bounded."""
    store = Store()
    store.open.clear()
    batcher = Batcher(store.flush, max_waiting=2)
    async with asyncio.TaskGroup() as group:
        for number in range(3):
            group.create_task(batcher.submit(number))
        await asyncio.sleep(0)
        with pytest.raises(Unavailable):
            await batcher.submit(3)
        store.open.set()


@given(st.lists(st.integers(-50, 50), max_size=40), st.integers(1, 7), st.integers(1, 3))
async def test_items_submitted_together_are_answered_in_their_order(items: list[int], max_batch: int, max_in_flight: int) -> None:
    """As many flushes as they need, and what fails of them is an answer like the others."""
    store = Store()
    batcher = Batcher(store.flush, max_batch=max_batch, max_in_flight=max_in_flight)
    found = await batcher.submit_all(items)
    assert [str(result) if isinstance(result, NotFound) else result for result in found] == [
        item * 2 if item >= 0 else str(NotFound(str(item))) for item in items
    ]
    assert len(store.batches) == -(-len(items) // max_batch)


async def test_a_flush_that_fails_fails_its_own_part_of_what_came_together() -> None:
    """The rest is answered."""

    async def flush(items: list[int]) -> Sequence[int | Exception]:
        if 0 in items:
            raise Unavailable("postgres")
        return items

    found = await Batcher(flush, max_batch=2).submit_all([3, 4, 0, 1, 5])
    assert [type(result) for result in found] == [int, int, Unavailable, Unavailable, int]


async def test_whoever_gives_up_on_many_leaves_them_flushed_and_nothing_unheard() -> None:
    """All of them were accepted; what failed among them before is nobody's, and no one is told of it."""
    store, unheard = Store(), list[object]()

    async def flush(items: list[int]) -> Sequence[int | Exception]:
        if items == [1]:
            await store.open.wait()
        return await store.flush(items) if items == [1] else [NotFound(str(item)) for item in items]

    store.open.clear()
    batcher = Batcher(flush, max_batch=1, max_in_flight=2)
    asyncio.get_running_loop().set_exception_handler(lambda _, context: unheard.append(context))
    many = asyncio.ensure_future(batcher.submit_all([1, 2, 3]))
    # The two that fail are done while the first is not.
    with pytest.raises(NotFound):
        await batcher.submit(4)
    many.cancel()
    await asyncio.wait([many])
    assert many.cancelled()
    store.open.set()
    await batcher.close()
    assert store.batches == [[1]]
    del many
    gc.collect()
    asyncio.get_running_loop().set_exception_handler(None)
    assert unheard == []


async def test_many_are_accepted_whole_or_not_at_all() -> None:
    """An overfull batcher takes none of them."""
    store = Store()
    batcher = Batcher(store.flush, max_waiting=2)
    with pytest.raises(Unavailable):
        await batcher.submit_all([1, 2, 3])
    assert await batcher.submit_all([4, 5]) == [8, 10]
    assert store.batches == [[4, 5]]


async def test_a_batch_runs_for_no_caller_in_particular() -> None:
    """The tenant and deadline of the caller who starts a flush do not reach the items of others."""
    seen: list[object] = []

    async def flush(items: list[int]) -> Sequence[int | Exception]:
        seen.extend((maybe_tenant(), current_deadline()))
        return items

    tenant = TenantContext(TenantId(new_uuid7()), "free", "local", "key:1", frozenset(), 1, datetime.now(UTC), False, "token")
    with bind_tenant(tenant, deadline=1.0):
        await Batcher(flush).submit(1)
    assert seen == [None, None]
