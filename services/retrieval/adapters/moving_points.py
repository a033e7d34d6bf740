"""Carries a tenant's points from one Qdrant to another. A point is named by the content it is cut from, so equal ids are equal points."""

import uuid
from collections.abc import Sequence

import structlog
from qdrant_client import grpc as q

from services.kernel.errors import Unavailable
from services.kernel.ids import TenantId
from services.kernel.placement import HOME, Place
from services.retrieval.adapters.placed_index import PlacedIndex
from services.retrieval.adapters.qdrant import QdrantIndex

log = structlog.get_logger(__name__)

POINTS_AT_ONCE = 100


class MovingPoints:
    """What retrieval keeps of a tenant outside Postgres."""

    def __init__(self, index: PlacedIndex) -> None:
        self._index = index

    async def copy(self, tenant_id: TenantId, source: Place, target: Place) -> int:
        """Makes the target's points the source's and counts both; nothing to do where both are in one Qdrant.

        A point that its tenant removed after the ids were read is no difference: it counts as changed, so another round follows.

        Raises: Unavailable when the counts differ afterwards.
        """
        if source.qdrant_url == target.qdrant_url:
            return 0
        async with self._index.at(source) as ours, self._index.at(target) as copy:
            await copy.provision(tenant_id)
            wanted, there = await ours.point_ids(tenant_id), await copy.point_ids(tenant_id)
            missing, extra = sorted(wanted - there), sorted(there - wanted)
            written = await _write(tenant_id, ours, copy, missing)
            for start in range(0, len(extra), POINTS_AT_ONCE):
                await copy.remove_points(tenant_id, extra[start : start + POINTS_AT_ONCE])
            counted = await copy.count(tenant_id)
        expected = len(wanted) - (len(missing) - written)
        if counted != expected:
            log.warning("points_differ", tenant_id=str(tenant_id), wanted=expected, found=counted)
            raise Unavailable("qdrant", "points changed while they were copied; repeat the call")
        return len(missing) + len(extra)

    async def drop_shared(self, tenant_id: TenantId, now_at: Place) -> dict[str, int]:
        """Removes the collection in the shared Qdrant of a tenant that has one of its own elsewhere."""
        if not now_at.qdrant_url:
            return {}
        async with self._index.at(HOME) as shared:
            return {"qdrant:points": await shared.erase(tenant_id)}

    async def drop_copy(self, tenant_id: TenantId, target: Place) -> None:
        """Removes the collection in a Qdrant of the target's own; nothing to do where it shares the others'."""
        if target.qdrant_url:
            async with self._index.at(target) as copy:
                await copy.erase(tenant_id)


async def _write(tenant_id: TenantId, ours: QdrantIndex, copy: QdrantIndex, ids: Sequence[uuid.UUID]) -> int:
    written = 0
    for start in range(0, len(ids), POINTS_AT_ONCE):
        points = await ours.read_points(tenant_id, ids[start : start + POINTS_AT_ONCE])
        written += len(points)
        await copy.write_points(tenant_id, [q.PointStruct(id=point.id, payload=point.payload, vectors=_vectors(point)) for point in points])
    return written


def _vectors(point: q.RetrievedPoint) -> q.Vectors:
    named = {name: _vector(vector) for name, vector in point.vectors.vectors.vectors.items()}
    return q.Vectors(vectors=q.NamedVectors(vectors=named))


def _vector(vector: q.VectorOutput) -> q.Vector:
    match vector.WhichOneof("vector"):
        case "dense":
            return q.Vector(dense=vector.dense)
        case "sparse":
            return q.Vector(sparse=vector.sparse)
        case _ if vector.HasField("indices"):
            # Servers of an earlier version write the values beside the indices.
            return q.Vector(sparse=q.SparseVector(values=vector.data, indices=vector.indices.data))
        case _:
            return q.Vector(dense=q.DenseVector(data=vector.data))
