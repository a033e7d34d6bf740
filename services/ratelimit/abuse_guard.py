"""Keeps a tenant out for a while that goes on after being refused, or whose names and keys are tried with wrong secrets.

Refusals are added up in the store over all processes, told by each after `TELL_SECONDS` at the latest, so that no refusal writes by
itself. That the guard is open is known to all of them within `LOOK_SECONDS`; it closes by itself. What has been admitted is never touched:
it is renewed, extended, committed and released as ever.
"""

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

import structlog

from mesh.common.v1 import error_reason_pb2
from services.kernel.errors import LimitExceeded, Unavailable
from services.kernel.ids import TenantId
from services.kernel.tenant_context import TenantContext
from services.ratelimit.calendar_periods import moment
from services.ratelimit.decision import Refusal
from services.ratelimit.limit_rule import SECOND_US
from services.ratelimit.ready_counters import tenant_of
from services.ratelimit.terms import GuardTerms, Terms

log = structlog.get_logger(__name__)

LOOK_SECONDS = 0.2
TELL_SECONDS = 0.1
# The first look at a tenant may delay its call by so much; a store that is slower than that refuses it anyway.
_FIRST_LOOK_SECONDS = 0.01
_CAPACITY = 10_000


class AbuseCause(StrEnum):
    """Why the guard opened; on the wire in the metadata of ABUSE_GUARD."""

    REFUSALS = "REFUSALS"
    AUTH_FAILURES = "AUTH_FAILURES"


@dataclass(frozen=True, slots=True)
class GuardState:
    """How the guard stands by the store's clock: open until then, for this cause; `until_us` 0 or past: not open.

    `refusals`: those of the last 60 s, of all processes, since it last opened.
    """

    now_us: int
    until_us: int
    cause: AbuseCause
    refusals: int = 0

    @property
    def left_us(self) -> int:
        """How long it stays open."""
        return max(0, self.until_us - self.now_us)


class GuardStore(Protocol):
    """Keeps guards, one atomic step each."""

    async def look(self, tenant_id: TenantId, terms: GuardTerms, refusals: int = 0) -> GuardState:
        """Counts refusals, opens the guard where they or failed authentications are too many, returns how it stands.

        Raises: Unavailable.
        """
        ...

    async def add_failures(self, failures: Mapping[TenantId, int]) -> None:
        """Counts failed authentications. Raises: Unavailable."""
        ...

    async def lift(self, tenant_id: TenantId) -> bool:
        """Closes it and forgets; tells whether it was open. Raises: Unavailable."""
        ...


@dataclass(slots=True)
class _Known:
    open_until: float = 0.0
    look_at: float = 0.0
    looked: bool = False
    until_us: int = 0
    cause: AbuseCause = AbuseCause.REFUSALS
    # Refusals the store has counted, as it last said, and those it was not told of yet.
    counted: int = 0
    untold: int = 0
    looking: "asyncio.Task[None] | None" = None


