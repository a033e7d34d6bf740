"""Prompts and conversations over a real Postgres: the same store answers alike in the pool, in a bridge and in a silo."""

from collections.abc import AsyncIterator, ItemsView
from dataclasses import dataclass, replace

import pytest

from services.inference.adapters.postgres import PostgresMemory
from services.inference.conversation import new_conversation_id
from services.inference.prompt_assembly import ASSISTANT, USER, Turn
from services.kernel.errors import NotFound, Unavailable
from services.kernel.ids import CallId, TenantId, new_uuid7
from services.kernel.place_making import PlaceMaker
from services.kernel.placement import PlacementKind
from services.kernel.sealing import TenantKeys
from services.kernel.tenant_cipher import TenantCipher
from services.kernel.tenant_context import TenantContext
from services.kernel.tenant_database import PlaceMissing, TenantDatabase
from services.tenant.adapters.schema_maker import PostgresSchemaMaker
from services.tenant.adapters.silo_maker import PostgresSiloMaker
from tests.support.places import PLACEMENTS, KnownPlaces
from tests.support.stores import PostgresStore

QUESTION, ANSWER = Turn(USER, "How are you?"), Turn(ASSISTANT, "Fine.")


class NoKeys:
    """Nothing here is sealed: who asks for keys is wrong."""

    async def fetch(self, context: TenantContext, tenant_id: TenantId) -> TenantKeys:
        raise AssertionError


@dataclass(frozen=True, slots=True)
class Desk:
    """A store, and how to get tenants for it."""

    memory: PostgresMemory
    database: TenantDatabase
    places: KnownPlaces
    maker: PlaceMaker
    kind: PlacementKind

    async def new_tenant(self) -> TenantId:
        """A tenant with a prompt, in the desk's kind of place."""
        tenant_id = TenantId(new_uuid7())
        await self.places.place(tenant_id, self.kind, self.maker)
        await self.memory.put_prompt(tenant_id, "Be kind.", only_first=True)
        return tenant_id

    async def conversation(self, tenant_id: TenantId) -> str:
        """A conversation with one call's turns."""
        conversation_id = new_conversation_id()
        await self.memory.add_conversation(tenant_id, conversation_id, "ada")
        await self.memory.remember(tenant_id, conversation_id, CallId(new_uuid7()), [QUESTION, ANSWER])
        return conversation_id


@pytest.fixture(scope="session", params=PLACEMENTS, ids=str)
async def desk(request: pytest.FixtureRequest, postgres: PostgresStore) -> AsyncIterator[Desk]:
    """A migrated database and the store over it; its tenants live in one kind of place."""
    places = KnownPlaces(await postgres.fresh_database(), "inference")
    await places.migrate()
    database = await TenantDatabase.open(places.dsn("inference_service"))
    maker, silos, _ = places.follow(database)
    yield Desk(PostgresMemory(database, TenantCipher(NoKeys())), database, places, maker, request.param)
    await silos.close()
    await database.close()


async def test_prompts_have_versions(desk: Desk) -> None:
    """A changed prompt is a new version, the same words are not, and a first prompt replaces none."""
    tenant_id = await desk.new_tenant()
    assert (await desk.memory.put_prompt(tenant_id, "Be kind.", only_first=False)).version == 1
    assert (await desk.memory.put_prompt(tenant_id, "Be brief.", only_first=False)).version == 2
    assert (await desk.memory.put_prompt(tenant_id, "Be first.", only_first=True)).text == "Be brief."
    assert (await desk.memory.newest_prompt(tenant_id)).version == 2


async def test_a_conversation_is_remembered_once(desk: Desk) -> None:
    """A call's turns are added once, however often they are sent, and the next call recalls them in order."""
    tenant_id, call_id = await desk.new_tenant(), CallId(new_uuid7())
    conversation_id = await desk.conversation(tenant_id)
    for _ in range(2):
        await desk.memory.remember(tenant_id, conversation_id, call_id, [QUESTION, ANSWER])
    recalled = await desk.memory.recall(tenant_id, conversation_id, 10_000)
    assert recalled.history == (QUESTION, ANSWER, QUESTION, ANSWER)
    assert [turn.sequence for turn in await desk.memory.turns(tenant_id, conversation_id, 1, 2)] == [2, 3]


async def test_another_tenant_finds_nothing(desk: Desk) -> None:
    """A foreign conversation is neither recalled, listed, continued nor deleted."""
    owner, stranger = await desk.new_tenant(), await desk.new_tenant()
    conversation_id = await desk.conversation(owner)
    with pytest.raises(NotFound):
        await desk.memory.recall(stranger, conversation_id, 10_000)
    with pytest.raises(NotFound):
        await desk.memory.turns(stranger, conversation_id, 0, 10)
    await desk.memory.remember(stranger, conversation_id, CallId(new_uuid7()), [QUESTION])
    await desk.memory.delete_conversation(stranger, conversation_id)
    assert len(await desk.memory.turns(owner, conversation_id, 0, 10)) == 2


