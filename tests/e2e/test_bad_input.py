"""Bad input: a typed error each, nothing written, nothing billed, nothing held, the service alive."""

import uuid
from collections.abc import Callable

import grpc
import pytest
from google.protobuf.message import Message

from devstack.mesh_client import Metadata, credentials, operator_credentials, refusal
from devstack.state import DemoTenant
from mesh.inference.v1 import inference_service_pb2 as pb
from mesh.metering.v1 import usage_service_pb2
from mesh.ratelimit.v1 import rate_limit_service_pb2
from mesh.retrieval.v1 import document_service_pb2
from mesh.tenant.v1 import api_key_service_pb2, api_key_service_pb2_grpc, tenant_service_pb2
from tests.support.mesh import Mesh
from tests.support.raw_http2 import raw_unary

GENERATE = "/mesh.inference.v1.InferenceService/Generate"


def question(text: str = "Hello.", **options: object) -> pb.GenerateRequest:
    """A small request."""
    return pb.GenerateRequest(messages=[pb.Message(role=pb.ROLE_USER, text=text)], options=pb.GenerateOptions(**options))


async def call_raw(mesh: Mesh, service: str, method: str, body: bytes, metadata: Metadata) -> tuple[str, str]:
    """Sends bytes as they are and returns (code, reason) of the refusal, or ("OK", "")."""
    options = (("grpc.max_send_message_length", -1),)
    async with grpc.aio.insecure_channel(mesh.stack.ports.address(service), options=options) as channel:
        try:
            await channel.unary_unary(method, request_serializer=None, response_deserializer=None)(body, metadata=metadata, timeout=20)
        except grpc.aio.AioRpcError as error:
            told = refusal(error)
            return told.code, told.reason
    return "OK", ""


async def assert_nothing_happened(mesh: Mesh, tenant: DemoTenant) -> None:
    """The tenant's ledger is empty, nothing of its limits is used or held, and a good call works."""
    metadata = credentials(tenant.api_key)
    await assert_nothing_is_held(mesh, tenant)
    report = await mesh.client.usage.GetUsageReport(usage_service_pb2.GetUsageReportRequest(), metadata=metadata, timeout=10)
    assert (report.settled_count, report.open_count, report.unresolved_count) == (0, 0, 0)
    await mesh.client.inference.Generate(question(), metadata=metadata, timeout=20)


async def assert_nothing_is_held(mesh: Mesh, tenant: DemoTenant) -> None:
    """No limit of the tenant counts anything."""
    request = rate_limit_service_pb2.ListLimitsRequest()
    listed = await mesh.client.limits.ListLimits(request, metadata=credentials(tenant.api_key), timeout=10)
    assert {limit.rule: limit.used for limit in listed.limits if limit.used} == {}


REFUSED_QUESTIONS: list[tuple[str, Callable[[], pb.GenerateRequest], str, str]] = [
    ("no messages", pb.GenerateRequest, "INVALID_ARGUMENT", "INVALID_REQUEST"),
    ("blank text", lambda: question("  \n "), "INVALID_ARGUMENT", "INVALID_REQUEST"),
    ("no role", lambda: pb.GenerateRequest(messages=[pb.Message(text="Hello.")]), "INVALID_ARGUMENT", "INVALID_REQUEST"),
    (
        "assistant speaks last",
        lambda: pb.GenerateRequest(messages=[pb.Message(role=pb.ROLE_ASSISTANT, text="Hello.")]),
        "INVALID_ARGUMENT",
        "INVALID_REQUEST",
    ),
    ("unknown model", lambda: question(model="gpt-9"), "INVALID_ARGUMENT", "UNKNOWN_MODEL"),
    ("model of a larger plan", lambda: question(model="claude-opus-4-6"), "PERMISSION_DENIED", "MODEL_TIER"),
    ("negative output tokens", lambda: question(max_output_tokens=-1), "INVALID_ARGUMENT", "INVALID_REQUEST"),
    ("more output tokens than the plan's", lambda: question(max_output_tokens=999_999), "INVALID_ARGUMENT", "REQUEST_TOO_LARGE"),
    ("a context beyond the plan's", lambda: question("word " * 100_000), "INVALID_ARGUMENT", "REQUEST_TOO_LARGE"),
    ("malformed conversation", lambda: question(conversation_id="1"), "NOT_FOUND", "NOT_FOUND"),
    ("a conversation that is not there", lambda: question(conversation_id="0" * 64), "NOT_FOUND", "NOT_FOUND"),
    ("malformed feature", lambda: question(feature="No Spaces!"), "INVALID_ARGUMENT", "INVALID_REQUEST"),
]


