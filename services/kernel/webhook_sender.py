"""Posts signed messages to HTTP receivers. Follows no redirect, keeps no cookie and reads no answer's body."""

from collections.abc import Sequence
from datetime import UTC, datetime

import aiohttp

from services.kernel.public_sockets import PrivateAddress, outward_session
from services.kernel.webhook_signing import DeliveryFailed, signatures_of

TIMEOUT_SECONDS = 5.0


class WebhookSender:
    """One client session for any number of receivers; build it inside a running loop. Any 2xx is a receipt.

    `private_addresses`: receivers in private networks are called too.
    """

    def __init__(self, *, private_addresses: bool, timeout_seconds: float = TIMEOUT_SECONDS) -> None:
        self._session = outward_session(timeout_seconds=timeout_seconds, private_addresses=private_addresses)

    async def close(self) -> None:
        """Closes the connections."""
        await self._session.close()

    async def post(self, url: str, keys: Sequence[bytes], message_id: str, body: bytes, *, content_type: str) -> None:
        """Posts the body under its id, signed by each key. Raises: DeliveryFailed for anything but 2xx within the time."""
        timestamp = int(datetime.now(UTC).timestamp())
        headers = {
            "content-type": content_type,
            "webhook-id": message_id,
            "webhook-timestamp": str(timestamp),
            "webhook-signature": signatures_of(keys, message_id, timestamp, body),
        }
        try:
            async with self._session.post(url, data=body, headers=headers, allow_redirects=False) as answer:
                status = answer.status
        except TimeoutError:
            raise DeliveryFailed("the receiver did not answer in time") from None
        except aiohttp.ClientConnectorError as error:
            private = isinstance(error.os_error, PrivateAddress)
            raise DeliveryFailed("the receiver is at a private address" if private else _unreachable(error)) from None
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise DeliveryFailed(_unreachable(error)) from None
        if not 200 <= status < 300:
            raise DeliveryFailed(f"the receiver answered {status}")


def _unreachable(error: Exception) -> str:
    # The kind alone: its words may hold the receiver's URL, which may hold a secret.
    return f"the receiver cannot be reached ({type(error).__name__})"
