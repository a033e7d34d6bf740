"""What the official client gets from the Messages API when nothing goes wrong, or when the request itself is wrong."""

from collections.abc import Callable

import anthropic
import httpx
import pytest
from anthropic import AsyncAnthropic
from anthropic.types import MessageParam

from devstack.provider_stub.tokens import count_text
from tests.devstack.provider_stub.conftest import API_KEY, MODEL, Provider

Asking = Callable[[str], list[MessageParam]]
TEA = '<documents><document id="1" title="Tea times">Green tea is served at four.</document></documents>\nWhen is green tea served?'
COFFEE = '<documents><document id="1" title="Coffee">Green tea is never served here.</document></documents>\nWhen is green tea served?'
ANSWER = "According to [Tea times]: Green tea is served at four."
HEADERS = {"x-api-key": API_KEY, "anthropic-version": "2023-06-01", "content-type": "application/json"}


async def test_plain_answer_comes_from_the_documents_given(client: AsyncAnthropic, asking: Asking) -> None:
    """The answer quotes the document of this request and no other, and its usage is what the rule counts."""
    message = await client.messages.create(model=MODEL, max_tokens=200, messages=asking(TEA))
    other = await client.messages.create(model=MODEL, max_tokens=200, messages=asking(COFFEE))
    assert [block.text for block in message.content if block.type == "text"] == [ANSWER]
    assert [block.text for block in other.content if block.type == "text"] == ["According to [Coffee]: Green tea is never served here."]
    assert (message.stop_reason, message.stop_sequence, message.model, message.role) == ("end_turn", None, MODEL, "assistant")
    assert message.usage.output_tokens == count_text(ANSWER)
    assert message.id.startswith("msg_")
    assert message._request_id is not None
    assert message._request_id.startswith("req_")


async def test_conversation_is_remembered(client: AsyncAnthropic) -> None:
    """Without documents the earlier turns answer."""
    turns: list[MessageParam] = [
        {"role": "user", "content": "My cat is called Mia."},
        {"role": "assistant", "content": "Noted."},
        {"role": "user", "content": "What is my cat called?"},
    ]
    message = await client.messages.create(model=MODEL, max_tokens=200, messages=turns)
    assert message.content[0].type == "text"
    assert message.content[0].text == "I have no documents to answer from. Earlier you said: My cat is called Mia."


async def test_stream_has_the_events_of_the_real_one_in_its_order(client: AsyncAnthropic, asking: Asking) -> None:
    """Start, block start, deltas, block stop, message delta, stop; the text and usage of the plain answer."""
    stream = await client.messages.create(model=MODEL, max_tokens=200, messages=asking(TEA), stream=True)
    events = [event async for event in stream]
    kinds = [event.type for event in events]
    deltas = kinds.count("content_block_delta")
    opening, closing = ["message_start", "content_block_start"], ["content_block_stop", "message_delta", "message_stop"]
    assert kinds == [*opening, *["content_block_delta"] * deltas, *closing]
    assert deltas > 1
    started, ended = events[0], events[-2]
    assert started.type == "message_start"
    assert ended.type == "message_delta"
    assert (started.message.usage.output_tokens, started.message.stop_reason, started.message.content) == (1, None, [])
    assert (ended.usage.output_tokens, ended.delta.stop_reason) == (count_text(ANSWER), "end_turn")
    assert ended.usage.input_tokens == started.message.usage.input_tokens


async def test_a_ping_follows_the_start_of_the_block(provider: Provider, asking: Asking) -> None:
    """On the wire every event names its type twice, and the ping stands where the real API puts it."""
    body = {"model": MODEL, "max_tokens": 9, "stream": True, "messages": asking("Hello?")}
    async with httpx.AsyncClient() as http:
        response = await http.post(f"{provider.url}/v1/messages", json=body, headers=HEADERS)
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    named = [line.removeprefix("event: ") for line in response.text.splitlines() if line.startswith("event: ")]
    assert named[:4] == ["message_start", "content_block_start", "ping", "content_block_delta"]


