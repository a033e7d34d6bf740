"""Holds: taken before a call, prolonged while it runs, ended by what the ledger says. Refuses with the rule that binds, never by guess."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Protocol
from uuid import UUID

import structlog

from services.kernel.errors import ContentConflict, InvalidRequest, MeshError, ReservationLost
from services.kernel.ids import ReservationId, TenantId, uuid7_time
from services.kernel.request_context import remaining_seconds
from services.kernel.tenant_context import TenantContext
from services.ratelimit.decision import Refusal, refusal
from services.ratelimit.fencing import Fencing
from services.ratelimit.limits import Amounts, Limits
from services.ratelimit.rebuild import Rebuilder, rebuilding
from services.ratelimit.window import LimitStatus, Usage, microseconds, statuses

log = structlog.get_logger(__name__)

LARGEST_ID_AGE_SECONDS = 60
_MOST_REBUILDS = 3
_DEFAULT_DEADLINE_SECONDS = 5.0


class Verdict(StrEnum):
    """What the store answers a Reserve or a look."""

    HELD = "held"
    REFUSED = "refused"
    REBUILD = "rebuild"
    OLD = "old"
    AHEAD = "ahead"
    ENDED = "ended"
    CONFLICT = "conflict"


class CommitKind(StrEnum):
    """What the ledger decided of a call."""

    SETTLED = "settled"
    VOID = "void"
    PIN = "pin"


@dataclass(frozen=True, slots=True)
class Answer:
    """The store's answer; `usage` is there when it held or refused."""

    verdict: Verdict
    usage: Usage | None = None


@dataclass(frozen=True, slots=True)
class Held:
    """A hold, and the limits after it."""

    epoch: int
    reserve_us: int
    limits: Sequence[LimitStatus]


@dataclass(frozen=True, slots=True)
class Look:
    """The limits as they stand, and what would keep a call out."""

    limits: Sequence[LimitStatus]
    refusal: Refusal | None


@dataclass(frozen=True, slots=True)
class Settlement:
    """What the ledger says of one reservation, in the epoch it said so."""

    tenant_id: TenantId
    reservation_id: ReservationId
    epoch: int
    kind: CommitKind
    actual: Amounts


class LimitsOf(Protocol):
    """Knows what a tenant may use."""

    async def __call__(self, context: TenantContext) -> Limits:
        """Returns the limits of the context's tenant, of its configuration's version or newer."""
        ...


class ReservationStore(Protocol):
    """Decides and counts, one atomic step a tenant."""

    window_us: int

    async def reserve(self, tenant_id: TenantId, reservation_id: ReservationId, minted_us: int, amounts: Amounts, limits: Limits) -> Answer:
        """Takes a hold, or says why not and changes nothing."""
        ...

    async def look(self, tenant_id: TenantId, amounts: Amounts, limits: Limits) -> Answer:
        """Says what is used and whether a call of this size would be held. Writes nothing."""
        ...

    async def release(self, tenant_id: TenantId, reservation_id: ReservationId, epoch: int) -> None:
        """Lets a hold of this epoch go; ignores any other."""
        ...

    async def renew(self, reservations: Sequence[tuple[TenantId, ReservationId]]) -> list[bool]:
        """Prolongs leases; tells of each whether it lives."""
        ...

    async def commit(self, settlements: Sequence[Settlement]) -> list[bool]:
        """Applies settlements; tells of each whether it is done. False: send it again."""
        ...


