"""The stores without rows: Redis keys stay inside their tenant's slot, and Qdrant itself refuses a token in a foreign collection."""

import base64
import functools
import hashlib
import hmac
import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import grpc
import pytest
from pydantic import SecretStr
from qdrant_client import grpc as q
from redis.asyncio import Redis

from devstack.stack import Stack
from services.kernel.ids import TenantId
from services.retrieval.adapters.qdrant import DENSE, alias_name, collection_name
from services.retrieval.adapters.qdrant_token import CollectionTokens
from tests.isolation.fingerprint import fingerprint, payload_of, qdrant, redis_of, scroll, superuser
from tests.isolation.rounds import PLAIN, over
from tests.isolation.target import Target
from tests.support.mesh import Mesh

# The stores are attacked directly, with keys and tokens of their own: no transport is in the way.
pytestmark = over(PLAIN)

KEY = re.compile(rb"^\{([0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[0-9a-f]{4}-[0-9a-f]{12})\}:[a-z_]+$")
# What tenants took of a provider's account, in its slot: the one kind of key that names several.
_ACCOUNT_KINDS = rb"members|active|claims|totals|calls|recent|request_turns|input_turns|output_turns|lines|fronts"
ACCOUNT_KEY = re.compile(rb"^\{acct:[a-z0-9][a-z0-9_.-]{0,99}\}:(" + _ACCOUNT_KINDS + rb")$")
ANY_TENANT = re.compile(rb"[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[0-9a-f]{4}-[0-9a-f]{12}")
COLLECTION = re.compile(r"^t_([0-9a-f]{32})_v\d+$")
# What a server does not implement it does for nobody.
REFUSED = (grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.UNIMPLEMENTED)
READING = ("get", "scroll", "count", "query", "batch")
KNOWN_TENANTS = "SELECT tenant_id FROM tenant.tenants"
DIMENSIONS = 384
Attack = Callable[[], Awaitable[Any]]


@pytest.fixture
def victim(resident: Target) -> Target:
    """The attacked tenant: these attacks are the same wherever its content lives."""
    return resident


async def known_tenants(stack: Stack) -> set[UUID]:
    """Every tenant that was ever made and not erased."""
    connection = await superuser(stack)
    try:
        return {row["tenant_id"] for row in await connection.fetch(KNOWN_TENANTS)}
    finally:
        await connection.close()


async def _is_tombstone(redis: Redis, key: bytes) -> bool:
    # An erased tenant's counters stay away for some minutes: a mark with an end, and nothing that was counted.
    if not key.endswith(b":meta") or await redis.type(key) != b"hash":
        return False
    return set(await redis.hkeys(key)) == {b"erased", b"history"} and await redis.ttl(key) > 0


async def _strangers_in_account(redis: Redis, key: bytes, tenants: set[UUID]) -> list[str]:
    # An account's keys go by themselves, and who is erased is taken out of them.
    named = {UUID(found.decode()) for found in ANY_TENANT.findall(await redis.dump(key) or b"")}
    lasting = [] if await redis.ttl(key) > 0 else [f"{key!r} does not end"]
    return lasting + [f"{key!r} holds {tenant}, which is no known tenant" for tenant in named - tenants]


async def misplaced_keys(redis: Redis, tenants: set[UUID]) -> list[str]:
    """Names each key that is neither in a known tenant's slot and silent of others nor an account's and silent of strangers."""
    wrong: list[str] = []
    async for key in redis.scan_iter(count=1000):
        if ACCOUNT_KEY.match(key):
            wrong += await _strangers_in_account(redis, key, tenants)
            continue
        match = KEY.match(key)
        if match is None or UUID(match[1].decode()) not in tenants:
            wrong += [] if match and await _is_tombstone(redis, key) else [f"{key!r} belongs to no known tenant"]
            continue
        value = await redis.dump(key) or b""
        foreign = [tenant for tenant in tenants if str(tenant).encode() in value and str(tenant).encode() != match[1]]
        wrong += [f"{key!r} holds {foreign}"] if foreign else []
    return wrong


