"""Documents sealed under the tenant's own data key: found and read like any, unreadable in the database, moved to new keys online."""

import asyncio
import hashlib
import json
import secrets
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from urllib.parse import urlsplit, urlunsplit

import asyncpg
import pytest

from services.kernel.errors import MeshError, Unavailable
from services.kernel.ids import TenantId
from services.kernel.request_context import bind_tenant
from services.kernel.sealed_writes import reseal_for_a_while
from services.kernel.tenant_cipher import KeyUseFailed, TenantCipher
from services.retrieval.adapters.postgres import PostgresDocumentStore
from services.retrieval.adapters.postgres_sealing import PostgresSealedRows
from services.retrieval.chunking import cut
from services.retrieval.document import DocumentDraft
from services.retrieval.library import Library
from services.retrieval.repairing import repair_once
from tests.retrieval.conftest import Shelf
from tests.retrieval.reseal_process import context_of

HOLIDAYS = DocumentDraft("holidays.md", "Paid holidays", "# Holidays\n\nEverybody has 27 days of paid holiday.")
EXPENSES = DocumentDraft("expenses.md", "Expenses", "# Expenses\n\nMeals cost at most 38 euros a day.")


@contextmanager
def calling(tenant_id: TenantId, *, encrypts: bool = True) -> Iterator[None]:
    """A call in the name of a tenant is in hand."""
    with bind_tenant(context_of(tenant_id, encrypts=encrypts)):
        yield


def replica(shelf: Shelf) -> tuple[Library, PostgresSealedRows]:
    """Another process's worth of caches on the same stores."""
    cipher = TenantCipher(shelf.keys)
    return Library(PostgresDocumentStore(shelf.database, shelf.jobs, cipher), shelf.index, shelf.embedder), PostgresSealedRows(
        shelf.database, cipher
    )


async def reseal_all(shelf: Shelf, tenant_id: TenantId, version: int) -> int:
    """Seals everything again through another replica."""
    _, rows = replica(shelf)
    total = 0
    while True:
        count, done = await reseal_for_a_while(rows, tenant_id, version)
        total += count
        if done:
            return total
        await asyncio.sleep(0.02)


@asynccontextmanager
async def rows_of(shelf: Shelf, tenant_id: TenantId) -> AsyncIterator[asyncpg.Connection]:
    """A connection past every policy to where the tenant's rows are."""
    place = shelf.places.where[tenant_id].place
    own = urlsplit(place.dsn.get_secret_value()).path
    dsn = urlunsplit(urlsplit(shelf.admin_dsn)._replace(path=own)) if own else shelf.admin_dsn
    connection = await asyncpg.connect(dsn, server_settings={"search_path": place.schema or "retrieval"})
    try:
        yield connection
    finally:
        await connection.close()


def dsn_at(shelf: Shelf, tenant_id: TenantId) -> str:
    """The service's own way to where the tenant's rows are."""
    place = shelf.places.where[tenant_id].place
    return f"{place.dsn.get_secret_value() or shelf.service_dsn}?options=-csearch_path%3D{place.schema or 'retrieval'}"


async def raw(shelf: Shelf, tenant_id: TenantId) -> str:
    """Every value of the tenant's rows, as text and as the text of their bytes."""
    values = []
    async with rows_of(shelf, tenant_id) as connection:
        for table in ("documents", "chunks"):
            for row in await connection.fetch(f"SELECT * FROM {table} t WHERE tenant_id = $1", tenant_id):
                values += [value.decode("latin-1") if isinstance(value, bytes) else str(value) for value in row.values()]
    assert values
    return "\n".join(values)


async def execute(shelf: Shelf, sql: str, tenant_id: TenantId, *arguments: object) -> None:
    """Changes a tenant's rows past every policy."""
    async with rows_of(shelf, tenant_id) as connection:
        await connection.execute(sql, tenant_id, *arguments)


