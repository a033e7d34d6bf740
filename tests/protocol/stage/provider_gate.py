"""What stands before the provider: a dispatch waits there until the run says what is billed, or written first."""

import asyncio
import contextlib
import json
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import aiohttp
from aiohttp import web

from devstack.ports import LOOPBACK
from devstack.provider_stub.stream import text_delta
from tests.protocol.stage.wire import Letter, Wire

_CALL_ID = "x-tenantry-call-id"
_FIRST_TEXT, _END_OF_TEXT = "event: content_block_delta", "event: content_block_stop"


class ProviderGate:
    """Stands before the provider: a dispatch goes on when the run says what is billed, and its answer comes back when the run says so."""

    def __init__(self, wire: Wire, target: str) -> None:
        self._wire, self._target = wire, target
        self._session: aiohttp.ClientSession | None = None
        self.output_tokens: dict[str, int] = {}
        # What is written before the answer's end, by call; None ends it.
        self._written: dict[str, asyncio.Queue[str | None]] = {}
        # How every answer of a run begins: all ask the same.
        self._opening = ""

    def write(self, call_id: uuid.UUID, text: str) -> bool:
        """Has the provider write a part of its answer now, whatever it bills in the end. False for a call that it was not sent."""
        if (written := self._written.get(str(call_id))) is None:
            return False
        written.put_nowait(text)
        return True

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """Takes a request for the provider."""
        body, headers = await request.read(), {k: v for k, v in request.headers.items() if k.lower() not in ("host", "content-length")}
        call_id = request.headers.get(_CALL_ID, "")

        async def send() -> bytes:
            told = headers | _orders(self.output_tokens.get(call_id))
            assert self._session is not None
            async with self._session.request(request.method, f"{self._target}{request.path_qs}", data=body, headers=told) as answer:
                content = await answer.read()
                return json.dumps([answer.status, answer.headers["content-type"], content.decode()]).encode()

        if request.path != "/v1/messages" or self._wire.open:
            answer = await send()
            self._opening = self._opening or _text(answer).partition(_FIRST_TEXT)[0]
            return _response(answer)
        letter = Letter("dispatch", (uuid.UUID(call_id),), -1, "inference", send, reader=asyncio.get_running_loop().create_future())
        await self._wire.put(letter)
        assert letter.reader is not None
        written = self._written[call_id] = asyncio.Queue()
        letter.reader.add_done_callback(lambda _: written.put_nowait(None))
        begun = await self._begin(request, written)
        answer = await letter.reader
        if not isinstance(answer, bytes):
            raise web.HTTPInternalServerError
        if begun is None:
            return _response(answer)
        with contextlib.suppress(ConnectionError):
            # Its text is written already.
            await begun.write((_END_OF_TEXT + _text(answer).partition(_END_OF_TEXT)[2]).encode())
        return begun

    async def _begin(self, request: web.Request, written: "asyncio.Queue[str | None]") -> web.StreamResponse | None:
        """Writes what is written before the end, if anything is."""
        begun = None
        while (text := await written.get()) is not None:
            # Whoever asked may be dead by now: its run goes on.
            with contextlib.suppress(ConnectionError):
                if begun is None:
                    begun = web.StreamResponse(headers={"content-type": "text/event-stream"})
                    await begun.prepare(request)
                    await begun.write(self._opening.encode())
                await begun.write(text_delta(text))
        return begun

    @asynccontextmanager
    async def serving(self, port: int) -> AsyncIterator[None]:
        """Listens on a loopback port."""
        app = web.Application(client_max_size=1 << 24)
        app.router.add_route("*", "/{path:.*}", self.handle)
        runner = web.AppRunner(app, handler_cancellation=False, shutdown_timeout=0.1)
        await runner.setup()
        async with aiohttp.ClientSession() as self._session:
            await web.TCPSite(runner, LOOPBACK, port).start()
            try:
                yield
            finally:
                await runner.cleanup()


def _orders(output_tokens: int | None) -> dict[str, str]:
    if output_tokens is None:
        return {}
    # Of those who are told to write more than they may: the others do not pass it.
    return {"x-stub-output-tokens": str(output_tokens), "x-stub-ignore-max-tokens": "1"}


def _text(answer: bytes) -> str:
    content: str = json.loads(answer)[2]
    return content


def _response(answer: bytes) -> web.Response:
    status, content_type, content = json.loads(answer)
    return web.Response(status=status, body=content.encode(), headers={"content-type": content_type})
