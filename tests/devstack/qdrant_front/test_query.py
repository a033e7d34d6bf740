"""Queries: nearest, sparse, by id, fused, batched."""

import grpc
import pytest
from qdrant_client import AsyncQdrantClient, models
from qdrant_client import grpc as q

from .front import API_KEY, Front, stub, with_three_points

M = models
DENSE = M.Prefetch(query=[1.0, 0.0, 0.0], using="dense", limit=3)
WORDS = M.Prefetch(query=M.SparseVector(indices=[8], values=[1.0]), using="words", limit=3)


def _ids(answer: M.QueryResponse) -> list[int]:
    return [int(hit.id) for hit in answer.points]


async def test_nearest_is_ranked_limited_offset_and_cut_off(client: AsyncQdrantClient, documents: str) -> None:
    """A dense query ranks by similarity and honours limit, offset, threshold and search parameters."""
    query, exact = [1.0, 0.0, 0.0], M.SearchParams(exact=True, hnsw_ef=16)
    assert _ids(await client.query_points(documents, query=query, using="dense", search_params=exact)) == [1, 2, 3]
    assert _ids(await client.query_points(documents, query=query, using="dense", limit=1, offset=1)) == [2]
    assert _ids(await client.query_points(documents, query=query, using="dense", score_threshold=0.5)) == [1, 2]


async def test_sparse_query_finds_only_points_that_share_a_word(client: AsyncQdrantClient, documents: str) -> None:
    """A sparse query ranks by weight and leaves out points without any of its indices."""
    found = await client.query_points(documents, query=M.SparseVector(indices=[8], values=[1.0]), using="words")
    assert _ids(found) == [3, 2]


async def test_query_by_id_leaves_that_point_out(client: AsyncQdrantClient, documents: str) -> None:
    """A query by a point's id uses its vector, excludes it and keeps the caller's filter."""
    assert _ids(await client.query_points(documents, query=1, using="dense")) == [2, 3]
    only_blue = M.Filter(must=[M.FieldCondition(key="color", match=M.MatchValue(value="blue"))])
    assert _ids(await client.query_points(documents, query=1, using="dense", query_filter=only_blue)) == [3]
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await client.query_points(documents, query=404, using="dense")
    assert refused.value.code() is grpc.StatusCode.NOT_FOUND
    assert "No point with id 404 found" in str(refused.value.details())


async def test_hybrid_query_is_fused_by_reciprocal_rank(client: AsyncQdrantClient, documents: str) -> None:
    """RRF scores each point by the sum of 1 / (2 + rank) over the prefetches, ranks from zero."""
    found = await client.query_points(documents, prefetch=[DENSE, WORDS], query=M.FusionQuery(fusion=M.Fusion.RRF), with_payload=["color"])
    scores = {int(hit.id): hit.score for hit in found.points}
    assert scores == pytest.approx({1: 1 / 2, 2: 1 / 3 + 1 / 3, 3: 1 / 4 + 1 / 2})
    assert found.points[0].payload == {"color": "blue"}


async def test_weights_and_constant_of_rank_fusion_are_honoured(client: AsyncQdrantClient, documents: str) -> None:
    """A weight moves the ranking towards its prefetch."""
    dense_first = await client.query_points(documents, prefetch=[DENSE, WORDS], query=M.RrfQuery(rrf=M.Rrf(k=2, weights=[10.0, 0.1])))
    assert _ids(dense_first)[0] == 1


async def test_nested_prefetch_is_fused_by_distribution(client: AsyncQdrantClient, documents: str) -> None:
    """DBSF works over prefetches that are themselves fused from prefetches."""
    inner = M.Prefetch(prefetch=[DENSE, WORDS], query=M.FusionQuery(fusion=M.Fusion.RRF), limit=2)
    found = await client.query_points(documents, prefetch=[inner, WORDS], query=M.FusionQuery(fusion=M.Fusion.DBSF))
    assert sorted(_ids(found)) == [2, 3]


async def test_prefetch_is_rescored_and_filtered(client: AsyncQdrantClient, documents: str) -> None:
    """A nearest query over a prefetch rescoring keeps to the prefetch's candidates."""
    assert _ids(await client.query_points(documents, prefetch=[WORDS], query=[1.0, 0.0, 0.0], using="dense")) == [2, 3]


async def test_batch_answers_each_query_in_order(client: AsyncQdrantClient, documents: str) -> None:
    """A batch returns one answer a query, in the order asked."""
    answers = await client.query_batch_points(
        documents, [M.QueryRequest(query=[0.0, 0.0, 1.0], using="dense", limit=1), M.QueryRequest(query=2, using="dense", limit=1)]
    )
    assert [_ids(answer) for answer in answers] == [[3], [1]]


async def test_batch_cannot_name_a_second_collection(front: Front, client: AsyncQdrantClient, documents: str) -> None:
    """A query inside a batch that names another collection answers INVALID_ARGUMENT."""
    other = await with_three_points(client)
    request = q.QueryBatchPoints(collection_name=documents, query_points=[q.QueryPoints(collection_name=other, limit=1)])
    async with front.channel() as channel:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await stub(q.PointsStub, channel).QueryBatch(request, metadata=(("api-key", API_KEY),))
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize(("query", "using"), [([1.0, 0.0], "dense"), ([1.0, 0.0, 0.0], "other"), ([1.0, 0.0, 0.0], "words")])
async def test_query_vector_that_does_not_fit_is_refused(client: AsyncQdrantClient, documents: str, query: list[float], using: str) -> None:
    """A query of the wrong dimension, name or kind answers INVALID_ARGUMENT."""
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await client.query_points(documents, query=query, using=using)
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_request_that_outlives_its_own_timeout_is_ended(front: Front, documents: str) -> None:
    """The request's timeout field is kept: one of no seconds answers DEADLINE_EXCEEDED, and the collection serves on."""
    metadata = (("api-key", API_KEY),)
    async with front.channel() as channel:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await stub(q.PointsStub, channel).Query(q.QueryPoints(collection_name=documents, timeout=0), metadata=metadata)
        served = await stub(q.PointsStub, channel).Query(q.QueryPoints(collection_name=documents, timeout=5), metadata=metadata)
    assert refused.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert len(served.result) == 3
