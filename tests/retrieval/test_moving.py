"""A tenant's points follow it to a Qdrant of its own while it is used: what was found before is found after, and nothing stays behind."""

import asyncio
import itertools
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta

import pytest
from pydantic import SecretStr

from services.kernel.ids import TenantId, new_uuid7
from services.kernel.placement import HOME, PlacementKind, Whereabouts
from services.kernel.tenant_cipher import TenantCipher
from services.kernel.tenant_context import TenantContext
from services.kernel.tenant_database import JobsDatabase, TenantDatabase
from services.kernel.tenant_moving import TenantMover
from services.retrieval.adapters.moving_points import MovingPoints
from services.retrieval.adapters.placed_index import PlacedIndex
from services.retrieval.adapters.postgres import PostgresDocumentStore
from services.retrieval.adapters.qdrant import QdrantIndex
from services.retrieval.app import TENANT_TABLES
from services.retrieval.document import DocumentDraft
from services.retrieval.embedding import HashingEmbedder
from services.retrieval.library import Library
from tests.devstack.qdrant_front.front import API_KEY, running_front
from tests.retrieval.conftest import ScriptedKeys
from tests.support.places import KnownPlaces
from tests.support.stores import PostgresStore

FEW, MANY = 4, 24


@dataclass(frozen=True, slots=True)
class Replica:
    """One process of the service."""

    library: Library
    store: PostgresDocumentStore
    index: PlacedIndex
    mover: TenantMover


@dataclass(frozen=True, slots=True)
class World:
    """Two replicas over a shared Qdrant, and another Qdrant that is to be one tenant's own."""

    places: KnownPlaces
    replicas: tuple[Replica, Replica]
    own_url: str

    async def begin_move(self, tenant_id: TenantId) -> TenantContext:
        """Makes a silo with the other Qdrant and says that the tenant is going there."""
        made = await self.places.make(tenant_id, PlacementKind.SILO)
        target = replace(made.place, qdrant_url=self.own_url, qdrant_api_key=SecretStr(API_KEY))
        self.places.where[tenant_id] = Whereabouts(HOME, target, made.migration_dsn)
        end = datetime.now(UTC) + timedelta(seconds=60)
        return TenantContext(tenant_id, "free", "local", "mesh:tenant", frozenset(), 1, end, False, "token")

    def arrive(self, tenant_id: TenantId) -> None:
        """Says that the tenant lives at the new place, as the tenant service does once every part has moved."""
        known = self.places.where[tenant_id]
        self.places.where[tenant_id] = Whereabouts(known.following or known.place)


