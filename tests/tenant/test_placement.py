"""Which place a tenant gets is decided before anything is recorded, its secrets are sealed, and another region's tenant is sent away."""

import hashlib
import json
import socket
import time
from contextlib import AsyncExitStack
from dataclasses import replace
from urllib.parse import urlsplit, urlunsplit
from uuid import UUID, uuid4

import asyncpg
import grpc
import pytest
from pydantic import SecretStr

from devstack.ports import free_port
from mesh.tenant.v1 import placement_service_pb2 as pb
from mesh.tenant.v1 import placement_service_pb2_grpc, tenant_service_pb2
from services.kernel.cell import Cell
from services.kernel.errors import InvalidRequest, WrongCell, WrongState
from services.kernel.ids import TenantId, new_uuid7
from services.kernel.placement import PlacementKind
from services.kernel.tenant_cipher import KeyUseFailed
from services.tenant.actor import Actor
from services.tenant.adapters.postgres_moves import PostgresMoves
from services.tenant.adapters.postgres_placements import PostgresPlacements
from services.tenant.adapters.schema_maker import PostgresSchemaMaker
from services.tenant.adapters.silo_maker import PostgresSiloMaker
from services.tenant.adapters.store_probe import StoreProbe
from services.tenant.app.parts import build_parts
from services.tenant.key_management import parse_master_keys
from services.tenant.placement import CONTENT_SERVICES, Placements, PlacementWish, SiloStores, StoredPlace, refuse_malformed
from services.tenant.saga import LeaseLost
from services.tenant.tenant_wish import TenantWish
from tests.support.places import KnownPlaces
from tests.support.stores import PostgresStore
from tests.tenant.harness import Harness, as_service, call, new_master_key, refusal, wish

SILO = SiloStores("postgresql://app:secret@db.example:5432/acme", "postgresql://owner:secret@db.example:5432/acme")
OWN = SiloStores(
    postgres_owner_dsn=SILO.postgres_owner_dsn,
    retrieval_dsn="postgresql://finder:secret@db.example:5432/acme",
    inference_dsn="postgresql://answerer:secret@db.example:5432/acme",
)
STATEMENTS_OF_A_SILO = 23


async def test_a_place_that_cannot_be_made_is_refused_before_anything_is_recorded(harness: Harness) -> None:
    """Without a role for schemas or a server for databases the request is refused, says what to set, and leaves its slug free."""
    for isolation, state in ((pb.ISOLATION_BRIDGE, "NO_BRIDGE"), (pb.ISOLATION_SILO, "NO_SILO")):
        request = wish(plan="enterprise")
        request.isolation = isolation
        refused = await refusal(call(harness.tenants.CreateTenant, request, harness.as_operator()))
        assert (refused.reason_name, refused.metadata["state"]) == ("WRONG_STATE", state)
        assert "TENANTRY_" in refused.message
        again = wish(slug=request.slug)
        assert (await call(harness.tenants.CreateTenant, again, harness.as_operator())).tenant.slug == request.slug


@pytest.mark.parametrize(
    ("plan", "isolation", "state"),
    [("free", pb.ISOLATION_BRIDGE, "BRIDGE"), ("starter", pb.ISOLATION_SILO, "SILO"), ("professional", pb.ISOLATION_SILO, "SILO")],
)
async def test_a_place_that_the_plan_does_not_offer_is_refused_and_nothing_recorded(
    harness: Harness, plan: str, isolation: pb.Isolation, state: str
) -> None:
    """The refusal names what the plan offers; no table has a new row, and no key is made for the addresses that came with it."""
    request = wish(plan=plan)
    request.isolation = isolation
    if isolation == pb.ISOLATION_SILO:
        request.silo.CopyFrom(pb.SiloStores(postgres_dsn=SILO.postgres_dsn, postgres_owner_dsn=SILO.postgres_owner_dsn))
    before = await row_counts(harness)
    refused = await refusal(call(harness.tenants.CreateTenant, request, harness.as_operator()))
    assert (refused.code, refused.reason_name) == (grpc.StatusCode.FAILED_PRECONDITION, "WRONG_STATE")
    assert (refused.metadata["resource"], refused.metadata["state"]) == ("plan", state)
    assert "pool" in refused.message
    assert "secret" not in refused.message
    after = await row_counts(harness)
    # The operator's own access is recorded in any case.
    assert after.pop("audit") == before.pop("audit") + 1
    assert after == before
    again = wish(slug=request.slug, request_id=request.request_id)
    assert (await call(harness.tenants.CreateTenant, again, harness.as_operator())).tenant.slug == request.slug


