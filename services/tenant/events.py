"""Events of tenants' lives, on their way to the operator's own systems: at least once, in order by tenant and sink.

Refuses to send for ever: what its receiver does not take is given up after a bound, kept, and can be sent again by hand.
"""

import asyncio
import base64
import binascii
import hashlib
import hmac
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import Protocol
from uuid import UUID

import structlog

from services.kernel.errors import MeshError, NotFound
from services.kernel.ids import TenantId

log = structlog.get_logger(__name__)

MAX_ATTEMPTS = 12
_FIRST_PAUSE_SECONDS = 1.0
_LONGEST_PAUSE_SECONDS = 3600.0
_AT_ONCE = 8
MIN_SECRET_BYTES = 24
_SECRET_PREFIX = "whsec_"  # noqa: S105 - what a secret begins with


class Sink(StrEnum):
    """Where an event goes."""

    WEBHOOK = "webhook"
    MAIL = "mail"


class EventState(StrEnum):
    """Where an event is."""

    PENDING = "PENDING"
    DELIVERED = "DELIVERED"
    DEAD = "DEAD"


@dataclass(frozen=True, slots=True)
class Event:
    """An event as it is kept; `data` is a JSON object without personal data."""

    tenant_id: TenantId
    event_id: UUID
    position: int
    sink: Sink
    event_type: str
    data: str
    state: EventState
    attempts: int
    last_error: str
    create_time: datetime
    end_time: datetime | None


class DeliveryFailed(Exception):
    """The receiver did not take the event; the message is one short line without its data."""


class EventSink(Protocol):
    """A receiver."""

    async def send(self, event: Event) -> None:
        """Returns once the receiver took the event. Raises: DeliveryFailed."""
        ...


class Outbox(Protocol):
    """Events of all tenants."""

    async def take_due(self, sinks: Sequence[Sink], limit: int) -> Sequence[Event]:
        """Takes, for each tenant and sink, the oldest event that waits, if it is due and nobody sends it; counts the attempt."""
        ...

    async def delivered(self, event: Event) -> None:
        """Notes that the receiver took it."""
        ...

    async def failed(self, event: Event, error: str, pause_seconds: float | None) -> None:
        """Notes why not, and when to try again; None gives it up."""
        ...

    async def list_page(self, state: EventState | None, before: int | None, limit: int) -> Sequence[Event]:
        """Returns events before a position, newest first."""
        ...

    async def replay(self, tenant_id: TenantId, event_id: UUID) -> Event | None:
        """Makes the event wait again, from its first attempt; None when there is no such event."""
        ...


class EventRelay:
    """One loop for `BackgroundTasks`: `run`."""

    def __init__(self, outbox: Outbox, sinks: Mapping[Sink, EventSink], *, poll_seconds: float, max_attempts: int = MAX_ATTEMPTS) -> None:
        self._outbox = outbox
        self._sinks = sinks
        self._poll_seconds = poll_seconds
        self._max_attempts = max_attempts

    async def run(self) -> None:
        """Delivers what is due until cancelled."""
        while True:
            try:
                while await self.deliver_due():
                    # A tenant's next event is due once the one before it is through.
                    continue
            except MeshError as error:
                log.warning("event_relay_failed", reason=error.reason_name)
            await asyncio.sleep(self._poll_seconds * random.uniform(0.8, 1.2))  # noqa: S311 - jitter

    async def deliver_due(self) -> int:
        """Sends one event a tenant and sink, and returns how many were sent."""
        events = await self._outbox.take_due(tuple(self._sinks), _AT_ONCE)
        async with asyncio.TaskGroup() as group:
            for event in events:
                group.create_task(self._deliver(event))
        return len(events)

    async def _deliver(self, event: Event) -> None:
        try:
            await self._sinks[event.sink].send(event)
        except DeliveryFailed as error:
            pause = pause_seconds(event.attempts) if event.attempts < self._max_attempts else None
            log.warning("event_not_delivered", event_id=str(event.event_id), sink=event.sink, error=str(error), given_up=pause is None)
            await self._note(self._outbox.failed(event, str(error), pause))
        else:
            await self._note(self._outbox.delivered(event))

    async def _note(self, noting: object) -> None:
        try:
            await noting  # type: ignore[misc] # a coroutine of the outbox
        except MeshError as error:
            # The lease ends by itself and the event is sent again: at least once.
            log.warning("event_not_noted", reason=error.reason_name)


class EventDesk:
    """What operators do with events."""

    def __init__(self, outbox: Outbox) -> None:
        self._outbox = outbox

    async def list(self, state: EventState | None, before: int | None, limit: int) -> Sequence[Event]:
        """Returns events, newest first."""
        return await self._outbox.list_page(state, before, limit)

    async def replay(self, tenant_id: TenantId, event_id: UUID) -> Event:
        """Makes the event wait again. Raises: NotFound."""
        event = await self._outbox.replay(tenant_id, event_id)
        if event is None:
            raise NotFound("event")
        return event


def pause_seconds(attempts: int) -> float:
    """Returns how long to wait after so many attempts: doubled each time, capped, with full jitter above half."""
    return min(_LONGEST_PAUSE_SECONDS, _FIRST_PAUSE_SECONDS * 2.0 ** min(attempts - 1, 20)) * random.uniform(0.5, 1.0)  # noqa: S311 - jitter


def body_of(event: Event, region: str) -> bytes:
    """Returns the event as a CloudEvent in JSON. Source: CloudEvents 1.0, JSON format."""
    return json.dumps(
        {
            "specversion": "1.0",
            "id": str(event.event_id),
            "source": f"tenantry/{region}",
            "type": event.event_type,
            "subject": str(event.tenant_id),
            "time": event.create_time.astimezone(UTC).isoformat().replace("+00:00", "Z"),
            "datacontenttype": "application/json",
            "data": json.loads(event.data),
        },
        sort_keys=True,
        separators=(",", ":"),
    ).encode()


def signature_of(key: bytes, event_id: str, timestamp: int, body: bytes) -> str:
    """Returns `v1,<base64>`: HMAC-SHA-256 over id, time and body.

    Source: Standard Webhooks 1.0.
    """
    signed = f"{event_id}.{timestamp}.".encode() + body
    return "v1," + base64.b64encode(hmac.new(key, signed, hashlib.sha256).digest()).decode()


def read_webhook_secret(text: str) -> bytes:
    """Returns the key of `whsec_<base64>`, or the bytes of any other text. Raises: ValueError with a sentence that repeats nothing of it.

    Source: Standard Webhooks 1.0, which wants at least 24 bytes.
    """
    key = text.strip().encode()
    if text.startswith(_SECRET_PREFIX):
        try:
            key = base64.b64decode(text.removeprefix(_SECRET_PREFIX), validate=True)
        except binascii.Error:
            key = b""
    if len(key) < MIN_SECRET_BYTES:
        msg = f"must hold a key of at least {MIN_SECRET_BYTES} bytes: set it to whsec_ and what `openssl rand -base64 32` prints"
        raise ValueError(msg)
    return key
