"""How a provider account's own limits are shared: by weight over the tenants that use it, what is unused lent and given back in time.

Whoever is refused claims its share from then on, for a window: what it lacks is kept for it as use leaves the window, and lent to nobody.
Which tenant asks counts, never how often or from how many replicas.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Protocol

import structlog

from mesh.common.v1 import error_reason_pb2
from services.kernel.errors import LimitExceeded, QuotaViolation, Unavailable
from services.kernel.ids import ReservationId, TenantId
from services.ratelimit.calendar_periods import moment
from services.ratelimit.limit_rule import MINUTE_US
from services.ratelimit.limits import Demand
from services.ratelimit.turn import Place, Queued, Stand

log = structlog.get_logger(__name__)

WINDOW_US = MINUTE_US
_DIMENSIONS = ("requests", "input tokens", "output tokens")


class ShareVerdict(IntEnum):
    """What the store answers; the numbers are the script's."""

    TAKEN = 0
    ACCOUNT_FULL = 1
    SHARE_USED = 2
    TOO_LARGE = 3
    TAKEN_BEFORE = 4
    QUEUED = 5


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
    """One decision. `limit` and `used` are the account's for ACCOUNT_FULL and TOO_LARGE, the tenant's share for SHARE_USED.

    Of one that waits: since when, 0 without a place, and how many of its tenant's are before it.
    """

    verdict: ShareVerdict
    now_us: int
    dimension: int = 0
    limit: int = 0
    used: int = 0
    free_us: int = 0
    since_us: int = 0
    ahead: int = 0

    def place(self, account: str) -> Place:
        """Where one stands that was not admitted."""
        return Place(self.now_us, self.since_us, self.ahead, 0, line=account)


class ShareRefused(LimitExceeded):
    """An account has no room for a call now; `place` is where it waits for it."""

    place: Place | None = None


@dataclass(frozen=True, slots=True)
class CountedCall:
    """What a call is to be counted with."""

    tenant_id: TenantId
    call_id: ReservationId
    use: AccountUse


@dataclass(frozen=True, slots=True)
class TakenShare:
    """What a call took of an account just now."""

    account: str
    tenant_id: TenantId
    call_id: ReservationId


NOTHING_USED = AccountUse(0, 0, 0)
# The request may have reached the provider, which then counted it.
ONE_REQUEST = AccountUse(1, 0, 0)


def need_of(demand: Demand, input_tokens: int) -> AccountUse:
    """The worst case of a call: its output is what it may be shortened by, and else all that is not its input."""
    short = demand.shortening
    output = max(0, demand.amounts.tokens - input_tokens) if short is None else short.max_output_tokens
    return AccountUse(1, input_tokens, output)


class ShareStore(Protocol):
    """Keeps what calls took of accounts in the last window."""

    async def take(
        self,
        account: str,
        limits: AccountUse,
        tenant_id: TenantId,
        weight: int,
        call_id: ReservationId,
        need: AccountUse,
        stand: Stand | None = None,
    ) -> ShareAnswer:
        """Takes the need once, or says why not. A refusal takes nothing; it is remembered who lacks its share."""
        ...

    async def count(self, account: str, calls: Sequence[CountedCall]) -> None:
        """Counts calls with what they used, where they are known and still in the window."""
        ...


class ProviderShares:
    """Every known account. An unknown account has no limits here."""

    def __init__(self, store: ShareStore, accounts: dict[str, AccountUse]) -> None:
        self._store = store
        self._accounts = accounts

    async def take(
        self, account: str, tenant_id: TenantId, weight: int, call_id: ReservationId, need: AccountUse, stand: Stand | None = None
    ) -> TakenShare | Queued | None:
        """Takes a call's worst case; None for an account without limits, and for a call that has its share already.

        Raises: ShareRefused PROVIDER_SHARE, Unavailable.
        """
        limits = self._accounts.get(account)
        if limits is None:
            return None
        answer = await self._store.take(account, limits, tenant_id, max(1, weight), call_id, need, stand)
        match answer.verdict:
            case ShareVerdict.TAKEN:
                return TakenShare(account, tenant_id, call_id)
            case ShareVerdict.TAKEN_BEFORE:
                return None
            case ShareVerdict.QUEUED:
                return Queued(answer.place(account))
            case _:
                refused = share_refusal(account, tenant_id, answer, need)
                refused.place = answer.place(account) if stand is not None else None
                raise refused

    async def give_back(self, shares: Sequence[TakenShare]) -> None:
        """Gives back all that calls took which are not made after all; they may take again. Tries once."""
        for share in shares:
            await self._count(share.account, [CountedCall(share.tenant_id, share.call_id, NOTHING_USED)])

    async def count(self, calls: Sequence[CountedCall]) -> None:
        """Counts calls with what they used, whichever account they are of. Repeated it changes nothing. Tries once."""
        # Whose account a call is of the accounts know themselves: the ledger need not be told, and there are few of them.
        for account in self._accounts if calls else ():
            await self._count(account, calls)

    async def _count(self, account: str, calls: Sequence[CountedCall]) -> None:
        try:
            await self._store.count(account, calls)
        except Unavailable:
            # Too much is counted, and only until the minute ends: nothing that the ledger need tell again.
            log.info("shares_left_to_their_window", account=account, calls=len(calls))


def share_refusal(account: str, tenant_id: TenantId, answer: ShareAnswer, need: AccountUse) -> ShareRefused:
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
        return ShareRefused(reason, message, None, quota, **metadata)
    retry_after_seconds = max(0, -(-(answer.free_us - answer.now_us) // 1000)) / 1000
    metadata["reset_time"] = moment(answer.free_us).isoformat().replace("+00:00", "Z")
    whose = "your share of the" if answer.verdict is ShareVerdict.SHARE_USED else "the"
    message = (
        f"{answer.used} of {whose} provider account's {answer.limit} {what} a minute are in use: try again in {retry_after_seconds:.3f} s."
    )
    return ShareRefused(reason, message, retry_after_seconds, quota, **metadata)
