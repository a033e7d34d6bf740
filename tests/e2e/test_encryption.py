"""An encrypting tenant in the whole mesh: what is stored shows no text, its key changes through kill -9, and with it everything ends."""

import asyncpg
import grpc
import pytest

from devstack.environment import DATABASE, KEY_DATABASE
from devstack.mesh_client import credentials, refusal
from devstack.state import DemoTenant
from mesh.inference.v1 import conversation_service_pb2, conversation_service_pb2_grpc, inference_service_pb2
from mesh.retrieval.v1 import document_service_pb2, search_service_pb2
from mesh.tenant.v1 import data_key_service_pb2, data_key_service_pb2_grpc
from tests.support.mesh import Mesh, running_mesh

FACT = "heliotrope-4711"
SEALED = {
    "inference.turns": "SELECT key_version FROM inference.turns WHERE tenant_id = $1",
    "retrieval.documents": "SELECT key_version FROM retrieval.documents WHERE tenant_id = $1",
    "retrieval.chunks": "SELECT key_version FROM retrieval.chunks WHERE tenant_id = $1",
}
# Says of one tenant that its content is sealed, whatever its plan and placement say.
SEAL_ITS_CONTENT = """
CREATE OR REPLACE FUNCTION tenant.facts(p_tenant_id uuid) RETURNS SETOF tenant.tenant_facts LANGUAGE sql STABLE SECURITY INVOKER AS $$
    SELECT f.state, f.plan, f.region, f.config_version, f.placement, f.encrypt_content OR p_tenant_id = '{tenant_id}'
    FROM tenant.facts_of_the_plan(p_tenant_id) f
$$
"""


async def begin_sealing(connection: asyncpg.Connection, tenant: DemoTenant) -> None:
    """Sets the flag of a tenant nobody has authenticated as yet."""
    source = await connection.fetchval("SELECT pg_get_functiondef('tenant.facts(uuid)'::regprocedure)")
    await connection.execute(source.replace("tenant.facts(", "tenant.facts_of_the_plan(", 1))
    await connection.execute("GRANT EXECUTE ON FUNCTION tenant.facts_of_the_plan(uuid) TO tenant_service")
    await connection.execute(SEAL_ITS_CONTENT.format(tenant_id=tenant.tenant_id))


async def converse(mesh: Mesh, tenant: DemoTenant) -> str:
    """Stores a document and has a conversation about it; returns the conversation's id."""
    metadata = credentials(tenant.api_key)
    document = document_service_pb2.DocumentInput(document_key="vault", title=f"On {FACT}", text=f"The code of the vault is {FACT}.")
    await mesh.client.documents.UpsertDocuments(
        document_service_pb2.UpsertDocumentsRequest(documents=[document]), metadata=metadata, timeout=30
    )
    async with grpc.aio.insecure_channel(mesh.stack.ports.address("inference")) as channel:
        stub = conversation_service_pb2_grpc.ConversationServiceStub(channel)
        begun = await stub.CreateConversation(conversation_service_pb2.CreateConversationRequest(user=FACT), metadata=metadata, timeout=30)
    conversation_id = str(begun.conversation.conversation_id)
    message = inference_service_pb2.Message(role=inference_service_pb2.ROLE_USER, text=f"I think it is {FACT}. Is it?")
    options = inference_service_pb2.GenerateOptions(
        max_output_tokens=60,
        conversation_id=conversation_id,
        retrieval=inference_service_pb2.RetrievalOptions(mode=inference_service_pb2.RETRIEVAL_MODE_REQUIRED),
    )
    request = inference_service_pb2.GenerateRequest(messages=[message], options=options)
    answer = await mesh.client.inference.Generate(request, metadata=metadata, timeout=60)
    assert answer.summary.sources
    return conversation_id