async def row_counts(harness: Harness) -> dict[str, int]:
    """How many rows each table of the service has, and how many keys the key store."""
    async with harness.superuser() as connection:
        names = [row[0] for row in await connection.fetch("SELECT tablename FROM pg_tables WHERE schemaname = 'tenant'")]
        counts = {name: await connection.fetchval(f"SELECT count(*) FROM tenant.{name}") for name in names}
    key_store = await asyncpg.connect(harness.settings.key_store_admin_dsn.get_secret_value())
    try:
        return counts | {"data_keys": await key_store.fetchval("SELECT count(*) FROM tenant_keys.data_keys")}
    finally:
        await key_store.close()


async def test_a_creation_that_fails_gives_its_place_up_and_can_be_erased(harness: Harness) -> None:
    """Once a service has refused a silo's tenant for good, its addresses and keys are gone; the FAILED tenant is erased like any other."""
    request = wish(plan="enterprise")
    request.isolation = pb.ISOLATION_SILO
    request.silo.CopyFrom(await harness.own_database())
    harness.peers["retrieval"].failures = [grpc.StatusCode.INVALID_ARGUMENT]
    await refusal(call(harness.tenants.CreateTenant, request, harness.as_operator()))
    found = "SELECT tenant_id FROM tenant.request_directory WHERE request_id = $1"
    tenant_id = await harness.value(found, UUID(request.request_id))
    assert await harness.value("SELECT state FROM tenant.tenants WHERE tenant_id = $1", tenant_id) == "FAILED"
    assert await harness.value("SELECT count(*) FROM tenant.placements WHERE tenant_id = $1", tenant_id) == 0
    assert await harness.value("SELECT content::text FROM tenant.sagas WHERE tenant_id = $1", tenant_id) == "{}"
    erase = tenant_service_pb2.EraseTenantRequest(request_id=str(uuid4()), tenant_id=str(tenant_id), confirm_slug=request.slug)
    assert (await call(harness.tenants.EraseTenant, erase, harness.as_operator())).receipt.verified


async def test_stores_that_do_not_answer_are_refused_before_anything_is_recorded(harness: Harness) -> None:
    """An address without a server, one that never answers and a refused login are named without a password, soon, and leave nothing."""
    own, before = await harness.own_database(), await row_counts(harness)
    password = urlsplit(own.postgres_owner_dsn).password or ""
    closed = f"postgresql://finder:{password}@127.0.0.1:{free_port()}/acme"
    request, refusals = wish(plan="enterprise", isolation=pb.ISOLATION_SILO), 0
    wrong = own.inference_postgres_dsn.replace(password, "x")
    # It listens and never accepts: a connection is made and nothing is ever said.
    with socket.create_server(("127.0.0.1", 0)) as silent:
        waiting = f"127.0.0.1:{silent.getsockname()[1]}"
        for code, stores in (
            (grpc.StatusCode.UNAVAILABLE, pb.SiloStores(postgres_dsn=closed, postgres_owner_dsn=closed.replace("finder", "maker"))),
            (grpc.StatusCode.UNAVAILABLE, with_host(own, waiting)),
            (
                grpc.StatusCode.INVALID_ARGUMENT,
                changed(own, inference_postgres_dsn=wrong),
            ),
        ):
            request.silo.CopyFrom(stores)
            begun = time.monotonic()
            refused = await refusal(call(harness.tenants.CreateTenant, request, harness.as_operator(), timeout_seconds=30))
            assert refused.code is code, refused
            assert time.monotonic() - begun < 15
            assert "127.0.0.1:" in refused.message
            assert password not in f"{refused.message}{refused.metadata}"
            refusals += 1
    after = await row_counts(harness)
    assert after.pop("audit") == before.pop("audit") + refusals
    assert after == before
    request.silo.CopyFrom(own)
    assert (await call(harness.tenants.CreateTenant, request, harness.as_operator())).tenant.slug == request.slug


