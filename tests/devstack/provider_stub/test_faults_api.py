"""What the official client gets when the provider is told to fail, and what each failure is billed."""

import time
from collections.abc import Callable

import anthropic
import httpx2
import pytest
from anthropic import AsyncAnthropic
from anthropic.types import MessageParam

from tests.devstack.provider_stub.conftest import MODEL, Provider

Asking = Callable[[str], list[MessageParam]]


@pytest.mark.parametrize(
    ("status", "raised", "kind"),
    [
        (400, anthropic.BadRequestError, "invalid_request_error"),
        (401, anthropic.AuthenticationError, "authentication_error"),
        (403, anthropic.PermissionDeniedError, "permission_error"),
        (404, anthropic.NotFoundError, "not_found_error"),
        (413, anthropic.ContentTooLargeError, "request_too_large"),
        (429, anthropic.RateLimitError, "rate_limit_error"),
        (500, anthropic.InternalServerError, "api_error"),
        (529, anthropic.OverloadedError, "overloaded_error"),
    ],
)
async def test_each_ordered_error_raises_the_clients_own_and_bills_nothing(
    provider: Provider, client: AsyncAnthropic, asking: Asking, call_id: str, status: int, raised: type[anthropic.APIStatusError], kind: str
) -> None:
    """By directive and by header, plain and streamed: the same error, its type in the body, no line in the ledger."""
    directed, plain = asking(f"[[stub: error={status}]] Hi?"), asking("Hi?")
    named = {"x-tenantry-call-id": call_id}
    with pytest.raises(raised) as by_directive:
        await client.messages.create(model=MODEL, max_tokens=9, messages=directed, extra_headers=named)
    with pytest.raises(raised) as by_header:
        ordered = {**named, "x-stub-error": str(status)}
        await client.messages.create(model=MODEL, max_tokens=9, messages=plain, stream=True, extra_headers=ordered)
    assert by_directive.value.type == by_header.value.type == kind
    assert by_directive.value.request_id is not None
    assert provider.outcomes(call_id) == []


async def test_rate_limit_says_when_to_come_back(client: AsyncAnthropic, asking: Asking) -> None:
    """The retry-after header holds the seconds ordered."""
    with pytest.raises(anthropic.RateLimitError) as refused:
        await client.messages.create(model=MODEL, max_tokens=9, messages=asking("[[stub: error=429 retry_after=2]] Hi?"))
    assert refused.value.response.headers["retry-after"] == "2"


async def test_a_misspelt_order_is_refused(client: AsyncAnthropic, asking: Asking) -> None:
    """A fault that cannot happen must not look like a provider that works."""
    with pytest.raises(anthropic.BadRequestError, match="unknown order 'eror'"):
        await client.messages.create(model=MODEL, max_tokens=9, messages=asking("[[stub: eror=529]] Hi?"))


async def test_directive_is_not_part_of_the_question(client: AsyncAnthropic, asking: Asking) -> None:
    """What orders a fault is not answered to."""
    message = await client.messages.create(model=MODEL, max_tokens=99, messages=asking("What now? [[stub: latency_ms=1]]"))
    assert message.content[0].type == "text"
    assert message.content[0].text == "I have no documents to answer from. You asked: “What now?”"


async def test_overload_mid_stream_bills_the_tokens_sent(provider: Provider, client: AsyncAnthropic, asking: Asking, call_id: str) -> None:
    """After N tokens an error event ends the stream; the client raises overloaded with status 200; N tokens are billed."""
    messages, heard = asking("[[stub: overload_after=6 output_tokens=50]] Hi?"), ""
    with pytest.raises(anthropic.APIStatusError) as raised:
        async with client.messages.stream(
            model=MODEL, max_tokens=99, messages=messages, extra_headers={"x-tenantry-call-id": call_id}
        ) as stream:
            async for text in stream.text_stream:
                heard += text
    assert (raised.value.status_code, raised.value.type, len(heard)) == (200, "overloaded_error", 24)
    assert provider.outcomes(call_id) == ["started", "overloaded"]
    assert (await provider.entry(call_id, "overloaded"))["output_tokens"] == 6


async def test_cut_stream_bills_the_tokens_sent(provider: Provider, client: AsyncAnthropic, asking: Asking, call_id: str) -> None:
    """After N tokens the connection ends; the client raises a transport error; N tokens are billed."""
    messages, heard = asking("[[stub: cut_after=6 output_tokens=50]] Hi?"), ""
    with pytest.raises(httpx2.TransportError):
        async with client.messages.stream(
            model=MODEL, max_tokens=99, messages=messages, extra_headers={"x-tenantry-call-id": call_id}
        ) as stream:
            async for text in stream.text_stream:
                heard += text
    assert len(heard) == 24
    assert (await provider.entry(call_id, "cut"))["output_tokens"] == 6


