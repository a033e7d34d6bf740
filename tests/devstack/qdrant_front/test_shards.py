"""The store beneath the server: open shards are bounded, panics are contained, cancelled calls finish."""

import asyncio
from collections.abc import AsyncIterator, Awaitable
from pathlib import Path
from threading import Event

import grpc
import pytest
from qdrant_client import grpc as q
from qdrant_edge import EdgeShard, Point, Query, SearchRequest, SparseVector, UpdateOperation

from devstack.qdrant_front.convert_collection import Schema
from devstack.qdrant_front.failure import Failure
from devstack.qdrant_front.store import Store


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[Store]:
    """A store that keeps two shards open."""
    opened = Store(tmp_path, max_open_shards=2)
    yield opened
    await opened.close()


def _definition(name: str) -> q.CreateCollection:
    sparse = q.SparseVectorConfig(map={"words": q.SparseVectorParams()})
    vectors = q.VectorsConfig(params=q.VectorParams(size=2, distance=q.Dot))
    return q.CreateCollection(collection_name=name, vectors_config=vectors, sparse_vectors_config=sparse)


def _store_point(shard: EdgeShard, _: Schema) -> None:
    shard.update(UpdateOperation.upsert_points([Point(1, {"": [1.0, 0.0], "words": SparseVector([1], [1.0])})]))


def _count(shard: EdgeShard, _: Schema) -> int:
    return shard.info().points_count


async def test_open_shards_stay_within_their_bound(store: Store) -> None:
    """With more collections than may be open, each keeps its points while it is closed and opened again."""
    names = [f"c{number}" for number in range(5)]
    for name in names:
        await store.create(_definition(name))
        await store.write(name, _store_point)
        assert store.shards.open_count <= 2
    for name in names * 2:
        assert await store.read(name, _count) == 1
        assert store.shards.open_count <= 2


async def test_panic_of_the_engine_ends_one_call_and_nothing_else(store: Store) -> None:
    """A query the engine panics on answers INTERNAL; the collection serves the next call."""
    await store.create(_definition("c"))
    await store.write("c", _store_point)

    def panicking(shard: EdgeShard, _: Schema) -> object:
        return shard.search(SearchRequest(Query.Nearest(SparseVector([1, 1], [1.0]), using="words"), 1))

    with pytest.raises(Failure) as refused:
        await store.read("c", panicking)
    assert refused.value.code is grpc.StatusCode.INTERNAL
    assert "panicked" in refused.value.message
    assert await store.read("c", _count) == 1


class SlowWrite:
    """Stores a point once it is let go, so that what waits behind it can be seen to wait."""

    def __init__(self) -> None:
        self.entered, self._release, self._loop = asyncio.Event(), Event(), asyncio.get_running_loop()

    def __call__(self, shard: EdgeShard, schema: Schema) -> None:
        self._loop.call_soon_threadsafe(self.entered.set)
        self._release.wait(5)
        _store_point(shard, schema)

    def let_go(self) -> None:
        self._release.set()


async def test_cancelled_write_ends_before_the_next_call_begins(store: Store) -> None:
    """A caller that gives up leaves its write to finish, and nothing else enters the collection meanwhile."""
    await store.create(_definition("c"))
    slow = SlowWrite()
    async with asyncio.TaskGroup() as tasks:
        writing = tasks.create_task(store.write("c", slow))
        await slow.entered.wait()
        counting = tasks.create_task(store.read("c", _count))
        writing.cancel()
        done, _ = await asyncio.wait([counting], timeout=0.2)
        assert not done
        slow.let_go()
    assert writing.cancelled()
    assert counting.result() == 1


async def test_call_that_waited_is_done_on_what_its_name_means_now(store: Store) -> None:
    """A read through an alias that moved while the read waited is answered by the alias's new collection."""
    await store.create(_definition("old"))
    await store.create(_definition("new"))
    store.catalog.change_aliases([q.AliasOperations(create_alias=q.CreateAlias(collection_name="old", alias_name="current"))])
    slow = SlowWrite()
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(store.write("current", slow))
        await slow.entered.wait()
        counting = tasks.create_task(store.read("current", _count))
        await asyncio.wait([counting], timeout=0.05)
        store.catalog.change_aliases([q.AliasOperations(create_alias=q.CreateAlias(collection_name="new", alias_name="current"))])
        slow.let_go()
    assert counting.result() == 0
    assert await store.read("old", _count) == 1


async def test_call_that_waited_for_a_deletion_finds_nothing(store: Store) -> None:
    """A read queued behind the deletion of its collection answers NOT_FOUND."""
    await store.create(_definition("c"))
    slow = SlowWrite()
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(store.write("c", slow))
        await slow.entered.wait()
        tasks.create_task(store.delete("c"))
        await asyncio.wait([counting := tasks.create_task(_refusal(store.read("c", _count)))], timeout=0.05)
        slow.let_go()
    assert counting.result() is grpc.StatusCode.NOT_FOUND


async def _refusal(attempt: Awaitable[object]) -> grpc.StatusCode | None:
    try:
        await attempt
    except Failure as refused:
        return refused.code
    return None
