"""What the ledger says of a reservation, and what that is to the limits of the provider's account. Decides nothing."""

from dataclasses import dataclass
from enum import StrEnum

from services.kernel.ids import ReservationId, TenantId
from services.ratelimit.limits import Amounts
from services.ratelimit.provider_share import ONE_REQUEST, AccountUse, CountedCall


class CommitKind(StrEnum):
    """What the ledger decided of a call."""

    SETTLED = "settled"
    VOID = "void"
    PIN = "pin"


@dataclass(frozen=True, slots=True)
class Settlement:
    """What the ledger says of one reservation, in the epoch it said so. `output_tokens` are those within `actual`; None: not told."""

    tenant_id: TenantId
    reservation_id: ReservationId
    epoch: int
    kind: CommitKind
    actual: Amounts
    output_tokens: int | None = None

    @property
    def counted_call(self) -> CountedCall | None:
        """What a provider account counts the call with from now on; None: with what it took."""
        match self.kind:
            case CommitKind.SETTLED if self.output_tokens is not None:
                use = AccountUse(1, max(0, self.actual.tokens - self.output_tokens), self.output_tokens)
            case CommitKind.VOID:
                use = ONE_REQUEST
            case _:
                return None
        return CountedCall(self.tenant_id, self.reservation_id, use)
