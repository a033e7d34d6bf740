"""The provider adapter against exact bytes: what is read, and what each failure says about the bill."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from devstack.ports import free_port
from services.inference.adapters.anthropic import AnthropicProvider
from services.inference.adapters.server_sent_events import EventSplitter
from services.inference.call import Question, Received, RetrievalMode, Usage
from services.inference.models import describe
from services.inference.prompt_assembly import USER, AssembledPrompt, Turn
from services.inference.provider_failure import ProviderFailure
from services.inference.worst_case import Price
from services.kernel.ids import CallId, TenantId, new_uuid7
from services.kernel.tenant_context import TenantContext
from tests.inference.peers import HAIKU

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nrequest-id: req_1\r\nconnection: close\r\n\r\n"
START = (
    b'event: message_start\ndata: {"type":"message_start","message":{"id":"m","usage":{"input_tokens":10,"cache_read_input_tokens":3,'
    b'"cache_creation_input_tokens":9,"cache_creation":{"ephemeral_5m_input_tokens":4,"ephemeral_1h_input_tokens":5},"output_tokens":1}}}\n\n'
)
PING = b'event: ping\ndata: {"type": "ping"}\n\n'
DELTA = b'event: content_block_delta\ndata: {"type":"content_block_delta","index":0,"delta":{"type":"text_delta","text":"H\xc3\xa9"}}\n\n'
THINKING = (
    b'event: content_block_delta\ndata: {"type":"content_block_delta","index":0,"delta":{"type":"thinking_delta","thinking":"hm"}}\n\n'
)
END = (
    b'event: message_delta\ndata: {"type":"message_delta","delta":{"stop_reason":"end_turn"},"usage":{"output_tokens":7}}\n\n'
    b'event: message_stop\ndata: {"type":"message_stop"}\n\n'
)
OVERLOADED = b'event: error\ndata: {"type":"error","error":{"type":"overloaded_error","message":"Overloaded"}}\n\n'


@asynccontextmanager
async def answering(*writes: bytes) -> AsyncIterator[tuple[str, list[bytes]]]:
    """A server that reads one request, writes these bytes and hangs up; yields its URL and the requests."""
    requests: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = next(int(line.split(b":")[1]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length"))
        requests.append(head + await reader.readexactly(length))
        for data in writes:
            writer.write(data)
            await writer.drain()
            await asyncio.sleep(0.005)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", requests
    finally:
        server.close()
        await server.wait_closed()


def question(seconds: float = 5.0) -> Question:
    """Any question."""
    tenant_id = TenantId(new_uuid7())
    tenant = TenantContext(tenant_id, "free", "local", "key:1", frozenset(), 1, datetime.now(UTC), operator=False, token="t")
    return Question(
        call_id=CallId(new_uuid7()), tenant=tenant, tenant_id=tenant_id, messages=(Turn(USER, "Hi"),), model=describe(HAIKU),
        price=Price("v", 1, 1), max_output_tokens=10, context_tokens=1000, weight=1, feature="", user="", conversation_id="",
        retrieval=RetrievalMode.OFF, top_k=0, stop_sequences=(), deadline=time.monotonic() + seconds,
    )  # fmt: skip


async def ask(url: str, *, header: str = "", seconds: float = 5.0) -> tuple[Received, ProviderFailure | None]:
    """Asks once and returns what was received and how it failed."""
    provider = AnthropicProvider(base_url=url, api_key="k", call_id_header=header, max_connections=4)
    received, failure = Received(), None
    prompt = AssembledPrompt("Be brief.", (Turn(USER, "Hi"),), (), 100)
    try:
        async for _ in provider.stream(question(seconds), prompt, 10, received):
            pass
    except ProviderFailure as error:
        failure = error
    finally:
        await provider.close()
    return received, failure


async def test_usage_is_exact_in_every_class() -> None:
    """Input and cache classes come from the start of the message, output from its end; thinking is no text."""
    async with answering(HEAD, START, PING, THINKING, DELTA, END) as (url, _):
        received, failure = await ask(url)
    assert failure is None
    assert received.usage == Usage(10, 7, cache_read_tokens=3, cache_write_5m_tokens=4, cache_write_1h_tokens=5)
    assert (received.text, received.stop_reason, received.complete, received.provider_request_id) == ("Hé", "end_turn", True, "req_1")
    # "hm" was thought and "Hé" said: both were written, and the final usage is the count of all that.
    assert (received.output_bytes, received.counted_bytes, received.counted_tokens) == (5, 5, 7)


@pytest.mark.parametrize("count", ["200000000", "-1", "1.5", '"7"', "true"])
async def test_a_count_that_is_none_is_never_billed(count: str) -> None:
    """Usage no ledger could take makes the call unresolved: what is not known is not guessed."""
    end = END.replace(b'"output_tokens":7', f'"output_tokens":{count}'.encode())
    async with answering(HEAD, START, DELTA, end) as (url, _):
        received, failure = await ask(url)
    assert failure is not None
    assert (failure.cause, failure.unbilled, received.complete) == ("malformed_event", False, False)


async def test_no_header_names_the_call_unless_configured() -> None:
    """The call id leaves the mesh only in the configured header."""
    async with answering(HEAD, START, END) as (url, requests):
        await ask(url)
        await ask(url, header="x-call")
    assert b"x-call" not in requests[0].lower()
    assert b"x-call: " in requests[1].lower()


FAILURES: list[tuple[str, Sequence[bytes], bool, bool, str]] = [
    ("closed without a response", (), False, False, "provider_unreachable"),
    ("broken response head", (b"nonsense\r\n\r\n",), False, False, "provider_unreachable"),
    ("cut after the head", (HEAD,), True, False, "cut"),
    ("cut after the start", (HEAD, START), True, False, "cut"),
    ("cut in the text", (HEAD, START, DELTA, DELTA[:40]), True, False, "cut"),
    ("overloaded in the text", (HEAD, START, DELTA, OVERLOADED), True, False, "midstream_overloaded_error"),
    ("not JSON", (HEAD, START, b"event: x\ndata: {oops\n\n"), True, False, "malformed_event"),
    ("server error", (b"HTTP/1.1 503 No\r\ncontent-length: 0\r\nconnection: close\r\n\r\n",), False, False, "provider_503"),
    ("redirect", (b"HTTP/1.1 307 Go\r\nlocation: /x\r\ncontent-length: 0\r\nconnection: close\r\n\r\n",), False, False, "provider_307"),
    ("overloaded", (b"HTTP/1.1 529 No\r\ncontent-length: 0\r\nconnection: close\r\n\r\n",), False, True, "provider_529"),
]


@pytest.mark.parametrize(("name", "writes", "accepted", "unbilled", "cause"), FAILURES, ids=[case[0] for case in FAILURES])
async def test_only_what_is_certainly_unbilled_counts_as_unbilled(
    name: str, writes: Sequence[bytes], accepted: bool, unbilled: bool, cause: str
) -> None:
    """Each failure after the request left is taken as possibly billed, except the refusals the provider makes before it works."""
    async with answering(*writes) as (url, requests):
        received, failure = await ask(url)
    assert failure is not None
    assert (failure.accepted, failure.unbilled, failure.cause) == (accepted, unbilled, cause)
    assert not received.complete
    assert len(requests) == 1


async def test_a_refused_connection_is_unbilled() -> None:
    """A request that never left is certainly not billed."""
    _, failure = await ask(f"http://127.0.0.1:{free_port()}")
    assert failure is not None
    assert (failure.unbilled, failure.unsent) == (True, True)


async def test_a_silent_provider_may_have_billed() -> None:
    """No answer within the deadline leaves the bill unknown."""

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    server = await asyncio.start_server(silent, "127.0.0.1", 0)
    _, failure = await ask(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", seconds=0.2)
    server.close()
    await server.wait_closed()
    assert failure is not None
    assert not failure.unbilled


events = st.lists(st.text(st.characters(blacklist_categories=("Cs",), blacklist_characters="\r\n"), min_size=1), max_size=5)


@given(events, st.sampled_from((b"\n", b"\r\n", b"\r")), st.data())
def test_events_are_the_same_however_the_bytes_are_cut(texts: list[str], newline: bytes, data: Any) -> None:
    """Any line ending and any division of the stream into reads gives the same events."""
    stream = b"".join(b"event: x" + newline + b": note" + newline + b"data: " + text.encode() + newline * 2 for text in texts)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=8)))
    splitter = EventSplitter()
    found = [event for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True) for event in splitter.feed(stream[start:end])]
    # A lone carriage return at the end may be half a pair: only more bytes can tell.
    found += list(splitter.feed(b": end\n\n"))
    assert found == [text.encode() for text in texts]
