"""Where a tenant lives is asked once and proven every time: a place refuses who has left it, and a move loses and doubles nothing."""

import asyncio
import itertools
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from urllib.parse import urlsplit, urlunsplit

import asyncpg
import pytest
from pydantic import SecretStr

from services.inference.adapters.postgres import PostgresMemory
from services.inference.app import TENANT_TABLES
from services.inference.conversation import new_conversation_id
from services.inference.prompt_assembly import USER, Turn
from services.kernel import catalog, tenant_moving
from services.kernel.errors import NotFound, Unavailable
from services.kernel.ids import CallId, TenantId, new_uuid7
from services.kernel.lending import Lending
from services.kernel.migrate import Destination, MigrationRefused, fill, home_of, migrate_all_places
from services.kernel.place_making import PlaceMaker
from services.kernel.placement import HOME, Place, PlaceDirectory, PlacementKind, RemotePlaces, Whereabouts
from services.kernel.request_context import bind_tenant
from services.kernel.sealing import TenantKeys
from services.kernel.silo_pools import SiloPools
from services.kernel.tenant_cipher import TenantCipher
from services.kernel.tenant_context import TenantContext
from services.kernel.tenant_database import TenantDatabase
from services.kernel.tenant_moving import MoveNotVerified, TenantMover
from tests.support.places import MIGRATIONS, KnownPlaces
from tests.support.stores import PostgresStore
from tests.support.waiting import eventually

OUTSIDE = (PlacementKind.BRIDGE, PlacementKind.SILO)


@dataclass(frozen=True, slots=True)
class Replica:
    """One process of a service: what it remembers is its own."""

    database: TenantDatabase
    memory: PostgresMemory
    directory: PlaceDirectory
    maker: PlaceMaker
    silos: SiloPools
    mover: TenantMover


class NoKeys:
    """Has none: what these tenants keep is not sealed."""

    async def fetch(self, context: TenantContext, tenant_id: TenantId) -> TenantKeys:
        """Refuses."""
        raise Unavailable("data_key")


@dataclass(frozen=True, slots=True)
class World:
    """Two replicas of a service on one database."""

    places: KnownPlaces
    replicas: tuple[Replica, Replica]

    async def begin_move(self, tenant_id: TenantId, kind: PlacementKind) -> TenantContext:
        """Makes the place a tenant of the pool shall move to, and returns what the mover is called with."""
        made = await self.places.make(tenant_id, kind)
        self.places.where[tenant_id] = Whereabouts(HOME, made.place, made.migration_dsn)
        return context_of(tenant_id)


@pytest.fixture(scope="module")
async def world(postgres: PostgresStore) -> AsyncIterator[World]:
    """A migrated database under two replicas."""
    places = KnownPlaces(await postgres.fresh_database(), "inference")
    await places.migrate()
    replicas = [await replica(places), await replica(places)]
    yield World(places, (replicas[0], replicas[1]))
    for one in replicas:
        await one.silos.close()
        await one.database.close()


async def replica(places: KnownPlaces) -> Replica:
    """Starts one."""
    database = await TenantDatabase.open(places.dsn("inference_service"))
    maker, silos, directory = places.follow(database)
    mover = TenantMover(database, places, maker, "inference", TENANT_TABLES)
    return Replica(database, PostgresMemory(database, TenantCipher(NoKeys())), directory, maker, silos, mover)


def context_of(tenant_id: TenantId, placement: str = "pool") -> TenantContext:
    """A proven context."""
    end = datetime.now(UTC) + timedelta(seconds=60)
    return TenantContext(tenant_id, "free", "local", "key:1", frozenset(), 1, end, False, "token", placement=placement)


async def a_tenant(world: World) -> TenantId:
    """A tenant of the pool with a prompt."""
    tenant_id = TenantId(new_uuid7())
    await world.replicas[0].memory.put_prompt(tenant_id, "Be kind.", only_first=True)
    return tenant_id


