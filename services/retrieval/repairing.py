"""Finishes what a crash left half-done: documents whose points were never written, and points of documents that are gone."""

import asyncio
from collections.abc import Awaitable
from typing import Protocol

import structlog

from services.kernel.errors import MeshError
from services.kernel.ids import DocumentId, TenantId
from services.retrieval.library import Library

log = structlog.get_logger(__name__)

PAUSE_SECONDS = 5.0


class OwedWork(Protocol):
    """What is owed to the collections, over all tenants."""

    async def unindexed(self, limit: int) -> list[tuple[TenantId, DocumentId, bytes]]:
        """Returns documents (tenant, id, content digest) that have waited over 10 s for their points."""
        ...

    async def undeleted(self, limit: int) -> list[tuple[TenantId, DocumentId]]:
        """Returns removed documents (tenant, id) whose points may still be there after 10 s."""
        ...


async def repair_forever(work: OwedWork, library: Library) -> None:
    """Repairs what is owed every few seconds, until cancelled. A store that is away is tried again at the next turn."""
    while True:
        try:
            await repair_once(work, library)
        except MeshError as error:
            log.warning("repair_postponed", reason=error.reason_name)
        await asyncio.sleep(PAUSE_SECONDS)


async def repair_once(work: OwedWork, library: Library, *, limit: int = 100) -> int:
    """Repairs up to `limit` documents of each kind and returns how many; one that fails does not hold up the others."""
    repaired = 0
    for tenant_id, document_id, row_digest in await work.unindexed(limit):
        repaired += await _succeeds(tenant_id, document_id, library.index(tenant_id, document_id, row_digest))
    for tenant_id, document_id in await work.undeleted(limit):
        repaired += await _succeeds(tenant_id, document_id, library.remove_points(tenant_id, document_id))
    return repaired


async def _succeeds(tenant_id: TenantId, document_id: DocumentId, repair: Awaitable[None]) -> bool:
    try:
        await repair
    except MeshError as error:
        log.warning("document_not_repaired", tenant_id=str(tenant_id), document_id=str(document_id), reason=error.reason_name)
        return False
    log.info("document_repaired", tenant_id=str(tenant_id), document_id=str(document_id))
    return True
