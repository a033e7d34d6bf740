"""Each tenant's Qdrant collection, over gRPC: `t_<uuid hex>_v1` behind the alias `t_<uuid hex>`.

Every request on points carries a token for that tenant's alias alone, so the database itself refuses another tenant's collection.
Only making and dropping collections uses the key with full rights.
"""

import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar
from urllib.parse import urlsplit

import grpc
from pydantic import SecretStr
from qdrant_client import grpc as q

from services.kernel.errors import Unavailable
from services.kernel.ids import DocumentId, TenantId
from services.kernel.request_context import remaining_seconds
from services.kernel.tenant_scan import ScannedStore
from services.retrieval.adapters.qdrant_token import CollectionTokens
from services.retrieval.document import Hit
from services.retrieval.sparse_terms import SparseVector, document_terms, query_terms

DENSE = "dense"
SPARSE = "words"
TENANT_FIELD = "tenant_id"
DOCUMENT_FIELD = "document_id"
PREFETCH_FACTOR = 4
IDS_AT_ONCE = 1000

REQUEST_SECONDS = 5.0
COLLECTION_SECONDS = 15.0
_AWAY = frozenset({grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.RESOURCE_EXHAUSTED})

Request = TypeVar("Request")
Answer = TypeVar("Answer")
Metadata = tuple[tuple[str, str], ...]


def alias_name(tenant_id: TenantId) -> str:
    """Names a tenant's collection in every request; derived from the id alone, never from a slug."""
    return f"t_{tenant_id.hex}"


def collection_name(tenant_id: TenantId, version: int = 1) -> str:
    """Names the collection behind the alias, so that a new one can be filled and switched to."""
    return f"{alias_name(tenant_id)}_v{version}"


