"""Events of tenants' lives, on their way to the operator's own systems: at least once, in order by tenant and sink.

Refuses to send for ever: what its receiver does not take is given up after a bound, kept, and can be sent again by hand.
"""

import asyncio
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
from services.kernel.webhook_signing import DeliveryFailed, pause_seconds

log = structlog.get_logger(__name__)

MAX_ATTEMPTS = 12
_AT_ONCE = 8


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
