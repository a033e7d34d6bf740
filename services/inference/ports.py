"""What a call needs from outside, each as one Protocol. Adapters implement them; every failure they raise is a MeshError."""

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import Enum, auto
from typing import Protocol

from services.inference.call import CallRef, Found, HoldToTake, Memory, Question, Ready, Received, Reservation, Settled, Usage
from services.inference.prompt_assembly import AssembledPrompt, Turn
from services.inference.worst_case import Hold, Price
from services.kernel.errors import MeshError
from services.kernel.ids import CallId, ReservationId, TenantId
from services.kernel.tenant_context import TenantContext


class OpenOutcome(Enum):
    """How the ledger answered an open."""

    OPENED = auto()
    STALE_EPOCH = auto()
    ENDED = auto()
    CALL_ID_TAKEN = auto()
    PRICE_MISSING = auto()
    TENANT_NOT_PROVEN = auto()


@dataclass(frozen=True, slots=True)
class Opened:
    """The outcome of an open, and whether the ledger has the call as void."""

    outcome: OpenOutcome
    void: bool = False


@dataclass(frozen=True, slots=True)
class CallToOpen:
    """An attempt as the ledger records it before it is sent."""

    ref: CallRef
    question: Question
    hold: Hold
    reservation: Reservation
    prompt_version: str
    dispatch_deadline: datetime
    attempt: int


@dataclass(frozen=True, slots=True)
class CallToSettle:
    """What an attempt was billed."""

    ref: CallRef
    received: Received


@dataclass(frozen=True, slots=True)
class CallToVoid:
    """An attempt that ends without a bill: `certain` when nothing was billed, else it may have been."""

    ref: CallRef
    certain: bool
    cause: str
    received: Usage | None = None


class Limits(Protocol):
    """The limits of tenants."""

    async def reserve(self, wanted: HoldToTake) -> Reservation:
        """Holds the worst case, or less output where the rules shorten it; repeatable by reservation id."""
        ...

    async def reserve_ahead(self, wanted: Sequence[HoldToTake]) -> Sequence[Reservation | MeshError]:
        """Holds several of one tenant, each by itself and whole or not at all. Raises: MeshError when it is not known of any."""
        ...

    async def extend(self, tenant: TenantContext, reservation: Reservation, hold: Hold) -> None:
        """Raises a living hold to this one, all or nothing; repeatable. Raises: as reserve."""
        ...

    async def renew(self, refs: Sequence[CallRef]) -> Sequence[CallRef]:
        """Prolongs leases and returns those that no longer live."""
        ...

    async def release(self, tenant: TenantContext, reservation_id: ReservationId, epoch: int) -> None:
        """Lets a hold go."""
        ...


class Ledger(Protocol):
    """The ledger of calls. Every answer was committed before it was given; everything may be repeated."""

    async def open(self, call: CallToOpen) -> Opened:
        """Records an attempt before it is sent."""
        ...

    async def extend(self, ref: CallRef, hold: Hold) -> bool:
        """Raises the bound of an open call to what is held; False when the call is not open. Repeatable."""
        ...

    async def settle(self, call: CallToSettle) -> Settled:
        """Records what it was billed."""
        ...

    async def void(self, call: CallToVoid) -> None:
        """Ends it without a bill."""
        ...

    async def renew(self, refs: Sequence[CallRef]) -> Sequence[CallRef]:
        """Prolongs leases and returns those of calls that are not open."""
        ...


class OwnProviderKeys(Protocol):
    """The keys that tenants bring for the provider."""

    async def get(self, context: TenantContext) -> str:
        """Returns the tenant's own key; empty when it has none."""
        ...


class Prices(Protocol):
    """The price book."""

    async def price(self, model: str) -> Price | None:
        """Returns the price in force; None when the book has none for the model."""
        ...


class Documents(Protocol):
    """The tenant's documents."""

    async def search(self, tenant: TenantContext, query: str, top_k: int) -> Found:
        """Returns the chunks nearest to the query, best first, none of them blank."""
        ...


class Recollection(Protocol):
    """Inference's own store, as a call uses it."""

    async def recall(self, tenant_id: TenantId, conversation_id: str, history_bytes: int) -> Memory:
        """Reads the newest prompt and the conversation's last turns, fresh, in one round trip. Raises: NotFound."""
        ...

    async def remember(self, tenant_id: TenantId, conversation_id: str, call_id: CallId, turns: Sequence[Turn]) -> None:
        """Adds a call's turns to its conversation; repeatable by call id. A conversation deleted meanwhile stays deleted."""
        ...


class Provider(Protocol):
    """A model provider. One attempt a call: it never retries."""

    def stream(self, question: Question, prompt: AssembledPrompt, max_output_tokens: int, received: Received) -> AsyncGenerator[str, None]:
        """Sends the request, yields the answer's text as it comes and keeps `received` up to date.

        What it writes beside text is counted in `received` and yielded as an empty piece. Closing the iterator closes the connection.

        Raises: ProviderFailure.
        """
        ...


class TokenCounter(Protocol):
    """The provider's own count of tokens, which costs nothing."""

    async def count_tokens(self, question: Question, system: str, messages: Sequence[Turn]) -> int:
        """Returns the input tokens a request of these texts would have. Raises: ProviderFailure."""
        ...


class Sink(Protocol):
    """Where the answer goes."""

    async def started(self, question: Question, ready: Ready) -> None:
        """Tells that the call is recorded and about to be sent."""
        ...

    def add(self, text: str) -> None:
        """Takes the next piece of text without waiting."""
        ...
