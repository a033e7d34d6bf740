"""The rpcs on collections and aliases, each behind the rights it needs."""

from time import perf_counter

from qdrant_client import grpc as q

from ..accepted import accept_only
from ..access import CURRENT_ACCESS, Need
from ..convert_collection import collection_info
from ..failure import Failure
from ..store import Store
from .call import Context


class Collections(q.CollectionsServicer):
    """Serves `qdrant.Collections`; what it does not define is answered UNIMPLEMENTED by the gate."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def Create(self, request: q.CreateCollection, context: Context) -> q.CollectionOperationResponse:
        """Create a collection."""
        started = perf_counter()
        CURRENT_ACCESS.get().require_manage()
        await self._store.create(request)
        return q.CollectionOperationResponse(result=True, time=perf_counter() - started)

    async def Delete(self, request: q.DeleteCollection, context: Context) -> q.CollectionOperationResponse:
        """Delete a collection by its own name; the result says whether there was one."""
        started = perf_counter()
        CURRENT_ACCESS.get().require_manage()
        accept_only(request, "collection_name", "timeout")
        deleted = await self._store.delete(request.collection_name)
        return q.CollectionOperationResponse(result=deleted, time=perf_counter() - started)

    async def Get(self, request: q.GetCollectionInfoRequest, context: Context) -> q.GetCollectionInfoResponse:
        """Describe a collection."""
        started = perf_counter()
        CURRENT_ACCESS.get().require(request.collection_name, Need.READ)
        shard_info = await self._store.read(request.collection_name, lambda shard, _: shard.info())
        names = self._store.catalog.names
        described = collection_info(names.collections[names.resolve(request.collection_name)], shard_info)
        return q.GetCollectionInfoResponse(result=described, time=perf_counter() - started)

    async def List(self, request: q.ListCollectionsRequest, context: Context) -> q.ListCollectionsResponse:
        """List the collections the caller may see."""
        started = perf_counter()
        access = CURRENT_ACCESS.get()
        visible = [q.CollectionDescription(name=name) for name in sorted(self._store.catalog.names.collections) if access.sees(name)]
        return q.ListCollectionsResponse(collections=visible, time=perf_counter() - started)

    async def CollectionExists(self, request: q.CollectionExistsRequest, context: Context) -> q.CollectionExistsResponse:
        """Tell whether a collection or an alias has the name."""
        started = perf_counter()
        CURRENT_ACCESS.get().require(request.collection_name, Need.READ)
        try:
            self._store.catalog.names.resolve(request.collection_name)
            exists = True
        except Failure:
            exists = False
        return q.CollectionExistsResponse(result=q.CollectionExists(exists=exists), time=perf_counter() - started)

    async def UpdateAliases(self, request: q.ChangeAliases, context: Context) -> q.CollectionOperationResponse:
        """Apply all the alias actions at once, or none."""
        started = perf_counter()
        CURRENT_ACCESS.get().require_manage()
        accept_only(request, "actions", "timeout")
        self._store.catalog.change_aliases(request.actions)
        return q.CollectionOperationResponse(result=True, time=perf_counter() - started)

    async def ListAliases(self, request: q.ListAliasesRequest, context: Context) -> q.ListAliasesResponse:
        """List the aliases whose own name and target the caller may both see."""
        started = perf_counter()
        return q.ListAliasesResponse(aliases=self._visible_aliases(None), time=perf_counter() - started)

    async def ListCollectionAliases(self, request: q.ListCollectionAliasesRequest, context: Context) -> q.ListAliasesResponse:
        """List the visible aliases of one collection."""
        started = perf_counter()
        CURRENT_ACCESS.get().require(request.collection_name, Need.READ)
        return q.ListAliasesResponse(aliases=self._visible_aliases(request.collection_name), time=perf_counter() - started)

    def _visible_aliases(self, collection_name: str | None) -> list[q.AliasDescription]:
        access = CURRENT_ACCESS.get()
        return [
            q.AliasDescription(alias_name=alias, collection_name=target)
            for alias, target in sorted(self._store.catalog.names.aliases.items())
            if access.sees(alias) and access.sees(target) and collection_name in (None, target)
        ]