@pytest.fixture(scope="module")
async def world(postgres: PostgresStore, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[World]:
    """A migrated database and two running engines."""
    places = KnownPlaces(await postgres.fresh_database(), "retrieval")
    await places.migrate()
    with running_front(tmp_path_factory.mktemp("shared")) as shared, running_front(tmp_path_factory.mktemp("own")) as own:
        async with AsyncExitStack() as stack:
            replicas = [await replica(places, f"http://{shared.address}", stack) for _ in range(2)]
            yield World(places, (replicas[0], replicas[1]), f"http://{own.address}")
        shared.kill()
        own.kill()


async def replica(places: KnownPlaces, url: str, stack: AsyncExitStack) -> Replica:
    """Starts one."""
    database, embedder = await TenantDatabase.open(places.dsn("retrieval_service")), HashingEmbedder()
    stack.push_async_callback(database.close)
    maker, silos, _ = places.follow(database)
    stack.push_async_callback(silos.close)
    shared = QdrantIndex(url, SecretStr(API_KEY), embedder.dimensions)
    stack.push_async_callback(shared.close)
    jobs = await JobsDatabase.open(places.dsn("retrieval_jobs"))
    stack.push_async_callback(jobs.close)
    index = PlacedIndex(shared, database, embedder.dimensions)
    store = PostgresDocumentStore(database, jobs, TenantCipher(ScriptedKeys()))
    stack.push_async_callback(index.close)
    mover = TenantMover(database, places, maker, "retrieval", TENANT_TABLES, MovingPoints(index))
    return Replica(Library(store, index, embedder), store, index, mover)


async def test_points_follow_their_tenant(world: World) -> None:
    """What is put, changed and deleted all through a move is found, or not, as it should be, by every replica; nothing stays behind."""
    tenant_id, (one, other) = TenantId(new_uuid7()), world.replicas
    await one.index.provision(tenant_id)
    await one.library.put(tenant_id, [draft("anchor", "The anchor holds the ship.")])
    context, moved, wanted = await world.begin_move(tenant_id), asyncio.Event(), dict[str, str]()
    async with asyncio.TaskGroup() as group:
        for number, each in enumerate((one, other, other)):
            group.create_task(write(each.library, tenant_id, number, moved, wanted))
        group.create_task(keep_finding(other.library, tenant_id, moved))
        await one.mover.move(context)
        moved.set()
    world.arrive(tenant_id)
    for each in world.replicas:
        for key, text in wanted.items():
            found = {hit.chunk.document_key: hit.chunk.chunk.text for hit in await each.library.search(tenant_id, text, 5)}
            assert found.get(key) == text
        listed = {document.key: document for document in await each.library.list_page(tenant_id, "", 1000)}
        assert set(listed) == {*wanted, "anchor"}
        assert all(document.indexed for document in listed.values())
    left = await one.mover.drop_left(context)
    assert left["postgres:retrieval.documents"] > 0
    assert left["qdrant:points"] > 0
    async with one.index.at(HOME) as shared, one.index.at(world.places.where[tenant_id].place) as own:
        assert await shared.count(tenant_id) == 0
        assert await own.count(tenant_id) == len(wanted) + 1


async def test_points_written_beside_a_move_are_written_again(world: World) -> None:
    """A document whose points went to the old Qdrant while its tenant moved is not marked as indexed before they are in the new one."""
    tenant_id, (one, other) = TenantId(new_uuid7()), world.replicas
    await one.index.provision(tenant_id)
    context = await world.begin_move(tenant_id)
    upsert, moves = PlacedIndex.upsert, 0

    async def moved_meanwhile(index: PlacedIndex, *args: object) -> None:
        nonlocal moves
        await upsert(index, *args)  # type: ignore[arg-type] # passed on as they came
        if index is other.index and moves == 0:
            moves += 1
            await one.mover.move(context)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(PlacedIndex, "upsert", moved_meanwhile)
        await other.library.put(tenant_id, [draft("late", "The late note.")])
    assert moves == 1
    assert [hit.chunk.document_key for hit in await one.library.search(tenant_id, "late note", 5)] == ["late"]


async def test_points_removed_while_they_are_copied_fail_no_move(world: World) -> None:
    """A document deleted after its points were listed and before they were read is in neither Qdrant, and the move goes on."""
    tenant_id, (one, other) = TenantId(new_uuid7()), world.replicas
    await one.index.provision(tenant_id)
    stored, _ = await one.library.put(tenant_id, [draft("anchor", "The anchor holds the ship."), draft("gone", "The gone note.")])
    context = await world.begin_move(tenant_id)
    read_points, reads = QdrantIndex.read_points, 0

    async def read_after_the_deletion(index: QdrantIndex, *args: object) -> object:
        nonlocal reads
        reads += 1
        if reads == 1:
            await other.library.delete(tenant_id, stored[1].document_id)
        return await read_points(index, *args)  # type: ignore[arg-type] # passed on as they came

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(QdrantIndex, "read_points", read_after_the_deletion)
        await one.mover.move(context)
    world.arrive(tenant_id)
    assert reads > 0
    async with one.index.at(world.places.where[tenant_id].place) as own:
        assert await own.count(tenant_id) == 1


async def test_a_replica_that_knows_the_old_collection_alone_finds_the_new_one(world: World) -> None:
    """A search in a collection that is gone asks where the tenant lives now, and answers from there."""
    tenant_id, (one, stale) = TenantId(new_uuid7()), world.replicas
    await one.index.provision(tenant_id)
    await one.library.put(tenant_id, [draft("anchor", "The anchor holds the ship.")])
    context = await world.begin_move(tenant_id)
    await one.mover.move(context)
    world.arrive(tenant_id)
    await one.mover.drop_left(context)
    assert [hit.chunk.document_key for hit in await stale.library.search(tenant_id, "anchor", 5)] == ["anchor"]


async def keep_finding(library: Library, tenant_id: TenantId, moved: asyncio.Event) -> None:
    """Searches until the move is over; one that finds nothing is a failure."""
    while not moved.is_set():
        assert "anchor" in {hit.chunk.document_key for hit in await library.search(tenant_id, "What does the anchor hold?", 5)}


async def write(library: Library, tenant_id: TenantId, writer: int, moved: asyncio.Event, wanted: dict[str, str]) -> None:
    """Puts documents, changes every second and deletes every fifth, until the move is over and a little longer."""
    for number in itertools.count():
        if (moved.is_set() and number >= FEW) or number >= MANY * 20:
            return
        key = f"{writer}-{number % MANY}"
        text = f"Note {writer} {number} about {['alpha', 'beta', 'gamma', 'delta'][number % 4]}{number}."
        [stored], _ = await library.put(tenant_id, [draft(key, text)])
        wanted[key] = text
        if number % 5 == 4:
            await library.delete(tenant_id, stored.document_id)
            del wanted[key]


def draft(key: str, text: str) -> DocumentDraft:
    """A document of one chunk."""
    return DocumentDraft(key, key, text)
