"""Stripe's endpoint for meter events and an operator's own, over HTTP on loopback: they fail, throttle and answer too late as told."""

import asyncio
import hashlib
import json
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any

from aiohttp import web

from devstack.event_receiver import is_signed

SECRET_KEY = "sk_test_of_the_tests"
SIGNING_SECRET = "a secret of the tests that is long enough"
# What a fake may do with a request beside taking it, or answering with a status: take it and never answer, cut the connection, or answer
# with what is no JSON, or no text.
SILENT, CUT, NO_JSON, NO_TEXT = -1, -2, -3, -4


class StripeFake:
    """`POST /v1/billing/meter_events` as Stripe documents it: an identifier is taken once, and refused with 400 afterwards."""

    def __init__(self) -> None:
        self.taken: dict[str, dict[str, str]] = {}
        self.requests: Counter[str] = Counter()
        # What comes of the nth request for an identifier (from 1): 0 takes it.
        self.trouble: Callable[[str, int], int] = lambda identifier, number: 0
        self.url = ""

    @property
    def app(self) -> web.Application:
        """The server."""
        app = web.Application()
        app.router.add_post("/v1/billing/meter_events", self._take)
        return app

    def of(self, customer_id: str) -> list[dict[str, str]]:
        """What was taken of a customer, by time of use."""
        found = [event for event in self.taken.values() if event["payload[stripe_customer_id]"] == customer_id]
        return sorted(found, key=lambda event: (event["timestamp"], event["event_name"]))

    async def _take(self, request: web.Request) -> web.Response:
        if request.headers["Authorization"] != f"Bearer {SECRET_KEY}":
            return _error(401, "invalid_request_error", "Invalid API Key provided")
        event = {name: str(value) for name, value in (await request.post()).items()}
        identifier = event["identifier"]
        self.requests[identifier] += 1
        outcome = self.trouble(identifier, self.requests[identifier])
        if outcome > 0:
            headers = {"Retry-After": "1"} if outcome == 429 else {}
            return _error(outcome, "api_error" if outcome >= 500 else "invalid_request_error", "no", headers)
        if identifier in self.taken:
            return _error(400, "invalid_request_error", f"An event already exists with identifier {identifier}.")
        self.taken[identifier] = event
        await _not_answering(request, outcome)
        if outcome in (NO_JSON, NO_TEXT):
            return web.Response(body=b"<html>" if outcome == NO_JSON else b"\xff\xfe{")
        return web.json_response({"object": "billing.meter_event", "identifier": identifier, "event_name": event["event_name"]})


class EndpointFake:
    """An operator's receiver of CloudEvents; checks signatures, and knows an id again."""

    def __init__(self) -> None:
        self.received: list[dict[str, Any]] = []
        self.trouble: Callable[[str, int], int] = lambda identifier, number: 0
        self.requests: Counter[str] = Counter()
        self.bodies: dict[str, set[str]] = {}
        self.url = ""

    @property
    def app(self) -> web.Application:
        """The server."""
        app = web.Application()
        app.router.add_post("/", self._take)
        return app

    def of(self, tenant_id: object) -> list[dict[str, Any]]:
        """What was received of a tenant, each id once, by time of use."""
        known = {event["id"]: event for event in self.received if event["subject"] == str(tenant_id)}
        return sorted(known.values(), key=lambda event: (event["data"]["use_time"], event["id"]))

    async def _take(self, request: web.Request) -> web.Response:
        body = await request.read()
        assert request.headers["content-type"] == "application/cloudevents+json"
        if not is_signed(SIGNING_SECRET, request.headers, body, now=datetime.now(UTC).timestamp()):
            return web.Response(status=401)
        event = json.loads(body)
        assert event["id"] == request.headers["webhook-id"]
        self.bodies.setdefault(event["id"], set()).add(hashlib.sha256(body).hexdigest())
        self.requests[event["id"]] += 1
        outcome = self.trouble(event["id"], self.requests[event["id"]])
        if outcome > 0:
            return web.Response(status=outcome)
        self.received.append(event)
        await _not_answering(request, outcome)
        return web.Response(status=204)


@asynccontextmanager
async def served(fake: StripeFake | EndpointFake) -> AsyncIterator[None]:
    """Serves a fake on a free port and says where."""
    runner = web.AppRunner(fake.app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    fake.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    try:
        yield
    finally:
        await runner.cleanup()


async def _not_answering(request: web.Request, outcome: int) -> None:
    if outcome == SILENT:
        await asyncio.sleep(3_600)
    if outcome == CUT and request.transport is not None:
        request.transport.abort()


def _error(status: int, kind: str, message: str, headers: dict[str, str] | None = None) -> web.Response:
    return web.json_response({"error": {"type": kind, "message": message}}, status=status, headers=headers)
