"""Generate and StreamGenerate: one pipeline, two sinks."""

import time
from collections.abc import Awaitable, Callable

import grpc
from google.protobuf.duration_pb2 import Duration

from mesh.common.v1 import money_pb2
from mesh.inference.v1 import inference_service_pb2 as pb
from mesh.inference.v1 import inference_service_pb2_grpc
from services.inference.call import Allowance, Question, Ready, Report, RetrievalMode, Usage
from services.inference.delta_coalescing import DeltaForwarder
from services.inference.pipeline import AnswerPipeline
from services.inference.ports import OwnProviderKeys, Prices, Sink
from services.inference.prompt_assembly import ASSISTANT, USER, Chunk, Turn
from services.inference.question import Asked, to_question
from services.kernel.ids import CallId, new_uuid7
from services.kernel.request_context import bind_call_id, client_call_id, current_tenant, current_tenant_id, remaining_seconds
from services.kernel.tenant_config import TenantConfigCache

_MODES = {
    pb.RETRIEVAL_MODE_UNSPECIFIED: RetrievalMode.OFF,
    pb.RETRIEVAL_MODE_OFF: RetrievalMode.OFF,
    pb.RETRIEVAL_MODE_BEST_EFFORT: RetrievalMode.BEST_EFFORT,
    pb.RETRIEVAL_MODE_REQUIRED: RetrievalMode.REQUIRED,
}
_ROLES = {pb.ROLE_USER: USER, pb.ROLE_ASSISTANT: ASSISTANT}


class Collected:
    """A sink for answers that go out whole: the pipeline keeps the text."""

    async def started(self, question: Question, ready: Ready) -> None:
        """Nothing goes out before the end."""

    def add(self, text: str) -> None:
        """Nothing goes out before the end."""


class Streamed(DeltaForwarder):
    """A sink that writes `started` and coalesced deltas to a response stream."""

    def __init__(self, write: Callable[[pb.StreamGenerateResponse], Awaitable[None]]) -> None:
        super().__init__(lambda text: write(pb.StreamGenerateResponse(delta=pb.TextDelta(text=text))))
        self._write_message = write

    async def started(self, question: Question, ready: Ready) -> None:
        """Writes the first message."""
        started = pb.CallStarted(
            call_id=str(question.call_id),
            model=question.model.name,
            sources=[_source(chunk) for chunk in ready.prompt.chunks],
            retrieval_degraded=ready.degraded,
            shortened=ready.allowance.shortened,
            granted_output_tokens=ready.allowance.output_tokens,
            waited=_waited(ready.allowance),
        )
        await self._write_message(pb.StreamGenerateResponse(started=started))


class InferenceService(inference_service_pb2_grpc.InferenceServiceServicer):
    """Answers from models."""

    def __init__(
        self,
        pipeline: AnswerPipeline,
        configs: TenantConfigCache,
        provider_keys: OwnProviderKeys,
        prices: Prices,
        default_deadline_seconds: float,
        provider_account: str = "",
    ) -> None:
        self._pipeline = pipeline
        self._configs = configs
        self._provider_keys = provider_keys
        self._prices = prices
        self._default_deadline_seconds = default_deadline_seconds
        self._provider_account = provider_account

    async def Generate(self, request: pb.GenerateRequest, context: object) -> pb.GenerateResponse:
        """Answers in one message."""
        report = await self._answer(request, Collected())
        return pb.GenerateResponse(text=report.received.text, summary=_summary(report))

    async def StreamGenerate(  # type: ignore[override] # a coroutine that writes: its clean-up runs in the call's own task
        self,
        request: pb.StreamGenerateRequest,
        context: "grpc.aio.ServicerContext[pb.StreamGenerateRequest, pb.StreamGenerateResponse]",
    ) -> None:
        """Answers as a stream."""
        async with Streamed(context.write) as sink:
            report = await self._answer(request, sink)
        await context.write(pb.StreamGenerateResponse(final=_summary(report)))

    async def _answer(self, request: pb.GenerateRequest | pb.StreamGenerateRequest, sink: Sink) -> Report:
        tenant = current_tenant()
        call_id = CallId(client_call_id() or new_uuid7())
        bind_call_id(call_id)
        options = request.options
        asked = Asked(
            call_id=call_id,
            tenant=tenant,
            tenant_id=current_tenant_id(),
            messages=tuple([Turn(_ROLES[message.role], message.text) for message in request.messages]),
            model=options.model,
            max_output_tokens=options.max_output_tokens,
            feature=options.feature,
            user=options.user,
            conversation_id=options.conversation_id,
            retrieval=_MODES[options.retrieval.mode],
            top_k=options.retrieval.top_k,
            stop_sequences=tuple(options.stop_sequences),
            deadline=time.monotonic() + min(self._default_deadline_seconds, remaining_seconds(self._default_deadline_seconds)),
            provider_key=await self._provider_keys.get(tenant),
            min_output_tokens=options.min_output_tokens,
            max_wait_seconds=options.max_wait.ToNanoseconds() / 1e9,
        )
        question = await to_question(asked, await self._configs.get(tenant), self._prices, self._provider_account)
        return await self._pipeline.answer(question, sink)


def _summary(report: Report) -> pb.CallSummary:
    question, received = report.question, report.received
    return pb.CallSummary(
        call_id=str(question.call_id),
        model=question.model.name,
        stop_reason=received.stop_reason,
        usage=_usage(received.usage),
        cost=money_pb2.NanoUsd(nano_usd=report.settled.cost_nano_usd),
        ledger_entry_id=str(report.settled.entry_id),
        remaining=[pb.RemainingLimit(rule=left.rule, limit=left.limit, remaining=left.remaining) for left in report.remaining],
        sources=[_source(chunk) for chunk in report.ready.prompt.chunks],
        retrieval_degraded=report.ready.degraded,
        prompt_version=report.ready.prompt_version,
        first_token_ms=received.first_token_ms,
        total_ms=received.total_ms,
        shortened=report.ready.allowance.shortened,
        granted_output_tokens=report.ready.allowance.output_tokens,
        waited=_waited(report.ready.allowance),
    )


def _waited(allowance: Allowance) -> Duration | None:
    if not allowance.waited_seconds:
        return None
    waited = Duration()
    waited.FromNanoseconds(int(allowance.waited_seconds * 1e9))
    return waited


def _usage(usage: Usage) -> pb.Usage:
    return pb.Usage(
        input_tokens=usage.input_tokens,
        output_tokens=usage.output_tokens,
        cache_read_tokens=usage.cache_read_tokens,
        cache_write_5m_tokens=usage.cache_write_5m_tokens,
        cache_write_1h_tokens=usage.cache_write_1h_tokens,
    )


def _source(chunk: Chunk) -> pb.Source:
    return pb.Source(document_id=chunk.document_id, document_key=chunk.document_key, title=chunk.title, chunk_id=chunk.chunk_id)
