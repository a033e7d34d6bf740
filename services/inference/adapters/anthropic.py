"""The provider port over the Anthropic SDK: one client an endpoint, one attempt a call, always streamed, events read without its models.

The key is the request's: a tenant's own, or the house's. One client for all of them, so that tenants' keys make no pools of connections.

Never retries, never sends trace context or tenant ids to the provider; an own header carries the call id only where one is configured.
"""

import logging
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from time import monotonic
from typing import Any, cast

import aiohttp
import anthropic
import httpx2
import orjson

from services.inference.adapters.endpoint_clients import EndpointClients, key_headers
from services.inference.adapters.server_sent_events import EventSplitter
from services.inference.call import Question, Received, Usage
from services.inference.prompt_assembly import AssembledPrompt
from services.inference.provider_failure import ProviderFailure
from services.inference.worst_case import text_bytes
from services.kernel.ids import TenantId

_CONNECT_SECONDS = 5.0
_MAX_STOP_REASON_LENGTH = 100
_MOST_TOKENS = 100_000_000
_MAX_REQUEST_ID_LENGTH = 200


class AnthropicProvider:
    """Streams answers from Anthropic's Messages API, or from anything that speaks it."""

    def __init__(
        self,
        *,
        base_url: str,
        api_key: str,
        call_id_header: str,
        max_connections: int,
        own_key_refused: Callable[[TenantId], None] = lambda _: None,
    ) -> None:
        # One line a request from each of them says nothing that the call's own record does not.
        for library in ("anthropic", "httpx2"):
            logging.getLogger(library).setLevel(logging.WARNING)
        self._call_id_header = call_id_header
        self.clients = EndpointClients(base_url=base_url, api_key=api_key, max_connections=max_connections)
        self._own_key_refused = own_key_refused

    async def close(self) -> None:
        """Closes the clients' connections."""
        await self.clients.close()

    async def stream(
        self, question: Question, prompt: AssembledPrompt, max_output_tokens: int, received: Received
    ) -> AsyncGenerator[str, None]:
        """Sends the request and yields the answer's text, one piece a network read; `received` is kept up to date.

        Raises: ProviderFailure.
        """
        body = _body(question, prompt, max_output_tokens)
        async with self.clients.lend(question.endpoint) as client, aclosing(self._stream(client, question, body, received)) as texts:
            async for text in texts:
                yield text

    async def _stream(
        self, client: anthropic.AsyncAnthropic, question: Question, body: dict[str, object], received: Received
    ) -> AsyncGenerator[str, None]:
        accepted = False
        try:
            response = await self._send(client, question, body)
            accepted = True
            try:
                received.provider_request_id = response.headers.get("request-id", "")[:_MAX_REQUEST_ID_LENGTH]
                async with aclosing(_texts(response, received)) as texts:
                    async for text in texts:
                        yield text
            finally:
                await response.aclose()
        except (TimeoutError, anthropic.AnthropicError, httpx2.HTTPError, aiohttp.ClientError, OSError) as error:
            failure = _failure(error, accepted=accepted, own_key=bool(question.provider_key))
            if failure.own_key and failure.key_refused:
                self._own_key_refused(question.tenant_id)
            raise failure from error

    async def _send(self, client: anthropic.AsyncAnthropic, question: Question, body: dict[str, object]) -> httpx2.Response:
        # The client's generic post: the typed method builds and checks models of a request that is exact already, at a quarter of the cost.
        remaining = max(question.remaining_seconds(), 0.001)
        timeout = httpx2.Timeout(remaining, connect=min(remaining, _CONNECT_SECONDS))
        headers: dict[str, str | anthropic.Omit] = {self._call_id_header: str(question.call_id)} if self._call_id_header else {}
        response = await client.post(
            "/v1/messages",
            cast_to=httpx2.Response,
            body=body,
            options={"timeout": timeout, "headers": headers | key_headers(question.provider_key)},
            stream=True,
            stream_cls=anthropic.AsyncStream[object],
        )
        # `cast_to` wins over `stream_cls`: what comes back is the response itself, its body unread.
        return cast("httpx2.Response", response)


def _body(question: Question, prompt: AssembledPrompt, max_output_tokens: int) -> dict[str, object]:
    body: dict[str, object] = {
        "model": question.model.name,
        "max_tokens": max_output_tokens,
        "system": prompt.system,
        "messages": [{"role": turn.role, "content": turn.text} for turn in prompt.messages],
        "stream": True,
    }
    if question.stop_sequences:
        body["stop_sequences"] = list(question.stop_sequences)
    return body