class AbuseGuard:
    """Implements Guard. A tenant without guard costs nothing here."""

    def __init__(self, store: GuardStore, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._store = store
        self._clock = clock
        self._known: OrderedDict[TenantId, _Known] = OrderedDict()
        self._to_tell: dict[TenantId, tuple[_Known, GuardTerms]] = {}
        self._any_to_tell = asyncio.Event()

    async def admit(self, context: TenantContext, terms: Terms) -> None:
        """Raises: LimitExceeded ABUSE_GUARD while the tenant is kept out."""
        if terms.guard is None:
            return
        known = self._looked_at(tenant_of(context), terms.guard)
        if not known.looked and known.looking is not None:
            await asyncio.wait([known.looking], timeout=_FIRST_LOOK_SECONDS)
        if known.open_until > self._clock():
            raise guarded(known.open_until - self._clock(), known.until_us, known.cause)

    def admits(self, context: TenantContext, terms: Terms) -> bool:
        """Whether the tenant is known, without waiting, not to be kept out."""
        if terms.guard is None:
            return True
        known = self._looked_at(tenant_of(context), terms.guard)
        return known.looked and known.open_until <= self._clock()

    async def refused(self, context: TenantContext, terms: Terms, refusal: Refusal) -> None:
        """Counts a refusal. The one that is too many, with those the store last said it has, is told at once, so that the guard opens."""
        guard = terms.guard
        if guard is None or not guard.refusals_per_minute:
            return
        tenant_id = tenant_of(context)
        known = self._of(tenant_id)
        known.untold += 1
        if known.counted + known.untold > guard.refusals_per_minute:
            await asyncio.wait([self._look(tenant_id, known, guard, tell=True)])
        else:
            self._to_tell[tenant_id] = known, guard
            self._any_to_tell.set()

    async def guarded_until_us(self, context: TenantContext, terms: Terms) -> int | None:
        """Until when the tenant is kept out; None when it is not. Raises: Unavailable."""
        if terms.guard is None:
            return None
        state = await self._store.look(tenant_of(context), terms.guard)
        return state.until_us if state.left_us else None

    async def report(self, failures: Mapping[TenantId, int]) -> None:
        """Counts failed authentications of tenants. Raises: Unavailable."""
        await self._store.add_failures(failures)

    async def lift(self, tenant_id: TenantId) -> bool:
        """Ends the guard; tells whether it was open. Other processes follow within `LOOK_SECONDS`. Raises: Unavailable."""
        was_open = await self._store.lift(tenant_id)
        self._known.pop(tenant_id, None)
        return was_open

    async def run(self) -> None:
        """Tells the store of refusals until cancelled: one script for each tenant that was refused, however often it was."""
        while True:
            await self._any_to_tell.wait()
            await asyncio.sleep(TELL_SECONDS)
            self._any_to_tell.clear()
            to_tell, self._to_tell = self._to_tell, {}
            async with asyncio.TaskGroup() as group:
                for tenant_id, (known, guard) in to_tell.items():
                    if known.untold:
                        group.create_task(self._learn(tenant_id, known, guard, _taken(known)))

    def _looked_at(self, tenant_id: TenantId, terms: GuardTerms) -> _Known:
        known = self._of(tenant_id)
        if self._clock() >= known.look_at:
            self._look(tenant_id, known, terms)
        return known

    def _of(self, tenant_id: TenantId) -> _Known:
        known = self._known.get(tenant_id)
        if known is None:
            known = self._known[tenant_id] = _Known()
            if len(self._known) > _CAPACITY:
                self._known.popitem(last=False)
        self._known.move_to_end(tenant_id)
        return known

    def _look(self, tenant_id: TenantId, known: _Known, terms: GuardTerms, *, tell: bool = False) -> "asyncio.Task[None]":
        if known.looking is None or known.looking.done() or tell:
            # Nobody waits for it but the first: an open guard must not cost every decision a round trip.
            known.look_at = self._clock() + LOOK_SECONDS
            known.looking = asyncio.get_running_loop().create_task(self._learn(tenant_id, known, terms, _taken(known)))
        return known.looking

    async def _learn(self, tenant_id: TenantId, known: _Known, terms: GuardTerms, refusals: int) -> None:
        try:
            state = await self._store.look(tenant_id, terms, refusals)
        except Unavailable:
            # As it was known last. Whether they were counted is unknown, and counting them twice could keep out who should not be.
            return
        known.looked, known.counted = True, state.refusals
        opened = state.left_us > 0 and state.until_us != known.until_us
        known.open_until, known.until_us, known.cause = self._clock() + state.left_us / SECOND_US, state.until_us, state.cause
        if opened:
            log.warning("abuse_guard_open", tenant_id=str(tenant_id), cause=state.cause, seconds=state.left_us // SECOND_US)


def _taken(known: _Known) -> int:
    refusals, known.untold = known.untold, 0
    return refusals


def guarded(left_seconds: float, until_us: int, cause: AbuseCause) -> LimitExceeded:
    """The refusal as callers meet it."""
    why = "went on after being refused" if cause is AbuseCause.REFUSALS else "had its names or keys tried with wrong credentials"
    message = f"This tenant {why} and is kept out for {left_seconds:.0f} s more: stop calling until then, or ask an operator to lift it."
    reset_time = moment(until_us).isoformat().replace("+00:00", "Z")
    return LimitExceeded(error_reason_pb2.ERROR_REASON_ABUSE_GUARD, message, left_seconds, (), cause=cause.value, reset_time=reset_time)