async def test_sealed_documents_read_like_any_others(shelf: Shelf) -> None:
    """Search, get, list and export give the plaintext and its true digest; no raw row holds text, title or that digest."""
    tenant_id = await shelf.new_tenant()
    with calling(tenant_id):
        stored, changed = await shelf.library.put(tenant_id, [HOLIDAYS, EXPENSES])
        assert changed == 2
        found = await shelf.library.search(tenant_id, "days of holiday", 1)
        assert [(hit.chunk.title, hit.chunk.chunk.text) for hit in found] == [(HOLIDAYS.title, cut(HOLIDAYS.text)[0].text)]
        read = await shelf.library.get(tenant_id, stored[0].document_id)
        assert (read.title, read.text, read.content_sha256) == (HOLIDAYS.title, HOLIDAYS.text, HOLIDAYS.content_sha256)
        assert [item.title for item in await shelf.library.list_page(tenant_id, "", 10)] == [EXPENSES.title, HOLIDAYS.title]
        exported = [row["content"] async for _, row in shelf.store.export(tenant_id)]
        assert sorted(map(str, exported)) == sorted((HOLIDAYS.text, EXPENSES.text))
    values = await raw(shelf, tenant_id)
    digest = HOLIDAYS.content_sha256.decode("latin-1")
    assert not [word for word in ("27 days", "Paid holidays", "38 euros", digest) if word in values]


async def test_an_unchanged_sealed_document_is_left_alone(shelf: Shelf) -> None:
    """Storing the same content again changes nothing, also after a rotation."""
    tenant_id = await shelf.new_tenant()
    with calling(tenant_id):
        [first], _ = await shelf.library.put(tenant_id, [HOLIDAYS])
        assert (await shelf.library.put(tenant_id, [HOLIDAYS]))[1] == 0
        shelf.keys.of[tenant_id][2] = secrets.token_bytes(32)
        assert await reseal_all(shelf, tenant_id, 2) == 2
        del shelf.keys.of[tenant_id][1]
        library, _ = replica(shelf)
        [again], changed = await library.put(tenant_id, [HOLIDAYS])
        assert (changed, again.update_time) == (0, first.update_time)
        assert len(await library.search(tenant_id, "holiday", 3)) == 1


async def test_the_stored_digest_is_no_oracle(shelf: Shelf) -> None:
    """The same text in two documents and in two tenants leaves different digests, and none that the text alone could make."""
    tenants = [await shelf.new_tenant() for _ in range(2)]
    digests = set()
    for tenant_id in tenants:
        with calling(tenant_id):
            copies = [DocumentDraft(key, HOLIDAYS.title, HOLIDAYS.text) for key in ("one", "two")]
            stored, _ = await shelf.library.put(tenant_id, copies)
            digests |= {document.row_digest for document in stored}
    assert len(digests) == 4
    assert HOLIDAYS.content_sha256 not in digests
    assert hashlib.sha256(HOLIDAYS.text.encode()).digest() not in digests


async def test_only_what_a_search_returns_is_opened(shelf: Shelf) -> None:
    """A chunk that does not open spoils no search that does not return it."""
    tenant_id = await shelf.new_tenant()
    with calling(tenant_id):
        await shelf.library.put(tenant_id, [HOLIDAYS, EXPENSES])
        named = "(SELECT document_id FROM documents WHERE tenant_id = $1 AND document_key = $2)"
        altered = "UPDATE chunks SET sealed_content = sealed_content || '\\x00' WHERE tenant_id = $1 AND document_id = "
        await execute(shelf, altered + named, tenant_id, "expenses.md")
        [hit] = await shelf.library.search(tenant_id, "How many days of paid holiday?", 1)
        assert hit.chunk.document_key == "holidays.md"
        with pytest.raises(KeyUseFailed):
            await shelf.library.search(tenant_id, "How many days of paid holiday?", 2)


async def test_what_is_moved_does_not_open(shelf: Shelf, capsys: pytest.CaptureFixture[str]) -> None:
    """A text moved to another column, document or tenant does not open and is a security event."""
    owner, thief = await shelf.new_tenant(), await shelf.new_tenant()
    ids = {}
    for tenant_id in (owner, thief):
        with calling(tenant_id):
            stored, _ = await shelf.library.put(tenant_id, [HOLIDAYS, EXPENSES])
            ids[tenant_id] = [document.document_id for document in stored]
    moves = (
        ("sealed_content", owner, ids[owner][0], thief, ids[thief][0]),
        ("sealed_content", owner, ids[owner][0], owner, ids[owner][1]),
        ("sealed_header", owner, ids[owner][0], thief, ids[thief][1]),
    )
    for column, from_tenant, from_id, to_tenant, to_id in moves:
        async with rows_of(shelf, from_tenant) as connection:
            read = f"SELECT {column} FROM documents WHERE tenant_id = $1 AND document_id = $2"
            stolen = await connection.fetchval(read, from_tenant, from_id)
        assert stolen
        move = "UPDATE documents SET sealed_content = $3 WHERE tenant_id = $1 AND document_id = $2"
        await execute(shelf, move, to_tenant, to_id, stolen)
        with calling(to_tenant), pytest.raises(KeyUseFailed) as caught:
            await shelf.library.get(to_tenant, to_id)
        assert "27 days" not in caught.value.message
    assert "key_use_failed" in "".join(capsys.readouterr())


