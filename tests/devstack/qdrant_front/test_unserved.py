"""What this server does not do is said by name."""

from collections.abc import Callable

import grpc
import pytest
from google.protobuf.message import Message
from qdrant_client import grpc as q

from .front import API_KEY, Front, fresh_name

VECTORS = q.VectorsConfig(params=q.VectorParams(size=2, distance=q.Dot))
SHARD_KEYS = q.ShardKeySelector(shard_keys=[q.ShardKey(keyword="a")])

CASES: list[tuple[str, Callable[[str], Message], str]] = [
    (
        "/qdrant.Collections/Create",
        lambda name: q.CreateCollection(
            collection_name=fresh_name(),
            vectors_config=VECTORS,
            quantization_config=q.QuantizationConfig(binary=q.BinaryQuantization()),
        ),
        "CreateCollection.quantization_config",
    ),
    (
        "/qdrant.Collections/Create",
        lambda name: q.CreateCollection(collection_name=fresh_name(), vectors_config=VECTORS, shard_number=2),
        "CreateCollection.shard_number",
    ),
    (
        "/qdrant.Collections/Create",
        lambda name: q.CreateCollection(
            collection_name=fresh_name(), vectors_config=VECTORS, optimizers_config=q.OptimizersConfigDiff(memmap_threshold=1)
        ),
        "OptimizersConfigDiff.memmap_threshold",
    ),
    ("/qdrant.Points/Upsert", lambda name: q.UpsertPoints(collection_name=name, shard_key_selector=SHARD_KEYS), "shard_key_selector"),
    (
        "/qdrant.Points/Query",
        lambda name: q.QueryPoints(collection_name=name, lookup_from=q.LookupLocation(collection_name=name)),
        "QueryPoints.lookup_from",
    ),
    ("/qdrant.Points/Query", lambda name: q.QueryPoints(collection_name=name, query=q.Query(sample=q.Random)), "Query.sample"),
    (
        "/qdrant.Points/Query",
        lambda name: q.QueryPoints(
            collection_name=name, using="dense", query=q.Query(nearest=q.VectorInput(document=q.Document(text="x", model="m")))
        ),
        "VectorInput.document",
    ),
    ("/qdrant.Points/Scroll", lambda name: q.ScrollPoints(collection_name=name, order_by=q.OrderBy(key="size")), "ScrollPoints.order_by"),
    (
        "/qdrant.Points/Count",
        lambda name: q.CountPoints(collection_name=name, filter=q.Filter(must=[q.Condition(slice=q.SliceCondition(total=2, index=1))])),
        "Condition.slice",
    ),
    (
        "/qdrant.Points/CreateFieldIndex",
        lambda name: q.CreateFieldIndexCollection(
            collection_name=name,
            field_name="f",
            field_index_params=q.PayloadIndexParams(text_index_params=q.TextIndexParams(stopwords=q.StopwordsSet(custom=["x"]))),
        ),
        "TextIndexParams.stopwords",
    ),
    ("/qdrant.Points/Facet", lambda name: q.FacetCounts(collection_name=name, key="color"), "/qdrant.Points/Facet"),
    ("/qdrant.Collections/Update", lambda name: q.UpdateCollection(collection_name=name), "/qdrant.Collections/Update"),
]


@pytest.mark.parametrize(("method", "request_for", "named"), CASES, ids=[case[2] for case in CASES])
async def test_unserved_part_of_the_api_is_refused_by_name(
    front: Front, documents: str, method: str, request_for: Callable[[str], Message], named: str
) -> None:
    """A method, query, condition or field outside the surface answers UNIMPLEMENTED and names itself."""
    async with front.channel() as channel:
        call: grpc.aio.UnaryUnaryMultiCallable[Message, bytes] = channel.unary_unary(
            method, request_serializer=lambda message: message.SerializeToString()
        )
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await call(request_for(documents), metadata=(("api-key", API_KEY),))
    assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED
    assert named in str(refused.value.details())
