"""What may stand around a decision: a guard before it, a provider account's share beside it. Where there is none, these do nothing."""

from collections.abc import Sequence
from typing import Protocol

from services.kernel.ids import TenantId
from services.kernel.tenant_context import TenantContext
from services.ratelimit.decision import Refusal
from services.ratelimit.provider_share import AccountUse, TakenShare
from services.ratelimit.terms import Terms


class Guard(Protocol):
    """Keeps tenants out that go on after being refused."""

    async def admit(self, context: TenantContext, terms: Terms) -> None:
        """Raises: LimitExceeded ABUSE_GUARD while the tenant is kept out."""
        ...

    async def refused(self, context: TenantContext, terms: Terms, refusal: Refusal) -> None:
        """Learns of a refusal. Writes nothing to the tenant's counters."""
        ...


class AccountShares(Protocol):
    """Shares a provider account's own limits among tenants."""

    async def take(self, account: str, tenant_id: TenantId, weight: int, need: AccountUse) -> TakenShare | None:
        """Takes a call's worst case; None for an account without limits. Raises: LimitExceeded PROVIDER_SHARE, Unavailable."""
        ...

    async def give_back(self, shares: Sequence[tuple[TakenShare, AccountUse]]) -> None:
        """Gives back what calls did not use. Raises: Unavailable."""
        ...


class NoGuard:
    """Keeps nobody out."""

    async def admit(self, context: TenantContext, terms: Terms) -> None:
        """Admits."""

    async def refused(self, context: TenantContext, terms: Terms, refusal: Refusal) -> None:
        """Forgets."""


class NoShares:
    """Knows no account."""

    async def take(self, account: str, tenant_id: TenantId, weight: int, need: AccountUse) -> TakenShare | None:
        """Lets everyone have it."""
        return None

    async def give_back(self, shares: Sequence[tuple[TakenShare, AccountUse]]) -> None:
        """Nothing was taken."""
