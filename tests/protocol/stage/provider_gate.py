"""What stands before the provider: a dispatch waits there until the run says what is billed."""

import asyncio
import json
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import aiohttp
from aiohttp import web

from devstack.ports import LOOPBACK
from tests.protocol.stage.wire import Letter, Wire

_CALL_ID = "x-tenantry-call-id"


class ProviderGate:
    """Stands before the provider: a dispatch goes on when the run says what is billed, and its answer comes back when the run says so."""

    def __init__(self, wire: Wire, target: str) -> None:
        self._wire, self._target = wire, target
        self._session: aiohttp.ClientSession | None = None
        self.output_tokens: dict[str, int] = {}

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """Takes a request for the provider."""
        body, headers = await request.read(), {k: v for k, v in request.headers.items() if k.lower() not in ("host", "content-length")}
        call_id = request.headers.get(_CALL_ID, "")

        async def send() -> bytes:
            told = headers | ({"x-stub-output-tokens": str(self.output_tokens[call_id])} if call_id in self.output_tokens else {})
            assert self._session is not None
            async with self._session.request(request.method, f"{self._target}{request.path_qs}", data=body, headers=told) as answer:
                content = await answer.read()
                return json.dumps([answer.status, answer.headers["content-type"], content.decode()]).encode()

        if request.path != "/v1/messages" or self._wire.open:
            return _response(await send())
        letter = Letter("dispatch", (uuid.UUID(call_id),), -1, "inference", send, reader=asyncio.get_running_loop().create_future())
        await self._wire.put(letter)
        assert letter.reader is not None
        answer = await letter.reader
        if not isinstance(answer, bytes):
            raise web.HTTPInternalServerError
        return _response(answer)

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


def _response(answer: bytes) -> web.Response:
    status, content_type, content = json.loads(answer)
    return web.Response(status=status, body=content.encode(), headers={"content-type": content_type})