def with_host(stores: pb.SiloStores, address: str) -> pb.SiloStores:
    """The same stores at another address."""
    at = {
        field.name: urlunsplit(urlsplit(dsn)._replace(netloc=f"{urlsplit(dsn).username}:x@{address}")) for field, dsn in stores.ListFields()
    }
    return pb.SiloStores(**at)


def changed(stores: pb.SiloStores, **changes: str) -> pb.SiloStores:
    """The same stores with other logins."""
    found = pb.SiloStores()
    found.CopyFrom(stores)
    found.MergeFrom(pb.SiloStores(**changes))
    return found


async def test_each_service_is_told_its_own_login(harness: Harness) -> None:
    """In a database that an operator made with a role for each service, neither is told the other's DSN."""
    request = wish(plan="enterprise", isolation=pb.ISOLATION_SILO)
    request.silo.CopyFrom(await harness.own_database())
    created = await call(harness.tenants.CreateTenant, request, harness.as_operator())
    token = (await harness.authenticate(created.api_key)).context_token
    stub = placement_service_pb2_grpc.PlacementServiceStub(harness.channel)
    for service, dsn in (("retrieval", request.silo.retrieval_postgres_dsn), ("inference", request.silo.inference_postgres_dsn)):
        answer = await call(stub.GetPlacement, pb.GetPlacementRequest(), as_service(service, token, created.tenant.tenant_id))
        assert answer.place.postgres_dsn == dsn


async def test_another_regions_tenant_is_not_made_here(harness: Harness) -> None:
    """A wish for another region is refused with that region and its cell's address, if it is known."""
    refused = await refusal(harness.create(region="eu-west"))
    assert (refused.code, refused.reason_name) == (grpc.StatusCode.FAILED_PRECONDITION, "WRONG_CELL")
    assert refused.metadata == {"region": "eu-west", "cell": ""}
    with pytest.raises(WrongCell) as known:
        Cell("local", {"eu-west": "eu.example:443"}).refuse_elsewhere("eu-west")
    assert known.value.metadata["cell"] == "eu.example:443"


async def test_another_regions_tenant_is_not_authenticated_here(harness: Harness) -> None:
    """A key of a tenant whose data lives in another region is refused with the way to its cell."""
    created = await harness.create()
    await harness.execute("UPDATE tenant.tenants SET region = 'eu-west' WHERE tenant_id = $1", created.tenant.tenant_id)
    refused = await refusal(harness.authenticate(created.api_key))
    assert (refused.reason_name, refused.metadata["region"]) == ("WRONG_CELL", "eu-west")


async def test_a_tenant_of_the_pool_has_no_secrets_to_tell(harness: Harness) -> None:
    """A service that asks for a pool tenant's place learns the kind and nothing else; others may not ask."""
    created = await harness.create()
    token = (await harness.authenticate(created.api_key)).context_token
    stub = placement_service_pb2_grpc.PlacementServiceStub(harness.channel)
    request = pb.GetPlacementRequest()
    answer = await call(stub.GetPlacement, request, as_service("inference", token, created.tenant.tenant_id))
    assert answer == pb.GetPlacementResponse(place=pb.Place(isolation=pb.ISOLATION_POOL))
    for caller in ("metering", "ratelimit"):
        refused = await refusal(call(stub.GetPlacement, request, as_service(caller, token, created.tenant.tenant_id)))
        assert refused.reason_name == "CALLER_NOT_ALLOWED"


