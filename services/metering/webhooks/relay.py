"""Sends deliveries to tenants' receivers: at least once, in no promised order, one at a time to each receiver.

A receiver that hangs holds up itself alone. What is not taken is tried again later and later, then kept as dead.
"""

import asyncio
import random
import time
from collections.abc import Coroutine, Sequence
from typing import Any, Protocol

import structlog

from services.kernel.errors import MeshError
from services.kernel.webhook_signing import DeliveryFailed, pause_seconds
from services.metering.webhooks.endpoint import CONTENT_TYPE, Delivery, DeliveryOutbox, DueDelivery, body_of
from services.metering.webhooks.secrets import EndpointSecrets

log = structlog.get_logger(__name__)

_AT_ONCE = 32
_CLEANING_SECONDS = 3600.0


class Sender(Protocol):
    """Posts signed messages."""

    async def post(self, url: str, keys: Sequence[bytes], message_id: str, body: bytes, *, content_type: str) -> None:
        """Returns once the receiver took it. Raises: DeliveryFailed."""
        ...


class DeliveryRelay:
    """One loop for `BackgroundTasks`: `run`."""

    def __init__(
        self,
        outbox: DeliveryOutbox,
        sender: Sender,
        secrets: EndpointSecrets,
        *,
        region: str,
        poll_seconds: float,
        max_attempts: int,
        history_days: int,
    ) -> None:
        self._outbox = outbox
        self._sender = sender
        self._secrets = secrets
        self._region = region
        self._poll_seconds = poll_seconds
        self._max_attempts = max_attempts
        self._history_days = history_days
        self._under_way = 0
        self._clean_at = time.monotonic()

    async def run(self) -> None:
        """Sends what is due until cancelled."""
        async with asyncio.TaskGroup() as group:
            while True:
                try:
                    taken = await self._take(group)
                    await self._clean()
                except MeshError as error:
                    log.warning("deliveries_not_taken", reason=error.reason_name)
                    taken = 0
                if not taken:
                    await asyncio.sleep(self._poll_seconds * random.uniform(0.8, 1.2))  # noqa: S311 - jitter

    async def _take(self, group: asyncio.TaskGroup) -> int:
        room = _AT_ONCE - self._under_way
        due = await self._outbox.take_due(room) if room > 0 else []
        for each in due:
            self._under_way += 1
            group.create_task(self._deliver(each))
        return len(due)

    async def _deliver(self, due: DueDelivery) -> None:
        delivery = due.delivery
        try:
            await self._send(due)
        except DeliveryFailed as error:
            pause = pause_seconds(delivery.attempts) if delivery.attempts < self._max_attempts else None
            log.warning(
                "webhook_not_delivered",
                tenant_id=str(delivery.tenant_id),
                delivery_id=str(delivery.delivery_id),
                error=str(error),
                given_up=pause is None,
            )
            await self._note(delivery, self._outbox.failed(delivery, str(error), pause))
        else:
            await self._note(delivery, self._outbox.delivered(delivery))
        finally:
            self._under_way -= 1

    async def _send(self, due: DueDelivery) -> None:
        delivery = due.delivery
        keys = [self._secrets.signing_key(delivery.tenant_id, delivery.endpoint_id, sealed) for sealed in due.sealed_secrets]
        await self._sender.post(due.url, keys, str(delivery.event_id), body_of(delivery, self._region), content_type=CONTENT_TYPE)

    async def _note(self, delivery: Delivery, noting: Coroutine[Any, Any, None]) -> None:
        try:
            await noting
        except MeshError as error:
            # The lease ends by itself and it is sent again: at least once.
            log.warning("delivery_not_noted", delivery_id=str(delivery.delivery_id), reason=error.reason_name)

    async def _clean(self) -> None:
        if time.monotonic() >= self._clean_at:
            await self._outbox.forget_ended(self._history_days)
            self._clean_at = time.monotonic() + _CLEANING_SECONDS
