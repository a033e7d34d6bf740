"""Providers' own accounts of usage, as scripted servers on loopback: one of single requests, one that answers whatever a test puts."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from uuid import UUID

import orjson
from aiohttp import web

from devstack.provider_stub.ledger_pages import page
from mesh.metering.v1 import ledger_service_pb2 as pb
from tests.metering.mesh import MODEL, Mesh, Tenant, unknown

HOUSE, TENANTS_KEY = "house-key-hash", "tenants-key-hash"
KEY = "the-key-of-the-feed"
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class RequestLedger:
    """What a provider billed, request by request; it knows everything that began before `complete_until`."""

    def __init__(self) -> None:
        self.lines: list[dict[str, object]] = []
        self.complete_until: datetime | None = datetime(2100, 1, 1, tzinfo=UTC)
        self.broken_from: datetime | None = None

    def bill(self, call: pb.OpenCall, tokens: Sequence[int], *, after: timedelta = timedelta(seconds=1), **changes: object) -> str:
        """Bills a call, by default once it is over and to the house's key; returns the request's id."""
        started = call.reserve_time.ToDatetime(tzinfo=UTC) + after
        request_id = f"req_{len(self.lines)}"
        names = ("input_tokens", "output_tokens", "cache_read", "cache_creation_5m", "cache_creation_1h")
        line = {
            "request_id": request_id,
            "call_id": str(UUID(bytes=call.call_id)),
            "api_key_hash": HOUSE,
            "model": MODEL,
            **dict(zip(names, tokens, strict=True)),
            "outcome": "complete",
            "started_at": started.isoformat(),
        }
        self.lines.append(line | changes)
        return request_id

    async def answer(self, request: web.Request) -> web.StreamResponse:
        """One page, as the provider stub tells it."""
        assert request.headers["x-api-key"] == KEY
        if self.broken_from is not None and datetime.fromisoformat(request.query["starting_at"]) >= self.broken_from:
            return web.json_response({"data": "none of your business"})
        # Pages are short, so that there are several.
        told = page(self.lines, dict(request.query) | {"limit": "2"}, datetime.now(UTC))
        told["complete_until"] = None if self.complete_until is None else self.complete_until.isoformat()
        return web.json_response(told)


class Answers:
    """Answers each request with the next of what a test put, and remembers what was asked."""

    def __init__(self, *answers: object) -> None:
        self.answers = list(answers)
        self.asked: list[web.Request] = []

    async def answer(self, request: web.Request) -> web.StreamResponse:
        """The next answer: an object as JSON, bytes as they are, a response, or None for a connection that breaks."""
        self.asked.append(request)
        told = self.answers.pop(0)
        if told is None:
            assert request.transport is not None
            request.transport.close()
            await asyncio.Event().wait()
        if isinstance(told, web.StreamResponse):
            return told
        return web.Response(body=told if isinstance(told, bytes) else orjson.dumps(told), content_type="application/json")


@asynccontextmanager
async def served(handler: Handler) -> AsyncIterator[str]:
    """Serves every path on a free port; yields the address."""
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", handler)
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    await runner.cleanup()


async def opened_at(mesh: Mesh, tenant: Tenant, time: datetime, **changes: object) -> pb.OpenCall:
    """A call that was reserved and opened then, and could be dispatched for a minute."""
    call = await mesh.opened(tenant, reserve_time=time, dispatch_deadline=time + timedelta(minutes=1), **changes)
    ids = (UUID(bytes=call.ref.tenant_id), UUID(bytes=call.ref.reservation_id))
    await mesh.admin.execute("UPDATE metering.calls SET open_time = $3 WHERE tenant_id = $1 AND reservation_id = $2", *ids, time)
    return call


async def cut_at(mesh: Mesh, tenant: Tenant, time: datetime, **changes: object) -> pb.OpenCall:
    """A call of then whose bill the ledger does not know."""
    call = await opened_at(mesh, tenant, time, **changes)
    await mesh.void(unknown(call.ref, pb.TokenUsage(input_tokens=9, output_tokens=1)))
    return call