async def test_what_tables_are_made_with_is_told_in_no_callers_name(harness: Harness) -> None:
    """A service with the token of a tenant's own call is not told the owner's DSN: only work the tenant service began is."""
    created = await harness.create()
    token = (await harness.authenticate(created.api_key)).context_token
    stub = placement_service_pb2_grpc.PlacementServiceStub(harness.channel)
    asked = call(stub.GetPlacement, pb.GetPlacementRequest(for_tables=True), as_service("retrieval", token, created.tenant.tenant_id))
    assert (await refusal(asked)).reason_name == "CALLER_NOT_ALLOWED"


@pytest.mark.parametrize(
    "wrong",
    [
        PlacementWish(PlacementKind.POOL, SILO),
        PlacementWish(PlacementKind.SILO, replace(SILO, postgres_owner_dsn="")),
        PlacementWish(PlacementKind.SILO, replace(SILO, postgres_owner_dsn=SILO.postgres_dsn)),
        PlacementWish(PlacementKind.SILO, replace(SILO, postgres_owner_dsn="postgresql://owner:secret@db.example:5432/other")),
        PlacementWish(PlacementKind.SILO, replace(SILO, postgres_dsn="mysql://app:secret@db.example/acme")),
        PlacementWish(PlacementKind.SILO, replace(SILO, postgres_dsn="postgresql://app:secret@db.example:port/acme")),
        PlacementWish(PlacementKind.SILO, SiloStores(postgres_owner_dsn=SILO.postgres_owner_dsn)),
        PlacementWish(PlacementKind.SILO, replace(SILO, retrieval_dsn=OWN.retrieval_dsn, inference_dsn=OWN.inference_dsn)),
        PlacementWish(PlacementKind.SILO, replace(OWN, inference_dsn="")),
        PlacementWish(PlacementKind.SILO, replace(OWN, inference_dsn=OWN.retrieval_dsn)),
        PlacementWish(PlacementKind.SILO, replace(OWN, inference_dsn=SILO.postgres_owner_dsn)),
        PlacementWish(PlacementKind.SILO, replace(OWN, inference_dsn="postgresql://answerer:secret@db.example:5432/other")),
        PlacementWish(PlacementKind.SILO, replace(OWN, postgres_owner_dsn="")),
        PlacementWish(PlacementKind.SILO, replace(SILO, qdrant_api_key="secret")),
        PlacementWish(PlacementKind.SILO, replace(SILO, qdrant_url="file:///secret")),
    ],
)
def test_stores_that_do_not_fit_are_refused_without_being_repeated(wrong: PlacementWish) -> None:
    """Halves, one role for both, two databases and other schemes are refused by field, and no secret stands in the words."""
    with pytest.raises(InvalidRequest) as refused:
        refuse_malformed(wrong)
    assert "secret" not in str(refused.value)
    for complete in (SILO, OWN):
        refuse_malformed(PlacementWish(PlacementKind.SILO, complete))


def test_a_wish_hides_its_secrets_and_counts_them() -> None:
    """A wish prints no DSN; another place is another request, and none at all is the request it was before."""
    made = TenantWish("acme", "Acme", "free", "o@example.com", "Ada")
    placed = replace(made, placement=PlacementWish(PlacementKind.SILO, SILO))
    assert "secret" not in repr(placed)
    assert made.digest() != placed.digest() != replace(placed, placement=PlacementWish(PlacementKind.SILO)).digest()
    before = {"assistant_name": "Ada", "display_name": "Acme", "owner_email": "o@example.com", "plan": "free", "slug": "acme"}
    assert made.digest() == hashlib.sha256(json.dumps(before, sort_keys=True, separators=(",", ":")).encode()).digest()


