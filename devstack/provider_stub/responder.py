"""Sends an answer, plain or as events, at the ordered pace and with the ordered end, and bills it.

The ledger is told before the client: the started line is on disk before the first byte, the ending before the final event.
"""

import asyncio
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass

from aiohttp import web

from devstack.provider_stub import stream, tokens
from devstack.provider_stub.billed_call import BilledCall
from devstack.provider_stub.errors import ApiError
from devstack.provider_stub.faults import Ending, Faults
from devstack.provider_stub.generation import Generation

TOKENS_PER_DELTA = 4
DELTAS_PER_WRITE = 16
EVENT_HEADERS = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache"}


@dataclass(frozen=True, slots=True)
class Reply:
    """All that is needed to answer one call."""

    call: BilledCall
    generation: Generation
    faults: Faults

    @property
    def message_id(self) -> str:
        """The message's id, told apart from the request's by its prefix alone."""
        return self.call.identity.request_id.replace("req_", "msg_", 1)

    @property
    def headers(self) -> Mapping[str, str]:
        """What every response to the call carries."""
        return {"request-id": self.call.identity.request_id}


async def respond(request: web.BaseRequest, reply: Reply, *, streaming: bool) -> web.StreamResponse:
    """Answer the call; whatever stops it on the way is recorded as its ending.

    Raises: ApiError 529 for a plain call ordered to be overloaded.
    """
    call = reply.call
    call.start()
    try:
        return await (_events(request, reply) if streaming else _plain(request, reply))
    except (asyncio.CancelledError, ConnectionError):
        _, token_count = reply.faults.ending(reply.generation.token_count)
        call.generated_tokens += reply.faults.written_unnoticed(token_count - call.generated_tokens)
        call.end("cancelled")
        raise
    except ApiError:
        raise
    except Exception:
        call.end("error")
        raise


async def _plain(request: web.BaseRequest, reply: Reply) -> web.StreamResponse:
    call, generation, faults = reply.call, reply.generation, reply.faults
    ending, token_count = faults.ending(generation.token_count)
    if faults.latency_ms or faults.token_ms:
        await call.durable()
        await asyncio.sleep(faults.latency_ms / 1000)
        while faults.token_ms and call.generated_tokens < token_count:
            await asyncio.sleep(faults.token_ms / 1000)
            call.generated_tokens += 1
    call.generated_tokens = token_count
    await _finish(call, ending)
    if ending is Ending.OVERLOADED:
        raise ApiError(529)
    response = web.Response(
        body=stream.plain_body(reply.message_id, call.identity.model, call.usage, generation),
        headers=reply.headers,
        content_type="application/json",
    )
    if ending is Ending.CUT:
        _hang_up(request)
    return response


async def _events(request: web.BaseRequest, reply: Reply) -> web.StreamResponse:
    call, generation = reply.call, reply.generation
    ending, token_count = reply.faults.ending(generation.token_count)
    await call.durable()
    await asyncio.sleep(reply.faults.latency_ms / 1000)
    response = web.StreamResponse(headers={**EVENT_HEADERS, **reply.headers})
    await response.prepare(request)
    opening = stream.opening(reply.message_id, call.identity.model, call.usage)
    async for events in _paced(reply, token_count):
        await response.write(opening + events)
        opening = b""
    if opening:
        await response.write(opening)
    await _finish(call, ending)
    if ending is Ending.OVERLOADED:
        await response.write_eof(stream.error_event(529, call.identity.request_id))
    elif ending is Ending.CUT:
        _hang_up(request)
    else:
        await response.write_eof(stream.BLOCK_STOP + stream.closing(call.usage, generation))
    return response


async def _paced(reply: Reply, token_count: int) -> AsyncIterator[bytes]:
    """Yield what to write next and counts its tokens as generated: one at a time when paced, else a few deltas at once."""
    pause_seconds = reply.faults.token_ms / 1000
    size, step = (1, 1) if pause_seconds else (TOKENS_PER_DELTA, TOKENS_PER_DELTA * DELTAS_PER_WRITE)
    parts = tokens.pieces(reply.generation.text)[:token_count]
    for start in range(0, len(parts), step):
        # Also without a pause: the loop has to turn for a client that left to be noticed.
        if start or pause_seconds:
            await asyncio.sleep(pause_seconds)
        written = parts[start : start + step]
        reply.call.generated_tokens += len(written)
        yield b"".join(stream.text_delta("".join(written[at : at + size])) for at in range(0, len(written), size))


async def _finish(call: BilledCall, ending: Ending) -> None:
    if ending is Ending.STALLED:
        await asyncio.Event().wait()
    call.end(ending.value)
    await call.durable()


def _hang_up(request: web.BaseRequest) -> None:
    if request.transport is not None:
        request.transport.close()
