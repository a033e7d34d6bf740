"""One call over five real processes: the answer, the ledger, the limits and the trace agree."""

import json
import uuid

import grpc
import pytest

from devstack.asking import ask
from devstack.handbook import COMPANIES, HARBOR, LUMEN, Company, questions
from devstack.mesh_client import credentials, refusal
from devstack.state import SERVICES
from devstack.trace_receiver import Span
from mesh.inference.v1 import conversation_service_pb2, conversation_service_pb2_grpc, inference_service_pb2
from mesh.metering.v1 import ledger_service_pb2, usage_service_pb2
from mesh.ratelimit.v1 import rate_limit_service_pb2
from tests.support.mesh import Mesh, account_use
from tests.support.waiting import eventually


@pytest.mark.parametrize("company", COMPANIES, ids=lambda company: company.slug)
async def test_a_tenant_is_answered_from_its_own_documents(mesh: Mesh, company: Company) -> None:
    """Each handbook question is answered with the facts of the tenant's own documents and none of the other's."""
    tenant = await mesh.company(company)
    for item in questions(company)[:3]:
        asked = await ask(mesh.client, tenant, item.question)
        assert item.source in {source.document_key for source in asked.summary.sources}
        assert any(phrase.lower() in asked.text.lower() for phrase in item.expected_phrases), asked.text
        assert not any(phrase.lower() in asked.text.lower() for phrase in item.forbidden_phrases), asked.text


async def test_the_ledger_has_exactly_the_call_that_was_made(mesh: Mesh) -> None:
    """The final message, the ledger's record and the usage report tell the same tokens and the same nano-dollars."""
    tenant = await mesh.tenant()
    asked = await ask(mesh.client, tenant, "What do you know?")
    metadata = credentials(tenant.api_key)
    record = (await mesh.client.usage.GetCall(usage_service_pb2.GetCallRequest(call_id=str(asked.call_id)), metadata=metadata)).attempts[0]
    assert record.state == ledger_service_pb2.CALL_STATE_SETTLED
    assert record.entry_id == asked.summary.ledger_entry_id
    assert record.cost.nano_usd == asked.cost_nano_usd > 0
    assert (record.usage.input_tokens, record.usage.output_tokens) == (asked.summary.usage.input_tokens, asked.summary.usage.output_tokens)
    report = await mesh.client.usage.GetUsageReport(usage_service_pb2.GetUsageReportRequest(), metadata=metadata)
    assert (report.settled_count, report.total_cost.nano_usd) == (1, asked.cost_nano_usd)


async def test_the_limits_count_what_the_ledger_counts(mesh: Mesh) -> None:
    """After a call nothing is held any more, and the month's cost at the limits is the ledger's."""
    tenant = await mesh.tenant()
    asked = await ask(mesh.client, tenant, "What do you know?")
    used = await settled_limits(mesh, tenant.api_key)
    tokens = asked.summary.usage.input_tokens + asked.summary.usage.output_tokens
    assert used["concurrent_calls"] == 0
    assert {rule: amount for rule, amount in used.items() if amount} == {
        "requests_burst": 1,
        "requests_per_minute": 1,
        "tokens_per_minute": tokens,
        "tokens_per_day": tokens,
        "tokens_per_month": tokens,
        "cost_nano_usd_per_day": asked.cost_nano_usd,
        "cost_nano_usd_per_month": asked.cost_nano_usd,
    }


async def settled_limits(mesh: Mesh, api_key: str) -> dict[str, int]:
    """What is used of each limit, once no call is counted as running (the commit travels through the outbox)."""
    while True:
        listed = await mesh.client.limits.ListLimits(rate_limit_service_pb2.ListLimitsRequest(), metadata=credentials(api_key), timeout=5)
        used = {limit.rule: limit.used for limit in listed.limits}
        if used["concurrent_calls"] == 0:
            return used


async def test_the_providers_account_counts_what_the_ledger_counts(mesh: Mesh) -> None:
    """After a call its tenant has used one request of the account's minute, and the tokens of its bill instead of the worst case."""
    tenant = await mesh.tenant()
    asked = await ask(mesh.client, tenant, "What do you know?")
    await settled_limits(mesh, tenant.api_key)
    usage = asked.summary.usage

    async def is_counted() -> bool:
        return await account_use(mesh, tenant) == (1, usage.input_tokens, usage.output_tokens)

    await eventually(is_counted, within_seconds=10)


EDGES = {
    ("inference mesh.inference.v1.InferenceService/StreamGenerate", "tenant mesh.tenant.v1.AuthenticationService/Authenticate"),
    ("inference mesh.inference.v1.InferenceService/StreamGenerate", "ratelimit mesh.ratelimit.v1.RateLimitService/ReserveBatch"),
    ("inference mesh.inference.v1.InferenceService/StreamGenerate", "metering mesh.metering.v1.LedgerService/OpenCalls"),
    ("inference mesh.inference.v1.InferenceService/StreamGenerate", "retrieval mesh.retrieval.v1.SearchService/Search"),
    ("inference mesh.inference.v1.InferenceService/StreamGenerate", "inference chat claude-sonnet-4-6"),
    ("inference mesh.inference.v1.InferenceService/StreamGenerate", "metering mesh.metering.v1.LedgerService/SettleCalls"),
    ("ratelimit mesh.ratelimit.v1.RateLimitService/ReserveBatch", "metering mesh.metering.v1.LedgerService/BeginEpoch"),
}


