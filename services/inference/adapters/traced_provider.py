"""The provider port with a CLIENT span around each attempt, by the GenAI conventions. No prompt, no answer, no secret in it."""

from collections.abc import AsyncGenerator
from contextlib import aclosing

from opentelemetry.trace import Span, SpanKind, Status, StatusCode

from services.inference.call import Question, Received
from services.inference.models import PROVIDER
from services.inference.ports import Provider
from services.inference.prompt_assembly import AssembledPrompt
from services.inference.provider_failure import ProviderFailure
from services.kernel.telemetry import names
from services.kernel.telemetry.tracing import is_recording, tracer

OPERATION = "chat"


class TracedProvider:
    """Traces another provider."""

    def __init__(self, inner: Provider) -> None:
        self._inner = inner

    def stream(self, question: Question, prompt: AssembledPrompt, max_output_tokens: int, received: Received) -> AsyncGenerator[str, None]:
        """Streams as the other does; without an exporter it costs nothing."""
        if not is_recording():
            return self._inner.stream(question, prompt, max_output_tokens, received)
        return self._traced(question, prompt, max_output_tokens, received)

    async def _traced(
        self, question: Question, prompt: AssembledPrompt, max_output_tokens: int, received: Received
    ) -> AsyncGenerator[str, None]:
        span = tracer().start_span(f"{OPERATION} {question.model.name}", kind=SpanKind.CLIENT, attributes=_attributes(question))
        try:
            async with aclosing(self._inner.stream(question, prompt, max_output_tokens, received)) as pieces:
                async for piece in pieces:
                    yield piece
        except ProviderFailure as failure:
            span.set_attribute(names.ERROR_TYPE, failure.cause)
            span.set_status(Status(StatusCode.ERROR))
            raise
        finally:
            _end(span, received)


def _attributes(question: Question) -> dict[str, str]:
    return {
        names.OPERATION: OPERATION,
        names.PROVIDER: PROVIDER,
        names.MODEL: question.model.name,
        names.CALL_ID: str(question.call_id),
        names.TENANT_ID: str(question.tenant_id),
        names.TENANT_TIER: question.tenant.tier,
    }


def _end(span: Span, received: Received) -> None:
    if received.complete:
        span.set_attribute(names.INPUT_TOKENS, received.usage.input_tokens)
        span.set_attribute(names.OUTPUT_TOKENS, received.usage.output_tokens)
    span.end()