async def test_every_redis_key_is_a_known_tenants(mesh: Mesh, victim: Target, attacker: Target) -> None:
    """Each key starts with `{tenant uuid}:`, the tenant exists, and its value names no other tenant."""
    async with redis_of(mesh.stack) as redis:
        assert await misplaced_keys(redis, await known_tenants(mesh.stack)) == []
        for target in (victim, attacker):
            assert await redis.exists(f"{{{target.tenant_id}}}:meta")


@pytest.fixture
async def vectors(mesh: Mesh) -> AsyncIterator[tuple[Any, Any]]:
    """Stubs of the vector store: points and collections."""
    async with qdrant(mesh.stack) as channel:
        yield q.PointsStub(channel), q.CollectionsStub(channel)  # type: ignore[no-untyped-call] # generated


def _on_points(points: Any, name: str, key: tuple[tuple[str, str], ...], point_id: str) -> dict[str, Attack]:
    one = q.PointId(uuid=point_id)
    chosen = q.PointsSelector(points=q.PointsIdsList(ids=[one]))
    vector = q.Vectors(vectors=q.NamedVectors(vectors={DENSE: q.Vector(dense=q.DenseVector(data=[0.1] * DIMENSIONS))}))
    nearest = q.Query(nearest=q.VectorInput(dense=q.DenseVector(data=[0.1] * DIMENSIONS)))
    stolen = {"tenant_id": q.Value(string_value="stolen")}
    requests: dict[str, tuple[Any, Any]] = {
        "get": (points.Get, q.GetPoints(collection_name=name, ids=[one], with_payload=q.WithPayloadSelector(enable=True))),
        "scroll": (points.Scroll, q.ScrollPoints(collection_name=name, limit=10)),
        "count": (points.Count, q.CountPoints(collection_name=name, exact=True)),
        "query": (points.Query, q.QueryPoints(collection_name=name, query=nearest, using=DENSE, limit=10)),
        "batch": (
            points.QueryBatch,
            q.QueryBatchPoints(collection_name=name, query_points=[q.QueryPoints(collection_name=name, query=nearest, using=DENSE)]),
        ),
        "upsert": (points.Upsert, q.UpsertPoints(collection_name=name, points=[q.PointStruct(id=one, vectors=vector)])),
        "delete": (points.Delete, q.DeletePoints(collection_name=name, points=chosen)),
        "set payload": (points.SetPayload, q.SetPayloadPoints(collection_name=name, payload=stolen, points_selector=chosen)),
        "overwrite": (points.OverwritePayload, q.SetPayloadPoints(collection_name=name, payload=stolen, points_selector=chosen)),
        "clear payload": (points.ClearPayload, q.ClearPayloadPoints(collection_name=name, points=chosen)),
        "index": (points.CreateFieldIndex, q.CreateFieldIndexCollection(collection_name=name, field_name="x")),
    }
    return {what: functools.partial(call, request, metadata=key, timeout=5) for what, (call, request) in requests.items()}


def _on_collections(collections: Any, victim: UUID, attacker: UUID, key: tuple[tuple[str, str], ...]) -> dict[str, Attack]:
    alias, name = alias_name(TenantId(victim)), collection_name(TenantId(victim))
    own, mine = alias_name(TenantId(attacker)), collection_name(TenantId(attacker))

    def actions(**action: Any) -> q.ChangeAliases:
        return q.ChangeAliases(actions=[q.AliasOperations(**action)])

    requests: dict[str, tuple[Any, Any]] = {
        "describe alias": (collections.Get, q.GetCollectionInfoRequest(collection_name=alias)),
        "describe": (collections.Get, q.GetCollectionInfoRequest(collection_name=name)),
        "drop": (collections.Delete, q.DeleteCollection(collection_name=name)),
        "drop by alias": (collections.Delete, q.DeleteCollection(collection_name=alias)),
        "create": (collections.Create, q.CreateCollection(collection_name="t_stolen")),
        "point own alias there": (
            collections.UpdateAliases,
            actions(create_alias=q.CreateAlias(collection_name=name, alias_name=own)),
        ),
        "take the alias": (collections.UpdateAliases, actions(create_alias=q.CreateAlias(collection_name=mine, alias_name=alias))),
        "drop the alias": (collections.UpdateAliases, actions(delete_alias=q.DeleteAlias(alias_name=alias))),
        "rename the alias": (
            collections.UpdateAliases,
            actions(rename_alias=q.RenameAlias(old_alias_name=alias, new_alias_name="t_mine")),
        ),
    }
    return {what: functools.partial(call, request, metadata=key, timeout=5) for what, (call, request) in requests.items()}