async def test_the_pool_asks_nobody(world: World) -> None:
    """A tenant whose context says pool, and work without a context, go to the shared tables without a question."""
    tenant_id = await a_tenant(world)
    asked = len(world.places.asked)
    with bind_tenant(context_of(tenant_id)):
        await world.replicas[0].memory.newest_prompt(tenant_id)
    assert len(world.places.asked) == asked


@pytest.mark.parametrize("kind", OUTSIDE, ids=str)
async def test_a_place_is_asked_for_once(world: World, kind: PlacementKind) -> None:
    """A tenant outside the pool is asked for once, until its place is forgotten."""
    tenant_id = TenantId(new_uuid7())
    one = world.replicas[0]
    await world.places.place(tenant_id, kind, one.maker)
    world.places.asked.clear()
    with bind_tenant(context_of(tenant_id, kind.value)):
        await one.memory.put_prompt(tenant_id, "Be kind.", only_first=True)
        await one.memory.newest_prompt(tenant_id)
        assert world.places.asked == [tenant_id]
        one.directory.forget(tenant_id)
        await one.memory.newest_prompt(tenant_id)
        assert world.places.asked == [tenant_id, tenant_id]


@pytest.mark.parametrize("kind", OUTSIDE, ids=str)
async def test_a_transaction_is_where_its_tenant_lives(world: World, kind: PlacementKind) -> None:
    """Were there no place that refuses, a transaction would still be in the tenant's own schema or database, and not in the shared ones."""
    tenant_id = TenantId(new_uuid7())
    database = world.replicas[0].database
    made = await world.places.make(tenant_id, kind)
    async with database.transaction(tenant_id) as connection:
        shared = await connection.fetchval("SELECT current_database()")
    async with database.transaction_at(made.place, tenant_id, walled=False) as connection:
        schema, entered = await connection.fetchrow("SELECT current_setting('search_path'), current_database()")
    if kind is PlacementKind.BRIDGE:
        assert (schema.partition(",")[0], entered) == (f"t_{tenant_id.hex}", shared)
    else:
        assert entered != shared


@pytest.mark.parametrize("kind", OUTSIDE, ids=str)
async def test_a_replica_that_remembers_the_pool_neither_reads_nor_writes_there(world: World, kind: PlacementKind) -> None:
    """After a move a replica with an old token and an old memory is refused by the pool and goes on at the new place, unnoticed."""
    tenant_id = await a_tenant(world)
    mover, stale = world.replicas
    await mover.mover.move(await world.begin_move(tenant_id, kind))
    with bind_tenant(context_of(tenant_id)):
        # One statement that is a transaction of its own, and a transaction of several.
        assert (await stale.memory.put_prompt(tenant_id, "Be brief.", only_first=False)).version == 2
        stale.directory.forget(tenant_id)
        assert (await stale.memory.newest_prompt(tenant_id)).text == "Be brief."
    assert await at_home(world, tenant_id) == ["Be kind."]


async def test_rows_of_a_tenant_are_found_in_one_place_only(world: World) -> None:
    """A tenant made in a bridge has nothing in the pool, even when a call without a context comes first."""
    tenant_id = TenantId(new_uuid7())
    await world.places.place(tenant_id, PlacementKind.BRIDGE, world.replicas[0].maker)
    await world.replicas[1].memory.put_prompt(tenant_id, "Be kind.", only_first=True)
    assert await at_home(world, tenant_id) == []
    assert (await world.replicas[0].memory.newest_prompt(tenant_id)).text == "Be kind."


async def test_the_shared_connection_keeps_no_tenants_schema(world: World) -> None:
    """Tenants of the pool and of bridges take turns on one connection without meeting."""
    database = await TenantDatabase.open(world.places.dsn("inference_service"), max_size=1)
    world.places.follow(database)
    memory = PostgresMemory(database, TenantCipher(NoKeys()))
    tenants = [TenantId(new_uuid7()) for _ in range(4)]
    for number, tenant_id in enumerate(tenants):
        if number % 2:
            await world.places.place(tenant_id, PlacementKind.BRIDGE, world.replicas[0].maker)
        await memory.put_prompt(tenant_id, f"I am {number}.", only_first=True)
    for _, (number, tenant_id) in itertools.product(range(20), enumerate(tenants)):
        assert (await memory.newest_prompt(tenant_id)).text == f"I am {number}."
        assert (await memory.recall(tenant_id, "", 100)).prompt == f"I am {number}."
    await database.close()


