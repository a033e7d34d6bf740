"""Signed messages to receivers that somebody else named: proven by any secret in use, and never sent into a private network."""

import base64
import hashlib
import hmac

import pytest

from devstack.event_receiver import is_signed
from devstack.ports import free_port
from services.kernel.webhook_sender import WebhookSender
from services.kernel.webhook_signing import DeliveryFailed, new_webhook_secret, pause_seconds, read_webhook_secret
from tests.tenant.receivers import running_receiver


async def test_a_message_is_signed_by_every_secret_in_use() -> None:
    """While a secret is changed the receiver proves the message by the old one or the new one, over id, time and body."""
    old, new = new_webhook_secret(), new_webhook_secret()
    sender = WebhookSender(private_addresses=True)
    async with running_receiver() as receiver:
        await sender.post(receiver.url, [read_webhook_secret(new), read_webhook_secret(old)], "m-1", b"{}", content_type="application/json")
    await sender.close()
    [(headers, body)] = receiver.received
    offered = headers["webhook-signature"].split(" ")
    assert len(offered) == 2
    for secret in (old, new):
        key = base64.b64decode(secret.removeprefix("whsec_"))
        assert len(key) == 32
        signed = f"m-1.{headers['webhook-timestamp']}.".encode() + body
        assert "v1," + base64.b64encode(hmac.new(key, signed, hashlib.sha256).digest()).decode() in offered
    assert not is_signed("another secret, long enough", headers, body, now=float(headers["webhook-timestamp"]))


async def test_nothing_is_sent_into_a_private_network() -> None:
    """By default: neither to an address written out nor to a name that leads there; the failure names no address."""
    sender = WebhookSender(private_addresses=False)
    async with running_receiver() as receiver:
        for url in (receiver.url, receiver.url.replace("127.0.0.1", "localhost")):
            with pytest.raises(DeliveryFailed, match="private address") as refused:
                await sender.post(url, [b"k" * 24], "m-1", b"{}", content_type="application/json")
            assert "127.0.0.1" not in str(refused.value)
        assert receiver.received == []
    await sender.close()


@pytest.mark.parametrize("trouble", ["down", "500", "redirect", "slow", "malformed"])
async def test_whatever_is_no_receipt_is_a_failure(trouble: str) -> None:
    """A receiver that is down, fails, points elsewhere, is slow, or is no URL: one short sentence without the URL."""
    sender = WebhookSender(private_addresses=True, timeout_seconds=0.5)
    async with running_receiver() as receiver:
        receiver.statuses = {"500": [500], "redirect": [307]}.get(trouble, [])
        receiver.delay_seconds = 2.0 if trouble == "slow" else 0.0
        url = {"down": f"http://127.0.0.1:{free_port()}/x", "malformed": "http://[:secret-path"}.get(trouble, receiver.url)
        with pytest.raises(DeliveryFailed) as failed:
            await sender.post(url, [b"k" * 24], "m-1", b"{}", content_type="application/json")
        assert url not in str(failed.value)
        assert "secret-path" not in str(failed.value)
    await sender.close()


def test_pauses_double_up_to_an_hour() -> None:
    """The pause after an attempt lies between half and the whole of a doubling ceiling, and never above an hour."""
    for attempts in range(1, 40):
        ceiling = min(3600.0, 2.0 ** (attempts - 1))
        assert ceiling / 2 <= pause_seconds(attempts) <= ceiling
