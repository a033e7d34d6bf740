"""The provider over HTTP: who may call, which route answers, and the error body of everything that goes wrong.

On aiohttp's plain server rather than its application: six routes need no router, and a call costs a third less.
"""

import asyncio
import hashlib
import logging
import os
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import replace
from datetime import UTC, datetime

import orjson
from aiohttp import web
from aiohttp.abc import AbstractStreamWriter
from aiohttp.http_parser import RawRequestMessage
from aiohttp.streams import StreamReader
from aiohttp.web_protocol import RequestHandler

from devstack.provider_stub import faults, ledger_pages, messages, models
from devstack.provider_stub.answer import Prompt
from devstack.provider_stub.billed_call import BilledCall, CallIdentity
from devstack.provider_stub.cache import PromptCache
from devstack.provider_stub.errors import ApiError, error_body, invalid
from devstack.provider_stub.generation import generate
from devstack.provider_stub.ledger import Ledger
from devstack.provider_stub.models import Model
from devstack.provider_stub.prompt import read
from devstack.provider_stub.received import REQUESTS_MAX, Received, ReceivedRequests
from devstack.provider_stub.responder import Reply, respond

BODY_BYTES_MAX = 32 * 1024 * 1024
CALL_ID_HEADERS = ("x-tenantry-call-id", "x-client-request-id")
# Waited twice, by the runner and by each connection: long enough for a plain answer, short enough not to hold up a stop for a stalled one.
SHUTDOWN_SECONDS = 0.5

log = logging.getLogger(__name__)
_Route = Callable[["ProviderStub", web.BaseRequest, str, str], Awaitable[web.StreamResponse]]