@pytest.mark.parametrize("kind", OUTSIDE, ids=str)
async def test_a_move_loses_and_doubles_nothing(world: World, kind: PlacementKind) -> None:
    """Two replicas write and delete all through a move: afterwards everything acknowledged is there, once, and nothing that was deleted."""
    tenant_id = await a_tenant(world)
    context = await world.begin_move(tenant_id, kind)
    moved, kept = asyncio.Event(), dict[str, int]()
    async with asyncio.TaskGroup() as group:
        for one in (*world.replicas, *world.replicas):
            group.create_task(converse(one.memory, tenant_id, moved, kept))
        await world.replicas[0].mover.move(context)
        moved.set()
    for one in world.replicas:
        found = {conversation_id: len(await one.memory.turns(tenant_id, conversation_id, 0, 100)) for conversation_id in kept}
        assert found == kept
    exported = [kind async for kind, _ in world.replicas[1].memory.export(tenant_id)]
    assert exported.count("postgres:inference.conversations") == len(kept) >= 4
    assert exported.count("postgres:inference.turns") == sum(kept.values())


async def test_two_movers_at_once_make_one_move(world: World) -> None:
    """A caller and the sweep may move one tenant at the same time, among writes; both end, and nothing is lost."""
    tenant_id = await a_tenant(world)
    context = await world.begin_move(tenant_id, PlacementKind.SILO)
    moved, kept = asyncio.Event(), dict[str, int]()
    async with asyncio.TaskGroup() as group:
        group.create_task(converse(world.replicas[0].memory, tenant_id, moved, kept))
        movers = [group.create_task(one.mover.move(context)) for one in world.replicas]
        await asyncio.wait(movers)
        moved.set()
    found = {conversation_id: len(await world.replicas[1].memory.turns(tenant_id, conversation_id, 0, 100)) for conversation_id in kept}
    assert found == kept


