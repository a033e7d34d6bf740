"""A tenant's library over the real stores: what goes in is found, by its owner alone, whatever crashed in between."""

import uuid

import grpc
import pytest
from pydantic import SecretStr
from qdrant_client import grpc as q

from services.kernel.errors import InvalidRequest, NotFound
from services.kernel.ids import DocumentId, TenantId, new_uuid7
from services.kernel.placement import PlacementKind
from services.retrieval.adapters.qdrant import alias_name
from services.retrieval.adapters.qdrant_token import CollectionTokens
from services.retrieval.chunking import cut
from services.retrieval.document import DocumentDraft
from services.retrieval.embedding import hash_vector
from services.retrieval.library import Library
from services.retrieval.repairing import repair_once
from tests.retrieval.conftest import Shelf

HOLIDAYS = DocumentDraft("holidays.md", "Holidays", "# Holidays\n\nEverybody has 27 days of paid holiday.")
EXPENSES = DocumentDraft("expenses.md", "Expenses", "# Expenses\n\nMeals cost at most 38 euros a day.")


async def found_keys(library: Library, tenant_id: TenantId, query: str) -> list[str]:
    """The keys of the documents found, best first."""
    return [found.chunk.document_key for found in await library.search(tenant_id, query, 5)]


async def test_a_stored_document_is_found_at_once(shelf: Shelf) -> None:
    """As soon as an upsert is answered, a search returns the nearest document first."""
    tenant_id = await shelf.new_tenant()
    stored, changed = await shelf.library.put(tenant_id, [HOLIDAYS, EXPENSES])
    assert changed == 2
    assert [document.key for document in stored] == ["holidays.md", "expenses.md"]
    assert (await found_keys(shelf.library, tenant_id, "How many days of holiday?"))[0] == "holidays.md"
    assert (await found_keys(shelf.library, tenant_id, "expenses for meals"))[0] == "expenses.md"


async def test_unchanged_documents_are_left_alone(shelf: Shelf) -> None:
    """Storing the same content again changes nothing, not even the update time."""
    tenant_id = await shelf.new_tenant()
    first, _ = await shelf.library.put(tenant_id, [HOLIDAYS])
    second, changed = await shelf.library.put(tenant_id, [HOLIDAYS])
    assert (changed, second[0].update_time) == (0, first[0].update_time)


async def test_replaced_content_is_not_found_any_more(shelf: Shelf) -> None:
    """A changed document answers with its new text alone."""
    tenant_id = await shelf.new_tenant()
    await shelf.library.put(tenant_id, [HOLIDAYS])
    await shelf.library.put(tenant_id, [DocumentDraft("holidays.md", "Holidays", "# Holidays\n\nNow there are 31 days.")])
    texts = [found.chunk.chunk.text for found in await shelf.library.search(tenant_id, "days of holiday", 5)]
    assert len(texts) == 1
    assert "31 days" in texts[0]


async def test_a_foreign_tenant_finds_and_reads_nothing(shelf: Shelf) -> None:
    """Another tenant neither finds a document nor reads, lists or deletes it by its id."""
    owner, stranger = await shelf.new_tenant(), await shelf.new_tenant()
    [document], _ = await shelf.library.put(owner, [HOLIDAYS])
    assert await shelf.library.search(stranger, "holiday", 5) == []
    with pytest.raises(NotFound):
        await shelf.library.get(stranger, document.document_id)
    await shelf.library.delete(stranger, document.document_id)
    assert await shelf.library.list_page(stranger, "", 10) == []
    assert (await shelf.library.get(owner, document.document_id)).text == HOLIDAYS.text


async def test_the_database_refuses_a_foreign_collection(shelf: Shelf) -> None:
    """A token for one tenant's collection is refused for another's by Qdrant itself."""
    owner, stranger = await shelf.new_tenant(), await shelf.new_tenant()
    await shelf.library.put(owner, [HOLIDAYS])
    tokens = CollectionTokens(SecretStr(shelf.qdrant_api_key))
    token = tokens.mint(alias_name(stranger), "rw")
    async with grpc.aio.insecure_channel(shelf.qdrant_url.removeprefix("http://")) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await q.PointsStub(channel).Count(q.CountPoints(collection_name=alias_name(owner)), metadata=(("api-key", token),))
    assert refused.value.code() is grpc.StatusCode.PERMISSION_DENIED


async def test_a_planted_foreign_point_is_dropped_and_reported(shelf: Shelf, capsys: pytest.CaptureFixture[str]) -> None:
    """A point that carries another tenant's id is never answered."""
    owner, stranger = await shelf.new_tenant(), await shelf.new_tenant()
    [document], _ = await shelf.library.put(stranger, [HOLIDAYS])
    [chunk] = await shelf.store.chunks_of(stranger, document.document_id)
    planted = q.PointStruct(
        id=q.PointId(uuid=str(chunk.chunk_id)),
        vectors=q.Vectors(vectors=q.NamedVectors(vectors={"dense": q.Vector(dense=q.DenseVector(data=hash_vector("holiday")))})),
        payload={"tenant_id": q.Value(string_value=str(stranger))},
    )
    async with grpc.aio.insecure_channel(shelf.qdrant_url.removeprefix("http://")) as channel:
        request = q.UpsertPoints(collection_name=alias_name(owner), wait=True, points=[planted])
        await q.PointsStub(channel).Upsert(request, metadata=(("api-key", shelf.qdrant_api_key),))
    assert await shelf.library.search(owner, "holiday", 5) == []
    assert "foreign_point_dropped" in "".join(capsys.readouterr())