async def test_a_place_is_not_written_behind_a_lost_lease(harness: Harness) -> None:
    """Who slept through the lease while another ended the creation writes no place, tells no token of it and announces nothing."""
    created = await harness.create()
    tenant_id, feed = TenantId(UUID(created.tenant.tenant_id)), "SELECT count(*) FROM tenant.changes WHERE tenant_id = $1"
    told = await harness.value(feed, tenant_id)
    async with AsyncExitStack() as stack:
        parts = await build_parts(harness.settings, stack)
        with pytest.raises(LeaseLost):
            await PostgresPlacements(parts.database, parts.box).settle(tenant_id, StoredPlace(PlacementKind.BRIDGE), uuid4())
    assert await harness.value("SELECT count(*) FROM tenant.placements WHERE tenant_id = $1", tenant_id) == 0
    assert await harness.value("SELECT placement FROM tenant.tenants WHERE tenant_id = $1", tenant_id) == "pool"
    assert await harness.value(feed, tenant_id) == told


async def test_addresses_are_sealed_in_the_database(harness: Harness) -> None:
    """A silo's DSNs do not stand in the table; they open for their own tenant and under their own key alone, while there is one."""
    created, bystander = await harness.create(), await harness.create()
    tenant_id, other = TenantId(UUID(created.tenant.tenant_id)), TenantId(UUID(bystander.tenant.tenant_id))
    stranger = harness.settings.model_copy(update={"master_keys": SecretStr(new_master_key("first"))})
    place = StoredPlace(PlacementKind.SILO, SILO)
    async with AsyncExitStack() as stack:
        parts = await build_parts(harness.settings, stack)
        placements = PostgresPlacements(parts.database, parts.box)
        await placements.settle(tenant_id, place, None)
        sealed = await harness.value("SELECT stores FROM tenant.placements WHERE tenant_id = $1", tenant_id)
        assert b"secret" not in sealed
        found = await placements.get(tenant_id)
        assert found is not None
        assert found.place == place
        for owner, purpose in ((other, "placement"), (tenant_id, "provider_key")):
            with pytest.raises(KeyUseFailed):
                await parts.box.open(owner, purpose, sealed)
        others = await build_parts(stranger, stack)
        with pytest.raises(KeyUseFailed):
            await PostgresPlacements(others.database, others.box).get(tenant_id)
        await parts.vault.destroy(tenant_id)
        with pytest.raises(WrongState):
            await placements.get(tenant_id)
        # What is dropped is known without its addresses: an undoing that was stopped behind the keys still ends.
        kept = Placements(placements, PostgresSchemaMaker("", 0), PostgresSiloMaker(""), StoreProbe())
        assert await kept.drop(tenant_id) == []
        with pytest.raises(WrongState):
            await parts.box.seal(tenant_id, "placement", b"x")
    with pytest.raises(ValueError, match="32 bytes"):
        parse_master_keys("first:c2hvcnQ=")


async def test_the_begin_of_a_move_is_on_record(harness: Harness) -> None:
    """Who begins a move, and where to, stands in the tenant's log before anything of it moves; a repeated call begins nothing."""
    created = await harness.create()
    tenant_id, actor = TenantId(UUID(created.tenant.tenant_id)), Actor("operator:test", "more room", "192.0.2.9")
    async with AsyncExitStack() as stack:
        parts = await build_parts(harness.settings, stack)
        moves = PostgresMoves(parts.database, PostgresPlacements(parts.database, parts.box))
        for _ in range(2):
            await moves.begin_move(tenant_id, StoredPlace(PlacementKind.SILO, SILO), actor, 600.0)
    [record] = await harness.audit(created.tenant.tenant_id, "TENANT_MOVE_BEGUN")
    assert (record["subject"], record["reason"], record["target"]) == ("operator:test", "more room", "placement:pool:silo")