async def test_a_move_that_dies_before_its_note_leaves_the_tenant_at_home(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mover that dies after its copy was committed has moved nobody: writes go on at home, and the next run carries them along."""
    tenant_id = await a_tenant(world)
    context = await world.begin_move(tenant_id, PlacementKind.BRIDGE)
    one, other = world.replicas
    note = TenantMover._note

    async def dies(mover: TenantMover, connection: asyncpg.Connection, tenant: TenantId, place: Place, state: str) -> None:
        if state == tenant_moving.AWAY:
            raise ConnectionError("killed")
        await note(mover, connection, tenant, place, state)

    with monkeypatch.context() as patched:
        patched.setattr(TenantMover, "_note", dies)
        with pytest.raises(Unavailable):
            await one.mover.move(context)
    await other.memory.put_prompt(tenant_id, "Be brief.", only_first=False)
    assert await at_home(world, tenant_id) == ["Be brief.", "Be kind."]
    await one.mover.move(context)
    await one.mover.move(context)
    assert (await other.memory.newest_prompt(tenant_id)).text == "Be brief."


@pytest.mark.parametrize("kind", OUTSIDE, ids=str)
async def test_an_erasure_ends_a_move_that_is_about_to_be_noted(world: World, monkeypatch: pytest.MonkeyPatch, kind: PlacementKind) -> None:
    """A tenant whose tombstone stands is not noted as living elsewhere, however far its move is, and its copy goes with its erasure."""
    tenant_id = await a_tenant(world)
    context, (one, other) = await world.begin_move(tenant_id, kind), world.replicas
    note, erasing = TenantMover._note, list[asyncio.Task[object]]()

    async def late(mover: TenantMover, connection: asyncpg.Connection, tenant: TenantId, place: Place, state: str) -> None:
        if state == tenant_moving.AWAY:
            erasing.append(asyncio.create_task(erase(other, context)))  # type: ignore[arg-type] # any coroutine
            await eventually(lambda: has_tombstone(world, tenant_id), within_seconds=4)
        await note(mover, connection, tenant, place, state)

    with monkeypatch.context() as patched:
        patched.setattr(TenantMover, "_note", late)
        with pytest.raises(NotFound):
            await one.mover.move(context)
    await erasing[0]
    await nothing_is_kept(world, tenant_id)


@pytest.mark.parametrize("kind", OUTSIDE, ids=str)
async def test_who_comes_to_a_move_after_the_erasure_copies_nothing(
    world: World, monkeypatch: pytest.MonkeyPatch, kind: PlacementKind
) -> None:
    """A mover that slept through the erasure of its tenant neither notes nor copies anything afterwards."""
    tenant_id = await a_tenant(world)
    context, (one, other) = await world.begin_move(tenant_id, kind), world.replicas
    copy = TenantMover._copy_open

    async def sleeps(mover: TenantMover, tenant: TenantId, whereabouts: Whereabouts) -> None:
        await erase(other, context)
        await copy(mover, tenant, whereabouts)

    with monkeypatch.context() as patched:
        patched.setattr(TenantMover, "_copy_open", sleeps)
        with pytest.raises(NotFound):
            await one.mover.move(context)
    await nothing_is_kept(world, tenant_id)
    with pytest.raises(NotFound):
        await one.mover.move(context)
    with pytest.raises(NotFound):
        await one.maker.note_away(tenant_id, world.places.where[tenant_id].following or HOME)
    await nothing_is_kept(world, tenant_id)


async def erase(one: Replica, context: TenantContext) -> None:
    """Erases the context's tenant, as the service does."""
    assert context.tenant_id is not None
    with bind_tenant(context):
        await one.memory.erase(context.tenant_id)
        await one.mover.erase_copies(context)
        await one.maker.forget(context.tenant_id)


async def has_tombstone(world: World, tenant_id: TenantId) -> bool:
    """Tells whether the erasure has begun."""
    return bool(await count(world.places.admin_dsn, "inference.erased_tenants", tenant_id))


async def nothing_is_kept(world: World, tenant_id: TenantId) -> None:
    """Looks at both ends of a move, past every policy: no row of the tenant is in its tables, and no list names it."""
    following = world.places.where[tenant_id].following
    assert following is not None
    there = world.places.admin_dsn
    if following.kind is PlacementKind.SILO:
        there = urlunsplit(urlsplit(there)._replace(path=f"/t_{tenant_id.hex}"))
    schema = following.schema or "inference"
    for table in ("prompts", "conversations", "turns"):
        assert await count(world.places.admin_dsn, f"inference.{table}", tenant_id) == 0
        assert await count(there, f"{schema}.{table}", tenant_id) == 0
    assert await count(world.places.admin_dsn, "inference.inference_placed_tenants", tenant_id) == 0


async def count(dsn: str, table: str, tenant_id: TenantId) -> int:
    """How many rows of the tenant a table holds."""
    connection = await asyncpg.connect(dsn)
    try:
        return int(await connection.fetchval(f"SELECT count(*) FROM {table} WHERE tenant_id = $1", tenant_id))
    finally:
        await connection.close()


async def test_a_copy_that_differs_stops_the_move(world: World) -> None:
    """Where the new place changes what is written to it, the counts and digests differ, and the tenant stays where it is."""
    tenant_id = await a_tenant(world)
    context = await world.begin_move(tenant_id, PlacementKind.BRIDGE)
    one, name = world.replicas[0], f"t_{tenant_id.hex}"
    await one.maker.make_tables(Place(PlacementKind.BRIDGE, schema=name), SecretStr(""))
    await administer(
        world,
        f"CREATE FUNCTION {name}.spoil() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN NEW.text := upper(NEW.text); RETURN NEW; END $$",
        f"CREATE TRIGGER spoil BEFORE INSERT ON {name}.prompts FOR EACH ROW EXECUTE FUNCTION {name}.spoil()",
    )
    with pytest.raises(MoveNotVerified):
        await one.mover.move(context)
    assert (await one.memory.newest_prompt(tenant_id)).text == "Be kind."
    assert one.directory.peek(tenant_id) is None


async def test_what_is_left_behind_is_removed_only_of_tenants_that_left(world: World) -> None:
    """Dropping what was left empties the pool of a moved tenant and touches nobody who lives there."""
    resident, gone = await a_tenant(world), await a_tenant(world)
    one = world.replicas[0]
    await one.mover.move(await world.begin_move(gone, PlacementKind.BRIDGE))
    assert (await one.mover.drop_left(context_of(gone)))["postgres:inference.prompts"] == 1
    assert await one.mover.drop_left(context_of(resident)) == {}
    assert await at_home(world, gone) == []
    assert (await one.memory.newest_prompt(gone)).text == (await one.memory.newest_prompt(resident)).text == "Be kind."


async def test_a_closed_place_without_a_new_one_is_unavailable_and_not_empty(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """When nobody can name the new place the call fails after a bounded wait; it never reads the old one."""
    monkeypatch.setattr("services.kernel.placement.MOVING_SECONDS", 0.2)
    tenant_id = await a_tenant(world)
    await world.replicas[0].maker.note_away(tenant_id, Place(PlacementKind.SILO))
    with pytest.raises(Unavailable, match="being moved"):
        await world.replicas[1].memory.newest_prompt(tenant_id)


async def test_without_the_tenants_context_nobody_learns_its_place() -> None:
    """A process cannot ask where a tenant lives unless a call of that tenant is in hand."""
    source = RemotePlaces.__new__(RemotePlaces)
    for context in (None, context_of(TenantId(new_uuid7()))):
        with pytest.raises(Unavailable):
            await source.fetch(TenantId(new_uuid7()), context)


def test_places_print_no_secrets() -> None:
    """DSNs and keys appear neither in a place's text nor in that of what is known of a tenant."""
    place = Place(PlacementKind.SILO, dsn=SecretStr("hidden-dsn"), qdrant_api_key=SecretStr("hidden-key"))
    assert "hidden" not in repr(Whereabouts(place, place, SecretStr("hidden-owner")))
    with pytest.raises(ValueError, match="lower-case"):
        replace(place, schema="t_1; DROP SCHEMA inference")


async def test_bridges_and_silos_come_forward_with_the_home_schema(world: World) -> None:
    """`migrate` visits every place it can reach, and finds nothing to do where the files are applied already."""
    for kind in OUTSIDE:
        await world.places.place(TenantId(new_uuid7()), kind, world.replicas[0].maker)
    assert await migrate_all_places(world.places.admin_dsn, world.places.admin_dsn, "inference", MIGRATIONS["inference"]) >= 2


@pytest.mark.parametrize("spoil", ["ALTER TABLE {}.turns NO FORCE ROW LEVEL SECURITY", "ALTER TABLE {}.turns OWNER TO tenantry_admin"])
async def test_the_catalog_finds_a_breach_in_a_bridge(world: World, spoil: str) -> None:
    """A bridge schema is held to the same rules as the shared tables."""
    tenant_id = TenantId(new_uuid7())
    await world.places.place(tenant_id, PlacementKind.BRIDGE, world.replicas[0].maker)
    name = f"t_{tenant_id.hex}"
    destination = Destination("inference", name, home_of("inference").owner, home_of("inference").service)
    connection = await asyncpg.connect(world.places.admin_dsn)
    assert await catalog.violations(connection, name, destinations=[destination]) == []
    await connection.execute(spoil.format(name))
    assert await catalog.violations(connection, name, destinations=[destination]) != []
    await connection.close()


def test_files_are_rewritten_for_another_schema_and_for_nobody_else() -> None:
    """The home's name before a dot or a comma becomes the schema's; what is for the jobs role alone is left out."""
    bridge = Destination("inference", "t_1", "inference_owner", "inference_service")
    sql = "SELECT inference.x; SET search_path = inference, pg_temp; -- inference of causes\nGRANT SELECT ON y TO :service, :jobs;"
    assert fill(sql, bridge) == (
        "SELECT t_1.x; SET search_path = t_1, pg_temp; -- inference of causes\nGRANT SELECT ON y TO inference_service;"
    )
    assert fill("CREATE POLICY a ON b\n    TO :jobs USING (true);\nSELECT 1;", bridge) == "\nSELECT 1;"
    with pytest.raises(MigrationRefused, match="jobs"):
        fill("ALTER TABLE x OWNER TO :jobs;", bridge)
    odd = Destination("inference", "inference", 'Odd "owner"', "svc")
    assert fill("ALTER TABLE inference.x OWNER TO :owner", odd) == 'ALTER TABLE inference.x OWNER TO "Odd ""owner"""'


async def test_dedicated_stores_are_bounded_and_the_idle_one_makes_room() -> None:
    """The store unused for longest is closed for a new one; one in use never is, and whoever finds no room is told within a bound."""
    closed: list[str] = []

    async def open_one(key: str) -> str:
        return key

    async def close_one(thing: str) -> None:
        closed.append(thing)

    lending = Lending[str, str](2, open_one, close_one, dependency="postgres")
    soon = asyncio.get_running_loop().time() + 0.2
    async with lending.lend("a"):
        async with lending.lend("b"):
            with bind_tenant(context_of(TenantId(new_uuid7())), deadline=soon), pytest.raises(Unavailable):
                async with lending.lend("c"):
                    pass
        async with lending.lend("c"):
            assert (closed, len(lending)) == (["b"], 2)
    await lending.close()
    assert sorted(closed) == ["a", "b", "c"]


async def converse(memory: PostgresMemory, tenant_id: TenantId, moved: asyncio.Event, kept: dict[str, int]) -> None:
    """Begins conversations, adds turns, deletes every third one, until the move is over and a little longer."""
    for number in itertools.count():
        if moved.is_set() and number > 3:
            return
        conversation_id, turns = new_conversation_id(), [Turn(USER, f"question {number}")]
        await memory.add_conversation(tenant_id, conversation_id, "ada")
        await memory.remember(tenant_id, conversation_id, CallId(new_uuid7()), turns)
        if number % 3 == 0:
            await memory.delete_conversation(tenant_id, conversation_id)
        else:
            await memory.remember(tenant_id, conversation_id, CallId(new_uuid7()), turns)
            kept[conversation_id] = 2


async def at_home(world: World, tenant_id: TenantId) -> list[str]:
    """The tenant's prompts in the shared table, read past every wall."""
    connection = await asyncpg.connect(world.places.admin_dsn)
    rows: Sequence[asyncpg.Record] = await connection.fetch("SELECT text FROM inference.prompts WHERE tenant_id = $1 ORDER BY 1", tenant_id)
    await connection.close()
    return [row["text"] for row in rows]


async def administer(world: World, *statements: str) -> None:
    """Changes the database from outside."""
    connection = await asyncpg.connect(world.places.admin_dsn)
    for sql in statements:
        await connection.execute(sql)
    await connection.close()


class Told:
    """Knows a tenant that lives in a bridge and is being copied to a silo."""

    def __init__(self, lives_at: Place, following: Place) -> None:
        self._whereabouts = Whereabouts(lives_at, following)

    async def fetch(self, tenant_id: TenantId, context: TenantContext | None) -> Whereabouts:
        """Tells both."""
        return self._whereabouts


async def test_who_comes_late_is_sent_where_the_tenant_lives_and_not_to_its_copy() -> None:
    """A place that is still being filled is nobody's until the one before it refuses: what was written there would be lost."""
    tenant_id, bridge = TenantId(new_uuid7()), Place(PlacementKind.BRIDGE, schema="t_one")
    silo = Place(PlacementKind.SILO, dsn=SecretStr("postgresql://app@db.example/own"))
    directory = PlaceDirectory(Told(bridge, silo))
    assert await directory.moved(tenant_id, HOME) == bridge
    assert await directory.moved(tenant_id, bridge) == silo
