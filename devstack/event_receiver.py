"""A receiver of the mesh's webhooks on loopback: checks each signature, keeps the event and tells it. Refuses what is not signed.

It stands for the operator's own system, and knows no more than that: the secret, and what Standard Webhooks 1.0 says.
"""

import base64
import hashlib
import hmac
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from aiohttp import web

from devstack.ports import LOOPBACK

PATH = "/events"
TOLERANCE_SECONDS = 300.0


class EventReceiver:
    """An HTTP server for events. One that was told already, such as a replayed one, is taken and told again: `webhook-id` names it."""

    def __init__(self, port: int, secret: str, kept_at: Path, tell: Callable[[str], None]) -> None:
        self._port = port
        self._secret = secret
        self._kept_at = kept_at
        self._tell = tell
        self._runner: web.AppRunner | None = None

    async def start(self) -> None:
        """Starts listening."""
        app = web.Application()
        app.router.add_post(PATH, self._take)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.2)
        await self._runner.setup()
        await web.TCPSite(self._runner, LOOPBACK, self._port).start()

    async def stop(self) -> None:
        """Stops listening. Safe to repeat."""
        if self._runner is not None:
            await self._runner.cleanup()

    async def _take(self, request: web.Request) -> web.Response:
        body = await request.read()
        if not is_signed(self._secret, request.headers, body, now=time.time()):
            self._tell("refused an event that is not signed with this stack's secret")
            return web.Response(status=401)
        with self._kept_at.open("ab") as kept:
            kept.write(body + b"\n")
        event = json.loads(body)
        self._tell(f"event {event['type']} of tenant {event['subject']}, signature verified")
        return web.Response(status=204)


def is_signed(secret: str, headers: Mapping[str, str], body: bytes, *, now: float) -> bool:
    """Tells whether the secret's owner signed this body under this id, at most 300 s away from `now`. Source: Standard Webhooks 1.0."""
    event_id, timestamp = headers.get("webhook-id", ""), headers.get("webhook-timestamp", "")
    if not timestamp.isascii() or not timestamp.isdigit() or len(timestamp) > 12 or abs(now - int(timestamp)) > TOLERANCE_SECONDS:
        return False
    signed = f"{event_id}.{timestamp}.".encode() + body
    expected = "v1," + base64.b64encode(hmac.new(secret.encode(), signed, hashlib.sha256).digest()).decode()
    # Several may stand there while a secret is changed.
    return any(hmac.compare_digest(expected.encode(), offered.encode()) for offered in headers.get("webhook-signature", "").split(" "))