async def _not_refused(attacks: dict[str, Attack]) -> list[str]:
    through: list[str] = []
    for what, attack in attacks.items():
        try:
            through.append(f"{what}: {await attack()}")
        except grpc.aio.AioRpcError as error:
            through += [f"{what}: {error.code()} {error.details()}"] if error.code() not in REFUSED else []
    return through


async def test_a_tenants_token_opens_no_other_collection(mesh: Mesh, vectors: tuple[Any, Any], victim: Target, attacker: Target) -> None:
    """With a token for one alias, the store refuses to read, write, alias, index or drop another tenant's collection, by either name."""
    before = await fingerprint(mesh.stack, TenantId(victim.tenant_id))
    tokens = CollectionTokens(SecretStr(mesh.stack.state.secrets.qdrant_api_key))
    key = (("api-key", tokens.mint(alias_name(TenantId(attacker.tenant_id)), "rw")),)
    points, collections = vectors
    point_id = (await scroll(mesh.stack, alias_name(TenantId(victim.tenant_id))))[0].id.uuid
    through: list[str] = []
    for name in (alias_name(TenantId(victim.tenant_id)), collection_name(TenantId(victim.tenant_id))):
        through += await _not_refused(_on_points(points, name, key, point_id))
    through += await _not_refused(_on_collections(collections, victim.tenant_id, attacker.tenant_id, key))
    assert not through, "\n".join(through)
    assert await fingerprint(mesh.stack, TenantId(victim.tenant_id)) == before


async def test_a_tenants_token_sees_no_other_collection(mesh: Mesh, vectors: tuple[Any, Any], victim: Target, attacker: Target) -> None:
    """Listing collections and aliases with one tenant's token names no other tenant's; asking whether one exists is refused or denied."""
    tokens = CollectionTokens(SecretStr(mesh.stack.state.secrets.qdrant_api_key))
    key = (("api-key", tokens.mint(alias_name(TenantId(attacker.tenant_id)), "rw")),)
    _, collections = vectors
    foreign = victim.tenant_id.hex
    for call, request in (
        (collections.List, q.ListCollectionsRequest()),
        (collections.ListAliases, q.ListAliasesRequest()),
        (collections.ListCollectionAliases, q.ListCollectionAliasesRequest(collection_name=collection_name(TenantId(victim.tenant_id)))),
    ):
        try:
            answer = await call(request, metadata=key, timeout=5)
        except grpc.aio.AioRpcError as error:
            assert error.code() in REFUSED
        else:
            assert foreign not in str(answer)


async def test_another_collection_cannot_be_looked_into_from_ones_own(
    mesh: Mesh, vectors: tuple[Any, Any], victim: Target, attacker: Target
) -> None:
    """A query on the own collection cannot take its vector from a point of another tenant's."""
    tokens = CollectionTokens(SecretStr(mesh.stack.state.secrets.qdrant_api_key))
    own, foreign = alias_name(TenantId(attacker.tenant_id)), alias_name(TenantId(victim.tenant_id))
    key = (("api-key", tokens.mint(own, "rw")),)
    points, _ = vectors
    point_id = (await scroll(mesh.stack, foreign))[0].id
    by_id = q.Query(nearest=q.VectorInput(id=point_id))
    for name in (foreign, collection_name(TenantId(victim.tenant_id))):
        lookup = q.LookupLocation(collection_name=name, vector_name=DENSE)
        plain = q.QueryPoints(collection_name=own, query=by_id, using=DENSE, limit=1, lookup_from=lookup)
        nested = q.QueryPoints(
            collection_name=own,
            prefetch=[q.PrefetchQuery(query=by_id, using=DENSE, limit=1, lookup_from=lookup)],
            query=q.Query(fusion=q.Fusion.RRF),
            limit=1,
        )
        for request in (plain, nested):
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await points.Query(request, metadata=key, timeout=5)
            assert refused.value.code() in REFUSED