async def test_streaming_helper_gathers_the_same_message(client: AsyncAnthropic, asking: Asking) -> None:
    """The client's own accumulator ends with the plain answer."""
    async with client.messages.stream(model=MODEL, max_tokens=200, messages=asking(TEA)) as stream:
        assert "".join([text async for text in stream.text_stream]) == ANSWER
        message = await stream.get_final_message()
    plain = await client.messages.create(model=MODEL, max_tokens=200, messages=asking(TEA))
    assert message.usage.output_tokens == plain.usage.output_tokens
    assert message.usage.input_tokens == plain.usage.input_tokens


async def test_count_is_what_the_call_then_costs(client: AsyncAnthropic, asking: Asking) -> None:
    """Counting first and calling then give the same input tokens."""
    system = "You are a careful librarian."
    counted = await client.messages.count_tokens(model=MODEL, system=system, messages=asking(TEA))
    message = await client.messages.create(model=MODEL, max_tokens=20, system=system, messages=asking(TEA))
    assert counted.input_tokens == message.usage.input_tokens == 8 + 4 + count_text(system) + count_text(TEA)


async def test_answer_ends_at_max_tokens(client: AsyncAnthropic, asking: Asking) -> None:
    """A shorter limit cuts the answer there and says so, plain and streamed alike."""
    message = await client.messages.create(model=MODEL, max_tokens=5, messages=asking(TEA))
    async with client.messages.stream(model=MODEL, max_tokens=5, messages=asking(TEA)) as stream:
        streamed = await stream.get_final_message()
    for cut in (message, streamed):
        assert (cut.stop_reason, cut.usage.output_tokens) == ("max_tokens", 5)
        assert cut.content[0].type == "text"
        assert cut.content[0].text == ANSWER[:20]


async def test_answer_ends_before_a_stop_sequence(client: AsyncAnthropic, asking: Asking) -> None:
    """The first stop sequence that would appear ends the answer and is named."""
    message = await client.messages.create(model=MODEL, max_tokens=99, stop_sequences=["four", " served"], messages=asking(TEA))
    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", " served")
    assert message.content[0].type == "text"
    assert message.content[0].text == "According to [Tea times]: Green tea is"


async def test_cached_prefix_is_written_then_read(client: AsyncAnthropic, asking: Asking, call_id: str) -> None:
    """The client sees the prefix billed as a write the first time and as a read the second, and input without it."""
    system: list[anthropic.types.TextBlockParam] = [{"type": "text", "text": call_id * 20, "cache_control": {"type": "ephemeral"}}]
    usages = [(await client.messages.create(model=MODEL, max_tokens=9, system=system, messages=asking("Hi?"))).usage for _ in range(2)]
    seen = [(usage.cache_creation_input_tokens, usage.cache_read_input_tokens, usage.input_tokens) for usage in usages]
    assert seen == [(180, 0, 13), (0, 180, 13)]
    assert usages[0].cache_creation is not None
    assert (usages[0].cache_creation.ephemeral_5m_input_tokens, usages[0].cache_creation.ephemeral_1h_input_tokens) == (180, 0)


async def test_models_are_listed_page_by_page(client: AsyncAnthropic) -> None:
    """The client's own pagination finds every model once; one model can be asked for."""
    listed = [model.id async for model in client.models.list(limit=3)]
    assert listed == ["claude-sonnet-4-6", "claude-opus-4-6", "claude-haiku-4-5-20251001", "claude-haiku-4-5"]
    assert (await client.models.retrieve("claude-opus-4-6")).line == "opus"


