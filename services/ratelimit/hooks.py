"""What may stand around a decision: a guard before it, a provider account's share beside it. Where there is none, these do nothing."""

from collections.abc import Sequence
from typing import Protocol

from services.kernel.ids import ReservationId, TenantId
from services.kernel.tenant_context import TenantContext
from services.ratelimit.decision import Refusal
from services.ratelimit.provider_share import AccountUse, CountedCall, TakenShare
from services.ratelimit.terms import Terms
from services.ratelimit.turn import Queued, Stand


class Guard(Protocol):
    """Keeps tenants out that go on after being refused."""

    async def admit(self, context: TenantContext, terms: Terms) -> None:
        """Raises: LimitExceeded ABUSE_GUARD while the tenant is kept out."""
        ...

    def admits(self, context: TenantContext, terms: Terms) -> bool:
        """Whether the tenant is known, without waiting, not to be kept out; `admit` tells of the others."""
        ...

    async def refused(self, context: TenantContext, terms: Terms, refusal: Refusal) -> None:
        """Learns of a refusal. Writes nothing to the tenant's counters."""
        ...


class AccountShares(Protocol):
    """Shares a provider account's own limits among tenants."""

    async def take(
        self, account: str, tenant_id: TenantId, weight: int, call_id: ReservationId, need: AccountUse, stand: Stand | None = None
    ) -> TakenShare | Queued | None:
        """Takes a call's worst case, once for all attempts to hold it; None for an account without limits.

        Raises: ShareRefused PROVIDER_SHARE, ContentConflict for a call that has less already, Unavailable.
        """
        ...

    async def give_back(self, shares: Sequence[TakenShare]) -> None:
        """Gives back what these attempts have of calls that they do not hold after all. Tries once."""
        ...

    async def count(self, calls: Sequence[CountedCall]) -> None:
        """Counts calls with what they used instead of what they took. Tries once."""
        ...


class NoGuard:
    """Keeps nobody out."""

    async def admit(self, context: TenantContext, terms: Terms) -> None:
        """Admits."""

    def admits(self, context: TenantContext, terms: Terms) -> bool:
        """Admits."""
        return True

    async def refused(self, context: TenantContext, terms: Terms, refusal: Refusal) -> None:
        """Forgets."""


class NoShares:
    """Knows no account."""

    async def take(
        self, account: str, tenant_id: TenantId, weight: int, call_id: ReservationId, need: AccountUse, stand: Stand | None = None
    ) -> TakenShare | Queued | None:
        """Lets everyone have it."""
        return None

    async def give_back(self, shares: Sequence[TakenShare]) -> None:
        """Nothing was taken."""

    async def count(self, calls: Sequence[CountedCall]) -> None:
        """Nothing is counted."""