class Reservations:
    """Every use of a tenant's limits."""

    def __init__(self, store: ReservationStore, limits_of: LimitsOf, rebuilder: Rebuilder, fencing: Fencing) -> None:
        self._store = store
        self._limits_of = limits_of
        self._rebuilder = rebuilder
        self._fencing = fencing

    async def reserve(self, context: TenantContext, reservation_id: ReservationId, amounts: Amounts) -> Held:
        """Holds the worst case of a call. Repeated with the same id and amounts it gives the same hold.

        Raises: LimitExceeded, ReservationLost, InvalidRequest, ContentConflict, Unavailable.
        """
        tenant_id = _tenant_of(context)
        minted_us = _minted_us(reservation_id)
        limits = await self._limits_of(context)
        answer = await self._reserve(context, reservation_id, minted_us, amounts, limits)
        if self._may_be_in_the_way(answer, limits, amounts):
            # What the holds of a dead caller are, only the ledger knows.
            await self._fencing.fence_expired(tenant_id)
            answer = await self._reserve(context, reservation_id, minted_us, amounts, limits)
        usage = answer.usage
        if usage is None:
            raise _lost_or_invalid(answer.verdict, reservation_id)
        self._fencing.watch(tenant_id)
        if answer.verdict is Verdict.HELD:
            return Held(usage.epoch, usage.reserve_us, statuses(limits, usage, self._store.window_us))
        raise self._refused(tenant_id, limits, usage, amounts)

    async def check(self, context: TenantContext, amounts: Amounts) -> Look:
        """Tells whether a call of this size would be admitted now. Counts nothing.

        A tenant without counters gets them from the ledger first: its limits must be readable before its first call.
        """
        limits = await self._limits_of(context)
        usage = await self._look(context, amounts, limits)
        window_us = self._store.window_us
        return Look(statuses(limits, usage, window_us), refusal(limits, usage, amounts, window_us))

    async def release(self, context: TenantContext, reservation_id: ReservationId, epoch: int) -> None:
        """Lets a hold go whose call was never opened, or was voided. Unknown or ended ones are ignored."""
        await self._store.release(_tenant_of(context), reservation_id, epoch)

    async def renew(self, reservations: Sequence[tuple[TenantId, ReservationId]]) -> list[bool]:
        """Prolongs leases; tells of each whether it lives."""
        return await self._store.renew(reservations)

    async def commit(self, settlements: Sequence[Settlement]) -> list[bool]:
        """Applies what the ledger says; tells of each whether it is done."""
        return await self._store.commit(settlements)

    async def _reserve(
        self, context: TenantContext, reservation_id: ReservationId, minted_us: int, amounts: Amounts, limits: Limits
    ) -> Answer:
        tenant_id = _tenant_of(context)
        for _ in range(_MOST_REBUILDS):
            answer = await self._store.reserve(tenant_id, reservation_id, minted_us, amounts, limits)
            if answer.verdict is not Verdict.REBUILD:
                return answer
            await self._rebuild(context)
        raise rebuilding("the caller's deadline is near")

    async def _look(self, context: TenantContext, amounts: Amounts, limits: Limits) -> Usage:
        tenant_id = _tenant_of(context)
        for _ in range(_MOST_REBUILDS):
            answer = await self._store.look(tenant_id, amounts, limits)
            if answer.usage is not None:
                return answer.usage
            await self._rebuild(context)
        raise rebuilding("the caller's deadline is near")

    async def _rebuild(self, context: TenantContext) -> None:
        try:
            async with asyncio.timeout(remaining_seconds(_DEFAULT_DEADLINE_SECONDS) * 0.9):
                await self._rebuilder.ensure(context)
        except TimeoutError:
            raise rebuilding("the caller's deadline is near") from None
        self._fencing.watch(_tenant_of(context))

    def _may_be_in_the_way(self, answer: Answer, limits: Limits, amounts: Amounts) -> bool:
        """Tells whether the refusal could fall away with the holds whose lease has ended."""
        if answer.verdict is not Verdict.REFUSED or answer.usage is None or not answer.usage.expired_holds:
            return False
        why = refusal(limits, answer.usage, amounts, self._store.window_us)
        return why is not None and why.retry_after_seconds is not None

    def _refused(self, tenant_id: TenantId, limits: Limits, usage: Usage, amounts: Amounts) -> MeshError:
        why = refusal(limits, usage, amounts, self._store.window_us)
        if why is None:
            msg = f"the store refused what its own figures admit: {usage}"
            raise RuntimeError(msg)
        log.info("reservation_refused", rule=why.status.rule.value, limit=why.status.limit, used=why.status.used, needed=why.needed)
        return why.error(tenant_id)


def _tenant_of(context: TenantContext) -> TenantId:
    if context.tenant_id is None:
        msg = "a reservation needs a tenant: the method's policy requires one"
        raise RuntimeError(msg)
    return context.tenant_id


def _minted_us(reservation_id: UUID) -> int:
    minted: datetime | None = uuid7_time(reservation_id)
    if minted is None:
        raise InvalidRequest("reservation_id", "must be a UUID of version 7, made for this attempt")
    return microseconds(minted)


def _lost_or_invalid(verdict: Verdict, reservation_id: UUID) -> MeshError:
    match verdict:
        case Verdict.AHEAD:
            return InvalidRequest(
                "reservation_id",
                f"carries a time more than {LARGEST_ID_AGE_SECONDS} s ahead of the store's clock; correct the clock that made it",
            )
        case Verdict.CONFLICT:
            return ContentConflict("reservation", "this reservation id holds other amounts: make a new id for each attempt")
        case Verdict.OLD:
            why = f"the reservation id is older than {LARGEST_ID_AGE_SECONDS} s"
        case _:
            why = "the reservation has ended"
    return ReservationLost(reservation_id, f"{why}: start the call again with a new one")
