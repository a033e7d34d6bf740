"""A collection's definition: from the wire to the engine's configuration and to the schema writes are checked against, and back as info.

Refuses quantization, multivectors, custom sharding, replicas and strict mode. What is left open gets Qdrant's documented defaults.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qdrant_client import grpc as q
from qdrant_edge import (
    Distance,
    EdgeConfig,
    EdgeOptimizersConfig,
    EdgeSparseVectorParams,
    EdgeVectorParams,
    HnswIndexConfig,
    Modifier,
)

from .accepted import accept_only
from .catalog import Definition
from .convert_index import schema_info
from .failure import unimplemented, wrong_input

if TYPE_CHECKING:  # named by the engine's stubs, absent from its module
    from qdrant_edge import ShardInfo

# Source: Qdrant's configuration reference, sections hnsw_index, optimizers and wal.
HNSW_DEFAULTS = q.HnswConfigDiff(m=16, ef_construct=100, full_scan_threshold=10_000, max_indexing_threads=0, on_disk=False)
OPTIMIZER_DEFAULTS = q.OptimizersConfigDiff(
    deleted_threshold=0.2, vacuum_min_vector_number=1000, default_segment_number=0, indexing_threshold=10_000, flush_interval_sec=30
)
WAL_DEFAULTS = q.WalConfigDiff(wal_capacity_mb=32, wal_segments_ahead=0)
# One thread a shard: hundreds of shards are open at once, and the engine runs one call at a time in any case.
SEARCH_THREADS_PER_SHARD = 1
LARGEST_DIMENSION = 65_536

_DISTANCES = {q.Cosine: Distance.Cosine, q.Euclid: Distance.Euclid, q.Dot: Distance.Dot, q.Manhattan: Distance.Manhattan}


@dataclass(frozen=True, slots=True)
class Schema:
    """Which vectors a collection has: dense ones with their dimension, the unnamed one under the empty name, and sparse ones."""

    dense: Mapping[str, int]
    sparse: frozenset[str]


def _dense_params(request: q.CreateCollection) -> dict[str, q.VectorParams]:
    match request.vectors_config.WhichOneof("config"):
        case "params":
            return {"": request.vectors_config.params}
        case "params_map":
            return dict(request.vectors_config.params_map.map)
    return {}


def schema_of(request: q.CreateCollection) -> Schema:
    """Read the schema off a definition."""
    dense = {name: params.size for name, params in _dense_params(request).items()}
    return Schema(dense, frozenset(request.sparse_vectors_config.map))


def engine_config(request: q.CreateCollection) -> EdgeConfig:
    """Build the engine's configuration, refusing what a single node of the engine does not have.

    Raises:
        Failure: UNIMPLEMENTED or INVALID_ARGUMENT.
    """
    accept_only(
        request,
        *("collection_name", "timeout", "vectors_config", "sparse_vectors_config", "hnsw_config", "optimizers_config"),
        *("on_disk_payload", "shard_number", "replication_factor", "write_consistency_factor", "sharding_method", "metadata"),
    )
    _check_single_node(request)
    sparse = {name: _sparse(params) for name, params in request.sparse_vectors_config.map.items()}
    return EdgeConfig(
        vectors={name: _dense(params) for name, params in _dense_params(request).items()},
        sparse_vectors=sparse,
        on_disk_payload=request.on_disk_payload if request.HasField("on_disk_payload") else None,
        hnsw_config=_hnsw(request.hnsw_config) if request.HasField("hnsw_config") else None,
        optimizers=_optimizers(request.optimizers_config) if request.HasField("optimizers_config") else None,
        max_search_threads=SEARCH_THREADS_PER_SHARD,
        wal_enabled=True,
    )


def _check_single_node(request: q.CreateCollection) -> None:
    for field in ("shard_number", "replication_factor", "write_consistency_factor"):
        if request.HasField(field) and getattr(request, field) != 1:
            raise unimplemented(f"CreateCollection.{field} other than 1")
    if request.sharding_method != q.Auto:
        raise unimplemented("CreateCollection.sharding_method Custom")


def _dense(params: q.VectorParams) -> EdgeVectorParams:
    accept_only(params, "size", "distance", "hnsw_config", "on_disk")
    if not 1 <= params.size <= LARGEST_DIMENSION:
        raise wrong_input(f"vector size must be 1 to {LARGEST_DIMENSION}, got {params.size}")
    if params.distance not in _DISTANCES:
        raise wrong_input(f"unknown distance {params.distance}")
    return EdgeVectorParams(
        size=params.size,
        distance=_DISTANCES[params.distance],
        on_disk=params.on_disk if params.HasField("on_disk") else None,
        hnsw_config=_hnsw(params.hnsw_config) if params.HasField("hnsw_config") else None,
    )


def _sparse(params: q.SparseVectorParams) -> EdgeSparseVectorParams:
    accept_only(params, "index", "modifier")
    accept_only(params.index, "full_scan_threshold", "on_disk")
    index = params.index
    return EdgeSparseVectorParams(
        full_scan_threshold=index.full_scan_threshold if index.HasField("full_scan_threshold") else None,
        on_disk=index.on_disk if index.HasField("on_disk") else None,
        modifier=Modifier.Idf if params.modifier == q.Idf else None,
    )


def _hnsw(diff: q.HnswConfigDiff) -> HnswIndexConfig:
    accept_only(diff, "m", "ef_construct", "full_scan_threshold", "max_indexing_threads", "on_disk", "payload_m")
    merged = q.HnswConfigDiff()
    merged.CopyFrom(HNSW_DEFAULTS)
    merged.MergeFrom(diff)
    return HnswIndexConfig(
        m=merged.m,
        ef_construct=merged.ef_construct,
        full_scan_threshold=merged.full_scan_threshold,
        max_indexing_threads=merged.max_indexing_threads,
        on_disk=merged.on_disk,
        payload_m=merged.payload_m if merged.HasField("payload_m") else None,
    )


def _optimizers(diff: q.OptimizersConfigDiff) -> EdgeOptimizersConfig:
    served = ("deleted_threshold", "vacuum_min_vector_number", "default_segment_number", "max_segment_size", "indexing_threshold")
    accept_only(diff, *served)
    return EdgeOptimizersConfig(**{known.name: value for known, value in diff.ListFields()})


def collection_info(definition: Definition, info: "ShardInfo") -> q.CollectionInfo:
    """Describe a collection that is up: its counts from the engine, its configuration as asked for over the defaults."""
    request = definition.request
    params = q.CollectionParams(
        shard_number=1,
        replication_factor=1,
        write_consistency_factor=1,
        on_disk_payload=request.on_disk_payload if request.HasField("on_disk_payload") else True,
    )
    if request.HasField("vectors_config"):
        params.vectors_config.CopyFrom(request.vectors_config)
    if request.HasField("sparse_vectors_config"):
        params.sparse_vectors_config.CopyFrom(request.sparse_vectors_config)
    config = q.CollectionConfig(
        params=params, hnsw_config=HNSW_DEFAULTS, optimizer_config=OPTIMIZER_DEFAULTS, wal_config=WAL_DEFAULTS, metadata=request.metadata
    )
    config.hnsw_config.MergeFrom(request.hnsw_config)
    config.optimizer_config.MergeFrom(request.optimizers_config)
    described = q.CollectionInfo(
        status=q.Green,
        optimizer_status=q.OptimizerStatus(ok=True),
        segments_count=info.segments_count,
        config=config,
        points_count=info.points_count,
        indexed_vectors_count=info.indexed_vectors_count,
        payload_schema={name: schema_info(index) for name, index in info.payload_schema.items()},
    )
    described.created_at.FromDatetime(definition.create_time)
    return described