async def test_a_deleted_document_is_gone_everywhere(shelf: Shelf) -> None:
    """After a delete no search, list or get knows the document; a repeated delete is answered alike."""
    tenant_id = await shelf.new_tenant()
    [document], _ = await shelf.library.put(tenant_id, [HOLIDAYS])
    await shelf.library.delete(tenant_id, document.document_id)
    await shelf.library.delete(tenant_id, document.document_id)
    assert await shelf.library.search(tenant_id, "holiday", 5) == []
    assert await shelf.library.list_page(tenant_id, "", 10) == []
    assert await shelf.index.erase(tenant_id) == 0


async def test_a_crash_before_indexing_is_repaired(shelf: Shelf) -> None:
    """A document whose points were never written is indexed by the repairing job."""
    tenant_id = await shelf.new_tenant()
    await shelf.store.put(tenant_id, HOLIDAYS, cut(HOLIDAYS.text))
    assert await shelf.library.search(tenant_id, "holiday", 5) == []
    await _age(shelf, "UPDATE documents SET update_time = now() - interval '1 minute' WHERE tenant_id = $1", tenant_id)
    assert await repair_once(shelf.owed, shelf.library) == 1
    assert await found_keys(shelf.library, tenant_id, "holiday") == ["holidays.md"]


async def test_a_place_without_tables_holds_up_nobodys_repairs(shelf: Shelf) -> None:
    """A tenant is on the list of those elsewhere before its tables are made: the repairing job goes past it to the others."""
    tenant_id, half_made = await shelf.new_tenant(), TenantId(new_uuid7())
    if shelf.kind is not PlacementKind.POOL:
        await shelf.maker.note_away(half_made, (await shelf.places.make(half_made, shelf.kind)).place)
    await shelf.store.put(tenant_id, HOLIDAYS, cut(HOLIDAYS.text))
    await _age(shelf, "UPDATE documents SET update_time = now() - interval '1 minute' WHERE tenant_id = $1", tenant_id)
    try:
        assert await repair_once(shelf.owed, shelf.library) == 1
    finally:
        await shelf.maker.forget(half_made)


async def test_a_crash_before_removing_points_is_repaired(shelf: Shelf) -> None:
    """Points of a removed document are never answered, and are removed by the repairing job."""
    tenant_id = await shelf.new_tenant()
    [document], _ = await shelf.library.put(tenant_id, [HOLIDAYS])
    await shelf.store.delete(tenant_id, document.document_id)
    assert await shelf.library.search(tenant_id, "holiday", 5) == []
    await _age(shelf, "UPDATE removed_documents SET remove_time = now() - interval '1 minute' WHERE tenant_id = $1", tenant_id)
    assert await repair_once(shelf.owed, shelf.library) == 1
    assert await shelf.index.erase(tenant_id) == 0


async def test_one_broken_tenant_does_not_hold_up_the_repair_of_others(shelf: Shelf) -> None:
    """A document of a tenant without a collection stays owed while others are repaired."""
    broken, sound = TenantId(uuid.uuid4()), await shelf.new_tenant()
    await shelf.places.place(broken, shelf.kind, shelf.maker)
    for tenant_id in (broken, sound):
        await shelf.store.put(tenant_id, HOLIDAYS, cut(HOLIDAYS.text))
        await _age(shelf, "UPDATE documents SET update_time = now() - interval '1 minute' WHERE tenant_id = $1", tenant_id)
    assert await repair_once(shelf.owed, shelf.library) == 1
    assert await found_keys(shelf.library, sound, "holiday") == ["holidays.md"]
    await shelf.store.erase(broken)


async def test_blank_documents_are_refused_before_anything_is_written(shelf: Shelf) -> None:
    """A blank text refuses the whole request."""
    tenant_id = await shelf.new_tenant()
    with pytest.raises(InvalidRequest):
        await shelf.library.put(tenant_id, [HOLIDAYS, DocumentDraft("blank.md", "Blank", " \n ")])
    assert await shelf.library.list_page(tenant_id, "", 10) == []


async def test_erasing_a_tenant_leaves_nothing(shelf: Shelf) -> None:
    """Erasure reports what it removed, and finds nothing the second time."""
    tenant_id = await shelf.new_tenant()
    await shelf.library.put(tenant_id, [HOLIDAYS, EXPENSES])
    assert await shelf.index.erase(tenant_id) == 2
    assert await shelf.store.erase(tenant_id) == {"chunks": 2, "documents": 2, "removed_documents": 0, "retrieval_sealing": 0}
    assert await shelf.index.erase(tenant_id) == 0


async def test_row_level_security_hides_other_tenants_from_the_service_role(shelf: Shelf) -> None:
    """Inside one tenant's transaction the service's own role sees no other tenant's rows, whatever the statement asks for."""
    owner, stranger = await shelf.new_tenant(), await shelf.new_tenant()
    await shelf.library.put(owner, [HOLIDAYS])
    async with shelf.store._database.transaction(stranger) as connection:
        assert await connection.fetchval("SELECT count(*) FROM documents") == 0
        assert await connection.fetchval("SELECT count(*) FROM chunks") == 0


async def test_provisioning_twice_keeps_what_is_there(shelf: Shelf) -> None:
    """Provisioning is idempotent."""
    tenant_id = await shelf.new_tenant()
    await shelf.library.put(tenant_id, [HOLIDAYS])
    await shelf.index.provision(tenant_id)
    assert await found_keys(shelf.library, tenant_id, "holiday") == ["holidays.md"]


async def test_an_unknown_document_is_not_found(shelf: Shelf) -> None:
    """An id that never existed answers like a foreign one."""
    with pytest.raises(NotFound):
        await shelf.library.get(await shelf.new_tenant(), DocumentId(uuid.uuid4()))


async def _age(shelf: Shelf, statement: str, tenant_id: TenantId) -> None:
    async with shelf.store._database.transaction(tenant_id) as connection:
        await connection.execute(statement, tenant_id)
