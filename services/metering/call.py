"""What the ledger says about calls, as values: states, outcomes, usage and the items of each kind of batch.

The numbers of the enumerations are those of the contract and of the database; a test holds them together.
"""

from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple, Protocol, Self


class CallState(IntEnum):
    """Where a call is."""

    NONE = 0
    OPEN = 1
    SETTLED = 2
    VOID = 3
    UNRESOLVED = 4
    RECONCILED = 5


class OpenOutcome(IntEnum):
    """How an open went."""

    OPENED = 1
    STALE_EPOCH = 2
    ENDED = 3
    CALL_ID_TAKEN = 4
    PRICE_MISSING = 5
    TENANT_NOT_PROVEN = 6


class SettleOutcome(IntEnum):
    """How a settlement went."""

    SETTLED = 1
    CONFLICT = 2
    NOT_OPEN = 3
    ADJUSTED = 4


class VoidKind(IntEnum):
    """Whether it is certain that a call was not billed."""

    NOT_BILLED = 1
    UNKNOWN = 2


class ExtendOutcome(IntEnum):
    """What came of an extension."""

    EXTENDED = 1
    NOT_OPEN = 2


class FenceOutcome(IntEnum):
    """What the limits do with a hold whose lease ended."""

    VOID = 1
    UNRESOLVED = 2
    SETTLED = 3
    SETTLED_BEFORE = 4


@dataclass(frozen=True, slots=True)
class TokenUsage:
    """Tokens of a call by price class, each 0 or more."""

    input: int = 0
    output: int = 0
    cache_read: int = 0
    cache_write_5m: int = 0
    cache_write_1h: int = 0

    @property
    def total(self) -> int:
        """All classes together."""
        return self.input + self.output + self.cache_read + self.cache_write_5m + self.cache_write_1h


class BatchItem(Protocol):
    """What every item of a batch has: ids as the 16 bytes the wire and the database share, which also sort as Postgres sorts UUIDs."""

    @property
    def tenant_id(self) -> bytes:
        """Whose."""
        ...

    @property
    def reservation_id(self) -> bytes:
        """Which attempt."""
        ...


@dataclass(frozen=True, slots=True)
class CallKey:
    """An attempt of a tenant."""

    tenant_id: bytes
    reservation_id: bytes


class Opening(NamedTuple):
    """An attempt to record before anything is sent. Times are microseconds since 1970, UTC; the tier is known once the tenant is proven.

    A plain tuple, as `Settlement` is, because hundreds come at once. `provider_account` is the operator's account that is billed; where
    it is the tenant's own, `bills_tenant_account` says so.
    """

    tenant_id: bytes
    reservation_id: bytes
    context_token: str
    call_id: bytes
    attempt: int
    epoch: int
    reserve_us: int
    dispatch_deadline_us: int
    bound_tokens: int
    bound_nano_usd: int
    price_version: str
    provider: str
    model: str
    feature: str
    user: str
    prompt_version: str
    provider_account: str = ""
    bills_tenant_account: bool = False
    tier: str = ""

    def in_tier(self, tier: str) -> Self:
        """Returns the same attempt of a tenant in that tier."""
        return self._replace(tier=tier)


@dataclass(frozen=True, slots=True)
class Opened:
    """How one open went, and where the call is."""

    outcome: OpenOutcome
    state: CallState


class Settlement(NamedTuple):
    """What an attempt was billed."""

    tenant_id: bytes
    reservation_id: bytes
    usage: TokenUsage
    stop_reason: str
    provider_request_id: str
    first_token_ms: int
    total_ms: int


class RatedSettlement(NamedTuple):
    """A settlement with its cost and the id its entry will have. `cost_nano_usd` is None when no opened call was found to rate it by."""

    settlement: Settlement
    entry_id: bytes
    cost_nano_usd: int | None

    @property
    def tenant_id(self) -> bytes:
        """Whose."""
        return self.settlement.tenant_id

    @property
    def reservation_id(self) -> bytes:
        """Which attempt."""
        return self.settlement.reservation_id


@dataclass(frozen=True, slots=True)
class Settled:
    """How one settlement went: the cost and entry the ledger holds, which are the first ones when it was repeated."""

    outcome: SettleOutcome
    cost_nano_usd: int
    entry_id: bytes
    # The tenant's epoch when this very item was written; None when it was there before or was refused.
    told_epoch: int | None


@dataclass(frozen=True, slots=True)
class Ending:
    """An attempt to end without a bill; `received` is what an UNKNOWN one got before its end."""

    tenant_id: bytes
    reservation_id: bytes
    kind: VoidKind
    cause: str
    received: TokenUsage | None


@dataclass(frozen=True, slots=True)
class Ended:
    """Where a call is after its ending, and the end written now, if any."""

    state: CallState
    told_epoch: int | None


@dataclass(frozen=True, slots=True)
class Fencing:
    """An attempt whose lease at the limits ended, and the limits' epoch."""

    tenant_id: bytes
    reservation_id: bytes
    epoch: int


@dataclass(frozen=True, slots=True)
class Fenced:
    """What the limits do with the hold; `told_epoch` when the fence itself left the call unresolved."""

    outcome: FenceOutcome
    told_epoch: int | None


@dataclass(frozen=True, slots=True)
class Extension:
    """The bounds an open attempt is to have at least: not the difference."""

    tenant_id: bytes
    reservation_id: bytes
    bound_tokens: int
    bound_nano_usd: int


@dataclass(frozen=True, slots=True)
class PriceKey:
    """What a call is rated by: fixed at its open."""

    version: str
    provider: str
    model: str
