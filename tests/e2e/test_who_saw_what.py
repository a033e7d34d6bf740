"""One question to the audit log answers who saw a document, through every way a document can be read, and after a kill -9."""

import asyncio
import json
import uuid

import grpc

from devstack.mesh_client import Metadata, credentials
from devstack.state import DemoTenant
from mesh.inference.v1 import inference_service_pb2 as inference
from mesh.retrieval.v1 import document_service_pb2, search_service_pb2
from mesh.tenant.v1 import audit_service_pb2 as audit
from tests.support.mesh import Mesh, running_mesh
from tests.support.waiting import eventually

ON_RECORD_SECONDS = 90.0


async def with_document(mesh: Mesh) -> tuple[DemoTenant, str]:
    """A tenant with one document."""
    tenant = await mesh.tenant()
    given = document_service_pb2.DocumentInput(document_key="vault", title="The vault", text="The code of the vault is 4711. Keep it safe.")
    request = document_service_pb2.UpsertDocumentsRequest(documents=[given])
    stored = await mesh.client.documents.UpsertDocuments(request, metadata=credentials(tenant.api_key), timeout=20)
    return tenant, stored.documents[0].document_id


async def readers(mesh: Mesh, metadata: Metadata, document_id: str) -> list[audit.AuditRecord]:
    """Who saw the document: one query."""
    answer = await mesh.client.audit.QueryAudit(audit.QueryAuditRequest(document_id=document_id), metadata=metadata, timeout=10)
    return list(answer.records)


def question(user: str, text: str = "What is the code of the vault?") -> dict[str, object]:
    """A question on the tenant's documents."""
    options = inference.GenerateOptions(
        max_output_tokens=250, user=user, retrieval=inference.RetrievalOptions(mode=inference.RETRIEVAL_MODE_REQUIRED)
    )
    return {"messages": [inference.Message(role=inference.ROLE_USER, text=text)], "options": options}


async def test_one_query_answers_who_saw_a_document(mesh: Mesh) -> None:
    """A model's answer, a search and a look at the document are all found by its id, with user, key, call and time."""
    tenant, document_id = await with_document(mesh)
    metadata, call_id = credentials(tenant.api_key), uuid.uuid4()
    await mesh.client.inference.Generate(
        inference.GenerateRequest(**question("carol")),  # type: ignore[arg-type] # fields by name
        metadata=credentials(tenant.api_key, call_id=call_id),
        timeout=30,
    )
    await mesh.client.search.Search(search_service_pb2.SearchRequest(query="vault", top_k=3), metadata=metadata, timeout=10)
    # These two are on record before they are answered: no waiting.
    assert {json.loads(record.detail_json).get("method") for record in await readers(mesh, metadata, document_id)} >= {"Search"}
    await mesh.client.documents.GetDocument(document_service_pb2.GetDocumentRequest(document_id=document_id), metadata=metadata, timeout=10)
    assert {json.loads(record.detail_json).get("method") for record in await readers(mesh, metadata, document_id)} >= {
        "Search",
        "GetDocument",
    }

    async def all_three() -> bool:
        return len(await readers(mesh, metadata, document_id)) == 3

    await eventually(all_three, within_seconds=ON_RECORD_SECONDS)
    [of_call] = [record for record in await readers(mesh, metadata, document_id) if record.source == "inference"]
    assert (of_call.user, of_call.call_id) == ("carol", str(call_id))
    assert all(record.subject.removeprefix("key:") in tenant.api_key for record in await readers(mesh, metadata, document_id))

    async def has_ended() -> bool:
        found = await mesh.client.audit.QueryAudit(audit.QueryAuditRequest(call_id=str(call_id)), metadata=metadata, timeout=10)
        return {record.action for record in found.records} == {"DOCUMENTS_READ", "CALL_ENDED"}

    await eventually(has_ended, within_seconds=ON_RECORD_SECONDS)
    proven = await mesh.client.audit.VerifyAuditChain(audit.VerifyAuditChainRequest(), metadata=metadata, timeout=20)
    assert (proven.first_broken_sequence, proven.record_count) == (0, proven.head.sequence)
    stranger = await mesh.tenant()
    assert await readers(mesh, credentials(stranger.api_key), document_id) == []


async def test_killed_inference_keeps_the_record_of_what_was_read() -> None:
    """A call killed in mid-stream has shown its documents: the record is in its database, and reaches the log after the restart."""
    async with running_mesh(trace_sample_ratio=0.0) as mesh:
        tenant, document_id = await with_document(mesh)
        metadata, call_id = credentials(tenant.api_key), uuid.uuid4()
        await mesh.client.search.Search(search_service_pb2.SearchRequest(query="vault"), metadata=metadata, timeout=10)
        stream = await begin(mesh, tenant, call_id)
        process = mesh.stack.processes["inference"]
        process.kill()
        await process.wait()
        stream.cancel()
        await mesh.stack.start_service("tenant")
        assert [record.source for record in await readers(mesh, metadata, document_id)] == ["retrieval"]
        await mesh.stack.start_service("inference")

        async def is_on_record() -> bool:
            found = await readers(mesh, metadata, document_id)
            return [record.call_id for record in found if record.source == "inference"] == [str(call_id)]

        await eventually(is_on_record, within_seconds=ON_RECORD_SECONDS)


async def begin(mesh: Mesh, tenant: DemoTenant, call_id: uuid.UUID) -> grpc.aio.UnaryStreamCall:
    """Starts a slow call, its credential known, with the audit log away from before it began; returns at its first text."""
    hello = inference.GenerateRequest(messages=[inference.Message(role=inference.ROLE_USER, text="Hello.")])
    await mesh.client.inference.Generate(hello, metadata=credentials(tenant.api_key), timeout=30)
    # With the log away the record cannot have left inference before the kill.
    process = mesh.stack.processes["tenant"]
    process.kill()
    await process.wait()
    text = "[[stub: output_tokens=200 token_ms=100]] What is the code of the vault?"
    stream = mesh.client.inference.StreamGenerate(
        inference.StreamGenerateRequest(**question("carol", text)),  # type: ignore[arg-type] # fields by name
        metadata=credentials(tenant.api_key, call_id=call_id),
        timeout=60,
    )
    async with asyncio.timeout(40):
        async for event in stream:
            if event.WhichOneof("event") == "delta":
                break
    return stream