async def _texts(response: httpx2.Response, received: Received) -> AsyncGenerator[str, None]:
    splitter = EventSplitter()
    async for chunk in response.aiter_bytes():
        before = received.output_bytes
        try:
            text = "".join([_take(orjson.loads(data), received) for data in splitter.feed(chunk)])
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise ProviderFailure("malformed_event", accepted=True) from error
        if text:
            if received.first_token_time is None:
                received.first_token_time = monotonic()
            received.parts.append(text)
        if received.output_bytes > before:
            yield text
    if not received.complete:
        raise ProviderFailure("cut", accepted=True)


def _take(event: dict[str, Any], received: Received) -> str:
    """Takes one event in and returns the text it adds."""
    match event.get("type"):
        case "content_block_delta":
            delta = event["delta"]
            # Whatever it writes, it bills.
            received.output_bytes += sum([text_bytes(part) for name, part in delta.items() if name != "type" and isinstance(part, str)])
            return delta["text"] if delta.get("type") == "text_delta" else ""
        case "message_start":
            _take_usage(event["message"].get("usage") or {}, received)
        case "message_delta":
            _take_usage(event.get("usage") or {}, received)
            stop_reason = event["delta"].get("stop_reason")
            if stop_reason:
                received.stop_reason, received.complete = str(stop_reason).replace("\x00", "")[:_MAX_STOP_REASON_LENGTH], True
        case "error":
            kind = (event.get("error") or {}).get("type", "error")
            raise ProviderFailure(f"midstream_{kind}"[:_MAX_STOP_REASON_LENGTH], accepted=True)
    return ""


def _take_usage(reported: dict[str, Any], received: Received) -> None:
    received.usage = _usage(reported, received.usage)
    received.counted_tokens, received.counted_bytes = received.usage.output_tokens, received.output_bytes


def _usage(reported: dict[str, Any], before: Usage) -> Usage:
    # Counts are cumulative, and a later event repeats only some of them.
    by_age = reported.get("cache_creation") or {}
    written = reported.get("cache_creation_input_tokens")
    one_hour = by_age.get("ephemeral_1h_input_tokens")
    five_minutes = by_age.get("ephemeral_5m_input_tokens")
    cache_write_1h = before.cache_write_1h_tokens if one_hour is None else one_hour
    if five_minutes is None:
        five_minutes = before.cache_write_5m_tokens if written is None else max(0, written - cache_write_1h)
    return Usage(
        input_tokens=_count(_or(reported.get("input_tokens"), before.input_tokens)),
        output_tokens=_count(_or(reported.get("output_tokens"), before.output_tokens)),
        cache_read_tokens=_count(_or(reported.get("cache_read_input_tokens"), before.cache_read_tokens)),
        cache_write_5m_tokens=_count(five_minutes),
        cache_write_1h_tokens=_count(cache_write_1h),
    )


def _count(reported: object) -> int:
    # What no ledger could take is no usage: the call is listed as unresolved instead of billed by it.
    if type(reported) is not int or not 0 <= reported <= _MOST_TOKENS:
        msg = "a token count is not one"
        raise ValueError(msg)
    return reported


def _or(reported: int | None, before: int) -> int:
    return before if reported is None else reported


def _failure(error: BaseException, *, accepted: bool, own_key: bool) -> ProviderFailure:
    if accepted:
        return ProviderFailure("cut", accepted=True, own_key=own_key)
    if isinstance(error, anthropic.APIStatusError):
        status = error.status_code
        retry_after = _retry_after(error.response.headers)
        return ProviderFailure(f"provider_{status}", http_status=status, retry_after_seconds=retry_after, own_key=own_key)
    return ProviderFailure("provider_unreachable", unsent=_never_sent(error), own_key=own_key)


def _never_sent(error: BaseException | None) -> bool:
    # The transport calls every lost connection a connect error; only the cause tells whether a connection was ever made.
    while error is not None:
        if isinstance(error, (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError)):
            return True
        error = error.__cause__
    return False


def _retry_after(headers: httpx2.Headers) -> float | None:
    try:
        return max(0.0, float(headers["retry-after"]))
    except (KeyError, ValueError):
        return None
