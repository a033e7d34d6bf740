"""Who may do what: the API key, tokens of every scope, and what is not a credential at all."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime

import grpc
import pytest
from qdrant_client import AsyncQdrantClient, models
from qdrant_client import grpc as q

from .front import API_KEY, Front, fresh_name, stub, token, with_three_points

UNAUTHENTICATED = grpc.StatusCode.UNAUTHENTICATED
PERMISSION_DENIED = grpc.StatusCode.PERMISSION_DENIED


def _in_seconds(seconds: int) -> int:
    return int(datetime.now(UTC).timestamp()) + seconds


def _scoped(name: str, mode: str) -> str:
    return token({"access": [{"collection": name, "access": mode}], "exp": _in_seconds(60)})


async def _status(attempt: Awaitable[object]) -> tuple[grpc.StatusCode, str]:
    try:
        await attempt
    except grpc.aio.AioRpcError as refused:
        return refused.code(), str(refused.details())
    return grpc.StatusCode.OK, ""


async def _list_with(front: Front, *metadata: tuple[str, str]) -> tuple[grpc.StatusCode, str]:
    async with front.channel() as channel:
        return await _status(stub(q.CollectionsStub, channel).List(q.ListCollectionsRequest(), metadata=metadata))


async def test_caller_without_a_key_is_turned_away(front: Front) -> None:
    """No credential answers UNAUTHENTICATED, for methods served and not served alike."""
    assert await _list_with(front) == (UNAUTHENTICATED, "Must provide an API key or an Authorization bearer token")
    async with front.channel() as channel:
        status, _ = await _status(stub(q.PointsStub, channel).Facet(q.FacetCounts(collection_name="any")))
    assert status is UNAUTHENTICATED


async def test_key_is_taken_from_either_header_and_api_key_wins(front: Front) -> None:
    """Both `api-key` and `authorization: Bearer` carry a key; a wrong `api-key` is not rescued by a right bearer."""
    assert (await _list_with(front, ("api-key", API_KEY)))[0] is grpc.StatusCode.OK
    assert (await _list_with(front, ("authorization", f"Bearer {API_KEY}")))[0] is grpc.StatusCode.OK
    assert (await _list_with(front, ("api-key", "x"), ("authorization", f"Bearer {API_KEY}")))[0] is UNAUTHENTICATED


NOT_A_CREDENTIAL = (UNAUTHENTICATED, "Invalid API key or JWT")


@pytest.mark.parametrize(
    ("credential", "expected"),
    [
        ("wrong", NOT_A_CREDENTIAL),
        ("", NOT_A_CREDENTIAL),
        ("a.b.c", NOT_A_CREDENTIAL),
        (token({"access": "m"}, algorithm="none"), NOT_A_CREDENTIAL),
        (token({"access": "m"}, algorithm="HS512"), NOT_A_CREDENTIAL),
        (token({"access": "m"}, secret="another"), (PERMISSION_DENIED, "InvalidSignature")),
        (token({"access": "m", "exp": _in_seconds(-31)}), (PERMISSION_DENIED, "ExpiredSignature")),
        (token({"access": "m", "exp": "tomorrow"}), NOT_A_CREDENTIAL),
        (token({"access": None}), NOT_A_CREDENTIAL),
        (token({"access": "rw"}), NOT_A_CREDENTIAL),
        (token({"access": [{"collection": "c"}]}), NOT_A_CREDENTIAL),
    ],
)
async def test_credential_that_is_not_valid_opens_nothing(front: Front, credential: str, expected: tuple[grpc.StatusCode, str]) -> None:
    """A wrong key, a malformed, unsigned, otherwise signed or expired token is refused in Qdrant's words."""
    assert await _list_with(front, ("api-key", credential)) == expected


async def test_token_is_valid_to_the_end_of_its_leeway(front: Front) -> None:
    """An expiry not more than 30 seconds past is still accepted."""
    assert (await _list_with(front, ("api-key", token({"access": "r", "exp": _in_seconds(-20)}))))[0] is grpc.StatusCode.OK


async def test_deprecated_and_unserved_claims_are_refused(front: Front) -> None:
    """A payload constraint or a collection given twice is refused, value_exists is UNIMPLEMENTED by name."""
    constrained = {"collection": "c", "access": "r", "payload": {"user": 1}}
    assert (await _list_with(front, ("api-key", token({"access": [constrained]}))))[0] is UNAUTHENTICATED
    twice = [{"collection": "c", "access": "r"}, {"collection": "c", "access": "rw"}]
    assert (await _list_with(front, ("api-key", token({"access": twice}))))[0] is UNAUTHENTICATED
    status, details = await _list_with(front, ("api-key", token({"access": "r", "value_exists": {"collection": "c", "matches": []}})))
    assert status is grpc.StatusCode.UNIMPLEMENTED
    assert "value_exists" in details


async def test_token_without_an_access_claim_has_full_rights(front: Front) -> None:
    """The trap: leaving `access` out of a token grants everything."""
    name = fresh_name()
    async with front.client(token({"exp": _in_seconds(60)})) as client:
        assert await client.create_collection(name, vectors_config=models.VectorParams(size=2, distance=models.Distance.DOT))
        assert await client.delete_collection(name)