@pytest.mark.parametrize(
    ("body", "status", "kind", "message"),
    [
        (b"{", 400, "invalid_request_error", "not valid JSON"),
        (
            b'{"model":"claude-haiku-4-5","messages":[{"role":"user","content":"x"}]}',
            400,
            "invalid_request_error",
            "max_tokens: Field required",
        ),
        (
            b'{"model":"claude-haiku-4-5","max_tokens":0,"messages":[{"role":"user","content":"x"}]}',
            400,
            "invalid_request_error",
            "max_tokens: ",
        ),
        (b'{"model":"claude-haiku-4-5","max_tokens":1,"messages":[]}', 400, "invalid_request_error", "at least one message"),
        (b'{"model":"claude-haiku-4-5","max_tokens":1,"messages":[{"role":"x","content":"x"}]}', 400, "invalid_request_error", 'role "x"'),
        (
            b'{"model":"claude-haiku-4-5","max_tokens":1,"messages":[{"role":"user","content":""}]}',
            400,
            "invalid_request_error",
            "non-empty",
        ),
        (b'{"model":"claude-haiku-4-5","max_tokens":1,"messages":[],"color":1}', 400, "invalid_request_error", "color: Extra inputs"),
        (b'{"model":"claude-0","max_tokens":1,"messages":[{"role":"user","content":"x"}]}', 404, "not_found_error", "model: claude-0"),
        (
            b'{"model":"claude-haiku-4-5","max_tokens":64001,"messages":[{"role":"user","content":"x"}]}',
            400,
            "invalid_request_error",
            "64001 >",
        ),
        (
            b'{"model":"claude-opus-4-6","max_tokens":1,"messages":[{"role":"user","content":"x"},{"role":"assistant","content":"y"}]}',
            400,
            "invalid_request_error",
            "prefill",
        ),
    ],
)
async def test_a_wrong_request_is_refused_in_the_shape_of_the_real_api(
    provider: Provider, body: bytes, status: int, kind: str, message: str
) -> None:
    """Every refusal names its type, says what is wrong, and carries the request id of its header."""
    async with httpx.AsyncClient() as http:
        response = await http.post(f"{provider.url}/v1/messages", content=body, headers=HEADERS)
    refused = response.json()
    assert (response.status_code, refused["type"], refused["error"]["type"]) == (status, "error", kind)
    assert message in refused["error"]["message"]
    assert refused["request_id"] == response.headers["request-id"]


async def test_more_than_four_cache_marks_are_refused(client: AsyncAnthropic, asking: Asking) -> None:
    """Five breakpoints are one too many."""
    block: anthropic.types.TextBlockParam = {"type": "text", "text": "x", "cache_control": {"type": "ephemeral"}}
    with pytest.raises(anthropic.BadRequestError, match="maximum of 4 blocks"):
        await client.messages.create(model=MODEL, max_tokens=9, system=[block] * 5, messages=asking("Hi?"))


async def test_a_body_over_32_megabytes_is_refused(provider: Provider) -> None:
    """The size alone refuses it; nothing of it is read as a request."""
    async with httpx.AsyncClient() as http:
        response = await http.post(f"{provider.url}/v1/messages", content=b" " * (32 * 1024 * 1024 + 1), headers=HEADERS)
    assert (response.status_code, response.json()["error"]["type"]) == (413, "request_too_large")


@pytest.mark.parametrize("headers", [{}, {"x-api-key": "wrong"}, {"authorization": "Bearer wrong"}])
async def test_without_the_right_key_nothing_answers(provider: Provider, headers: dict[str, str]) -> None:
    """Every route wants the key, and the body is the real API's 401."""
    async with httpx.AsyncClient() as http:
        for path in ("/v1/models", "/stub/ledger", "/stub/requests"):
            response = await http.get(provider.url + path, headers=headers)
            assert (response.status_code, response.json()["error"]["type"]) == (401, "authentication_error")


async def test_client_with_a_wrong_key_gets_its_authentication_error(provider: Provider, asking: Asking) -> None:
    """The official client raises what it raises against the real API."""
    async with AsyncAnthropic(api_key="wrong", base_url=provider.url, max_retries=0) as stranger:
        with pytest.raises(anthropic.AuthenticationError):
            await stranger.messages.create(model=MODEL, max_tokens=9, messages=asking("Hi?"))


async def test_requests_received_are_shown_without_their_keys(
    provider: Provider, client: AsyncAnthropic, asking: Asking, call_id: str
) -> None:
    """A test can see exactly what left the product; the ring can be emptied."""
    await client.messages.create(
        model=MODEL, max_tokens=9, messages=asking(f"Hi {call_id}?"), extra_headers={"x-tenantry-call-id": call_id}
    )
    (received,) = await provider.ask("GET", "/stub/requests?n=1")
    assert received["body"] == {"max_tokens": 9, "messages": asking(f"Hi {call_id}?"), "model": MODEL}
    assert isinstance(received["headers"], dict)
    assert received["headers"]["x-tenantry-call-id"] == call_id
    assert API_KEY not in str(received)
    await provider.ask("DELETE", "/stub/requests")
    assert await provider.ask("GET", "/stub/requests") == []
