"""Collections and aliases."""

import asyncio

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from qdrant_client import AsyncQdrantClient, models
from qdrant_client import grpc as q

from .front import Front, fresh_name, stub, with_three_points

PLAIN = models.VectorParams(size=2, distance=models.Distance.DOT)


async def test_collection_is_described_as_it_was_defined(client: AsyncQdrantClient) -> None:
    """A collection's info carries its vectors, its modifiers, its overrides over the defaults and its count of points."""
    name = fresh_name()
    await client.create_collection(
        name,
        vectors_config={"d": models.VectorParams(size=4, distance=models.Distance.EUCLID, on_disk=True)},
        sparse_vectors_config={"s": models.SparseVectorParams(modifier=models.Modifier.IDF)},
        hnsw_config=models.HnswConfigDiff(m=8),
        optimizers_config=models.OptimizersConfigDiff(indexing_threshold=5000),
        on_disk_payload=True,
    )
    info = await client.get_collection(name)
    assert info.status == models.CollectionStatus.GREEN
    assert info.points_count == 0
    assert info.config.params.vectors == {"d": models.VectorParams(size=4, distance=models.Distance.EUCLID, on_disk=True)}
    assert info.config.params.sparse_vectors == {"s": models.SparseVectorParams(modifier=models.Modifier.IDF)}
    assert (info.config.hnsw_config.m, info.config.hnsw_config.ef_construct) == (8, 100)
    assert info.config.optimizer_config.indexing_threshold == 5000


async def test_existence_follows_creation_and_deletion(client: AsyncQdrantClient) -> None:
    """A collection exists from its creation to its deletion, and deleting it again says there was none."""
    name = fresh_name()
    assert not await client.collection_exists(name)
    assert await client.create_collection(name, vectors_config=PLAIN)
    assert await client.collection_exists(name)
    assert name in {known.name for known in (await client.get_collections()).collections}
    assert await client.delete_collection(name)
    assert not await client.collection_exists(name)
    assert not await client.delete_collection(name)


async def test_name_that_is_taken_is_refused(client: AsyncQdrantClient) -> None:
    """Creating a collection twice answers ALREADY_EXISTS."""
    name = fresh_name()
    await client.create_collection(name, vectors_config=PLAIN)
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await client.create_collection(name, vectors_config=PLAIN)
    assert refused.value.code() is grpc.StatusCode.ALREADY_EXISTS
    assert f"Collection `{name}` already exists!" in str(refused.value.details())


@pytest.mark.parametrize("name", ["..", "a/b", "a\\b", "", "x" * 256])
async def test_name_that_could_leave_the_directory_is_refused(front: Front, client: AsyncQdrantClient, name: str) -> None:
    """A name with a separator, of dots or of no or too many characters answers INVALID_ARGUMENT."""
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await client.create_collection(name, vectors_config=PLAIN)
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_unknown_collection_is_not_found(client: AsyncQdrantClient) -> None:
    """Any use of a collection that does not exist answers NOT_FOUND in Qdrant's words."""
    for use in (client.get_collection("nowhere"), client.count("nowhere"), client.query_points("nowhere", query=[1.0])):
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await use
        assert refused.value.code() is grpc.StatusCode.NOT_FOUND
        assert "Collection `nowhere` doesn't exist!" in str(refused.value.details())


async def test_alias_stands_for_its_collection(client: AsyncQdrantClient) -> None:
    """An alias serves reads, writes and info, can be renamed and deleted, and goes with its collection."""
    name, alias, renamed = await with_three_points(client), fresh_name(), fresh_name()
    await client.update_collection_aliases([_create(name, alias)])
    assert (await client.count(alias)).count == 3
    await client.delete(alias, models.PointIdsList(points=[3]), wait=True)
    assert (await client.get_collection(alias)).points_count == 2
    rename = models.RenameAliasOperation(rename_alias=models.RenameAlias(old_alias_name=alias, new_alias_name=renamed))
    await client.update_collection_aliases([rename])
    assert [known.alias_name for known in (await client.get_collection_aliases(name)).aliases] == [renamed]
    assert not await client.collection_exists(alias)
    await client.delete_collection(name)
    assert renamed not in {known.alias_name for known in (await client.get_aliases()).aliases}


async def test_alias_changes_are_all_or_none(client: AsyncQdrantClient) -> None:
    """When one action of a request fails, none of its actions took place."""
    name, alias = await with_three_points(client), fresh_name()
    with pytest.raises(grpc.aio.AioRpcError):
        await client.update_collection_aliases([_create(name, alias), _create("nowhere", fresh_name())])
    assert not await client.collection_exists(alias)


async def test_alias_swap_is_atomic_under_searches(client: AsyncQdrantClient) -> None:
    """While an alias moves between collections, every search through it finds exactly one of them, whole."""
    names, alias = [fresh_name(), fresh_name()], fresh_name()
    for number, name in enumerate(names):
        await client.create_collection(name, vectors_config=PLAIN)
        await client.upsert(name, [models.PointStruct(id=number, vector=[1.0, 0.0])], wait=True)
    await client.update_collection_aliases([_create(names[0], alias)])
    swapping, seen = True, set()

    async def search() -> None:
        while swapping:
            found = await client.query_points(alias, query=[1.0, 0.0])
            assert len(found.points) == 1
            seen.add(found.points[0].id)

    async with asyncio.TaskGroup() as tasks:
        for _ in range(4):
            tasks.create_task(search())
        for turn in range(20):
            drop = models.DeleteAliasOperation(delete_alias=models.DeleteAlias(alias_name=alias))
            await client.update_collection_aliases([drop, _create(names[(turn + 1) % 2], alias)])
        swapping = False
    assert seen == {0, 1}


async def test_swap_followed_by_deletion_of_the_old_collection_fails_no_search(client: AsyncQdrantClient) -> None:
    """A search that waited its turn while the alias moved on is answered by the new collection."""
    old, new, alias = await with_three_points(client), await with_three_points(client), fresh_name()
    await client.update_collection_aliases([_create(old, alias)])
    async with asyncio.TaskGroup() as tasks:
        searches = [tasks.create_task(client.count(alias)) for _ in range(20)]
        await client.update_collection_aliases([_create(new, alias)])
        await client.delete_collection(old)
    assert {search.result().count for search in searches} == {3}


async def test_health_is_told_without_a_key(front: Front) -> None:
    """Both health services answer a caller without credentials."""
    async with front.channel() as channel:
        reply = await stub(q.QdrantStub, channel).HealthCheck(q.HealthCheckRequest())
        assert reply.title.startswith("qdrant")
        standard = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
        assert standard.status == health_pb2.HealthCheckResponse.SERVING


def _create(collection_name: str, alias_name: str) -> models.CreateAliasOperation:
    return models.CreateAliasOperation(create_alias=models.CreateAlias(collection_name=collection_name, alias_name=alias_name))