@pytest.mark.parametrize(
    ("request_of", "code", "reason"), [case[1:] for case in REFUSED_QUESTIONS], ids=[case[0] for case in REFUSED_QUESTIONS]
)
async def test_a_bad_question_is_refused_with_its_reason(
    mesh: Mesh, refused_tenant: DemoTenant, request_of: Callable[[], pb.GenerateRequest], code: str, reason: str
) -> None:
    """Each bad question gets its own typed refusal."""
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await mesh.client.inference.Generate(request_of(), metadata=credentials(refused_tenant.api_key), timeout=20)
    told = refusal(refused.value)
    assert (told.code, told.reason) == (code, reason), told.message
    await assert_nothing_is_held(mesh, refused_tenant)


@pytest.fixture(scope="module")
async def refused_tenant(mesh: Mesh) -> DemoTenant:
    """A tenant whose every call is refused."""
    return await mesh.tenant()


async def test_unknown_fields_are_refused(mesh: Mesh) -> None:
    """A field this version does not know is a refusal, not a guess."""
    tenant = await mesh.tenant()
    body = question().SerializeToString() + b"\xfa\x3f\x03abc"
    assert await call_raw(mesh, "inference", GENERATE, body, credentials(tenant.api_key)) == ("INVALID_ARGUMENT", "UNKNOWN_FIELDS")
    await assert_nothing_happened(mesh, tenant)


async def test_a_prompt_of_ten_megabytes_is_refused(mesh: Mesh) -> None:
    """A message beyond the server's size is refused before it is read."""
    tenant = await mesh.tenant()
    code, _ = await call_raw(mesh, "inference", GENERATE, question("x" * 10_000_000).SerializeToString(), credentials(tenant.api_key))
    assert code in {"RESOURCE_EXHAUSTED", "INVALID_ARGUMENT"}
    await assert_nothing_happened(mesh, tenant)


async def test_bytes_that_are_no_message_are_refused(mesh: Mesh) -> None:
    """Garbage and invalid UTF-8 inside a message are typed errors."""
    tenant = await mesh.tenant()
    metadata = credentials(tenant.api_key)
    assert (await call_raw(mesh, "inference", GENERATE, b"\xff\xff\xff", metadata))[0] == "INVALID_ARGUMENT"
    assert (await call_raw(mesh, "inference", GENERATE, b"\x0a\x07\x08\x01\x12\x03\xff\xfe\xfd", metadata))[0] == "INVALID_ARGUMENT"
    await assert_nothing_happened(mesh, tenant)


async def test_ids_that_are_no_uuids_are_refused(mesh: Mesh) -> None:
    """A malformed id in a request or in the metadata is named."""
    tenant = await mesh.tenant()
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await mesh.client.usage.GetCall(usage_service_pb2.GetCallRequest(call_id="42"), metadata=credentials(tenant.api_key))
    assert refusal(refused.value).reason == "INVALID_REQUEST"
    metadata = (*credentials(tenant.api_key), ("x-request-id", "42"))
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await mesh.client.inference.Generate(question(), metadata=metadata)
    assert (refusal(refused.value).reason, refusal(refused.value).metadata["key"]) == ("INVALID_METADATA", "x-request-id")
    await assert_nothing_happened(mesh, tenant)


@pytest.mark.parametrize("key", [b"x-request-id", b"x-tenant-id", b"x-operator-reason", b"x-tenant-context", b"authorization"])
async def test_metadata_that_is_no_utf8_is_refused(mesh: Mesh, key: bytes) -> None:
    """One of the mesh's own metadata keys with bytes beyond ASCII is a typed error, and the service lives on."""
    tenant = await mesh.tenant()
    authorization = [] if key == b"authorization" else [(b"authorization", f"Bearer {tenant.api_key}".encode())]
    metadata = [*authorization, (key, b"\xff\xfe\x80")]
    answer = await raw_unary(mesh.stack.ports.inference, GENERATE, question().SerializeToString(), metadata)
    assert answer[b"grpc-status"] == b"3", answer
    assert b"grpc-status-details-bin" in answer
    await assert_nothing_happened(mesh, tenant)