async def test_the_flag_says_how_to_write_and_never_how_to_read(shelf: Shelf) -> None:
    """Plain documents stay readable when sealing begins, sealed ones when it ends; storing one again writes it as the flag says now."""
    tenant_id = await shelf.new_tenant()
    with calling(tenant_id, encrypts=False):
        [plain], _ = await shelf.library.put(tenant_id, [HOLIDAYS])
    with calling(tenant_id):
        assert (await shelf.library.get(tenant_id, plain.document_id)).text == HOLIDAYS.text
        await shelf.library.put(tenant_id, [HOLIDAYS])
        assert "27 days" not in await raw(shelf, tenant_id)
        assert len(await shelf.library.search(tenant_id, "holiday", 5)) == 1
    with calling(tenant_id, encrypts=False):
        assert (await shelf.library.get(tenant_id, plain.document_id)).text == HOLIDAYS.text


async def test_writers_of_one_new_document_seal_it_to_its_one_row(shelf: Shelf) -> None:
    """When several writers make the same document at once, what is stored opens: it is bound to the id that won."""
    tenant_id = await shelf.new_tenant()
    with calling(tenant_id):
        async with asyncio.TaskGroup() as group:
            for number in range(6):
                group.create_task(shelf.store.put(tenant_id, (draft := DocumentDraft("same", "Same", f"Text {number}.")), cut(draft.text)))
        [document] = await shelf.library.list_page(tenant_id, "", 10)
        text = (await shelf.library.get(tenant_id, document.document_id)).text
        [chunk] = await shelf.store.chunks_of(tenant_id, document.document_id)
        assert chunk.chunk.text == text


async def test_a_rotation_under_writers_leaves_nothing_behind(shelf: Shelf) -> None:
    """While replicas write, a rotation ends with every row under the new key; the old one is retired at once and nothing is lost."""
    tenant_id = await shelf.new_tenant()
    stop = asyncio.Event()

    async def write(number: int) -> int:
        library, count = replica(shelf)[0], 0
        while not stop.is_set():
            draft = DocumentDraft(f"{number}-{count % 5}", "Title", f"Writer {number} wrote this as number {count}.")
            await library._store.put(tenant_id, draft, cut(draft.text))
            count += 1
        return count

    with calling(tenant_id):
        await shelf.store.put(tenant_id, HOLIDAYS, cut(HOLIDAYS.text))
        async with asyncio.TaskGroup() as group:
            writers = [group.create_task(write(number)) for number in range(3)]
            for version in (2, 3):
                await asyncio.sleep(0.1)
                shelf.keys.of[tenant_id][version] = secrets.token_bytes(32)
                await reseal_all(shelf, tenant_id, version)
                del shelf.keys.of[tenant_id][version - 1]
            stop.set()
        assert min(task.result() for task in writers) > 1
        library, _ = replica(shelf)
        documents = await library.list_page(tenant_id, "", 100)
        assert len(documents) >= 4
        for document in documents:
            assert (await library.get(tenant_id, document.document_id)).text
            assert await library._store.chunks_of(tenant_id, document.document_id)


