"""How a provider account's own limits are shared: by weight over the tenants that use it, what is unused lent and given back in time.

Whoever is refused claims its share from then on, for a window: what it lacks is kept for it as use leaves the window, and lent to nobody.
Which tenant asks counts, never how often or from how many replicas.
"""

import asyncio
import random
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Protocol

import structlog

from mesh.common.v1 import error_reason_pb2
from services.kernel.errors import ContentConflict, LimitExceeded, QuotaViolation, Unavailable
from services.kernel.ids import ReservationId, TenantId
from services.ratelimit.calendar_periods import moment
from services.ratelimit.limit_rule import MINUTE_US
from services.ratelimit.limits import Demand
from services.ratelimit.turn import Place, Queued, Stand

log = structlog.get_logger(__name__)

WINDOW_US = MINUTE_US
_DIMENSIONS = ("requests", "input tokens", "output tokens")
# Attempts are told apart by numbers that the store's scripts keep exactly.
_ATTEMPTS = 2**53


class ShareVerdict(IntEnum):
    """What the store answers; the numbers are the script's."""

    TAKEN = 0
    ACCOUNT_FULL = 1
    SHARE_USED = 2
    TOO_LARGE = 3
    TAKEN_BEFORE = 4
    QUEUED = 5
    OTHER_NEED = 6


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
    """What a call has of an account, on the word of one attempt to hold it: it stays until the last of them has given it back."""

    account: str
    tenant_id: TenantId
    call_id: ReservationId
    attempt: int


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
        attempt: int = 0,
    ) -> ShareAnswer:
        """Takes the need once, or says why not. A refusal takes nothing; it is remembered who lacks its share.

        `attempt`: who may give it back, 0 nobody. Of a call that has its share already one attempt more has it.
        """
        ...

    async def give_back(self, shares: Sequence[TakenShare]) -> None:
        """Takes attempts of one account off their calls' shares; what no attempt has any more is nobody's."""
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
        """Takes a call's worst case, once for all attempts to hold it; None for an account without limits.

        Raises: ShareRefused PROVIDER_SHARE, ContentConflict for a call that has less already, Unavailable.
        """
        limits = self._accounts.get(account)
        if limits is None:
            return None
        share = TakenShare(account, tenant_id, call_id, random.randrange(1, _ATTEMPTS))  # noqa: S311 - no secret
        taking = asyncio.ensure_future(self._store.take(account, limits, tenant_id, max(1, weight), call_id, need, stand, share.attempt))
        try:
            answer = await asyncio.shield(taking)
        except asyncio.CancelledError:
            # It is on its way, whether or not anybody waits for it.
            await asyncio.shield(self._given_back_after(taking, share))
            raise
        match answer.verdict:
            case ShareVerdict.TAKEN | ShareVerdict.TAKEN_BEFORE:
                return share
            case ShareVerdict.OTHER_NEED:
                raise other_amounts("reservation")
            case ShareVerdict.QUEUED:
                return Queued(answer.place(account))
            case _:
                refused = share_refusal(account, tenant_id, answer, need)
                refused.place = answer.place(account) if stand is not None else None
                raise refused

    async def give_back(self, shares: Sequence[TakenShare]) -> None:
        """Gives back what these attempts have of calls that they do not hold after all; they may take again. Tries once.

        Whoever is cancelled meanwhile does not wait for it: it goes on.
        """
        if shares:
            await asyncio.shield(self._given_back(shares))

    async def _given_back_after(self, taking: asyncio.Future[ShareAnswer], share: TakenShare) -> None:
        # Of two connections to the store one may overtake the other, and what is not taken yet is not given back either.
        await asyncio.wait([taking])
        await self._given_back([share])

    async def _given_back(self, shares: Sequence[TakenShare]) -> None:
        by_account: dict[str, list[TakenShare]] = {}
        for share in shares:
            by_account.setdefault(share.account, []).append(share)
        for account, taken in by_account.items():
            await self._once(account, len(taken), self._store.give_back(taken))

    async def count(self, calls: Sequence[CountedCall]) -> None:
        """Counts calls with what they used, whichever account they are of. Repeated it changes nothing. Tries once."""
        # Whose account a call is of the accounts know themselves: the ledger need not be told, and there are few of them.
        for account in self._accounts if calls else ():
            await self._once(account, len(calls), self._store.count(account, calls))

    async def _once(self, account: str, calls: int, told: Awaitable[None]) -> None:
        try:
            await told
        except Unavailable:
            # Too much is counted, and only until the minute ends: nothing that the ledger need tell again.
            log.info("shares_left_to_their_window", account=account, calls=calls)


def other_amounts(noun: str) -> ContentConflict:
    """What an id is answered that was used with other amounts, and still is."""
    return ContentConflict(noun, f"this {noun} id holds other amounts: make a new id for each attempt")


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