async def test_a_database_bears_so_many_schemas(postgres: PostgresStore) -> None:
    """The schema over the cap is refused with what to do instead; one that is there already is no schema more."""
    places = KnownPlaces(await postgres.fresh_database(), "inference")
    await places.migrate()
    maker, first = PostgresSchemaMaker(places.dsn("tenant_placement"), 1), TenantId(new_uuid7())
    await maker.make(first)
    await maker.make(first)
    for attempt in (maker.refuse_full, lambda: maker.make(TenantId(new_uuid7()))):
        with pytest.raises(WrongState, match="choose POOL or SILO"):
            await attempt()
    await maker.drop(first)
    await maker.refuse_full()


async def test_a_place_that_is_not_wanted_any_more_is_not_made(postgres: PostgresStore) -> None:
    """Whether a place is wanted is asked where nobody can drop it before it is made; a refusal leaves neither schema, database nor role."""
    places, tenant_id = KnownPlaces(await postgres.fresh_database(), "inference"), TenantId(new_uuid7())
    await places.migrate()
    schemas, silos = PostgresSchemaMaker(places.dsn("tenant_placement"), 10), PostgresSiloMaker(postgres.server.dsn())

    async def refuse() -> None:
        raise WrongState("tenant", "ERASING", "it ends")

    with pytest.raises(WrongState):
        await schemas.make(tenant_id, refuse)
    with pytest.raises(WrongState):
        await silos.make(tenant_id, silos.plan(tenant_id), refuse)
    admin = await asyncpg.connect(places.admin_dsn)
    for catalog, column in (("pg_namespace", "nspname"), ("pg_database", "datname"), ("pg_roles", "rolname")):
        assert await admin.fetchval(f"SELECT count(*) FROM {catalog} WHERE starts_with({column}, $1)", f"t_{tenant_id.hex}") == 0
    await admin.close()


async def test_a_silo_that_was_planned_with_one_login_is_made_as_planned(postgres: PostgresStore) -> None:
    """Passwords that were sealed with one login for both services are given to the roles they were sealed for, and those go with it."""
    maker, tenant_id = PostgresSiloMaker(postgres.server.dsn()), TenantId(uuid4())
    plan = maker.plan(tenant_id)
    both, owner = plan.dsn_for("inference").replace("_inference_", "_"), plan.owner_dsn_for("inference").replace("_inference_", "_")
    await maker.make(tenant_id, SiloStores(both, owner))
    for dsn in (both, owner):
        await (await asyncpg.connect(dsn)).close()
    await maker.drop(tenant_id)
    assert [item.found for item in await maker.scan(tenant_id)] == [0, 0]


@pytest.mark.parametrize("survived", range(STATEMENTS_OF_A_SILO))
async def test_a_silo_that_was_half_made_is_made_whole(postgres: PostgresStore, monkeypatch: pytest.MonkeyPatch, survived: int) -> None:
    """Making a silo may stop after any statement: the next run ends with a database each service can enter, and dropping leaves nothing."""
    maker, tenant_id = PostgresSiloMaker(postgres.server.dsn()), TenantId(uuid4())
    stores, left, execute = maker.plan(tenant_id), survived, asyncpg.Connection.execute

    async def dies(connection: asyncpg.Connection, sql: str, *args: object, **options: object) -> str:
        nonlocal left
        if left == 0:
            raise ConnectionError("killed")
        left -= 1
        return str(await execute(connection, sql, *args, **options))

    with monkeypatch.context() as patched:
        patched.setattr(asyncpg.Connection, "execute", dies)
        with pytest.raises(ConnectionError):
            await maker.make(tenant_id, stores)
    await maker.make(tenant_id, stores)
    for service in CONTENT_SERVICES:
        connection = await asyncpg.connect(stores.dsn_for(service))
        assert await connection.fetchval("SELECT current_user") == f"t_{tenant_id.hex}_{service}_service"
        await connection.close()
    for _ in range(2):
        await maker.drop(tenant_id)
    admin = await asyncpg.connect(postgres.server.dsn())
    assert await admin.fetchval("SELECT count(*) FROM pg_roles WHERE rolname LIKE $1", f"t_{tenant_id.hex}%") == 0
    await admin.close()
