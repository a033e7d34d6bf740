"""What may stand around a decision: a guard before it, a provider account's share beside it. Where there is none, these do nothing."""

from typing import Protocol

from services.kernel.ids import ReservationId
from services.kernel.tenant_context import TenantContext
from services.ratelimit.decision import Refusal
from services.ratelimit.limits import Amounts
from services.ratelimit.terms import Terms


class Guard(Protocol):
    """Keeps tenants out that go on after being refused."""

    def admit(self, context: TenantContext, terms: Terms) -> None:
        """Raises: LimitExceeded ABUSE_GUARD while the tenant is kept out."""
        ...

    def refused(self, context: TenantContext, terms: Terms, refusal: Refusal) -> None:
        """Learns of a refusal. Writes nothing to the tenant's counters."""
        ...


class AccountShares(Protocol):
    """Shares a provider account's own limits among tenants."""

    async def take(self, context: TenantContext, terms: Terms, account: str, reservation_id: ReservationId, amounts: Amounts) -> None:
        """Takes a part of the tenant's share; idempotent by reservation. Raises: LimitExceeded PROVIDER_SHARE, Unavailable."""
        ...

    async def give_back(self, context: TenantContext, account: str, reservation_id: ReservationId) -> None:
        """Gives back what a reservation took that a rule then refused."""
        ...


class NoGuard:
    """Keeps nobody out."""

    def admit(self, context: TenantContext, terms: Terms) -> None:
        """Admits."""

    def refused(self, context: TenantContext, terms: Terms, refusal: Refusal) -> None:
        """Forgets."""


class NoShares:
    """Knows no account."""

    async def take(self, context: TenantContext, terms: Terms, account: str, reservation_id: ReservationId, amounts: Amounts) -> None:
        """Lets everyone have it."""

    async def give_back(self, context: TenantContext, account: str, reservation_id: ReservationId) -> None:
        """Nothing was taken."""
