"""What is told to other systems, who tells it, and where it waits: values and ports."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import IntEnum
from typing import Protocol
from uuid import UUID

from services.kernel.ids import TenantId


class Sink(IntEnum):
    """Who is told; the numbers are the contract's and the database's."""

    STRIPE = 1
    ENDPOINT = 2


class Source(IntEnum):
    """What a record is; the numbers are the contract's UsageSource."""

    CALL = 1
    UNIT = 2
    EVENT = 3


@dataclass(frozen=True, slots=True, order=True)
class OutgoingKey:
    """What makes it the same thing, however often it is told."""

    tenant_id: TenantId
    sink: Sink
    usage_id: UUID
    meter: str


@dataclass(frozen=True, slots=True)
class Outgoing:
    """A thing to tell. `send_time` is when the first attempt began of which nobody knows whether it arrived; None without one.

    `meter`, `event_name` and `quantity` are Stripe's; `customer_id` is empty where the tenant has none any more.
    """

    key: OutgoingKey
    source: Source
    event_name: str
    customer_id: str
    quantity: int
    use_time: datetime
    record_time: datetime
    reservation_id: UUID | None
    attempts: int
    send_time: datetime | None

    @property
    def identifier(self) -> str:
        """The id that the receiver knows it by: the record's own, with the meter where a record is told on several."""
        return f"{self.key.usage_id}.{self.key.meter}" if self.source is Source.CALL and self.key.meter else str(self.key.usage_id)


@dataclass(frozen=True, slots=True)
class Waiting:
    """A thing that is not delivered, as operators see it; `due_time` is None once it was given up."""

    key: OutgoingKey
    source: Source
    quantity: int
    use_time: datetime
    attempts: int
    last_error: str
    due_time: datetime | None


class TellFailed(Exception):
    """The receiver does not have it, or nobody knows. The message is one short line without data or the receiver's words."""

    def __init__(self, why: str, *, may_have_arrived: bool, is_final: bool = False, pause_seconds: float | None = None) -> None:
        """`is_final`: no repeat helps. `pause_seconds`: the receiver said when to come back."""
        super().__init__(why)
        self.may_have_arrived = may_have_arrived
        self.is_final = is_final
        self.pause_seconds = pause_seconds


class Teller(Protocol):
    """Tells one receiver."""

    async def tell(self, item: Outgoing) -> None:
        """Returns once the receiver has it. Raises: TellFailed."""
        ...


class ExportOutbox(Protocol):
    """What is to be told, of all tenants."""

    async def take_due(self, sinks: Sequence[Sink], most: int) -> Sequence[Outgoing]:
        """Takes up to `most` for each receiver of what is due and nobody tells, under a lease; counts the attempt."""
        ...

    async def delivered(self, keys: Sequence[OutgoingKey]) -> None:
        """Forgets what its receiver has."""
        ...

    async def failed(self, item: Outgoing, error: TellFailed, pause_seconds: float | None) -> None:
        """Notes why not, and when to try again; None gives it up."""
        ...


class ExportRecords(Protocol):
    """The records behind what is told."""

    async def read(self, item: Outgoing) -> Mapping[str, object] | None:
        """Returns a record's columns without names of people; None when it is not there."""
        ...


class ExportSettings(Protocol):
    """What operators set, and what they see."""

    async def set_customer(self, tenant_id: TenantId, customer_id: str) -> None:
        """Sets whom Stripe bills for a tenant; empty: nobody."""
        ...

    async def customer(self, tenant_id: TenantId) -> str:
        """Returns whom; empty: nobody."""
        ...

    async def set_meter(self, meter: str, event_name: str) -> None:
        """Sets which meter of Stripe's is told; empty: none."""
        ...

    async def meters(self) -> Sequence[tuple[str, str]]:
        """Returns meters and Stripe's event names."""
        ...

    async def turn_endpoint(self, *, on: bool) -> None:
        """Begins or ends telling the endpoint."""
        ...

    async def is_endpoint_on(self) -> bool:
        """Tells whether the endpoint is told."""
        ...

    async def waiting(
        self, tenant_id: TenantId | None, sink: Sink | None, after: OutgoingKey | None, size: int, *, dead_only: bool
    ) -> Sequence[Waiting]:
        """Returns up to `size` things that are not delivered, after a position."""
        ...

    async def replay(self, tenant_id: TenantId | None, sink: Sink, *, accept_repeats: bool) -> int:
        """Makes what was given up wait again; returns how much."""
        ...
