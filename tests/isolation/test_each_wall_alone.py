"""Where two walls stand behind each other, an attack cannot tell that one has fallen: here each is watched by itself."""

import base64
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from math import inf
from typing import Any, ClassVar, cast
from uuid import UUID, uuid4

import asyncpg
import grpc
import pytest
from pydantic import SecretStr
from qdrant_client import grpc as q

from devstack.environment import DATABASE, TENANTS_OWN_KEYS
from devstack.ports import LOOPBACK
from mesh.tenant.v1 import audit_service_pb2, authentication_service_pb2
from services.inference.adapters.provider_keys_client import TenantProviderKeys
from services.kernel.credential_resolver import remote_trust
from services.kernel.errors import Forbidden, Unauthenticated
from services.kernel.ids import TenantId, new_uuid7
from services.kernel.request_context import EXTERNAL, RequestScope
from services.kernel.rpc.channel import MeshChannel
from services.kernel.rpc.policy import OPERATOR, REQUIRED, Policy, refuse_unlisted
from services.kernel.settings import ServiceSettings
from services.kernel.tenant_cipher import RemoteDataKeys, TenantCipher
from services.kernel.tenant_config import TenantConfigCache
from services.kernel.tenant_context import TenantContext
from services.kernel.tenant_database import TenantDatabase
from services.retrieval.adapters.qdrant import QdrantIndex, alias_name
from services.retrieval.document import DocumentStore, Hit, VectorIndex
from services.retrieval.embedding import Embedder
from services.retrieval.library import Library
from services.tenant.issuer import Issuer, IssuerTerms
from services.tenant.json_web_key import Algorithm
from services.tenant.json_web_token import JsonWebToken
from services.tenant.jwt_proof import read_claims
from tests.isolation.credentials_forged import Inside
from tests.isolation.fingerprint import superuser
from tests.isolation.postgres_attacks import SET_SESSION, as_role
from tests.isolation.rounds import PLAIN, over
from tests.isolation.surface import Surface
from tests.isolation.target import Target, in_seconds
from tests.isolation.test_stores import APPEND_ONLY
from tests.support.mesh import Mesh

CHANGING = ("UPDATE", "DELETE", "TRUNCATE")
ADMIN_KEY = "the-key-with-every-right"


def an_operator(tenant_id: TenantId | None) -> TenantContext:
    """An operator whom authentication has let in."""
    end = datetime.now(UTC) + timedelta(seconds=60)
    return TenantContext(tenant_id, "", "local", "operator:x", frozenset({"tenant:admin"}), 0, end, operator=True, token="")


class AsInference(ServiceSettings):
    service_name: ClassVar[str] = "inference"


@pytest.mark.parametrize("requirement", [OPERATOR, REQUIRED])
@pytest.mark.parametrize("reason", ["", " ", "x" * 501])
def test_the_policy_alone_asks_an_operator_for_a_reason(requirement: int, reason: str) -> None:
    """Whatever authentication let through: without a reason of 1 to 500 characters no operator's call is admitted."""
    call = RequestScope(
        method="/m", caller=EXTERNAL, tenant=an_operator(TenantId(new_uuid7())), metadata={"x-operator-reason": reason} if reason else {}
    )
    with pytest.raises(Forbidden) as refused:
        refuse_unlisted(Policy(requirement, frozenset({EXTERNAL}), ()), call)
    assert refused.value.reason_name == "OPERATOR_REASON_MISSING"


async def test_authentication_alone_asks_an_operator_for_a_reason(surface: Surface, inside: Inside) -> None:
    """A service that forgot to ask for the reason is told by authentication."""
    rpc = surface.find("tenant", "AuthenticationService/Authenticate")
    request = authentication_service_pb2.AuthenticateRequest(credential=inside.state.secrets.operator_key)
    answer = await surface.call(rpc, request, inside.as_service("inference"))
    assert answer.refused_as == ("PERMISSION_DENIED", "OPERATOR_REASON_MISSING")


@pytest.mark.parametrize("table", APPEND_ONLY)
async def test_changing_what_was_recorded_is_not_granted(mesh: Mesh, table: str) -> None:
    """Were there no trigger, no role that logs in could update, delete or truncate an append-only table."""
    schema = table.partition(".")[0]
    connection = await superuser(mesh.stack)
    try:
        for role in (f"{schema}_service", f"{schema}_jobs"):
            for right in CHANGING:
                assert not await connection.fetchval("SELECT has_table_privilege($1, $2, $3)", role, table, right), (role, right)
            columns = await connection.fetchval("SELECT has_any_column_privilege($1, $2, 'UPDATE')", role, table)
            assert not columns, role
    finally:
        await connection.close()


