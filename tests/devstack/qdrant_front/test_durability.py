"""What outlives the process."""

import asyncio
import fcntl
import signal
from pathlib import Path

import pytest
from qdrant_client import grpc as q
from qdrant_client import models
from qdrant_edge import EdgeShard, Point, UpdateOperation

from devstack.qdrant_front.convert_collection import Schema, engine_config
from devstack.qdrant_front.optimize import Optimized, optimize_all
from devstack.qdrant_front.server import Settings, serve
from devstack.qdrant_front.store import Store

from .front import API_KEY, running_front, with_three_points


async def test_acknowledged_writes_survive_a_kill_and_a_termination(tmp_path: Path) -> None:
    """After kill -9 every acknowledged write is there again; SIGTERM then ends with status zero, shards closed, the key in no file."""
    with running_front(tmp_path) as front:
        async with front.client() as client:
            name = await with_three_points(client)
            await client.create_payload_index(name, "color", models.PayloadSchemaType.KEYWORD, wait=True)
            create = models.CreateAlias(collection_name=name, alias_name="current")
            await client.update_collection_aliases([models.CreateAliasOperation(create_alias=create)])
            for number in range(100, 150):
                await client.upsert(name, [models.PointStruct(id=number, vector={"dense": [0.0, 1.0, 0.0]})], wait=True)
            await client.delete(name, models.PointIdsList(points=[100]), wait=True)
            front.kill()
    with running_front(tmp_path) as front:
        async with front.client() as client:
            assert (await client.count("current")).count == 3 + 49
            [record] = await client.retrieve("current", [3], with_vectors=True)
            assert record.payload is not None and record.payload["color"] == "blue"
            assert list((await client.get_collection(name)).payload_schema) == ["color"]
            await client.delete(name, models.PointIdsList(points=[101]), wait=True)
        front.process.send_signal(signal.SIGTERM)
        assert front.process.wait(10) == 0
    assert not any(API_KEY.encode() in path.read_bytes() for path in tmp_path.glob("*.*"))
    shard = EdgeShard.load(str(tmp_path / "collections" / name))
    assert shard.info().points_count == 3 + 48
    shard.close()


async def test_half_made_collection_is_gone_after_a_restart(tmp_path: Path) -> None:
    """A directory the catalog does not name, left by a crash in a creation or deletion, is removed; its name is free."""
    vectors = q.VectorsConfig(params=q.VectorParams(size=2, distance=q.Dot))
    kept, lost = (q.CreateCollection(collection_name=name, vectors_config=vectors) for name in ("kept", "lost"))
    before = Store(tmp_path, max_open_shards=2)
    await before.create(kept)
    await before.shards.create("lost", engine_config(lost))
    await before.close()
    after = Store(tmp_path, max_open_shards=2)
    assert [directory.name for directory in (tmp_path / "collections").iterdir()] == ["kept"]
    await after.create(lost)
    assert sorted(after.catalog.names.collections) == ["kept", "lost"]
    await after.close()


async def test_second_server_on_the_same_directory_is_refused(tmp_path: Path) -> None:
    """Two servers never share a directory: the second ends, naming the reason."""
    tmp_path.joinpath("lock").touch()
    with tmp_path.joinpath("lock").open("r") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        settings = Settings(port=0, data_dir=tmp_path, max_open_shards=2, api_key=API_KEY)
        with pytest.raises(SystemExit, match="another server uses"):
            await serve(settings, lambda port: None, asyncio.Event())


async def test_indexes_are_built_while_the_server_is_stopped(tmp_path: Path) -> None:
    """Optimizing a stopped directory builds the index the definition asks for, and the collection serves on."""
    hnsw = q.HnswConfigDiff(full_scan_threshold=1)
    vectors = q.VectorsConfig(params=q.VectorParams(size=16, distance=q.Dot, hnsw_config=hnsw))
    optimizers = q.OptimizersConfigDiff(indexing_threshold=1)
    before = Store(tmp_path, max_open_shards=2)
    await before.create(q.CreateCollection(collection_name="c", vectors_config=vectors, optimizers_config=optimizers))

    def fill(shard: EdgeShard, _: Schema) -> None:
        points = [Point(number, {"": [float(number)] * 16}) for number in range(500)]
        shard.update(UpdateOperation.upsert_points(points))

    await before.write("c", fill)
    await before.close()
    assert list(optimize_all(tmp_path)) == [Optimized("c", changed=True, point_count=500, indexed_vector_count=500)]
    after = Store(tmp_path, max_open_shards=2)
    assert (await after.read("c", lambda shard, _: shard.info())).indexed_vectors_count == 500
    await after.close()