async def test_a_resealing_killed_in_the_middle_goes_on(shelf: Shelf) -> None:
    """Kill -9 between pages leaves rows under both keys, all readable; the next run seals the rest and nothing twice over."""
    tenant_id = await shelf.new_tenant()
    with calling(tenant_id):
        for number in range(60):
            draft = DocumentDraft(f"{number:03}", "Title", f"This is document {number}.")
            await shelf.store.put(tenant_id, draft, cut(draft.text))
        shelf.keys.of[tenant_id][2] = secrets.token_bytes(32)
        keys = {str(version): key.hex() for version, key in shelf.keys.of[tenant_id].items()}
        told = json.dumps({"dsn": dsn_at(shelf, tenant_id), "tenant_id": str(tenant_id), "keys": keys})
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "tests.retrieval.reseal_process", stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
        )
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(told.encode() + b"\n")
        async with asyncio.timeout(60):
            while await process.stdout.readline() != b"page\n":
                pass
        process.kill()
        await process.wait()
        async with rows_of(shelf, tenant_id) as connection:
            counted = "SELECT count(*) FROM documents WHERE tenant_id = $1 AND key_version = $2"
            before = [await connection.fetchval(counted, tenant_id, version) for version in (1, 2)]
            assert sum(before) == 60
            assert before[1] >= 10
            left = await reseal_all(shelf, tenant_id, 2)
            assert left >= before[0]
            assert [await connection.fetchval(counted, tenant_id, version) for version in (1, 2)] == [0, 60]
        del shelf.keys.of[tenant_id][1]
        library, _ = replica(shelf)
        page = await library.list_page(tenant_id, "", 100)
        assert len([await library.get(tenant_id, document.document_id) for document in page]) == 60


async def test_rows_of_a_backup_do_not_open_once_the_keys_are_gone(shelf: Shelf) -> None:
    """Rows copied before the erasure and put back after it stay closed."""
    tenant_id = await shelf.new_tenant()
    with calling(tenant_id):
        [document], _ = await shelf.library.put(tenant_id, [HOLIDAYS])
        async with rows_of(shelf, tenant_id) as connection:
            tables = ("documents", "chunks")
            read = "SELECT to_jsonb(t)::text AS row FROM {} t WHERE tenant_id = $1"
            dump = {table: [row["row"] for row in await connection.fetch(read.format(table), tenant_id)] for table in tables}
            await shelf.store.erase(tenant_id)
            shelf.keys.of[tenant_id] = {1: secrets.token_bytes(32)}
            # As a restore does: without triggers, or the tombstone would refuse the rows.
            await connection.execute("SET session_replication_role = replica")
            for table, kept in dump.items():
                for row in kept:
                    restore = f"INSERT INTO {table} SELECT * FROM jsonb_populate_record(NULL::{table}, $1::text::jsonb)"
                    await connection.execute(restore, row)
        with pytest.raises(KeyUseFailed):
            await replica(shelf)[0].get(tenant_id, document.document_id)


async def test_half_done_sealed_documents_are_repaired_once_the_tenant_calls(shelf: Shelf) -> None:
    """Without the tenant's keys at hand the repair waits; after any search of the tenant's it is done."""
    tenant_id = await shelf.new_tenant()
    library, _ = replica(shelf)
    with calling(tenant_id):
        await shelf.store.put(tenant_id, HOLIDAYS, cut(HOLIDAYS.text))
    await execute(shelf, "UPDATE documents SET update_time = now() - interval '1 minute' WHERE tenant_id = $1", tenant_id)
    with pytest.raises(Unavailable):
        await library._store.chunks_of(tenant_id, next(iter([item[1] for item in await shelf.owed.unindexed(100) if item[0] == tenant_id])))
    await repair_once(shelf.owed, library)
    with calling(tenant_id):
        assert await library.search(tenant_id, "holiday", 5) == []
    await repair_once(shelf.owed, library)
    with calling(tenant_id):
        assert len(await library.search(tenant_id, "holiday", 5)) == 1


async def test_plain_documents_ask_for_no_key(shelf: Shelf) -> None:
    """A tenant that does not seal costs no question for keys."""
    tenant_id = await shelf.new_tenant()
    before = shelf.keys.fetched
    with calling(tenant_id, encrypts=False):
        await shelf.library.put(tenant_id, [HOLIDAYS])
        assert await shelf.library.search(tenant_id, "holiday", 5)
    assert shelf.keys.fetched == before


async def test_a_failure_to_get_keys_is_told_as_such(shelf: Shelf) -> None:
    """When the keys were destroyed or cannot be had, reading says so instead of answering with nothing."""
    tenant_id = await shelf.new_tenant()
    with calling(tenant_id):
        [document], _ = await shelf.library.put(tenant_id, [HOLIDAYS])
    with pytest.raises(MeshError):
        await replica(shelf)[0].get(tenant_id, document.document_id)
