"""One fetch for all who wait, and nothing remembered that failed."""

import asyncio
import gc

import pytest

from services.kernel.request_context import RequestScope, enter_scope, scope
from services.kernel.single_flight import SingleFlightCache


async def test_concurrent_misses_share_one_fetch() -> None:
    """Ten callers of an unknown key cause one fetch and get its value."""
    cache: SingleFlightCache[str, int] = SingleFlightCache(10)
    fetches = 0

    async def fetch() -> int:
        nonlocal fetches
        fetches += 1
        await asyncio.sleep(0)
        return 7

    async with asyncio.TaskGroup() as group:
        answers = [group.create_task(cache.get("a", fetch)) for _ in range(10)]
    assert ([answer.result() for answer in answers], fetches) == ([7] * 10, 1)


async def test_values_are_forgotten_by_what_their_keys_say() -> None:
    """Every meant key is fetched again, one that was under way as well; the others stay remembered."""
    cache: SingleFlightCache[tuple[str, int], int] = SingleFlightCache(10)
    gate, fetches = asyncio.Event(), 0

    async def fetch() -> int:
        nonlocal fetches
        fetches += 1
        return fetches

    async def slow() -> int:
        await gate.wait()
        return 0

    for key in (("a", 1), ("a", 2), ("b", 1)):
        await cache.get(key, fetch)
    async with asyncio.TaskGroup() as group:
        under_way = group.create_task(cache.get(("a", 3), slow))
        await asyncio.sleep(0)
        cache.forget_where(lambda key: key[0] == "a")
        gate.set()
    assert under_way.result() == 0
    assert [cache.peek(key) for key in (("a", 1), ("a", 2), ("a", 3), ("b", 1))] == [None, None, None, 3]


async def test_a_failed_fetch_is_tried_again() -> None:
    """A failure reaches its waiters and is not remembered."""
    cache: SingleFlightCache[str, int] = SingleFlightCache(10)

    async def fail() -> int:
        raise ConnectionError

    async def succeed() -> int:
        return 1

    with pytest.raises(ConnectionError):
        await cache.get("a", fail)
    assert await cache.get("a", succeed) == 1


async def test_a_cancelled_waiter_leaves_the_fetch_to_the_others() -> None:
    """One caller giving up does not fail another who waits for the same value."""
    cache: SingleFlightCache[str, int] = SingleFlightCache(10)
    go_on = asyncio.Event()

    async def fetch() -> int:
        await go_on.wait()
        return 1

    async with asyncio.TaskGroup() as group:
        leaving = group.create_task(cache.get("a", fetch))
        staying = group.create_task(cache.get("a", fetch))
        await asyncio.sleep(0)
        leaving.cancel()
        await asyncio.sleep(0)
        go_on.set()
    assert leaving.cancelled()
    assert staying.result() == 1


async def test_a_fetch_that_fails_after_all_its_waiters_left_is_no_unheard_failure() -> None:
    """Who was cancelled wants no answer; the loop is told of no exception that nobody retrieved, and the next caller tries again."""
    cache: SingleFlightCache[str, int] = SingleFlightCache(4)
    gate, unheard = asyncio.Event(), list[object]()
    asyncio.get_running_loop().set_exception_handler(lambda _, context: unheard.append(context))

    async def fails() -> int:
        await gate.wait()
        raise OSError("away")

    async def answers() -> int:
        return 7

    waiter = asyncio.ensure_future(cache.get("key", fails))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    waiter.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiter
    gate.set()
    for _ in range(4):
        await asyncio.sleep(0)
    gc.collect()
    assert await cache.get("key", answers) == 7
    assert unheard == []


async def test_the_least_recently_used_value_goes_first() -> None:
    """The cache is bounded, and use keeps a value."""
    cache: SingleFlightCache[str, int] = SingleFlightCache(2)

    async def fetch() -> int:
        return 1

    for key in ("a", "b", "a", "c"):
        await cache.get(key, fetch)
    assert (cache.peek("a"), cache.peek("b"), cache.peek("c")) == (1, None, 1)


async def test_the_fetch_takes_nothing_of_the_callers_scope_along() -> None:
    """A caller's tenant and deadline stay with that caller."""
    cache: SingleFlightCache[str, bool] = SingleFlightCache(2)

    async def fetch() -> bool:
        return scope() is None

    enter_scope(RequestScope(deadline=0.0))
    assert await cache.get("a", fetch)
