"""Collections as the servicers see them: a name, or an alias, and work done on what it means at the moment the work runs."""

import asyncio
import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

from qdrant_client.grpc import CreateCollection
from qdrant_edge import EdgeShard

from .catalog import Catalog, check_name
from .convert_collection import Schema, engine_config, schema_of
from .data_dir import catalog_path, collections_path
from .failure import already_exists
from .shards import Shards

# Rare: a flush waits for the disk with Python's interpreter lock held. Until then the engine's log holds every write.
FLUSH_INTERVAL_SECONDS = 30

_log = logging.getLogger(__name__)

Result = TypeVar("Result")
Work = Callable[[EdgeShard, Schema], Result]


class Store:
    """The catalog and the shards, kept in step: the catalog says what exists."""

    def __init__(self, data_dir: Path, max_open_shards: int) -> None:
        data_dir.mkdir(parents=True, exist_ok=True)
        self.catalog = Catalog.load(catalog_path(data_dir))
        self.shards = Shards(collections_path(data_dir), max_open_shards)
        self.shards.remove_leftovers(set(self.catalog.names.collections))

    async def create(self, request: CreateCollection) -> None:
        """Create a collection; it exists once the catalog says so, and a crash before that leaves nothing."""
        name = request.collection_name
        check_name(name)
        config = engine_config(request)
        async with self.shards.lock(name):
            if name in self.catalog.names.collections:
                raise already_exists(f"Collection `{name}` already exists!")
            await self.shards.create(name, config)
            try:
                self.catalog.add(request)
            except BaseException:
                await self.shards.destroy(name)
                raise

    async def delete(self, name: str) -> bool:
        """Delete a collection by its own name, never by an alias; tells whether there was one."""
        check_name(name)
        async with self.shards.lock(name):
            if name not in self.catalog.names.collections:
                return False
            self.catalog.remove(name)
            await self.shards.destroy(name)
            return True

    async def read(self, name: str, work: Work[Result]) -> Result:
        """Run work that changes nothing on the collection this name means."""
        return await self._run(name, work, writes=False)

    async def write(self, name: str, work: Work[Result]) -> Result:
        """Run work that may change the collection this name means."""
        return await self._run(name, work, writes=True)

    async def _run(self, name: str, work: Work[Result], *, writes: bool) -> Result:
        while True:
            real_name = self.catalog.names.resolve(name)
            async with self.shards.lock(real_name):
                # The alias may have been swapped while this call waited its turn; the work belongs to what it means now.
                if self.catalog.names.resolve(name) != real_name:
                    continue
                schema = schema_of(self.catalog.names.collections[real_name].request)
                return await self.shards.call(real_name, partial(_apply, work, schema), writes=writes)

    async def keep_flushing(self) -> None:
        """Flush what was written, until cancelled."""
        while True:
            await asyncio.sleep(FLUSH_INTERVAL_SECONDS)
            try:
                await self.shards.flush()
            except Exception:
                # The log still holds every write; the next round tries again.
                _log.exception("a flush failed")

    async def close(self) -> None:
        """Flush and closes everything."""
        await self.shards.close()


def _apply(work: Work[Result], schema: Schema, shard: EdgeShard) -> Result:
    return work(shard, schema)