async def test_one_trace_leads_through_all_five_services(mesh: Mesh) -> None:
    """A retrieval-augmented call is one trace: each server's span hangs, by the client's span, under the call that caused it."""
    tenant = await mesh.tenant()
    asked = await ask(mesh.client, tenant, questions(HARBOR)[0].question)
    traced = asked.trace.trace_id

    async def all_arrived() -> bool:
        return server_edges(mesh.stack.traces.spans(traced)) >= EDGES

    await eventually(all_arrived, within_seconds=20)
    spans = mesh.stack.traces.spans(traced)
    assert {span.service for span in spans} == set(SERVICES)
    assert not any(span.error for span in spans)


def server_edges(spans: list[Span]) -> set[tuple[str, str]]:
    """Who called whom: (service and span of the parent, service and span of the child)."""
    by_id = {span.span_id: span for span in spans}
    edges = set()
    for span in spans:
        parent = by_id.get(span.parent_span_id)
        # A client's span has its server's name: it is looked through.
        while parent is not None and parent.name == span.name:
            parent = by_id.get(parent.parent_span_id)
        if parent is not None:
            edges.add((f"{parent.service} {parent.name}", f"{span.service} {span.name}"))
    return edges


async def test_a_conversation_remembers_its_turns(mesh: Mesh) -> None:
    """The second call of a conversation knows what the first one said."""
    tenant = await mesh.tenant()
    async with grpc.aio.insecure_channel(mesh.stack.ports.address("inference")) as channel:
        conversations = conversation_service_pb2_grpc.ConversationServiceStub(channel)
        metadata = credentials(tenant.api_key)
        begun = await conversations.CreateConversation(conversation_service_pb2.CreateConversationRequest(user="u-1"), metadata=metadata)
        conversation_id = begun.conversation.conversation_id
        first = await generate(mesh, tenant.api_key, "My favourite spanner is called Excalibur.", conversation_id)
        second = await generate(mesh, tenant.api_key, "What is my favourite spanner called?", conversation_id)
        listed = await conversations.ListTurns(
            conversation_service_pb2.ListTurnsRequest(conversation_id=conversation_id), metadata=metadata
        )
    assert "Excalibur" in second.text
    assert [turn.text for turn in listed.turns] == [
        "My favourite spanner is called Excalibur.",
        first.text,
        "What is my favourite spanner called?",
        second.text,
    ]


async def generate(mesh: Mesh, api_key: str, text: str, conversation_id: str = "") -> inference_service_pb2.GenerateResponse:
    """One unary call."""
    request = inference_service_pb2.GenerateRequest(
        messages=[inference_service_pb2.Message(role=inference_service_pb2.ROLE_USER, text=text)],
        options=inference_service_pb2.GenerateOptions(max_output_tokens=200, conversation_id=conversation_id),
    )
    return await mesh.client.inference.Generate(request, metadata=credentials(api_key), timeout=20)


async def test_past_its_requests_a_tenant_is_told_why_and_until_when(mesh: Mesh) -> None:
    """The eleventh request of a free tenant's minute names the rule, the limit, what is used and the reset."""
    tenant = await mesh.tenant("free")
    for _ in range(10):
        await generate(mesh, tenant.api_key, "Hello.")
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await generate(mesh, tenant.api_key, "Hello.")
    told = refusal(refused.value)
    assert (told.code, told.reason, told.metadata["rule"]) == ("RESOURCE_EXHAUSTED", "PLAN_LIMIT", "requests_per_minute")
    assert (told.metadata["limit"], told.metadata["used"], told.metadata["remaining"]) == ("10", "10", "0")
    assert told.metadata["reset_time"]
    assert told.retry_after_seconds is not None
    assert 0 < told.retry_after_seconds <= 60


async def test_a_call_id_is_billed_once(mesh: Mesh) -> None:
    """The same call id a second time is refused and costs nothing."""
    tenant = await mesh.tenant()
    request = inference_service_pb2.GenerateRequest(
        messages=[inference_service_pb2.Message(role=inference_service_pb2.ROLE_USER, text="Hello.")]
    )
    metadata = credentials(tenant.api_key, call_id=uuid.uuid4())
    await mesh.client.inference.Generate(request, metadata=metadata, timeout=20)
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await mesh.client.inference.Generate(request, metadata=metadata, timeout=20)
    assert refused.value.code() is grpc.StatusCode.ALREADY_EXISTS
    report = await mesh.client.usage.GetUsageReport(usage_service_pb2.GetUsageReportRequest(), metadata=credentials(tenant.api_key))
    assert (report.settled_count, report.open_count, report.unresolved_count) == (1, 0, 0)


async def test_one_tenants_question_never_meets_the_others_documents(mesh: Mesh) -> None:
    """Asking the other company's question gives none of that company's facts."""
    lumen, harbor = await mesh.company(LUMEN), await mesh.company(HARBOR)
    for item in questions(LUMEN)[:3]:
        asked = await ask(mesh.client, harbor, item.question)
        assert not any(phrase.lower() in asked.text.lower() for phrase in item.expected_phrases), asked.text
    assert lumen.tenant_id != harbor.tenant_id


async def test_the_logs_tell_how_a_call_ended(mesh: Mesh) -> None:
    """One line with the call's id, tenant and trace says what it was billed; what was asked and answered stands in no line."""
    tenant = await mesh.tenant()
    asked = await ask(mesh.client, tenant, "What do you know of the sesquipedalian?")
    lines = [json.loads(line) for line in mesh.stack.state.log_path("inference").read_text().splitlines() if str(asked.call_id) in line]
    [ended] = [line for line in lines if line["event"] == "call_settled"]
    assert (ended["tenant_id"], ended["trace_id"]) == (tenant.tenant_id, asked.trace.trace_id)
    assert (ended["cost_nano_usd"], ended["model"]) == (asked.cost_nano_usd, asked.summary.model)
    assert "sesquipedalian" not in json.dumps(lines)
