"""One call as values: what is asked, what is held for it, how far its one attempt got, what came back. Decides nothing."""

import time
from dataclasses import dataclass, field
from datetime import datetime
from enum import Enum, auto
from typing import NamedTuple
from uuid import UUID

from mesh.common.v1 import limit_rule_pb2
from services.inference.models import Model
from services.inference.prompt_assembly import AssembledPrompt, Chunk, Turn
from services.inference.worst_case import Hold, Price
from services.kernel.ids import CallId, ReservationId, TenantId
from services.kernel.tenant_context import TenantContext


class CallRef(NamedTuple):
    """An attempt, as the limits and the ledger know it."""

    tenant_id: TenantId
    reservation_id: ReservationId


class RetrievalMode(Enum):
    """Whether the tenant's documents are searched, and what a failed search means."""

    OFF = auto()
    BEST_EFFORT = auto()
    REQUIRED = auto()


@dataclass(frozen=True, slots=True)
class Question:
    """A validated request. `deadline` is on time.monotonic(), `context_tokens` the most input the plan and the model allow.

    `prompt_prefix` stands before the tenant's prompt; `endpoint` is the tenant's own place at the provider, empty for everybody's.
    `provider_key` is the tenant's own; empty for the house's. Where the limits shorten its answer it needs `min_output_tokens`, and it may
    wait for them `max_wait_seconds`. `provider_account` is whose own limits it shares, empty when it is not known or
    the tenant's own is billed.
    """

    call_id: CallId
    tenant: TenantContext
    tenant_id: TenantId
    messages: tuple[Turn, ...]
    model: Model
    price: Price
    max_output_tokens: int
    context_tokens: int
    weight: int
    feature: str
    user: str
    conversation_id: str
    retrieval: RetrievalMode
    top_k: int
    stop_sequences: tuple[str, ...]
    deadline: float
    prompt_prefix: str = ""
    endpoint: str = ""
    provider_key: str = field(default="", repr=False)
    min_output_tokens: int = 1
    max_wait_seconds: float = 0.0
    provider_account: str = ""
    bills_tenant_account: bool = False

    @property
    def with_documents(self) -> bool:
        """True when documents are wanted."""
        return self.retrieval is not RetrievalMode.OFF

    def remaining_seconds(self) -> float:
        """Returns how long the call may still take; below 0 when it is over."""
        return self.deadline - time.monotonic()


@dataclass(frozen=True, slots=True)
class LimitLeft:
    """A limit of the tenant as the hold left it."""

    rule: str
    limit: int
    remaining: int
    unit: limit_rule_pb2.LimitUnit.ValueType = limit_rule_pb2.LIMIT_UNIT_UNSPECIFIED


@dataclass(frozen=True, slots=True)
class HoldToTake:
    """What the limits are asked to hold for one attempt; `attempt` counts from 1. `whole`: not to be shortened."""

    reservation_id: ReservationId
    question: Question
    hold: Hold
    attempt: int
    whole: bool = False


@dataclass(frozen=True, slots=True)
class Reservation:
    """What the limits hold: `tokens` and `cost_nano_usd` in all, `output_tokens` of them for the answer.

    `degraded`: admitted without their store, so that `limits` say nothing.
    """

    reservation_id: ReservationId
    epoch: int
    reserve_time: datetime
    limits: tuple[LimitLeft, ...]
    tokens: int
    cost_nano_usd: int
    output_tokens: int
    waited_seconds: float = 0.0
    degraded: bool = False


@dataclass(slots=True)
class Lease:
    """A hold that is kept alive. `opened` once the ledger knows the call, `lost` once a store no longer does."""

    ref: CallRef
    opened: bool = False
    lost: bool = False


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens by price class."""

    input_tokens: int = 0
    output_tokens: int = 0
    cache_read_tokens: int = 0
    cache_write_5m_tokens: int = 0
    cache_write_1h_tokens: int = 0

    @property
    def total(self) -> int:
        """All classes together."""
        return self.total_input + self.output_tokens

    @property
    def total_input(self) -> int:
        """All classes of input together."""
        return self.input_tokens + self.cache_read_tokens + self.cache_write_5m_tokens + self.cache_write_1h_tokens


@dataclass(slots=True)
class Received:
    """What the provider sent so far; `complete` once its final usage arrived.

    `output_bytes` of any kind were written; at `counted_bytes` of them the provider's own count was `counted_tokens`.
    """

    usage: Usage = field(default_factory=Usage)
    complete: bool = False
    stop_reason: str = ""
    provider_request_id: str = ""
    parts: list[str] = field(default_factory=list)
    output_bytes: int = 0
    counted_tokens: int = 0
    counted_bytes: int = 0
    dispatch_time: float = 0.0
    first_token_time: float | None = None
    end_time: float = 0.0

    @property
    def text(self) -> str:
        """The answer so far."""
        return "".join(self.parts)

    @property
    def first_token_ms(self) -> int:
        """From dispatch to the first text, 0 when there was none."""
        return 0 if self.first_token_time is None else int((self.first_token_time - self.dispatch_time) * 1000)

    @property
    def total_ms(self) -> int:
        """From dispatch to the end."""
        return max(0, int((self.end_time - self.dispatch_time) * 1000))


class Stage(Enum):
    """How far an attempt got: what has to be undone depends on nothing else."""

    RESERVED = auto()
    OPENING = auto()
    OPENED = auto()
    DISPATCHED = auto()
    ANSWERED = auto()


@dataclass(slots=True)
class Attempt:
    """The one attempt at the provider that a reservation stands for; `number` is which of the call, from 1.

    `input_tokens` is the most input it is put together with; what is held for it may be more.
    """

    question: Question
    hold: Hold
    reservation: Reservation
    lease: Lease
    input_tokens: int
    number: int = 1
    stage: Stage = Stage.RESERVED
    received: Received = field(default_factory=Received)

    @property
    def ref(self) -> CallRef:
        """Its name at the limits and the ledger."""
        return self.lease.ref

    @property
    def allowance(self) -> "Allowance":
        """What its answer may have."""
        granted = self.reservation.output_tokens
        return Allowance(granted, granted < self.question.max_output_tokens, self.reservation.waited_seconds)


@dataclass(frozen=True, slots=True)
class Memory:
    """What the tenant's own database says at the moment of the call: the newest prompt and the conversation's turns, oldest first."""

    prompt: str
    prompt_version: int
    history: tuple[Turn, ...]


@dataclass(frozen=True, slots=True)
class Found:
    """The documents that were found; `degraded` when they were wanted and could not be had."""

    chunks: tuple[Chunk, ...] = ()
    degraded: bool = False


@dataclass(frozen=True, slots=True)
class Allowance:
    """What the limits gave an answer: its output tokens, whether that is less than was asked for, and how long it waited for them."""

    output_tokens: int
    shortened: bool
    waited_seconds: float


@dataclass(frozen=True, slots=True)
class Ready:
    """All an attempt needs to be dispatched."""

    prompt: AssembledPrompt
    prompt_version: str
    degraded: bool
    allowance: Allowance


@dataclass(frozen=True, slots=True)
class Settled:
    """The ledger's answer: what the call cost and where that stands."""

    cost_nano_usd: int
    entry_id: UUID


@dataclass(frozen=True, slots=True)
class Report:
    """The call, finished."""

    question: Question
    ready: Ready
    received: Received
    settled: Settled
    remaining: tuple[LimitLeft, ...]
