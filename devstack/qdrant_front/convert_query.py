"""Queries with their nested prefetches to the engine's. Serves nearest (dense, sparse, by id) and fusion (RRF with weights, DBSF).

A query by id looks the vector up in the same collection and leaves that point out of its own answer, as Qdrant does.
"""

from collections.abc import Callable
from typing import cast

from qdrant_client import grpc as q
from qdrant_edge import (
    AcornSearchParams,
    EdgeShard,
    Filter,
    Fusion,
    HasIdCondition,
    IdfParams,
    Prefetch,
    QuantizationSearchParams,
    Query,
    QueryRequest,
    SearchParams,
)

from .accepted import accept_only
from .convert_collection import Schema
from .convert_filter import engine_filter
from .convert_points import EngineVector, checked, sparse, with_payload, with_vectors
from .convert_values import EngineId, point_id
from .failure import not_found, unimplemented, wrong_input

DEFAULT_LIMIT = 10
DEFAULT_RRF_K = 2
DEEPEST_PREFETCH = 16

_SHARED_FIELDS = ("prefetch", "query", "using", "filter", "params", "score_threshold", "limit")


def engine_query(sent: q.QueryPoints, shard: EdgeShard, schema: Schema) -> QueryRequest:
    """Read a whole query; the shard is asked for the vectors of points named by id.

    Raises:
        Failure: UNIMPLEMENTED for a kind of query not served, NOT_FOUND for an unknown point.
    """
    accept_only(sent, "collection_name", "timeout", "read_consistency", "offset", "with_vectors", "with_payload", *_SHARED_FIELDS)
    scoring, filter_ = _scored(sent, shard, schema)
    return QueryRequest(
        limit=_limit(sent),
        offset=sent.offset if sent.HasField("offset") else None,
        query=scoring,
        prefetches=[_prefetch(inner, shard, schema, 1) for inner in sent.prefetch],
        with_vector=with_vectors(sent.with_vectors, schema),
        with_payload=with_payload(sent.with_payload, default=False),
        filter=filter_,
        score_threshold=sent.score_threshold if sent.HasField("score_threshold") else None,
        params=_params(sent.params) if sent.HasField("params") else None,
    )


def _prefetch(sent: q.PrefetchQuery, shard: EdgeShard, schema: Schema, depth: int) -> Prefetch:
    if depth > DEEPEST_PREFETCH:
        raise wrong_input(f"prefetch is nested deeper than {DEEPEST_PREFETCH}")
    accept_only(sent, *_SHARED_FIELDS)
    scoring, filter_ = _scored(sent, shard, schema)
    return Prefetch(
        limit=_limit(sent),
        query=scoring,
        prefetches=[_prefetch(inner, shard, schema, depth + 1) for inner in sent.prefetch],
        params=_params(sent.params) if sent.HasField("params") else None,
        filter=filter_,
        score_threshold=sent.score_threshold if sent.HasField("score_threshold") else None,
    )


def _limit(sent: q.QueryPoints | q.PrefetchQuery) -> int:
    if not sent.HasField("limit"):
        return DEFAULT_LIMIT
    if sent.limit < 1:
        raise wrong_input("limit must be 1 or larger")
    return sent.limit


def _scored(sent: q.QueryPoints | q.PrefetchQuery, shard: EdgeShard, schema: Schema) -> tuple[Query | Fusion | None, Filter | None]:
    """Return how to score and what to score among: the request's filter, less the point the query names."""
    own_filter = engine_filter(sent.filter) if sent.HasField("filter") else None
    match sent.query.WhichOneof("variant"):
        case None:
            return None, own_filter
        case "nearest":
            vector, excluded = _nearest(sent.query.nearest, sent.using, lambda known: _vector_of(known, sent.using, shard), schema)
            return Query.Nearest(vector, using=sent.using), _without(own_filter, excluded)
        case "fusion":
            return _fusion(Fusion.Dbsf() if sent.query.fusion == q.DBSF else Fusion.Rrf(DEFAULT_RRF_K)), own_filter
        case "rrf":
            rrf = sent.query.rrf
            return _fusion(Fusion.Rrf(rrf.k if rrf.HasField("k") else DEFAULT_RRF_K, list(rrf.weights) or None)), own_filter
        case other:
            raise unimplemented(f"Query.{other}")


def _fusion(built: Fusion.Rrf | Fusion.Dbsf) -> Fusion:
    # The engine's stubs do not say that the two are fusions.
    return cast(Fusion, built)


def _nearest(
    sent: q.VectorInput, using: str, look_up: Callable[[EngineId], EngineVector], schema: Schema
) -> tuple[EngineVector, EngineId | None]:
    match sent.WhichOneof("variant"):
        case "dense":
            return checked(using, list(sent.dense.data), schema), None
        case "sparse":
            return checked(using, sparse(sent.sparse), schema), None
        case "id":
            if using not in schema.dense and using not in schema.sparse:
                raise wrong_input(f"Not existing vector name error: {using}")
            known = point_id(sent.id)
            return look_up(known), known
        case None:
            raise wrong_input("No vector provided")
        case other:
            raise unimplemented(f"VectorInput.{other}")


def _vector_of(known: EngineId, using: str, shard: EdgeShard) -> EngineVector:
    records = shard.retrieve([known], False, [using])
    if not records:
        raise not_found(f"No point with id {known} found")
    stored = records[0].vector
    vector = stored.get(using) if isinstance(stored, dict) else stored
    if vector is None:
        raise not_found(f"Vector with name `{using}` for point {known} is not found")
    return vector


def _without(own_filter: Filter | None, excluded: EngineId | None) -> Filter | None:
    if excluded is None:
        return own_filter
    return Filter(must=[own_filter] if own_filter is not None else None, must_not=[HasIdCondition({excluded})])


def _params(sent: q.SearchParams) -> SearchParams:
    accept_only(sent, "hnsw_ef", "exact", "quantization", "indexed_only", "acorn", "idf")
    quantization, acorn, idf = None, None, None
    if sent.HasField("quantization"):
        quantization = QuantizationSearchParams(
            ignore=sent.quantization.ignore,
            rescore=sent.quantization.rescore if sent.quantization.HasField("rescore") else None,
            oversampling=sent.quantization.oversampling if sent.quantization.HasField("oversampling") else None,
        )
    if sent.HasField("acorn"):
        max_selectivity = sent.acorn.max_selectivity if sent.acorn.HasField("max_selectivity") else None
        acorn = AcornSearchParams(enable=sent.acorn.enable, max_selectivity=max_selectivity)
    if sent.HasField("idf"):
        idf = IdfParams(corpus=engine_filter(sent.idf.corpus) if sent.idf.HasField("corpus") else None)
    return SearchParams(
        hnsw_ef=sent.hnsw_ef if sent.HasField("hnsw_ef") else None,
        exact=sent.exact,
        quantization=quantization,
        indexed_only=sent.indexed_only,
        acorn=acorn,
        idf=idf,
    )
