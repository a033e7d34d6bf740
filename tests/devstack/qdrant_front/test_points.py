"""Points, payloads, filters and payload indexes."""

from datetime import UTC, datetime
from uuid import uuid4

import grpc
import pytest
from qdrant_client import AsyncQdrantClient, models

from .front import fresh_name, with_three_points

M = models


async def test_point_comes_back_as_it_was_stored(client: AsyncQdrantClient) -> None:
    """Ids of both kinds, nested payloads, dense and sparse vectors survive the round trip."""
    name, identity = await with_three_points(client), str(uuid4())
    payload = {"text": "ä", "deep": {"list": [1, 2.5, None, False, {"k": "v"}]}, "large": 2**53 + 1, "none": {}}
    vector: M.VectorStruct = {"dense": [0.0, 1.0, 0.0], "words": models.SparseVector(indices=[1, 4000000000], values=[0.5, 2.0])}
    written = await client.upsert(name, [M.PointStruct(id=identity, vector=vector, payload=payload)], wait=True)
    assert written.status == M.UpdateStatus.COMPLETED
    [record] = await client.retrieve(name, [identity, 999], with_payload=True, with_vectors=True)
    assert (record.id, record.payload, record.vector) == (identity, payload, vector)


async def test_selectors_return_only_what_they_name(client: AsyncQdrantClient, documents: str) -> None:
    """Payload can be included or excluded by key, vectors by name."""
    [included] = await client.retrieve(documents, [1], with_payload=["color"], with_vectors=["words"])
    assert included.payload == {"color": "red"}
    assert list(included.vector or {}) == ["words"]
    [excluded] = await client.retrieve(documents, [1], with_payload=M.PayloadSelectorExclude(exclude=["color", "tags"]))
    assert set(excluded.payload or {}) == {"size", "at"}


async def test_unnamed_vector_is_stored_and_searched(client: AsyncQdrantClient) -> None:
    """A collection with a single unnamed vector takes bare lists."""
    name = fresh_name()
    await client.create_collection(name, vectors_config=M.VectorParams(size=2, distance=M.Distance.EUCLID))
    await client.upsert(name, [M.PointStruct(id=1, vector=[0.0, 3.0]), M.PointStruct(id=2, vector=[0.0, 1.0])], wait=True)
    found = await client.query_points(name, query=[0.0, 0.0], with_vectors=True)
    assert [(hit.id, hit.score, hit.vector) for hit in found.points] == [(2, 1.0, [0.0, 1.0]), (1, 3.0, [0.0, 3.0])]


@pytest.mark.parametrize(
    "vector",
    [
        {"dense": [1.0, 2.0]},
        {"other": [1.0, 2.0, 3.0]},
        {"words": [1.0, 2.0, 3.0]},
        {"dense": models.SparseVector(indices=[1], values=[1.0])},
        {"words": models.SparseVector(indices=[1, 1], values=[1.0, 2.0])},
        {"words": models.SparseVector(indices=[1, 2], values=[1.0])},
    ],
)
async def test_vector_that_does_not_fit_stores_nothing_of_its_batch(
    client: AsyncQdrantClient, documents: str, vector: M.VectorStruct
) -> None:
    """A wrong dimension, name or kind of vector answers INVALID_ARGUMENT and leaves the other points of the batch unstored."""
    fitting = M.PointStruct(id=10, vector={"dense": [1.0, 0.0, 0.0]})
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await client.upsert(documents, [fitting, M.PointStruct.model_construct(id=11, vector=vector, payload={})], wait=True)
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert (await client.count(documents)).count == 3


async def test_points_are_deleted_by_id_and_by_filter(client: AsyncQdrantClient) -> None:
    """Deletion removes exactly the points selected."""
    name = await with_three_points(client)
    await client.delete(name, M.PointIdsList(points=[1, 77]), wait=True)
    await client.delete(name, M.FilterSelector(filter=M.Filter(must=[_is("color", "blue")])), wait=True)
    assert await _ids(client, name, None) == [2]


async def test_payload_is_merged_replaced_and_removed(client: AsyncQdrantClient) -> None:
    """SetPayload merges, OverwritePayload replaces, DeletePayload removes keys; each by id or by filter."""
    name = await with_three_points(client)
    await client.set_payload(name, {"size": 9}, points=[1], wait=True)
    await client.set_payload(name, {"inner": 1}, points=M.Filter(must=[_is("color", "red")]), key="nested", wait=True)
    await client.delete_payload(name, ["at", "tags"], points=[1], wait=True)
    await client.overwrite_payload(name, {"only": "this"}, points=[2], wait=True)
    first, second = await client.retrieve(name, [1, 2])
    assert first.payload == {"color": "red", "size": 9, "nested": {"inner": 1}}
    assert second.payload == {"only": "this"}


