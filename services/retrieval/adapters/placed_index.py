"""The collection of a tenant wherever it is: in the shared Qdrant, or in the one that is the tenant's own."""

import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import replace

from pydantic import SecretStr

from services.kernel.errors import NotFound, Unavailable
from services.kernel.ids import DocumentId, TenantId
from services.kernel.lending import Lending
from services.kernel.placement import Place
from services.kernel.settings import DEFAULT_SILO_POOLS
from services.kernel.tenant_database import PlaceMissing, TenantDatabase
from services.kernel.tenant_scan import ScannedStore
from services.retrieval.adapters.qdrant import QdrantIndex
from services.retrieval.document import Hit


class PlacedIndex:
    """One index a Qdrant; channels to tenants' own are bounded in number and closed when others need the room."""

    def __init__(self, home: QdrantIndex, database: TenantDatabase, dimensions: int, *, limit: int = DEFAULT_SILO_POOLS) -> None:
        self._home = home
        self._database = database

        async def open_index(key: tuple[str, SecretStr]) -> QdrantIndex:
            return QdrantIndex(key[0], key[1], dimensions)

        async def close_index(index: QdrantIndex) -> None:
            await index.close()

        self._own: Lending[tuple[str, SecretStr], QdrantIndex] = Lending(limit, open_index, close_index, dependency="qdrant")

    async def close(self) -> None:
        """Closes the channels to tenants' own."""
        await self._own.close()

    @asynccontextmanager
    async def at(self, place: Place) -> AsyncIterator[QdrantIndex]:
        """Yields the index of a place."""
        if not place.qdrant_url:
            yield self._home
            return
        async with self._own.lend((place.qdrant_url, place.qdrant_api_key)) as index:
            yield index

    async def provision(self, tenant_id: TenantId) -> str:
        """Makes the collection unless it is there."""
        async with self._of(tenant_id) as index:
            return await index.provision(tenant_id)

    async def upsert(self, tenant_id: TenantId, document_id: DocumentId, points: Sequence[tuple[uuid.UUID, str, list[float]]]) -> None:
        """Writes points."""
        async with self._of(tenant_id) as index:
            await index.upsert(tenant_id, document_id, points)

    async def remove_document(self, tenant_id: TenantId, document_id: DocumentId, *, keep: Sequence[uuid.UUID]) -> None:
        """Removes a document's points except those to keep."""
        async with self._of(tenant_id) as index:
            await index.remove_document(tenant_id, document_id, keep=keep)

    async def search(self, tenant_id: TenantId, query: str, vector: list[float], limit: int) -> list[Hit]:
        """Returns the best points."""
        place = await self._database.place_of(tenant_id)
        try:
            async with self.at(place) as index:
                return await index.search(tenant_id, query, vector, limit)
        except Unavailable:
            # A collection that is gone may have moved with its tenant: the tenant's tables know.
            async with self._database.transaction(tenant_id):
                now_at = await self._database.place_of(tenant_id)
            if now_at == place:
                raise
        async with self.at(now_at) as index:
            return await index.search(tenant_id, query, vector, limit)

    async def erase(self, tenant_id: TenantId) -> int:
        """Removes the collection."""
        async with self._of(tenant_id) as index:
            return await index.erase(tenant_id)

    async def scan(self, tenant_id: TenantId) -> Sequence[ScannedStore]:
        """Counts collections and aliases that carry the tenant's id, in the shared Qdrant and in its own."""
        found = list(await self._home.scan(tenant_id))
        # Its own Qdrant is known through its own place: once that is dropped, there is none to ask.
        with suppress(PlaceMissing, NotFound):
            place = await self._database.find_place(tenant_id)
            if place.qdrant_url:
                async with self.at(place) as index:
                    found += [replace(item, store=f"silo:{item.store}") for item in await index.scan(tenant_id)]
        return found

    @asynccontextmanager
    async def _of(self, tenant_id: TenantId) -> AsyncIterator[QdrantIndex]:
        async with self.at(await self._database.place_of(tenant_id)) as index:
            yield index
