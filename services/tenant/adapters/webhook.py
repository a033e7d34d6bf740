"""Delivers events to one HTTP receiver, signed. Follows no redirect, keeps no cookie and reads no answer's body."""

from datetime import UTC, datetime

import aiohttp

from services.tenant.events import DeliveryFailed, Event, body_of, signature_of

TIMEOUT_SECONDS = 5.0


class Webhook:
    """The operator's receiver; any 2xx is a receipt."""

    def __init__(self, url: str, signing_key: bytes, *, region: str, timeout_seconds: float = TIMEOUT_SECONDS) -> None:
        self._url = url
        self._signing_key = signing_key
        self._region = region
        self._session = aiohttp.ClientSession(
            timeout=aiohttp.ClientTimeout(total=timeout_seconds), cookie_jar=aiohttp.DummyCookieJar(), auto_decompress=False
        )

    async def close(self) -> None:
        """Closes the connections."""
        await self._session.close()

    async def send(self, event: Event) -> None:
        """Posts the event. Raises: DeliveryFailed for anything but 2xx within 5 s."""
        body, timestamp = body_of(event, self._region), int(datetime.now(UTC).timestamp())
        headers = {
            "content-type": "application/cloudevents+json",
            "webhook-id": str(event.event_id),
            "webhook-timestamp": str(timestamp),
            "webhook-signature": signature_of(self._signing_key, str(event.event_id), timestamp, body),
        }
        try:
            async with self._session.post(self._url, data=body, headers=headers, allow_redirects=False) as answer:
                status = answer.status
        except TimeoutError:
            raise DeliveryFailed("the receiver did not answer in time") from None
        except (aiohttp.ClientError, OSError) as error:
            # The kind alone: its words may hold the receiver's URL, which may hold a secret.
            raise DeliveryFailed(f"the receiver cannot be reached ({type(error).__name__})") from None
        if not 200 <= status < 300:
            raise DeliveryFailed(f"the receiver answered {status}")
