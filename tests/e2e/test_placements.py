"""A tenant answers alike wherever its content lives, and its content is nowhere else."""

import time
import uuid

import asyncpg
import pytest

from devstack.environment import DATABASE
from devstack.mesh_client import credentials
from devstack.state import DemoTenant
from mesh.inference.v1 import conversation_service_pb2, inference_service_pb2
from mesh.retrieval.v1 import document_service_pb2
from services.kernel import catalog
from services.kernel.migrate import Destination, home_of
from tests.support.mesh import Mesh

PLACEMENTS = ("pool", "bridge", "silo")
# Generous: the machine may be doing other things. The times that were asked for are 2 s and 30 s, and the measured ones are printed.
SECONDS = {"pool": 10.0, "bridge": 30.0, "silo": 30.0}
TABLES = ("prompts", "conversations", "turns", "documents", "chunks")


@pytest.mark.parametrize("isolation", PLACEMENTS)
async def test_a_tenant_answers_wherever_it_lives(mesh: Mesh, isolation: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Documents, a search and a conversation work in a tenant's place, and leave no row outside of it."""
    begun = time.monotonic()
    tenant = await mesh.tenant("enterprise", isolation=isolation)
    seconds = time.monotonic() - begun
    with capsys.disabled():
        print(f"\nprovisioned {isolation} in {seconds:.2f} s")  # noqa: T201 - the measurement
    assert seconds < SECONDS[isolation]
    await talk(mesh, tenant)
    assert await rows(mesh, tenant, isolation) == {table: True for table in TABLES}
    for elsewhere in set(PLACEMENTS) - {isolation}:
        assert not any((await rows(mesh, tenant, elsewhere)).values()), elsewhere


async def test_places_keep_the_isolation_rules(mesh: Mesh) -> None:
    """The catalog of a bridge schema and of a silo database shows the same walls as the shared tables."""
    bridge, silo = await mesh.tenant(isolation="bridge"), await mesh.tenant(isolation="silo")
    shared = await asyncpg.connect(mesh.stack.postgres.dsn(DATABASE))
    name = name_of(bridge)
    homes = [Destination(home, name, home_of(home).owner, home_of(home).service) for home in ("inference", "retrieval")]
    assert await catalog.violations(shared, name, destinations=homes) == []
    await shared.close()
    own = await asyncpg.connect(mesh.stack.postgres.dsn(name_of(silo)))
    for home in ("inference", "retrieval"):
        destination = Destination(home, home, f"{name_of(silo)}_owner", f"{name_of(silo)}_service")
        assert await catalog.violations(own, home, destinations=[destination]) == []
    await own.close()


def name_of(tenant: DemoTenant) -> str:
    """What a tenant's own schema or database is called."""
    return f"t_{uuid.UUID(tenant.tenant_id).hex}"


async def talk(mesh: Mesh, tenant: DemoTenant) -> None:
    """Stores a document, asks about it in a conversation, and reads everything back."""
    metadata = credentials(tenant.api_key)
    document = document_service_pb2.DocumentInput(document_key="handbook.md", title="Holidays", text="Everybody has 27 days of holiday.")
    stored = await mesh.client.documents.UpsertDocuments(
        document_service_pb2.UpsertDocumentsRequest(documents=[document]), metadata=metadata, timeout=30
    )
    request = conversation_service_pb2.CreateConversationRequest(user="ada")
    begun = await mesh.client.conversations.CreateConversation(request, metadata=metadata, timeout=30)
    conversation_id = begun.conversation.conversation_id
    options = inference_service_pb2.GenerateOptions(
        max_output_tokens=50,
        conversation_id=conversation_id,
        retrieval=inference_service_pb2.RetrievalOptions(mode=inference_service_pb2.RETRIEVAL_MODE_REQUIRED),
    )
    message = inference_service_pb2.Message(role=inference_service_pb2.ROLE_USER, text="How many days of holiday?")
    answer = await mesh.client.inference.Generate(
        inference_service_pb2.GenerateRequest(messages=[message], options=options), metadata=metadata, timeout=30
    )
    assert [source.document_key for source in answer.summary.sources] == ["handbook.md"]
    turns = conversation_service_pb2.ListTurnsRequest(conversation_id=conversation_id)
    assert len((await mesh.client.conversations.ListTurns(turns, metadata=metadata, timeout=30)).turns) == 2
    wanted = document_service_pb2.GetDocumentRequest(document_id=stored.documents[0].document_id)
    assert (await mesh.client.documents.GetDocument(wanted, metadata=metadata, timeout=30)).document.text == document.text


async def rows(mesh: Mesh, tenant: DemoTenant, isolation: str) -> dict[str, bool]:
    """Tells for each table whether a place holds rows of the tenant; a place that is not there holds none."""
    database = name_of(tenant) if isolation == "silo" else DATABASE
    try:
        connection = await asyncpg.connect(mesh.stack.postgres.dsn(database))
    except asyncpg.InvalidCatalogNameError:
        return {}
    found: dict[str, bool] = {}
    for table in TABLES:
        home = "retrieval" if table in ("documents", "chunks") else "inference"
        name = f"{name_of(tenant) if isolation == 'bridge' else home}.{table}"
        there = await connection.fetchval("SELECT to_regclass($1) IS NOT NULL", name)
        sql = f"SELECT EXISTS (SELECT FROM {name} WHERE tenant_id = $1)"
        found[table] = there and await connection.fetchval(sql, uuid.UUID(tenant.tenant_id))
    await connection.close()
    return found
