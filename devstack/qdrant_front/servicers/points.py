"""The rpcs on points, each behind the rights it needs on the collection named in the request.

A write is applied before it is answered, whether or not the caller waits; `wait` only decides which of the two statuses it reads.
"""

from collections.abc import Callable
from time import perf_counter

from qdrant_client import grpc as q
from qdrant_edge import CountRequest, EdgeShard, QueryBatchRequest, ScrollRequest, UpdateMode, UpdateOperation

from ..accepted import accept_call
from ..access import Need
from ..convert_collection import Schema
from ..convert_filter import engine_filter
from ..convert_index import index_schema
from ..convert_points import point, retrieved, scored, with_payload, with_vectors
from ..convert_query import engine_query
from ..convert_values import point_id, wire_point_id
from ..failure import wrong_input
from ..store import Store
from .call import AnyWrite, Context, admit, field_name, payload_operation, selected, written

DEFAULT_SCROLL_LIMIT = 10
# How each mode of an upsert is called by the engine.
_UPDATE_MODES = {q.Upsert: UpdateMode.Upsert, q.InsertOnly: UpdateMode.InsertOnly, q.UpdateOnly: UpdateMode.UpdateOnly}

Written = q.PointsOperationResponse


class Points(q.PointsServicer):
    """Serves `qdrant.Points`; what it does not define is answered UNIMPLEMENTED by the gate."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def Upsert(self, request: q.UpsertPoints, context: Context) -> Written:
        """Store points, replacing those of the same id."""
        started = admit(request, Need.WRITE_POINTS)
        accept_call(request, "wait", "points", "update_filter", "update_mode")

        def work(shard: EdgeShard, schema: Schema) -> None:
            points = [point(sent, schema) for sent in request.points]
            condition = engine_filter(request.update_filter) if request.HasField("update_filter") else None
            shard.update(UpdateOperation.upsert_points(points, condition, _UPDATE_MODES[request.update_mode]))

        await self._store.write(request.collection_name, work)
        return written(request, started)

    async def Delete(self, request: q.DeletePoints, context: Context) -> Written:
        """Delete points by id or by filter."""
        started = admit(request, Need.WRITE_POINTS)
        accept_call(request, "wait", "points")
        await self._update(
            request, lambda: selected(request.points, UpdateOperation.delete_points, UpdateOperation.delete_points_by_filter)
        )
        return written(request, started)

    async def SetPayload(self, request: q.SetPayloadPoints, context: Context) -> Written:
        """Merge keys into the payload of points."""
        started = admit(request, Need.WRITE_POINTS)
        accept_call(request, "wait", "payload", "points_selector", "key")
        await self._update(request, lambda: payload_operation(request, UpdateOperation.set_payload, UpdateOperation.set_payload_by_filter))
        return written(request, started)

    async def OverwritePayload(self, request: q.SetPayloadPoints, context: Context) -> Written:
        """Replace the payload of points."""
        started = admit(request, Need.WRITE_POINTS)
        accept_call(request, "wait", "payload", "points_selector", "key")
        by_ids, by_filter = UpdateOperation.overwrite_payload, UpdateOperation.overwrite_payload_by_filter
        await self._update(request, lambda: payload_operation(request, by_ids, by_filter))
        return written(request, started)

    async def DeletePayload(self, request: q.DeletePayloadPoints, context: Context) -> Written:
        """Remove keys from the payload of points."""
        started = admit(request, Need.WRITE_POINTS)
        accept_call(request, "wait", "keys", "points_selector")
        keys = list(request.keys)
        by_ids, by_filter = UpdateOperation.delete_payload, UpdateOperation.delete_payload_by_filter
        await self._update(request, lambda: selected(request.points_selector, by_ids, by_filter, keys))
        return written(request, started)

    async def CreateFieldIndex(self, request: q.CreateFieldIndexCollection, context: Context) -> Written:
        """Build an index on a payload field."""
        started = admit(request, Need.WRITE_SCHEMA)
        accept_call(request, "wait", "field_name", "field_type", "field_index_params")
        await self._update(request, lambda: UpdateOperation.create_field_index(field_name(request), index_schema(request)))
        return written(request, started)

    async def DeleteFieldIndex(self, request: q.DeleteFieldIndexCollection, context: Context) -> Written:
        """Drop the index of a payload field."""
        started = admit(request, Need.WRITE_SCHEMA)
        accept_call(request, "wait", "field_name")
        await self._update(request, lambda: UpdateOperation.delete_field_index(field_name(request)))
        return written(request, started)

    async def Get(self, request: q.GetPoints, context: Context) -> q.GetResponse:
        """Return the points of these ids that exist."""
        started = admit(request, Need.READ)
        accept_call(request, "ids", "with_payload", "with_vectors")

        def work(shard: EdgeShard, schema: Schema) -> list[q.RetrievedPoint]:
            ids = [point_id(sent) for sent in request.ids]
            payload, vectors = with_payload(request.with_payload, default=False), with_vectors(request.with_vectors, schema)
            return [retrieved(record) for record in shard.retrieve(ids, payload, vectors)]

        result = await self._store.read(request.collection_name, work)
        return q.GetResponse(result=result, time=perf_counter() - started)

    async def Scroll(self, request: q.ScrollPoints, context: Context) -> q.ScrollResponse:
        """Return a page of points in order of id, and where the next one starts."""
        started = admit(request, Need.READ)
        accept_call(request, "filter", "offset", "limit", "with_payload", "with_vectors")
        if request.HasField("limit") and request.limit < 1:
            raise wrong_input("limit must be 1 or larger")

        def work(shard: EdgeShard, schema: Schema) -> q.ScrollResponse:
            records, next_id = shard.scroll(
                ScrollRequest(
                    offset=point_id(request.offset) if request.HasField("offset") else None,
                    limit=request.limit if request.HasField("limit") else DEFAULT_SCROLL_LIMIT,
                    filter=engine_filter(request.filter) if request.HasField("filter") else None,
                    with_payload=with_payload(request.with_payload, default=True),
                    with_vector=with_vectors(request.with_vectors, schema),
                )
            )
            next_offset = wire_point_id(next_id) if next_id is not None else None
            return q.ScrollResponse(result=[retrieved(record) for record in records], next_page_offset=next_offset)

        response = await self._store.read(request.collection_name, work)
        response.time = perf_counter() - started
        return response

    async def Count(self, request: q.CountPoints, context: Context) -> q.CountResponse:
        """Count points, exactly unless told otherwise."""
        started = admit(request, Need.READ)
        accept_call(request, "filter", "exact")

        def work(shard: EdgeShard, _: Schema) -> int:
            filter_ = engine_filter(request.filter) if request.HasField("filter") else None
            return int(shard.count(CountRequest(exact=request.exact if request.HasField("exact") else True, filter=filter_)))

        count = await self._store.read(request.collection_name, work)
        return q.CountResponse(result=q.CountResult(count=count), time=perf_counter() - started)

    async def Query(self, request: q.QueryPoints, context: Context) -> q.QueryResponse:
        """Return the best points of a query."""
        started = admit(request, Need.READ)

        def work(shard: EdgeShard, schema: Schema) -> list[q.ScoredPoint]:
            return [scored(found) for found in shard.query(engine_query(request, shard, schema))]

        result = await self._store.read(request.collection_name, work)
        return q.QueryResponse(result=result, time=perf_counter() - started)

    async def QueryBatch(self, request: q.QueryBatchPoints, context: Context) -> q.QueryBatchResponse:
        """Return the best points of each query, all on the one collection the batch names."""
        started = admit(request, Need.READ)
        accept_call(request, "query_points")
        for inner in request.query_points:
            # Rights were checked for the batch's collection; a query that names another one must not ride on them.
            if inner.collection_name not in ("", request.collection_name):
                raise wrong_input("every query of a batch must name the collection of the batch")

        def work(shard: EdgeShard, schema: Schema) -> list[q.BatchResult]:
            queries = [engine_query(inner, shard, schema) for inner in request.query_points]
            answers = shard.query_batch(QueryBatchRequest(queries)) if queries else []
            return [q.BatchResult(result=[scored(found) for found in answer]) for answer in answers]

        result = await self._store.read(request.collection_name, work)
        return q.QueryBatchResponse(result=result, time=perf_counter() - started)

    async def _update(self, request: AnyWrite, build: Callable[[], UpdateOperation]) -> None:
        # Built where it runs: the engine parses keys and filters as it builds, and what it raises is mapped there.
        await self._store.write(request.collection_name, lambda shard, _: shard.update(build()))