@pytest.mark.parametrize("key", [b"traceparent", b"x-of-somebody-else"])
async def test_metadata_of_others_is_left_alone(mesh: Mesh, key: bytes) -> None:
    """Keys that are not the mesh's own are ignored, whatever bytes they hold; a malformed trace parent counts as absent (W3C)."""
    tenant = await mesh.tenant()
    metadata = [(b"authorization", f"Bearer {tenant.api_key}".encode()), (key, b"\xff\xfe\x80")]
    answer = await raw_unary(mesh.stack.ports.inference, GENERATE, question().SerializeToString(), metadata)
    assert answer[b"grpc-status"] == b"0", answer


async def test_an_unknown_tenant_and_an_expired_key_are_refused(mesh: Mesh) -> None:
    """A key that is unknown, and one whose time has passed, do not authenticate; an unknown claimed tenant is a mismatch."""
    tenant = await mesh.tenant()
    for metadata, reason in (
        (credentials(tenant.api_key[:-1] + ("a" if tenant.api_key[-1] != "a" else "b")), "CREDENTIAL_INVALID"),
        (credentials(tenant.api_key, tenant_id=str(uuid.uuid4())), "TENANT_MISMATCH"),
        ((), "CREDENTIAL_MISSING"),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await mesh.client.inference.Generate(question(), metadata=metadata)
        assert refusal(refused.value).reason == reason
    await assert_nothing_happened(mesh, tenant)


async def test_an_expiry_in_the_past_is_refused(mesh: Mesh) -> None:
    """A key cannot be made that is dead already."""
    tenant = await mesh.tenant()
    request = api_key_service_pb2.CreateApiKeyRequest(display_name="late", scopes=["usage:read"])
    request.expire_time.FromJsonString("2020-01-01T00:00:00Z")
    async with grpc.aio.insecure_channel(mesh.stack.ports.address("tenant")) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await api_key_service_pb2_grpc.ApiKeyServiceStub(channel).CreateApiKey(request, metadata=credentials(tenant.api_key))
    assert refusal(refused.value).reason == "INVALID_REQUEST"


@pytest.mark.parametrize(
    "change",
    [
        {"slug": "Not A Slug"},
        {"slug": "a--b"},
        {"slug": "\u0430cme"},
        {"plan": "no-such-plan"},
        {"owner_email": "nobody"},
        {"request_id": "1"},
    ],
    ids=str,
)
async def test_a_tenant_that_cannot_be_is_not_made(mesh: Mesh, change: dict[str, str]) -> None:
    """A bad slug, plan, address or id refuses the tenant and leaves no trace of it."""
    fields = {
        "request_id": str(uuid.uuid4()),
        "slug": f"t-{uuid.uuid4().hex[:8]}",
        "display_name": "T",
        "plan": "free",
        "owner_email": "o@example.com",
    }
    metadata = operator_credentials(mesh.stack.state.secrets.operator_key, "test")
    before = await mesh.client.tenants.ListTenants(tenant_service_pb2.ListTenantsRequest(page_size=1000), metadata=metadata)
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await mesh.client.tenants.CreateTenant(tenant_service_pb2.CreateTenantRequest(**(fields | change)), metadata=metadata)
    assert refusal(refused.value).reason in {"INVALID_REQUEST", "NOT_FOUND"}
    after = await mesh.client.tenants.ListTenants(tenant_service_pb2.ListTenantsRequest(page_size=1000), metadata=metadata)
    assert len(after.tenants) == len(before.tenants)


async def test_bad_documents_are_refused_whole(mesh: Mesh) -> None:
    """One blank document refuses its whole request."""
    tenant = await mesh.tenant()
    documents = [document_service_pb2.DocumentInput(document_key=key, text=text) for key, text in (("a", "A fact."), ("b", " "))]
    metadata = credentials(tenant.api_key)
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await mesh.client.documents.UpsertDocuments(document_service_pb2.UpsertDocumentsRequest(documents=documents), metadata=metadata)
    assert refusal(refused.value).reason == "INVALID_REQUEST"
    listed = await mesh.client.documents.ListDocuments(document_service_pb2.ListDocumentsRequest(), metadata=metadata)
    assert not listed.documents


async def test_page_tokens_are_checked(mesh: Mesh) -> None:
    """A token no page gave is refused, on every list."""
    tenant = await mesh.tenant()
    metadata = credentials(tenant.api_key)
    lists: list[tuple[Callable[..., object], Message]] = [
        (mesh.client.documents.ListDocuments, document_service_pb2.ListDocumentsRequest(page_token="garbage!")),
        (mesh.client.usage.ListCalls, usage_service_pb2.ListCallsRequest(page_token="garbage!")),
    ]
    for method, request in lists:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await method(request, metadata=metadata)  # type: ignore[misc]
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