@pytest.mark.parametrize(
    "table",
    [
        "tenant.audit",
        "tenant.audit_documents",
        "metering.entries",
        "metering.unit_entries",
        "metering.subscriptions",
        "metering.invoice_lines",
        "metering.credit_uses",
        "metering.credit_notes",
        "metering.rerating_ends",
    ],
)
async def test_a_trigger_alone_refuses_to_change_what_was_recorded(mesh: Mesh, table: str) -> None:
    """Were everything granted, a trigger would still refuse: it refuses the superuser."""
    connection = await superuser(mesh.stack)
    try:
        for sql in (f"UPDATE {table} SET tenant_id = tenant_id WHERE false", f"DELETE FROM {table} WHERE false", f"TRUNCATE {table}"):
            with pytest.raises(asyncpg.RestrictViolationError):
                await connection.execute(sql)
    finally:
        await connection.close()


# What is remembered is the same however a replica is connected.
@over(PLAIN)
async def test_what_is_remembered_of_a_tenant_is_its_own(mesh: Mesh, inside: Inside, resident: Target) -> None:
    """A replica that knows one tenant's configuration, data keys and provider key gives none of them to another of the same version."""
    settings = AsInference(service_token=SecretStr(mesh.stack.state.secrets.service_tokens["inference"]))
    newcomer = await mesh.tenant()
    channel = MeshChannel(mesh.stack.ports.address("tenant"), settings=settings, target_service="tenant")
    _, verifier = remote_trust(channel)
    configurations, ciphers, own_keys = TenantConfigCache(channel), TenantCipher(RemoteDataKeys(channel)), TenantProviderKeys(channel)
    try:
        tokens = [await inside.context_of(api_key) for api_key in (resident.tenant.api_key, newcomer.api_key)]
        contexts = [replace(await verifier.verify(token), config_version=7) for token in tokens]
        expected = [context.tenant_id for context in contexts]
        assert [UUID((await configurations.get(context)).tenant_id) for context in contexts] == expected
        assert [(await ciphers.keys(context)).tenant_id for context in contexts] == expected
        assert [await own_keys.get(context) for context in contexts] == [TENANTS_OWN_KEYS[0], ""]
    finally:
        await channel.close()


async def test_a_connection_keeps_no_tenant(mesh: Mesh, victim: Target) -> None:
    """A pooled connection that served a tenant has none set when its transaction is over."""
    password = mesh.stack.state.secrets.role_passwords["inference"]
    dsn = f"postgresql://inference_service:{password}@{LOOPBACK}:{mesh.stack.ports.postgres}/{DATABASE}"
    database = await TenantDatabase.open(dsn, max_size=1)
    try:
        async with database.transaction(TenantId(victim.tenant_id)) as connection:
            assert await connection.fetchval("SELECT current_setting('app.tenant_id')") == str(victim.tenant_id)
        assert not await database.fetch_value(None, "SELECT current_setting('app.tenant_id', true)")
    finally:
        await database.close()


async def test_a_page_token_is_good_for_its_own_list_alone(surface: Surface, attacker: Target) -> None:
    """A list refuses where another list would go on, though caller and tenant are right."""
    documents, keys = "/mesh.retrieval.v1.DocumentService/ListDocuments", "/mesh.tenant.v1.ApiKeyService/ListApiKeys"
    turns = "/mesh.inference.v1.ConversationService/ListTurns"
    for port, method, token in (
        ("tenant", "ApiKeyService/ListApiKeys", attacker.ids.page_token(documents)),
        ("retrieval", "DocumentService/ListDocuments", attacker.ids.page_token(keys)),
        # One text as position like its own: nothing but the token's check tells the two lists apart.
        ("retrieval", "DocumentService/ListDocuments", attacker.ids.page_token(turns)),
    ):
        rpc = surface.find(port, method)
        answer = await surface.call(rpc, rpc.request_type(page_token=token), attacker.metadata)
        assert answer.refused_as == ("INVALID_ARGUMENT", "INVALID_REQUEST")


def test_the_claims_alone_are_held_against_the_registration() -> None:
    """Were a registration found by chance, a token of another issuer or for another audience would still prove nothing."""
    terms = IssuerTerms(
        "https://login.example", "mesh", "https://login.example/keys", (Algorithm.ES256,), frozenset({"tenant:read"}), timedelta()
    )
    registered, end = Issuer(new_uuid7(), terms, datetime.now(UTC)), datetime.now(UTC).timestamp() + 60
    for issuer, audience, is_its_own in (
        ("https://login.example", "mesh", True),
        ("https://login.example", "another", False),
        ("https://nobody.example", "mesh", False),
    ):
        token = JsonWebToken("", "ES256", "k", issuer, (audience,), {"exp": end, "sub": "someone", "scope": "tenant:read"})
        if is_its_own:
            assert read_claims(token, registered, datetime.now(UTC)).scopes == {"tenant:read"}
        else:
            with pytest.raises(Unauthenticated):
                read_claims(token, registered, datetime.now(UTC))


