"""Delivers events to the operator's HTTP receiver."""

from services.kernel.webhook_sender import WebhookSender
from services.tenant.events import Event, body_of


class Webhook:
    """The operator's receiver, wherever it is: its address is the operator's own word."""

    def __init__(self, sender: WebhookSender, url: str, signing_key: bytes, *, region: str) -> None:
        self._sender = sender
        self._url = url
        self._signing_key = signing_key
        self._region = region

    async def send(self, event: Event) -> None:
        """Posts the event. Raises: DeliveryFailed for anything but 2xx within the sender's time."""
        await self._sender.post(
            self._url,
            [self._signing_key],
            str(event.event_id),
            body_of(event, self._region),
            content_type="application/cloudevents+json",
        )