async def reads(mesh: Mesh, tenant: DemoTenant, conversation_id: str) -> list[str]:
    """What its owner reads of the conversation and finds in its documents."""
    metadata = credentials(tenant.api_key)
    async with grpc.aio.insecure_channel(mesh.stack.ports.address("inference")) as channel:
        stub = conversation_service_pb2_grpc.ConversationServiceStub(channel)
        request = conversation_service_pb2.ListTurnsRequest(conversation_id=conversation_id)
        turns = await stub.ListTurns(request, metadata=metadata, timeout=30)
    query = search_service_pb2.SearchRequest(query="code of the vault", top_k=1)
    found = await mesh.client.search.Search(query, metadata=metadata, timeout=30)
    return [turns.turns[0].text, found.chunks[0].title, found.chunks[0].text]


async def rotate(mesh: Mesh, tenant: DemoTenant) -> int:
    """Asks for a rotation as an operator; returns the version then in use."""
    metadata = (*credentials(mesh.stack.state.secrets.operator_key), ("x-operator-reason", "yearly rotation"))
    async with grpc.aio.insecure_channel(mesh.stack.ports.address("tenant")) as channel:
        stub = data_key_service_pb2_grpc.DataKeyServiceStub(channel)
        request = data_key_service_pb2.RotateDataKeyRequest(tenant_id=tenant.tenant_id)
        return int((await stub.RotateDataKey(request, metadata=metadata, timeout=60)).active_version)


async def kill(mesh: Mesh, name: str) -> None:
    """Ends a service as a crash would."""
    mesh.stack.processes[name].kill()
    await mesh.stack.processes[name].wait()


# Five starts of services and a mesh of its own, on a machine that may be busy.
@pytest.mark.timeout(400)
async def test_an_encrypting_tenants_key_changes_through_crashes_and_ends_with_its_keys() -> None:
    """Stored rows show no text; a rotation interrupted by kill -9 of two services ends when repeated; without keys nothing is read."""
    async with running_mesh(trace_sample_ratio=0.0) as mesh:
        tenant = await mesh.tenant("enterprise")
        data = await asyncpg.connect(mesh.stack.postgres.dsn(DATABASE))
        keys = await asyncpg.connect(mesh.stack.postgres.dsn(KEY_DATABASE))
        try:
            await begin_sealing(data, tenant)
            conversation_id = await converse(mesh, tenant)
            assert all(FACT in text for text in await reads(mesh, tenant, conversation_id))
            for table in (*SEALED, "inference.conversations"):
                rows = await data.fetch(f"SELECT * FROM {table} WHERE tenant_id = $1", tenant.tenant_id)
                assert rows
                assert not [row for row in rows if FACT.encode() in b"".join(v if isinstance(v, bytes) else str(v).encode() for v in row)]

            await kill(mesh, "retrieval")
            try:
                await rotate(mesh, tenant)
            except grpc.aio.AioRpcError as error:
                assert refusal(error).code == "UNAVAILABLE"
            await kill(mesh, "tenant")
            versions = "SELECT array_agg(version ORDER BY version) FROM tenant_keys.data_keys WHERE tenant_id = $1"
            assert await keys.fetchval(versions, tenant.tenant_id) == [1, 2]
            for name in ("tenant", "retrieval"):
                await mesh.stack.start_service(name)
            assert await rotate(mesh, tenant) == 2
            assert await keys.fetchval(versions, tenant.tenant_id) == [2]
            for sql in SEALED.values():
                assert {row["key_version"] for row in await data.fetch(sql, tenant.tenant_id)} == {2}
            assert all(FACT in text for text in await reads(mesh, tenant, conversation_id))

            await keys.execute("DELETE FROM tenant_keys.data_keys WHERE tenant_id = $1", tenant.tenant_id)
            await kill(mesh, "inference")
            await mesh.stack.start_service("inference")
            try:
                answered = await reads(mesh, tenant, conversation_id)
            except grpc.aio.AioRpcError as error:
                answered = [refusal(error).code]
            assert answered == ["INTERNAL"]
        finally:
            await data.close()
            await keys.close()