@dataclass(frozen=True, slots=True)
class Operation:
    """One thing to try on a collection."""

    title: str
    attempt: Callable[[AsyncQdrantClient, str], Awaitable[object]]


POINT = models.PointStruct(id=50, vector={"dense": [1.0, 0.0, 0.0]})
READS = [
    Operation("get", lambda client, name: client.get_collection(name)),
    Operation("exists", lambda client, name: client.collection_exists(name)),
    Operation("query", lambda client, name: client.query_points(name, query=[1.0, 0.0, 0.0], using="dense")),
    Operation("batch", lambda client, name: client.query_batch_points(name, [models.QueryRequest(query=1, using="dense")])),
    Operation("scroll", lambda client, name: client.scroll(name)),
    Operation("count", lambda client, name: client.count(name)),
    Operation("retrieve", lambda client, name: client.retrieve(name, [1])),
    Operation("aliases", lambda client, name: client.get_collection_aliases(name)),
]
POINT_WRITES = [
    Operation("upsert", lambda client, name: client.upsert(name, [POINT])),
    Operation("set payload", lambda client, name: client.set_payload(name, {"a": 1}, points=[1])),
    Operation("overwrite payload", lambda client, name: client.overwrite_payload(name, {"a": 1}, points=[1])),
    Operation("delete payload", lambda client, name: client.delete_payload(name, ["a"], points=[1])),
    Operation("delete", lambda client, name: client.delete(name, models.PointIdsList(points=[50]))),
]
SCHEMA_WRITES = [
    Operation("index", lambda client, name: client.create_payload_index(name, "a", models.PayloadSchemaType.INTEGER)),
    Operation("drop index", lambda client, name: client.delete_payload_index(name, "a")),
]
MANAGEMENT = [
    Operation(
        "create",
        lambda client, name: client.create_collection(f"{name}x", vectors_config=models.VectorParams(size=2, distance=models.Distance.DOT)),
    ),
    Operation(
        "alias",
        lambda client, name: client.update_collection_aliases(
            [models.DeleteAliasOperation(delete_alias=models.DeleteAlias(alias_name="none"))]
        ),
    ),
    Operation("delete collection", lambda client, name: client.delete_collection(f"{name}x")),
]
ALL = READS + POINT_WRITES + SCHEMA_WRITES + MANAGEMENT


async def _allowed(front: Front, credential: str, name: str) -> list[str]:
    allowed = []
    async with front.client(credential) as client:
        for operation in ALL:
            status, details = await _status(operation.attempt(client, name))
            assert status in (grpc.StatusCode.OK, PERMISSION_DENIED), (operation.title, details)
            if status is grpc.StatusCode.OK:
                allowed.append(operation.title)
    return allowed


async def test_each_scope_allows_exactly_its_operations(front: Front, client: AsyncQdrantClient) -> None:
    """Read, write, point-write and global scopes admit what Qdrant's table of access says, and nothing else."""
    name = await with_three_points(client)
    reads, points, schema, manage = ([o.title for o in group] for group in (READS, POINT_WRITES, SCHEMA_WRITES, MANAGEMENT))
    assert await _allowed(front, _scoped(name, "r"), name) == reads
    assert await _allowed(front, _scoped(name, "prw"), name) == reads + points
    assert await _allowed(front, _scoped(name, "rw"), name) == reads + points + schema
    assert await _allowed(front, token({"access": "r"}), name) == reads
    assert await _allowed(front, token({"access": "m"}), name) == reads + points + schema + manage


async def test_scoped_token_cannot_touch_or_see_another_collection(front: Front, client: AsyncQdrantClient) -> None:
    """Every operation on a foreign collection is PERMISSION_DENIED, existing or not, and listing shows only the token's own."""
    own, foreign = await with_three_points(client), await with_three_points(client)
    assert await _allowed(front, _scoped(own, "rw"), foreign) == []
    async with front.client(_scoped(own, "rw")) as scoped:
        for name in (foreign, "nowhere"):
            assert await _status(scoped.count(name)) == (PERMISSION_DENIED, f"Forbidden: Access to collection {name} is required")
        assert [known.name for known in (await scoped.get_collections()).collections] == [own]


async def test_scope_is_checked_against_the_name_in_the_request(front: Front, client: AsyncQdrantClient) -> None:
    """A token for an alias opens the alias and not its collection, a token for the collection opens no alias of it."""
    name, alias = await with_three_points(client), fresh_name()
    create = models.CreateAlias(collection_name=name, alias_name=alias)
    await client.update_collection_aliases([models.CreateAliasOperation(create_alias=create)])
    async with front.client(_scoped(alias, "r")) as by_alias, front.client(_scoped(name, "r")) as by_name:
        assert (await by_alias.count(alias)).count == 3
        assert (await _status(by_alias.count(name)))[0] is PERMISSION_DENIED
        assert (await _status(by_name.count(alias)))[0] is PERMISSION_DENIED
        assert (await by_alias.get_aliases()).aliases == []
        assert (await by_name.get_collection_aliases(name)).aliases == []
    both = token({"access": [{"collection": name, "access": "r"}, {"collection": alias, "access": "r"}]})
    async with front.client(both) as by_both:
        assert [known.alias_name for known in (await by_both.get_aliases()).aliases] == [alias]
