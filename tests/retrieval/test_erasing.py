"""A tenant's end in retrieval: rows, points and the tombstone, wherever the tenant lives."""

import pytest

from mesh.common.v1 import lifecycle_service_pb2 as pb
from services.kernel.errors import NotFound, Unavailable
from services.kernel.ids import TenantId
from services.kernel.placement import PlacementKind
from services.kernel.request_context import bind_tenant
from services.kernel.tenant_cipher import TenantCipher
from services.kernel.tenant_moving import TenantMover
from services.retrieval.adapters.moving_points import MovingPoints
from services.retrieval.adapters.postgres_sealing import PostgresSealedRows
from services.retrieval.app import TENANT_TABLES
from services.retrieval.chunking import cut
from services.retrieval.document import DocumentDraft
from services.retrieval.servicers.lifecycle import LifecycleServicer
from tests.retrieval.conftest import Shelf
from tests.retrieval.reseal_process import context_of
from tests.support.waiting import eventually

HOLIDAYS = DocumentDraft("holidays.md", "Holidays", "# Holidays\n\nEverybody has 27 days of paid holiday.")
EXPENSES = DocumentDraft("expenses.md", "Expenses", "# Expenses\n\nMeals cost at most 38 euros a day.")


async def test_an_erasure_counts_what_it_removes_and_may_be_repeated(shelf: Shelf) -> None:
    """Asked once, it names rows and points; asked again, also once the tenant's own place is dropped, it finds none and does not fail."""
    tenant_id = await shelf.new_tenant()
    await shelf.library.put(tenant_id, [HOLIDAYS, EXPENSES])
    mover = TenantMover(shelf.database, shelf.places, shelf.maker, "retrieval", TENANT_TABLES, MovingPoints(shelf.index))
    cipher = TenantCipher(shelf.keys)
    lifecycle = LifecycleServicer(shelf.store, shelf.index, shelf.maker, mover, PostgresSealedRows(shelf.database, cipher))
    rows = {"chunks": 2, "documents": 2, "removed_documents": 0, "retrieval_sealing": 0}
    removed = {f"postgres:retrieval.{table}": count for table, count in rows.items()} | {"qdrant:points": 2}
    with bind_tenant(context_of(tenant_id)):
        first = await lifecycle.EraseTenant(pb.EraseTenantRequest(), None)
        assert {item.kind: item.count for item in first.erased} == removed
        again = await lifecycle.EraseTenant(pb.EraseTenantRequest(), None)
        assert {item.kind: item.count for item in again.erased} == dict.fromkeys(removed, 0)
        await shelf.places.drop(tenant_id)
        await eventually(lambda: erases_nothing(lifecycle), within_seconds=20)


async def erases_nothing(lifecycle: LifecycleServicer) -> bool:
    """Asks for one more erasure; False while a connection that was cut with the database is still lent."""
    try:
        erased = (await lifecycle.EraseTenant(pb.EraseTenantRequest(), None)).erased
    except Unavailable:
        return False
    return not any(item.count for item in erased)


async def test_a_scan_after_an_erasure_finds_the_tombstone_alone(shelf: Shelf) -> None:
    """Rows and points go where the tenant lives, the tombstone stands at home; nothing else is found, also once the place is dropped."""
    tenant_id = await shelf.new_tenant()
    await shelf.library.put(tenant_id, [HOLIDAYS])
    away = {PlacementKind.BRIDGE: f"bridge:postgres:t_{tenant_id.hex}.documents", PlacementKind.SILO: "silo:postgres:retrieval.documents"}
    found = await left_of(shelf, tenant_id)
    assert found >= {away.get(shelf.kind, "postgres:retrieval.documents"), "qdrant:collections", "qdrant:aliases"}
    await shelf.store.erase(tenant_id)
    await shelf.index.erase(tenant_id)
    await shelf.maker.forget(tenant_id)
    assert await left_of(shelf, tenant_id) == {"postgres:retrieval.erased_tenants"}
    await shelf.places.drop(tenant_id)
    assert await shelf.library.list_page(tenant_id, "", 10) == []
    assert await left_of(shelf, tenant_id) == {"postgres:retrieval.erased_tenants"}
    with pytest.raises(NotFound):
        await shelf.store.put(tenant_id, HOLIDAYS, cut(HOLIDAYS.text))


async def left_of(shelf: Shelf, tenant_id: TenantId) -> set[str]:
    """The stores in which a scan finds the tenant or a document's words."""
    found = [*await shelf.store.scan(tenant_id, ["27 days"]), *await shelf.index.scan(tenant_id)]
    return {item.store for item in found if item.found or item.canaries}
