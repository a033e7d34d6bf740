"""Points: vectors checked against the collection's schema on the way in, selectors, and records on the way out.

Everything is checked before the engine sees it: the engine logs an operation before it applies it, so a bad one would be
half applied and be in the log for good.
"""

from collections.abc import Mapping
from typing import cast

from qdrant_client import grpc as q
from qdrant_edge import PayloadSelector, Point, Record, ScoredPoint, SparseVector

from .accepted import accept_only
from .convert_collection import Schema
from .convert_values import fill_payload, payload, point_id, wire_point_id
from .failure import unimplemented, wrong_input

EngineVector = list[float] | list[list[float]] | SparseVector


def point(sent: q.PointStruct, schema: Schema) -> Point:
    """Read a point to store."""
    return Point(point_id(sent.id), _vectors(sent.vectors, schema), payload(sent.payload))


def _vectors(sent: q.Vectors, schema: Schema) -> dict[str, list[float] | list[list[float]] | SparseVector]:
    match sent.WhichOneof("vectors_options"):
        case "vector":
            named = {"": sent.vector}
        case "vectors":
            named = dict(sent.vectors.vectors)
        case _:
            named = {}
    return {name: checked(name, stored_vector(vector), schema) for name, vector in named.items()}


def stored_vector(sent: q.Vector) -> EngineVector:
    """Read a vector of a point, in its present or its deprecated flat form."""
    match sent.WhichOneof("vector"):
        case "dense":
            return list(sent.dense.data)
        case "sparse":
            return sparse(sent.sparse)
        case None:
            accept_only(sent, "data", "indices")
            if sent.HasField("indices"):
                return sparse(q.SparseVector(values=sent.data, indices=sent.indices.data))
            return list(sent.data)
        case other:
            raise unimplemented(f"Vector.{other}")


def sparse(sent: q.SparseVector) -> SparseVector:
    """Read a sparse vector, whose indices are unique and as many as its values."""
    indices, values = list(sent.indices), list(sent.values)
    if len(indices) != len(values):
        raise wrong_input(f"sparse vector has {len(indices)} indices and {len(values)} values, must be the same")
    if len(set(indices)) != len(indices):
        raise wrong_input("sparse vector indices must be unique")
    return SparseVector(indices, values)


def checked(name: str, vector: EngineVector, schema: Schema) -> EngineVector:
    """Return the vector if the schema has one of this name, kind and dimension.

    Raises:
        Failure: INVALID_ARGUMENT.
    """
    if name not in schema.dense and name not in schema.sparse:
        raise wrong_input(f"Not existing vector name error: {name}")
    if isinstance(vector, SparseVector):
        if name not in schema.sparse:
            raise wrong_input(f"Vector {name} is dense, got a sparse one")
        return vector
    if name in schema.sparse:
        raise wrong_input(f"Vector {name} is sparse, got a dense one")
    if len(vector) != schema.dense[name]:
        raise wrong_input(f"Vector dimension error: expected dim: {schema.dense[name]}, got {len(vector)}")
    return vector


def with_payload(sent: q.WithPayloadSelector, *, default: bool) -> bool | PayloadSelector:
    """Read which part of the payload to return."""
    match sent.WhichOneof("selector_options"):
        case "enable":
            return sent.enable
        case "include":
            return PayloadSelector.Include(list(sent.include.fields))
        case "exclude":
            return PayloadSelector.Exclude(list(sent.exclude.fields))
    return default


def with_vectors(sent: q.WithVectorsSelector, schema: Schema) -> bool | list[str]:
    """Read which vectors to return; none unless asked for."""
    match sent.WhichOneof("selector_options"):
        case "enable":
            return sent.enable
        case "include":
            names = list(sent.include.names)
            unknown = next((name for name in names if name not in schema.dense and name not in schema.sparse), None)
            if unknown is not None:
                raise wrong_input(f"Not existing vector name error: {unknown}")
            return names
    return False


def retrieved(record: Record) -> q.RetrievedPoint:
    """Write a stored point."""
    written = q.RetrievedPoint(id=wire_point_id(record.id))
    fill_payload(written.payload, record.payload)
    if record.vector is not None:
        _fill_vectors(written.vectors, record.vector)
    return written


def scored(found: ScoredPoint) -> q.ScoredPoint:
    """Write a hit."""
    written = q.ScoredPoint(id=wire_point_id(found.id), score=found.score, version=found.version)
    fill_payload(written.payload, found.payload)
    if found.vector is not None:
        _fill_vectors(written.vectors, found.vector)
    return written


def _fill_vectors(target: q.VectorsOutput, known: EngineVector | Mapping[str, EngineVector]) -> None:
    if not isinstance(known, Mapping):
        target.vector.CopyFrom(_wire_vector(known))
        return
    target.vectors.SetInParent()
    for name, vector in known.items():
        target.vectors.vectors[name].CopyFrom(_wire_vector(vector))


def _wire_vector(known: EngineVector) -> q.VectorOutput:
    if isinstance(known, SparseVector):
        return q.VectorOutput(sparse=q.SparseVector(indices=known.indices, values=known.values))
    return q.VectorOutput(dense=q.DenseVector(data=cast(list[float], known)))