async def test_a_deleted_conversation_takes_its_turns(desk: Desk) -> None:
    """Deleting a conversation removes its turns with it."""
    tenant_id = await desk.new_tenant()
    await desk.memory.delete_conversation(tenant_id, await desk.conversation(tenant_id))
    assert await desk.memory.erase(tenant_id) == {
        "postgres:inference.turns": 0,
        "postgres:inference.conversations": 0,
        "postgres:inference.prompts": 1,
        "postgres:inference.inference_sealing": 0,
    }


async def test_everything_is_exported_and_erased(desk: Desk) -> None:
    """An export yields every record; erasure counts and removes them, and finds nothing the second time."""
    tenant_id = await desk.new_tenant()
    await desk.conversation(tenant_id)
    kinds = [kind.rpartition(".")[2] async for kind, _ in desk.memory.export(tenant_id)]
    assert sorted(kinds) == ["conversations", "prompts", "turns", "turns"]
    assert sum((await desk.memory.erase(tenant_id)).values()) == 4
    assert sum((await desk.memory.erase(tenant_id)).values()) == 0


async def test_a_scan_after_an_erasure_finds_the_tombstone_alone(desk: Desk) -> None:
    """Rows go where the tenant lives, the tombstone stands at home; nothing else is found, before and after the place itself is dropped."""
    tenant_id = await desk.new_tenant()
    await desk.conversation(tenant_id)
    away = {PlacementKind.BRIDGE: f"bridge:postgres:t_{tenant_id.hex}.turns", PlacementKind.SILO: "silo:postgres:inference.turns"}
    assert await left_of(desk, tenant_id) >= {away.get(desk.kind, "postgres:inference.turns"): (2, 1)}.items()
    await desk.memory.erase(tenant_id)
    await desk.maker.forget(tenant_id)
    tombstone = {"postgres:inference.erased_tenants": (1, 0)}.items()
    assert await left_of(desk, tenant_id) == tombstone
    await desk.places.drop(tenant_id)
    with pytest.raises(NotFound):
        await desk.memory.newest_prompt(tenant_id)
    assert await left_of(desk, tenant_id) == tombstone
    with pytest.raises(NotFound):
        await desk.memory.put_prompt(tenant_id, "Too late.", only_first=False)


async def left_of(desk: Desk, tenant_id: TenantId) -> ItemsView[str, tuple[int, int]]:
    """What a scan finds of the tenant and of its answer's words, store by store."""
    found = await desk.memory.scan(tenant_id, [ANSWER.text])
    return {item.store: (item.found, item.canaries) for item in found if item.found or item.canaries}.items()


async def test_making_a_place_again_keeps_what_is_in_it(desk: Desk) -> None:
    """Schema, database, roles and tables are made once: a repeated run changes nothing."""
    tenant_id = await desk.new_tenant()
    found = desk.places.where[tenant_id]
    match desk.kind:
        case PlacementKind.BRIDGE:
            await PostgresSchemaMaker(desk.places.dsn("tenant_placement"), 1).make(tenant_id)
            await desk.maker.make_tables(found.place, found.migration_dsn)
        case PlacementKind.SILO:
            stores = PostgresSiloMaker(desk.places.admin_dsn)
            dsn, owner_dsn = found.place.dsn.get_secret_value(), found.migration_dsn.get_secret_value()
            made = replace(stores.plan(tenant_id), inference_dsn=dsn, inference_owner_dsn=owner_dsn)
            await stores.make(tenant_id, made)
            await desk.maker.make_tables(found.place, found.migration_dsn)
        case PlacementKind.POOL:
            pass
    assert (await desk.memory.newest_prompt(tenant_id)).text == "Be kind."


async def test_a_dropped_place_is_missing_and_not_empty(desk: Desk) -> None:
    """After a schema or database is dropped its tenant gets an error, never an empty answer, and dropping again finds nothing."""
    if desk.kind is PlacementKind.POOL:
        return
    tenant_id = await desk.new_tenant()
    for _ in range(2):
        await desk.places.drop(tenant_id)
    # The first call may still hold a connection that was cut with the database.
    with pytest.raises(Unavailable):
        await desk.memory.newest_prompt(tenant_id)
    with pytest.raises(PlaceMissing):
        await desk.memory.newest_prompt(tenant_id)
