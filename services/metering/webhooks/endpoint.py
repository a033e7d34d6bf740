"""Tenants' receivers, what is sent to them, and the ports that keep both. Refuses addresses that nobody on the internet can have."""

import ipaddress
import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import IntEnum
from typing import Protocol
from urllib.parse import urlsplit
from uuid import UUID

from services.kernel.errors import InvalidRequest
from services.kernel.ids import TenantId
from services.kernel.public_address import is_public

MAX_ENDPOINTS = 10
CONTENT_TYPE = "application/cloudevents+json"


class DeliveryState(IntEnum):
    """Where a delivery is; the numbers are the contract's and the database's."""

    PENDING = 1
    DELIVERED = 2
    DEAD = 3


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A receiver. Until `previous_end_time` the secret before the last rotation signs too."""

    endpoint_id: UUID
    url: str
    create_time: datetime
    previous_end_time: datetime | None


@dataclass(frozen=True, slots=True)
class Delivery:
    """An event on its way to one receiver; `data` is a JSON object."""

    tenant_id: TenantId
    delivery_id: UUID
    endpoint_id: UUID
    event_id: UUID
    event_type: str
    data: str
    state: DeliveryState
    attempts: int
    last_error: str
    create_time: datetime
    due_time: datetime
    end_time: datetime | None


@dataclass(frozen=True, slots=True)
class DueDelivery:
    """A delivery in hand, with where it goes and the sealed secrets in use, the newest first."""

    delivery: Delivery
    url: str
    sealed_secrets: Sequence[bytes]


@dataclass(frozen=True, slots=True)
class DeliveryPosition:
    """The last delivery of the page before."""

    create_time: datetime
    delivery_id: UUID


class EndpointStore(Protocol):
    """A tenant's receivers and deliveries."""

    async def create(self, tenant_id: TenantId, endpoint_id: UUID, url: str, sealed_secret: bytes) -> Endpoint:
        """Keeps a receiver. Raises: LimitExceeded for one too many, NotFound once erased."""
        ...

    async def list_all(self, tenant_id: TenantId) -> Sequence[Endpoint]:
        """Returns receivers, oldest first."""
        ...

    async def rotate(self, tenant_id: TenantId, endpoint_id: UUID, sealed_secret: bytes, overlap_seconds: float) -> Endpoint | None:
        """Puts a new secret in the place of the one in use, which signs too until the overlap ends; None for no such receiver."""
        ...

    async def delete(self, tenant_id: TenantId, endpoint_id: UUID) -> None:
        """Removes a receiver with its deliveries, if it is there."""
        ...

    async def deliveries(
        self, tenant_id: TenantId, state: DeliveryState | None, endpoint_id: UUID | None, after: DeliveryPosition | None, size: int
    ) -> Sequence[Delivery]:
        """Returns up to `size` deliveries, newest first, after the position."""
        ...

    async def replay(self, tenant_id: TenantId, delivery_ids: Collection[UUID], dead_of: UUID | None) -> int:
        """Makes the named deliveries wait again, or all dead ones of a receiver; returns how many."""
        ...


class DeliveryOutbox(Protocol):
    """Deliveries of all tenants."""

    async def take_due(self, most: int) -> Sequence[DueDelivery]:
        """Takes what is due and in nobody's hands, one a receiver, under a lease; counts the attempt."""
        ...

    async def delivered(self, delivery: Delivery) -> None:
        """Notes that the receiver took it."""
        ...

    async def failed(self, delivery: Delivery, error: str, pause_seconds: float | None) -> None:
        """Notes why not, and when to try again; None gives it up."""
        ...

    async def forget_ended(self, days: int) -> int:
        """Removes deliveries that ended so long ago; returns how many."""
        ...


def refuse_address(url: str, *, private_addresses: bool) -> None:
    """Refuses what is no https address of a public host; http where it is a loopback one and those are allowed. Raises: InvalidRequest.

    What a name leads to is looked at when something is sent.
    """
    if not url.isascii() or not url.isprintable() or " " in url or "\\" in url:
        raise InvalidRequest("url", "must be an address in printable ASCII")
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname or "", parts.port
    except ValueError:
        raise InvalidRequest("url", "must be an address such as https://hooks.example/tenantry") from None
    if parts.username is not None or parts.password is not None or "#" in url or not host:
        raise InvalidRequest("url", "must name a host, and neither a user nor a fragment")
    address = _literal(host)
    is_loopback = address is not None and address.is_loopback
    if parts.scheme != "https" and not (parts.scheme == "http" and is_loopback and private_addresses):
        raise InvalidRequest("url", "must be https")
    if address is not None and not private_addresses and not is_public(str(address)):
        raise InvalidRequest("url", "must lead to a public address; this one is of a private network, a link or a loopback")


def body_of(delivery: Delivery, region: str) -> bytes:
    """Returns the event as a CloudEvent in JSON: the same bytes each time it is sent. Source: CloudEvents 1.0, JSON format."""
    return json.dumps(
        {
            "specversion": "1.0",
            "id": str(delivery.event_id),
            "source": f"tenantry/{region}",
            "type": delivery.event_type,
            "subject": str(delivery.tenant_id),
            "time": delivery.create_time.astimezone(UTC).isoformat().replace("+00:00", "Z"),
            "datacontenttype": "application/json",
            "data": json.loads(delivery.data),
        },
        sort_keys=True,
        separators=(",", ":"),
    ).encode()


def _literal(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None