def _token(key: str, claims: dict[str, object], algorithm: str = "HS256") -> str:
    header, payload = (
        base64.urlsafe_b64encode(json.dumps(part).encode()).rstrip(b"=") for part in ({"alg": algorithm, "typ": "JWT"}, claims)
    )
    signature = hmac.new(key.encode(), header + b"." + payload, hashlib.sha256).digest() if algorithm == "HS256" else b""
    return (header + b"." + payload + b"." + base64.urlsafe_b64encode(signature).rstrip(b"=")).decode()


async def test_forged_and_stale_collection_tokens_open_nothing(mesh: Mesh, vectors: tuple[Any, Any], victim: Target) -> None:
    """A token signed with another key, unsigned, expired or for reading alone does not do what it is used for."""
    real, alias = mesh.stack.state.secrets.qdrant_api_key, alias_name(TenantId(victim.tenant_id))
    now = int(datetime.now(UTC).timestamp())
    access = [{"collection": alias, "access": "rw"}]
    tokens = {
        "another key": _token("another key", {"exp": now + 60, "access": access}),
        "no rights named, another key": _token("another key", {"exp": now + 60}),
        "unsigned": _token(real, {"exp": now + 60, "access": access}, "none"),
        "expired": _token(real, {"exp": now - 120, "access": access}),
        "an api key of the mesh": victim.tenant.api_key,
        "nothing": "",
    }
    points, _ = vectors
    point_id = (await scroll(mesh.stack, alias))[0].id.uuid
    for what, token in tokens.items():
        assert await _not_refused(_on_points(points, alias, (("api-key", token),), point_id)) == [], what
    reader = CollectionTokens(SecretStr(real)).mint(alias, "r")
    attacks = _on_points(points, alias, (("api-key", reader),), point_id)
    writing = {what: attack for what, attack in attacks.items() if what not in READING}
    assert await _not_refused(writing) == []
    # The same attacks with the right token do get through: what was refused above was refused for its token.
    assert len(await _not_refused({what: attacks[what] for what in READING})) == len(READING)


async def foreign_points(stack: Stack, tenants: set[UUID]) -> list[str]:
    """Names each collection of no known tenant and each point that carries another tenant than its collection's."""
    async with qdrant(stack) as channel:
        stub = q.CollectionsStub(channel)  # type: ignore[no-untyped-call] # generated
        listed = await stub.List(q.ListCollectionsRequest(), metadata=(("api-key", stack.state.secrets.qdrant_api_key),), timeout=10)
    wrong: list[str] = []
    for collection in listed.collections:
        match = COLLECTION.match(collection.name)
        if match is None or UUID(match[1]) not in tenants:
            wrong.append(f"{collection.name} belongs to no known tenant")
            continue
        owner = str(UUID(match[1]))
        wrong += [
            f"{collection.name}: {point.id}" for point in await scroll(stack, collection.name) if payload_of(point)["tenant_id"] != owner
        ]
    return wrong


async def test_every_point_carries_the_tenant_of_its_collection(mesh: Mesh, victim: Target, attacker: Target) -> None:
    """Collections are named by tenant ids alone, and no point in one carries another tenant."""
    assert await foreign_points(mesh.stack, await known_tenants(mesh.stack)) == []
    assert await scroll(mesh.stack, alias_name(TenantId(victim.tenant_id)))