async def test_cut_and_overload_reach_plain_calls_too(provider: Provider, client: AsyncAnthropic, asking: Asking, call_id: str) -> None:
    """A plain call gets no answer, and is billed what was generated for it."""
    named = {"x-tenantry-call-id": call_id}
    with pytest.raises(anthropic.APIConnectionError):
        await client.messages.create(model=MODEL, max_tokens=99, messages=asking("[[stub: cut_after=3]] Hi?"), extra_headers=named)
    with pytest.raises(anthropic.OverloadedError):
        await client.messages.create(model=MODEL, max_tokens=99, messages=asking("[[stub: overload_after=4]] Hi?"), extra_headers=named)
    assert provider.outcomes(call_id) == ["started", "cut", "started", "overloaded"]
    assert [line["output_tokens"] for line in provider.lines() if line["call_id"] == call_id] == [0, 3, 0, 4]


async def test_leaving_a_stream_stops_the_generation(provider: Provider, client: AsyncAnthropic, asking: Asking, call_id: str) -> None:
    """A client that hangs up is noticed at once; what was generated until then is billed and no more."""
    messages = asking("[[stub: token_ms=5 output_tokens=2000]] Hi?")
    async with client.messages.stream(
        model=MODEL, max_tokens=4000, messages=messages, extra_headers={"x-tenantry-call-id": call_id}
    ) as stream:
        heard = [await anext(stream.text_stream) for _ in range(3)]
    left = time.monotonic()
    billed = (await provider.entry(call_id, "cancelled"))["output_tokens"]
    assert time.monotonic() - left < 5
    assert isinstance(billed, int)
    assert len(heard) <= billed < 200


async def test_silent_stream_stays_open_until_the_client_leaves(
    provider: Provider, client: AsyncAnthropic, asking: Asking, call_id: str
) -> None:
    """A stalled stream ends by the client's own limit and bills the tokens before the silence."""
    messages = asking("[[stub: stall_after=4 output_tokens=50]] Hi?")
    impatient = client.with_options(timeout=httpx2.Timeout(5, read=0.2))
    with pytest.raises(httpx2.TransportError):
        async with impatient.messages.stream(
            model=MODEL, max_tokens=99, messages=messages, extra_headers={"x-tenantry-call-id": call_id}
        ) as stream:
            async for _ in stream:
                assert provider.outcomes(call_id) == ["started"]
    assert (await provider.entry(call_id, "cancelled"))["output_tokens"] == 4


async def test_call_abandoned_before_its_first_byte_is_billed_its_input(
    provider: Provider, client: AsyncAnthropic, asking: Asking, call_id: str
) -> None:
    """Generation had begun: the input is billed although the client got nothing."""
    with pytest.raises(anthropic.APITimeoutError):
        await client.with_options(timeout=0.2).messages.create(
            model=MODEL, max_tokens=9, messages=asking("[[stub: latency_ms=60000]] Hi?"), extra_headers={"x-tenantry-call-id": call_id}
        )
    billed = await provider.entry(call_id, "cancelled")
    assert billed["output_tokens"] == 0
    assert isinstance(billed["input_tokens"], int)
    assert billed["input_tokens"] > 0


async def test_latency_and_pace_are_kept(client: AsyncAnthropic, asking: Asking) -> None:
    """The first byte waits as long as ordered, and so does each token after it."""
    started = time.monotonic()
    message = await client.messages.create(
        model=MODEL, max_tokens=9, messages=asking("[[stub: latency_ms=80, token_ms=10, output_tokens=5]] Hi?")
    )
    assert time.monotonic() - started >= 0.13
    assert message.usage.output_tokens == 5


async def test_output_has_the_length_ordered(client: AsyncAnthropic, asking: Asking) -> None:
    """Filler is exact, obeys max_tokens, and passes it only when told to."""
    lengths = []
    for order in ("output_tokens=70", "output_tokens=170", "output_tokens=170 ignore_max_tokens"):
        message = await client.messages.create(model=MODEL, max_tokens=100, messages=asking(f"[[stub: {order}]] Hi?"))
        lengths.append((message.usage.output_tokens, message.stop_reason))
    assert lengths == [(70, "end_turn"), (100, "max_tokens"), (170, "end_turn")]
