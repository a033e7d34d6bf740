"""The development receiver of webhooks takes what the mesh signs, and nothing else."""

import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import aiohttp
import pytest

from devstack.event_receiver import PATH, EventReceiver, is_signed
from devstack.ports import free_port
from services.kernel.ids import TenantId, new_uuid7
from services.kernel.webhook_sender import WebhookSender
from services.kernel.webhook_signing import DeliveryFailed, read_webhook_secret, signature_of
from services.tenant.adapters.webhook import Webhook
from services.tenant.events import Event, EventState, Sink, body_of

SECRET = "a secret of the stack, long enough"
KEY = read_webhook_secret(SECRET)


@dataclass
class Running:
    """A receiver, what it told, and where it keeps events."""

    url: str
    told: list[str]
    kept_at: Path


@pytest.fixture
async def running(tmp_path: Path) -> AsyncIterator[Running]:
    """A receiver on a free port."""
    told: list[str] = []
    port = free_port()
    receiver = EventReceiver(port, SECRET, tmp_path / "events.jsonl", told.append)
    await receiver.start()
    try:
        yield Running(f"http://127.0.0.1:{port}{PATH}", told, tmp_path / "events.jsonl")
    finally:
        await receiver.stop()


def event() -> Event:
    """An event that waits."""
    now = datetime.now(UTC)
    return Event(
        TenantId(new_uuid7()), new_uuid7(), 1, Sink.WEBHOOK, "tenant.provisioned", '{"slug":"acme"}', EventState.PENDING, 1, "", now, None
    )


async def test_an_event_as_the_mesh_signs_it_is_kept_and_told(running: Running) -> None:
    """The tenant service's own sender is answered with 2xx; the body is kept as it came, and one line tells type and tenant."""
    sender, sent = WebhookSender(private_addresses=True), event()
    try:
        await Webhook(sender, running.url, KEY, region="local").send(sent)
    finally:
        await sender.close()
    assert running.kept_at.read_bytes() == body_of(sent, "local") + b"\n"
    assert running.told == [f"event tenant.provisioned of tenant {sent.tenant_id}, signature verified"]


async def test_what_is_not_signed_with_the_secret_is_refused(running: Running) -> None:
    """A sender with another secret, and a post without any signature, get 401 and leave nothing in the file."""
    sender = WebhookSender(private_addresses=True)
    hook = Webhook(sender, running.url, b"another secret, long enough", region="local")
    try:
        with pytest.raises(DeliveryFailed, match="401"):
            await hook.send(event())
    finally:
        await sender.close()
    async with aiohttp.ClientSession() as session, session.post(running.url, data=b"{}") as answer:
        assert answer.status == 401
    assert not running.kept_at.exists()
    assert len(running.told) == 2


def test_a_signature_is_of_one_id_one_time_and_one_body() -> None:
    """Changed in any of the three, or five minutes old, it is none; one good signature among several is enough."""
    now, body = time.time(), b'{"type":"tenant.erased"}'
    good = {
        "webhook-id": "one",
        "webhook-timestamp": str(int(now)),
        "webhook-signature": signature_of(KEY, "one", int(now), body),
    }
    assert is_signed(SECRET, good, body, now=now)
    assert is_signed(SECRET, {**good, "webhook-signature": f"v1,bm9uZQ== {good['webhook-signature']}"}, body, now=now)
    for wrong in (
        {**good, "webhook-id": "two"},
        {**good, "webhook-timestamp": str(int(now) + 1)},
        {**good, "webhook-timestamp": "soon"},
        {**good, "webhook-signature": ""},
        {},
    ):
        assert not is_signed(SECRET, wrong, body, now=now)
    assert not is_signed(SECRET, good, body + b" ", now=now)
    assert not is_signed(SECRET, good, body, now=now + 302)