class QdrantIndex:
    """One channel to one Qdrant for all tenants; the token of each request says whose it is."""

    def __init__(self, url: str, api_key: SecretStr, dimensions: int) -> None:
        self._channel = _open_channel(url)
        self._points = q.PointsStub(self._channel)  # type: ignore[no-untyped-call] # generated without types
        self._collections = q.CollectionsStub(self._channel)  # type: ignore[no-untyped-call] # generated without types
        self._tokens = CollectionTokens(api_key)
        self._admin: Metadata = (("api-key", api_key.get_secret_value()),)
        self._dimensions = dimensions

    async def close(self) -> None:
        """Closes the channel."""
        await self._channel.close()

    async def provision(self, tenant_id: TenantId) -> str:
        """Makes collection, payload index and alias unless they are there. Idempotent."""
        name = collection_name(tenant_id)
        with _refusals():
            exists: q.CollectionExistsResponse = await self._administer(
                self._collections.CollectionExists, q.CollectionExistsRequest(collection_name=name)
            )
            if not exists.result.exists:
                await self._create(name)
            # Repeated on purpose: a crash between the steps leaves a collection without its index or alias.
            await self._administer(
                self._points.CreateFieldIndex,
                q.CreateFieldIndexCollection(
                    collection_name=name, wait=True, field_name=DOCUMENT_FIELD, field_type=q.FieldType.FieldTypeKeyword
                ),
            )
            alias = q.AliasOperations(create_alias=q.CreateAlias(collection_name=name, alias_name=alias_name(tenant_id)))
            await self._administer(self._collections.UpdateAliases, q.ChangeAliases(actions=[alias]))
        return name

    async def upsert(self, tenant_id: TenantId, document_id: DocumentId, points: Sequence[tuple[uuid.UUID, str, list[float]]]) -> None:
        """Writes points and waits until they can be found."""
        payload = {TENANT_FIELD: _text(str(tenant_id)), DOCUMENT_FIELD: _text(str(document_id))}
        structs = [
            q.PointStruct(id=q.PointId(uuid=str(chunk_id)), vectors=_vectors(vector, document_terms(text)), payload=payload)
            for chunk_id, text, vector in points
        ]
        request = q.UpsertPoints(collection_name=alias_name(tenant_id), wait=True, points=structs)
        await self._write(tenant_id, self._points.Upsert, request)

    async def remove_document(self, tenant_id: TenantId, document_id: DocumentId, *, keep: Sequence[uuid.UUID]) -> None:
        """Removes a document's points except those to keep."""
        selection = q.Filter(must=[_document_is(document_id)])
        if keep:
            selection.must_not.append(q.Condition(has_id=q.HasIdCondition(has_id=[q.PointId(uuid=str(kept)) for kept in keep])))
        request = q.DeletePoints(collection_name=alias_name(tenant_id), wait=True, points=q.PointsSelector(filter=selection))
        await self._write(tenant_id, self._points.Delete, request)

    async def search(self, tenant_id: TenantId, query: str, vector: list[float], limit: int) -> list[Hit]:
        """Returns the best points: nearest by meaning and by words, fused by reciprocal rank."""
        name = alias_name(tenant_id)
        legs = [
            q.PrefetchQuery(query=_nearest(q.VectorInput(dense=q.DenseVector(data=vector))), using=DENSE, limit=limit * PREFETCH_FACTOR)
        ]
        words = query_terms(query)
        if words.indices:
            legs.append(q.PrefetchQuery(query=_nearest(_sparse_input(words)), using=SPARSE, limit=limit * PREFETCH_FACTOR))
        request = q.QueryPoints(
            collection_name=name,
            prefetch=legs,
            query=q.Query(fusion=q.Fusion.RRF),
            limit=limit,
            with_payload=q.WithPayloadSelector(include=q.PayloadIncludeSelector(fields=[TENANT_FIELD])),
        )
        token: Metadata = (("api-key", self._tokens.mint(name, "r")),)
        with _refusals():
            answer = await self._points.Query(request, metadata=token, timeout=remaining_seconds(REQUEST_SECONDS))
        return [_hit(point) for point in answer.result]

    async def erase(self, tenant_id: TenantId) -> int:
        """Drops every collection behind or once behind the tenant's alias; returns how many points the current one held."""
        alias = alias_name(tenant_id)
        with _refusals():
            held = await self._count(alias)
            listed: q.ListCollectionsResponse = await self._administer(self._collections.List, q.ListCollectionsRequest())
            for collection in listed.collections:
                if collection.name.startswith(f"{alias}_v"):
                    await self._administer(self._collections.Delete, q.DeleteCollection(collection_name=collection.name))
        return held

    async def count(self, tenant_id: TenantId) -> int:
        """Returns how many points the tenant's collection holds; 0 when it is not there."""
        with _refusals():
            return await self._count(alias_name(tenant_id))

    async def point_ids(self, tenant_id: TenantId) -> set[uuid.UUID]:
        """Returns the id of every point of the tenant's collection."""
        found: set[uuid.UUID] = set()
        request = q.ScrollPoints(collection_name=alias_name(tenant_id), limit=IDS_AT_ONCE)
        with _refusals():
            while True:
                answer: q.ScrollResponse = await self._administer(self._points.Scroll, request)
                found |= {uuid.UUID(point.id.uuid) for point in answer.result}
                if not answer.HasField("next_page_offset"):
                    return found
                request.offset.CopyFrom(answer.next_page_offset)

    async def read_points(self, tenant_id: TenantId, ids: Sequence[uuid.UUID]) -> Sequence[q.RetrievedPoint]:
        """Returns points whole, those of them that are there."""
        request = q.GetPoints(
            collection_name=alias_name(tenant_id),
            ids=[q.PointId(uuid=str(point_id)) for point_id in ids],
            with_payload=q.WithPayloadSelector(enable=True),
            with_vectors=q.WithVectorsSelector(enable=True),
        )
        with _refusals():
            answer: q.GetResponse = await self._administer(self._points.Get, request)
        return answer.result

    async def write_points(self, tenant_id: TenantId, points: Sequence[q.PointStruct]) -> None:
        """Writes points as they are and waits until they can be found."""
        if points:
            request = q.UpsertPoints(collection_name=alias_name(tenant_id), wait=True, points=points)
            await self._write(tenant_id, self._points.Upsert, request)

    async def remove_points(self, tenant_id: TenantId, ids: Sequence[uuid.UUID]) -> None:
        """Removes points by id."""
        chosen = q.PointsSelector(points=q.PointsIdsList(ids=[q.PointId(uuid=str(point_id)) for point_id in ids]))
        request = q.DeletePoints(collection_name=alias_name(tenant_id), wait=True, points=chosen)
        await self._write(tenant_id, self._points.Delete, request)

    async def scan(self, tenant_id: TenantId) -> Sequence[ScannedStore]:
        """Counts collections and aliases that carry the tenant's id, as the key with every right sees them."""
        with _refusals():
            collections: q.ListCollectionsResponse = await self._administer(self._collections.List, q.ListCollectionsRequest())
            aliases: q.ListAliasesResponse = await self._administer(self._collections.ListAliases, q.ListAliasesRequest())
        found = {
            "qdrant:collections": sum(tenant_id.hex in item.name for item in collections.collections),
            "qdrant:aliases": sum(tenant_id.hex in item.alias_name + item.collection_name for item in aliases.aliases),
        }
        return [ScannedStore(store, count, 0, kept=False, sight="all") for store, count in found.items()]

    async def _create(self, name: str) -> None:
        request = q.CreateCollection(
            collection_name=name,
            vectors_config=q.VectorsConfig(
                params_map=q.VectorParamsMap(map={DENSE: q.VectorParams(size=self._dimensions, distance=q.Distance.Cosine)})
            ),
            sparse_vectors_config=q.SparseVectorConfig(map={SPARSE: q.SparseVectorParams(modifier=q.Modifier.Idf)}),
        )
        try:
            await self._administer(self._collections.Create, request)
        except grpc.aio.AioRpcError as error:
            # Another replica, or an earlier attempt that lost its answer, was first.
            if error.code() is not grpc.StatusCode.ALREADY_EXISTS:
                raise

    async def _count(self, alias: str) -> int:
        try:
            answer = await self._points.Count(
                q.CountPoints(collection_name=alias, exact=True), metadata=self._admin, timeout=COLLECTION_SECONDS
            )
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.NOT_FOUND:
                return 0
            raise
        return int(answer.result.count)

    async def _administer(self, method: "grpc.aio.UnaryUnaryMultiCallable[Request, Answer]", request: Request) -> Answer:
        answer: Answer = await method(request, metadata=self._admin, timeout=COLLECTION_SECONDS)
        return answer

    async def _write(
        self, tenant_id: TenantId, method: "grpc.aio.UnaryUnaryMultiCallable[Request, q.PointsOperationResponse]", request: Request
    ) -> None:
        token: Metadata = (("api-key", self._tokens.mint(alias_name(tenant_id), "rw")),)
        with _refusals():
            await method(request, metadata=token, timeout=remaining_seconds(REQUEST_SECONDS))