class ProviderStub:
    """Serves the API to the holders of the given keys."""

    def __init__(
        self, ledger: Ledger, api_keys: Iterable[str], offered: Mapping[str, Model], cache: PromptCache, *, allow_directives: bool = False
    ) -> None:
        self._ledger = ledger
        self._hash_by_key = {key: hashlib.sha256(key.encode()).hexdigest()[:16] for key in api_keys}
        self._models = offered
        self._cache = cache
        self._received = ReceivedRequests()
        self._allow_directives = allow_directives

    async def listen(self, port: int) -> tuple[web.ServerRunner, int]:
        """Bind the port on 127.0.0.1 (0 chooses one) and returns the runner to clean up, and the port."""
        # Without handler_cancellation a stream to a client that left would run, and bill, to its end.
        server = web.Server(self.handle, request_factory=_request, handler_cancellation=True, access_log=None)
        runner = web.ServerRunner(server, shutdown_timeout=SHUTDOWN_SECONDS)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", port, backlog=512).start()
        return runner, int(runner.addresses[0][1])

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """Answer one request."""
        request_id = f"req_01{os.urandom(11).hex()}"
        try:
            return await self._route(request, request_id)
        except ApiError as error:
            return _error(error, request_id)
        except web.HTTPRequestEntityTooLarge:
            return _error(ApiError(413), request_id)
        except (ConnectionError, web.HTTPException):
            raise
        except Exception:
            log.exception("request_failed request_id=%s", request_id)
            return _error(ApiError(500), request_id)

    async def _route(self, request: web.BaseRequest, request_id: str) -> web.StreamResponse:
        path = request.path.rstrip("/")
        api_key_hash = self._authenticate(request)
        methods = ROUTES.get(path)
        if methods is None and path.startswith("/v1/models/"):
            methods = {"GET": ProviderStub._model}
        if methods is None:
            raise ApiError(404)
        if (route := methods.get(request.method)) is None:
            raise ApiError(405)
        return await route(self, request, request_id, api_key_hash)

    def _authenticate(self, request: web.BaseRequest) -> str:
        key = request.headers.get("x-api-key")
        if key is not None:
            return self._known(key, "invalid x-api-key")
        # The SDK of the 2.x line sends its api_key as a bearer token; older ones and plain HTTP clients use x-api-key.
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            raise ApiError(401, "x-api-key header is required")
        return self._known(token, "invalid bearer token")

    def _known(self, key: str, refusal: str) -> str:
        if (api_key_hash := self._hash_by_key.get(key)) is None:
            raise ApiError(401, refusal)
        return api_key_hash

    async def _messages(self, request: web.BaseRequest, request_id: str, api_key_hash: str) -> web.StreamResponse:
        parsed = messages.parse(await self._body(request, request_id, api_key_hash), self._models)
        prompt, ordered = self._orders(request, read(parsed))
        if (refusal := ordered.refusal()) is not None:
            await asyncio.sleep(ordered.latency_ms / 1000)
            raise refusal
        generation = generate(parsed, prompt, ordered)
        identity = CallIdentity(request_id, _call_id(request.headers, parsed.user_id), api_key_hash, parsed.model.id)
        call = BilledCall(self._ledger, identity, self._cache.bill(parsed, api_key_hash, time.monotonic()))
        return await respond(request, Reply(call, generation, ordered), streaming=parsed.stream)

    async def _count_tokens(self, request: web.BaseRequest, request_id: str, api_key_hash: str) -> web.StreamResponse:
        parsed = messages.parse(await self._body(request, request_id, api_key_hash), self._models, counting=True)
        _, ordered = self._orders(request, read(parsed))
        await asyncio.sleep(ordered.latency_ms / 1000)
        if (refusal := ordered.refusal()) is not None:
            raise refusal
        return _json({"input_tokens": parsed.input_tokens}, request_id)

    async def _list_models(self, request: web.BaseRequest, request_id: str, _: str) -> web.StreamResponse:
        return _json(models.page(self._models, request.query), request_id)

    async def _model(self, request: web.BaseRequest, request_id: str, _: str) -> web.StreamResponse:
        return _json(models.describe(models.find(self._models, request.path.removeprefix("/v1/models/"))), request_id)

    async def _read_ledger(self, request: web.BaseRequest, request_id: str, __: str) -> web.StreamResponse:
        # Before the lines are: what begins meanwhile may or may not be among them.
        read_time = datetime.now(UTC)
        return _json(ledger_pages.page(await self._ledger.folded(), request.query, read_time), request_id)

    async def _read_requests(self, request: web.BaseRequest, request_id: str, _: str) -> web.StreamResponse:
        count = request.query.get("n", str(REQUESTS_MAX))
        if not count.isdecimal() or not 1 <= int(count) <= REQUESTS_MAX:
            raise invalid(f"n: must be between 1 and {REQUESTS_MAX}")
        return _json({"data": self._received.last(int(count))}, request_id)

    async def _clear_requests(self, _: web.BaseRequest, request_id: str, __: str) -> web.StreamResponse:
        self._received.clear()
        return _json({"data": []}, request_id)

    async def _body(self, request: web.BaseRequest, request_id: str, api_key_hash: str) -> bytes:
        if (request.content_length or 0) > BODY_BYTES_MAX:
            raise ApiError(413)
        if "anthropic-version" not in request.headers:
            raise invalid("anthropic-version: header is required")
        body = await request.read()
        self._received.add(Received(request_id, request.path, api_key_hash, request.headers, body))
        return body

    def _orders(self, request: web.BaseRequest, prompt: Prompt) -> tuple[Prompt, faults.Faults]:
        orders = faults.header_orders(request.headers)
        if self._allow_directives:
            question, directed = faults.split_question(prompt.question)
            if directed:
                prompt, orders = replace(prompt, question=question), directed | orders
        return prompt, faults.parse(orders)


ROUTES: Mapping[str, Mapping[str, _Route]] = {
    "/v1/messages": {"POST": ProviderStub._messages},
    "/v1/messages/count_tokens": {"POST": ProviderStub._count_tokens},
    "/v1/models": {"GET": ProviderStub._list_models},
    "/stub/ledger": {"GET": ProviderStub._read_ledger},
    "/stub/requests": {"GET": ProviderStub._read_requests, "DELETE": ProviderStub._clear_requests},
}


def _call_id(headers: Mapping[str, str], user_id: str | None) -> str | None:
    for name in CALL_ID_HEADERS:
        if name in headers:
            return headers[name]
    return user_id


def _json(value: object, request_id: str) -> web.Response:
    return web.Response(body=orjson.dumps(value), content_type="application/json", headers={"request-id": request_id})


def _error(error: ApiError, request_id: str) -> web.Response:
    headers = {"request-id": request_id, **error.headers}
    body = error_body(error.status, error.message, request_id)
    return web.Response(status=error.status, body=body, content_type="application/json", headers=headers)


def _request(
    message: RawRequestMessage,
    payload: StreamReader,
    protocol: RequestHandler,
    writer: AbstractStreamWriter,
    task: asyncio.Task[None],
) -> web.BaseRequest:
    loop = asyncio.get_running_loop()
    return web.BaseRequest(message, payload, protocol, writer, task, loop, client_max_size=BODY_BYTES_MAX)