async def test_the_library_alone_drops_points_of_other_tenants() -> None:
    """Were a collection to answer with another tenant's points, none would be looked up."""
    # Only what judges the hits is under trial: neither store, index nor embedder is touched.
    library = Library(cast("DocumentStore", None), cast("VectorIndex", None), cast("Embedder", None))
    own, other = TenantId(new_uuid7()), TenantId(new_uuid7())
    mine = Hit(uuid4(), own, 0.9)
    assert library._own(own, [Hit(uuid4(), other, 1.0), mine, Hit(uuid4(), None, 0.8)]) == [mine]


class Listening(q.PointsServicer):
    """A vector store that remembers with which key it was asked, and what it was given."""

    def __init__(self) -> None:
        self.keys: list[str] = []
        self.points: list[Any] = []

    async def Query(self, request: Any, context: Any) -> Any:
        self.keys.append(dict(context.invocation_metadata())["api-key"])
        return q.QueryResponse()

    async def Delete(self, request: Any, context: Any) -> Any:
        self.keys.append(dict(context.invocation_metadata())["api-key"])
        return q.PointsOperationResponse()

    async def Upsert(self, request: Any, context: Any) -> Any:
        self.points += request.points
        return q.PointsOperationResponse()


@asynccontextmanager
async def listening() -> AsyncIterator[tuple[Listening, str]]:
    """Serves it on loopback."""
    store, server = Listening(), grpc.aio.server()
    q.add_PointsServicer_to_server(store, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield store, f"http://127.0.0.1:{port}"
    finally:
        await server.stop(0)


async def test_the_collections_token_alone_names_one_collection() -> None:
    """Searches and writes carry a token for the tenant's own alias that ends within 300 s, never the key with every right."""
    tenant_id = TenantId(new_uuid7())
    async with listening() as (store, url):
        index = QdrantIndex(url, SecretStr(ADMIN_KEY), 3)
        await index.search(tenant_id, "words", [0.1, 0.2, 0.3], 5)
        await index.remove_document(tenant_id, new_uuid7(), keep=[])  # type: ignore[arg-type] # an id is an id here
        await index.close()
    assert len(store.keys) == 2
    for key, access in zip(store.keys, ("r", "rw"), strict=True):
        assert key != ADMIN_KEY
        payload = key.split(".")[1]
        claims = json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))
        assert claims["access"] == [{"collection": alias_name(tenant_id), "access": access}]
        assert 0 < claims.get("exp", inf) - datetime.now(UTC).timestamp() <= 300


async def test_each_point_is_written_with_its_own_tenant() -> None:
    """What the library drops hits by is written with every point: the tenant whose call it was."""
    tenant_id = TenantId(new_uuid7())
    async with listening() as (store, url):
        index = QdrantIndex(url, SecretStr(ADMIN_KEY), 3)
        await index.upsert(tenant_id, new_uuid7(), [(uuid4(), "words", [0.1, 0.2, 0.3])] * 2)  # type: ignore[arg-type] # as above
        await index.close()
    assert [point.payload["tenant_id"].string_value for point in store.points] == [str(tenant_id)] * 2


async def test_an_audit_record_needs_its_own_tenants_token(
    mesh: Mesh, surface: Surface, inside: Inside, victim: Target, attacker: Target
) -> None:
    """A service that holds one tenant's token writes nothing into another tenant's log."""
    rpc, contexts = surface.find("tenant", "AuditService/RecordAudit"), [await inside.context_of(attacker.tenant.api_key), ""]
    items = [
        {
            "tenant_id": victim.tenant_id.bytes,
            "audit_id": new_uuid7().bytes,
            "context_token": context,
            "occur_time": in_seconds(0),
            "action": "DOCUMENTS_READ",
            "user": "forged",
            "document_ids": [UUID(victim.ids.document_id).bytes],
        }
        for context in contexts
    ]
    answer = await surface.call(rpc, rpc.request_type(items=items), inside.as_service("inference"))
    assert answer.code == "OK"
    outcomes = list(answer.messages[0].outcomes)  # type: ignore[attr-defined] # a class of the reflected pool
    assert outcomes == [audit_service_pb2.AUDIT_OUTCOME_TENANT_NOT_PROVEN] * 2
    async with as_role(mesh.stack, "tenant") as connection:
        await connection.fetch(SET_SESSION, str(victim.tenant_id))
        forged = "SELECT count(*) FROM tenant.audit WHERE tenant_id = $1 AND user_name = 'forged'"
        assert not await connection.fetchval(forged, victim.tenant_id)