async def test_payload_of_a_missing_point_is_not_found(client: AsyncQdrantClient) -> None:
    """Setting payload on a point that does not exist answers NOT_FOUND."""
    name = await with_three_points(client)
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await client.set_payload(name, {"a": 1}, points=[404], wait=True)
    assert refused.value.code() is grpc.StatusCode.NOT_FOUND


async def test_scroll_pages_through_every_point_once(client: AsyncQdrantClient, documents: str) -> None:
    """Following the offsets of scroll visits each point once, in order of id."""
    first, offset = await client.scroll(documents, limit=2, with_payload=False)
    rest, end = await client.scroll(documents, limit=2, offset=offset, with_vectors=["dense"])
    assert ([point.id for point in first], [point.id for point in rest], end) == ([1, 2], [3], None)
    assert rest[0].payload is not None and rest[0].payload["color"] == "blue"


def _is(key: str, value: str | int | bool) -> M.FieldCondition:
    return M.FieldCondition(key=key, match=M.MatchValue(value=value))


FILTERS = [
    (M.Filter(must=[_is("color", "red")]), [1]),
    (M.Filter(must=[_is("size", 2)]), [2]),
    (M.Filter(must=[_is("whole", True)]), [3]),
    (M.Filter(must=[M.FieldCondition(key="color", match=M.MatchText(text="green"))]), [2]),
    (M.Filter(must=[M.FieldCondition(key="color", match=M.MatchAny(any=["red", "blue"]))]), [1, 3]),
    (M.Filter(must=[M.FieldCondition(key="size", match=M.MatchAny(any=[1, 2]))]), [1, 2]),
    (M.Filter(must=[M.FieldCondition(key="color", match=M.MatchExcept(**{"except": ["red"]}))]), [2, 3]),
    (M.Filter(must=[M.FieldCondition(key="size", range=M.Range(gt=1, lte=3))]), [2, 3]),
    (M.Filter(must=[M.FieldCondition(key="at", range=M.DatetimeRange(gte=datetime(2024, 6, 1, tzinfo=UTC)))]), [2]),
    (M.Filter(must=[M.IsEmptyCondition(is_empty=M.PayloadField(key="tags"))]), [2, 3]),
    (M.Filter(must=[M.IsNullCondition(is_null=M.PayloadField(key="note"))]), [3]),
    (M.Filter(must=[M.HasIdCondition(has_id=[1, 3, 8])]), [1, 3]),
    (M.Filter(must_not=[_is("color", "red")]), [2, 3]),
    (M.Filter(should=[_is("color", "red"), _is("size", 3)]), [1, 3]),
    (M.Filter(min_should=M.MinShould(conditions=[_is("color", "red"), _is("size", 1), _is("whole", True)], min_count=2)), [1]),
    (M.Filter(must=[M.Filter(should=[_is("size", 1), _is("size", 2)])], must_not=[_is("color", "green")]), [1]),
    (M.Filter(must=[M.NestedCondition(nested=M.Nested(key="parts", filter=M.Filter(must=[_is("n", 1), _is("ok", True)])))]), [3]),
    (M.Filter(must=[M.FieldCondition(key="tags", values_count=M.ValuesCount(gte=2))]), [1]),
    (M.Filter(), [1, 2, 3]),
]


async def test_filters_select_what_they_say(client: AsyncQdrantClient, documents: str) -> None:
    """Every clause and kind of condition selects the points it describes, in scroll, count and query alike."""
    for filter_, expected in FILTERS:
        assert await _ids(client, documents, filter_) == expected, filter_
        assert (await client.count(documents, filter_)).count == len(expected), filter_
        found = await client.query_points(documents, query=[1.0, 0.0, 0.0], using="dense", query_filter=filter_)
        assert sorted(int(hit.id) for hit in found.points) == expected, filter_


async def test_payload_indexes_are_created_listed_and_dropped(client: AsyncQdrantClient) -> None:
    """Each kind of payload index is built, shown in the collection's info and removed; filters agree with and without it."""
    name = await with_three_points(client)
    kinds = {"color": "keyword", "size": "integer", "weight": "float", "whole": "bool", "body": "text", "ref": "uuid", "at": "datetime"}
    for field, kind in kinds.items():
        await client.create_payload_index(name, field, M.PayloadSchemaType(kind), wait=True)
    await client.create_payload_index(name, "owner", M.KeywordIndexParams(type=M.KeywordIndexType.KEYWORD, is_tenant=True), wait=True)
    schema = (await client.get_collection(name)).payload_schema
    assert {field: index.data_type.value for field, index in schema.items()} == {**kinds, "owner": "keyword"}
    assert schema["size"].points == 3
    assert await _ids(client, name, M.Filter(must=[_is("color", "red")])) == [1]
    await client.delete_payload_index(name, "size", wait=True)
    assert "size" not in (await client.get_collection(name)).payload_schema


async def _ids(client: AsyncQdrantClient, name: str, filter_: M.Filter | None) -> list[int]:
    points, _ = await client.scroll(name, scroll_filter=filter_, limit=100)
    return [int(point.id) for point in points]