@contextmanager
def _refusals() -> Iterator[None]:
    try:
        yield
    except grpc.aio.AioRpcError as error:
        if error.code() is grpc.StatusCode.NOT_FOUND:
            raise Unavailable("qdrant", "the tenant's collection is not there: repeat the call once the tenant is provisioned") from None
        if error.code() in _AWAY:
            raise Unavailable("qdrant", "the vector store does not answer; try again shortly") from None
        raise


def _open_channel(url: str) -> grpc.aio.Channel:
    # Qdrant is a store, not a peer: it knows neither context tokens nor rich errors, so its channel is not the mesh's.
    parts = urlsplit(url)
    target = f"{parts.hostname}:{parts.port or 6334}"
    options = [("grpc.keepalive_time_ms", 30_000), ("grpc.max_receive_message_length", 32 * 1024 * 1024)]
    if parts.scheme == "https":
        return grpc.aio.secure_channel(target, grpc.ssl_channel_credentials(), options)  # noqa: TID251 - a store's
    return grpc.aio.insecure_channel(target, options)  # noqa: TID251 - a store's


def _text(value: str) -> q.Value:
    return q.Value(string_value=value)


def _document_is(document_id: DocumentId) -> q.Condition:
    return q.Condition(field=q.FieldCondition(key=DOCUMENT_FIELD, match=q.Match(keyword=str(document_id))))


def _vectors(dense: list[float], sparse: SparseVector) -> q.Vectors:
    named = {DENSE: q.Vector(dense=q.DenseVector(data=dense))}
    if sparse.indices:
        named[SPARSE] = q.Vector(sparse=q.SparseVector(values=sparse.values, indices=sparse.indices))
    return q.Vectors(vectors=q.NamedVectors(vectors=named))


def _sparse_input(sparse: SparseVector) -> q.VectorInput:
    return q.VectorInput(sparse=q.SparseVector(values=sparse.values, indices=sparse.indices))


def _nearest(vector: q.VectorInput) -> q.Query:
    return q.Query(nearest=vector)


def _hit(point: q.ScoredPoint) -> Hit:
    owner = point.payload[TENANT_FIELD].string_value if TENANT_FIELD in point.payload else ""
    try:
        tenant_id = uuid.UUID(owner)
    except ValueError:
        tenant_id = None
    return Hit(uuid.UUID(point.id.uuid), tenant_id, point.score)
