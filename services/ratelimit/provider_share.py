"""How a provider account's own limits are shared: by weight over the tenants that use it, with unused shares lent and soon given back.

A tenant within its share is refused only while others still hold what it lent them; from its first refusal on nobody borrows, so within one
window it has its share. Which tenant asks counts, never how often or from how many replicas.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Protocol

from mesh.common.v1 import error_reason_pb2
from services.kernel.errors import LimitExceeded, QuotaViolation
from services.kernel.ids import TenantId
from services.ratelimit.calendar_periods import moment
from services.ratelimit.limit_rule import MINUTE_US
from services.ratelimit.limits import Demand

WINDOW_US = MINUTE_US
_DIMENSIONS = ("requests", "input tokens", "output tokens")


class ShareVerdict(IntEnum):
    """What the store answers; the numbers are the script's."""

    TAKEN = 0
    ACCOUNT_FULL = 1
    SHARE_USED = 2
    TOO_LARGE = 3


@dataclass(frozen=True, slots=True)
class AccountUse:
    """Requests, input tokens and output tokens: of one call, or in any minute of an account. 0 in an account's limits means unlimited."""

    requests: int
    input_tokens: int
    output_tokens: int

    def in_order(self) -> tuple[int, int, int]:
        """The three dimensions as scripts take them."""
        return (self.requests, self.input_tokens, self.output_tokens)


@dataclass(frozen=True, slots=True)
class ShareAnswer:
    """One decision. `limit` and `used` are the account's for ACCOUNT_FULL and TOO_LARGE, the tenant's share for SHARE_USED."""

    verdict: ShareVerdict
    now_us: int
    dimension: int = 0
    limit: int = 0
    used: int = 0
    free_us: int = 0


@dataclass(frozen=True, slots=True)
class TakenShare:
    """What a call took of an account, to be given back in part or whole."""

    account: str
    tenant_id: TenantId
    taken_us: int
    use: AccountUse


def need_of(demand: Demand, input_tokens: int) -> AccountUse:
    """The worst case of a call: its output is what it may be shortened by, and else all that is not its input."""
    short = demand.shortening
    output = max(0, demand.amounts.tokens - input_tokens) if short is None else short.max_output_tokens
    return AccountUse(1, input_tokens, output)


class ShareStore(Protocol):
    """Keeps what tenants took of accounts in the last window."""

    async def take(self, account: str, limits: AccountUse, tenant_id: TenantId, weight: int, need: AccountUse) -> ShareAnswer:
        """Takes the need, or says why not. A refusal takes nothing; it is remembered who lacks its share."""
        ...

    async def give_back(self, share: TakenShare, unused: AccountUse) -> None:
        """Takes off what was not used, where it is still in the window."""
        ...


class ProviderShares:
    """Every known account. An unknown account has no limits here."""

    def __init__(self, store: ShareStore, accounts: dict[str, AccountUse]) -> None:
        self._store = store
        self._accounts = accounts

    async def take(self, account: str, tenant_id: TenantId, weight: int, need: AccountUse) -> TakenShare | None:
        """Takes a call's worst case; None for an account without limits. Raises: LimitExceeded PROVIDER_SHARE, Unavailable."""
        limits = self._accounts.get(account)
        if limits is None:
            return None
        answer = await self._store.take(account, limits, tenant_id, max(1, weight), need)
        if answer.verdict is not ShareVerdict.TAKEN:
            raise share_refusal(account, tenant_id, answer, need)
        return TakenShare(account, tenant_id, answer.now_us, need)

    async def give_back(self, shares: Sequence[tuple[TakenShare, AccountUse]]) -> None:
        """Gives back what calls did not use. Only an optimisation: what is never given back leaves with its window. Raises: Unavailable."""
        for share, unused in shares:
            if share.account in self._accounts:
                most = zip(unused.in_order(), share.use.in_order(), strict=True)
                await self._store.give_back(share, AccountUse(*(max(0, min(pair)) for pair in most)))


def share_refusal(account: str, tenant_id: TenantId, answer: ShareAnswer, need: AccountUse) -> LimitExceeded:
    """The refusal as callers meet it: what is in use, and when it frees."""
    what, needed = _DIMENSIONS[answer.dimension], need.in_order()[answer.dimension]
    metadata = {
        "account": account,
        "limit": str(answer.limit),
        "used": str(answer.used),
        "remaining": str(max(0, answer.limit - answer.used)),
    }
    quota = [
        QuotaViolation(f"tenant:{tenant_id}", f"{what} a minute of {account}: {answer.used} of {answer.limit} in use, {needed} needed")
    ]
    reason = error_reason_pb2.ERROR_REASON_PROVIDER_SHARE
    if answer.verdict is ShareVerdict.TOO_LARGE:
        message = f"This call needs {needed} {what} and the provider's account has {answer.limit} a minute: make the call smaller."
        return LimitExceeded(reason, message, None, quota, **metadata)
    retry_after_seconds = max(0, -(-(answer.free_us - answer.now_us) // 1000)) / 1000
    metadata["reset_time"] = moment(answer.free_us).isoformat().replace("+00:00", "Z")
    whose = "your share of the" if answer.verdict is ShareVerdict.SHARE_USED else "the"
    message = (
        f"{answer.used} of {whose} provider account's {answer.limit} {what} a minute are in use: try again in {retry_after_seconds:.3f} s."
    )
    return LimitExceeded(reason, message, retry_after_seconds, quota, **metadata)
