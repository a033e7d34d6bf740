"""Slices: units of a product charged ahead of their use, for a holder that then decides by itself until the lease ends.

Only where nothing is lost with the limits' data: docs/limits.md says why. Knows no holder's clock.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

import structlog

from mesh.common.v1 import error_reason_pb2
from services.kernel.errors import LimitExceeded, NotSliceable
from services.kernel.hot_value import hot_value
from services.kernel.ids import ReservationId, TenantId
from services.kernel.tenant_context import TenantContext
from services.ratelimit.decision import not_included, refusal
from services.ratelimit.fencing import Fencing
from services.ratelimit.hooks import Guard, NoGuard
from services.ratelimit.limits import NOBODY, Demand, Subject
from services.ratelimit.ready_counters import ReadyCounters, tenant_of
from services.ratelimit.request import minted_us
from services.ratelimit.reservation import lost_or_invalid
from services.ratelimit.standing import Answer, LimitStatus, Verdict, statuses
from services.ratelimit.terms import Plan, Terms

log = structlog.get_logger(__name__)

# What a refused slice needed: the least that is given.
_LEAST = Demand(attempt=0, quantity=1)
# When the line will be empty nobody knows: a holder may ask again after this long.
_LINE_HINT_SECONDS = 0.5


class Unsliceable(StrEnum):
    """Why a unit must be used use by use. In the order in which they are told."""

    DURABLE = "durable"
    OPEN = "open"
    SHADOW = "shadow"


@dataclass(frozen=True, slots=True)
class SliceRequest:
    """So many units, wanted for so long, for somebody, under an id of its own."""

    slice_id: ReservationId
    product_unit: str
    quantity: int
    lease_us: int
    subject: Subject = NOBODY


@hot_value
class SliceAnswer(Answer):
    """The store's answer to one. `lease_us` counts from the store's now; `largest_use` 0: any."""

    quantity: int = 0
    lease_us: int = 0
    largest_use: int = 0


@dataclass(frozen=True, slots=True)
class Slice:
    """A slice, with how the rules of the unit stand after it."""

    plan: Plan
    answer: SliceAnswer

    @property
    def limits(self) -> list[LimitStatus]:
        """Every rule that applies, as it stands."""
        return statuses(self.plan, self.answer)


@dataclass(frozen=True, slots=True)
class SliceReturn:
    """A slice that is used no more, and how many were used of it."""

    slice_id: ReservationId
    epoch: int
    used: int


class SliceStore(Protocol):
    """Charges slices and takes back the rest of them."""

    async def take(self, tenant_id: TenantId, terms: Terms, plan: Plan, request: SliceRequest) -> SliceAnswer:
        """Charges as many as are wanted, or as the rules let one holder have; or says why none."""
        ...

    async def give_back(self, tenant_id: TenantId, returns: Sequence[SliceReturn]) -> int:
        """Takes back what was not used; ignores slices that are over. Returns how many ended by it."""
        ...


class Slices:
    """Every slice of a tenant's limits."""

    def __init__(self, store: SliceStore, counters: ReadyCounters, fencing: Fencing, *, guard: Guard | None = None) -> None:
        self._store = store
        self._counters = counters
        self._fencing = fencing
        self._guard: Guard = guard or NoGuard()

    async def take(self, context: TenantContext, request: SliceRequest) -> Slice:
        """Charges a slice, unless others wait in line for one of its rules.

        Repeated with the same id while it lives, it is the same slice with what is left of its lease.

        Raises: LimitExceeded, Forbidden FEATURE, NotSliceable, ReservationLost, ContentConflict, InvalidRequest, Unavailable.
        """
        tenant_id = tenant_of(context)
        minted_us(request.slice_id, "slice_id")
        await self._guard.admit(context, await self._counters.terms_of(context))

        async def question(terms: Terms) -> list[SliceAnswer]:
            return [await self._store.take(tenant_id, terms, sliceable_plan(terms, request), request)]

        terms, (answer,) = await self._counters.ask(context, question)
        self._fencing.watch(tenant_id)
        plan = terms.plan(request.subject, request.product_unit)
        if answer.verdict is Verdict.HELD:
            return Slice(plan, answer)
        if answer.verdict is Verdict.QUEUED:
            raise _behind_others(request.product_unit)
        if answer.verdict is not Verdict.REFUSED:
            raise lost_or_invalid(answer.verdict, request.slice_id, "slice_id")
        why = refusal(plan, answer, _LEAST)
        if why is None:
            msg = f"the store refused what its own figures admit: {answer}"
            raise RuntimeError(msg)
        log.info("slice_refused", rule=why.status.rule.name, limit=why.status.limit, used=why.status.used)
        await self._guard.refused(context, terms, why)
        raise why.error(tenant_id)

    async def give_back(self, context: TenantContext, returns: Sequence[SliceReturn]) -> None:
        """Takes back what was not used. Unknown, ended and older slices are ignored. Raises: Unavailable."""
        await self._store.give_back(tenant_of(context), returns)


def sliceable_plan(terms: Terms, request: SliceRequest) -> Plan:
    """The plan of a unit that may be used in slices. Raises: Forbidden FEATURE, NotSliceable."""
    unit = request.product_unit
    if unit not in terms.included_units:
        raise not_included(unit)
    plan = terms.plan(request.subject, unit)
    cause = _unsliceable(terms, plan)
    if cause is not None:
        raise NotSliceable(unit, cause.value, _WHY[cause])
    return plan


_WHY = {
    Unsliceable.DURABLE: "a rule counts a day, a month or a cycle, so each use is put on record",
    Unsliceable.OPEN: "a rule stays open without its store, and would not know of slices after a loss",
    Unsliceable.SHADOW: "a rule in shadow mode decides each use by itself",
}


def _behind_others(product_unit: str) -> LimitExceeded:
    message = f"others wait in line for {product_unit}, and a slice would pass them: call Consume, which may wait too (max_wait)"
    expected_wait_ms = str(int(_LINE_HINT_SECONDS * 1000))
    return LimitExceeded(error_reason_pb2.ERROR_REASON_QUEUE_FULL, message, _LINE_HINT_SECONDS, expected_wait_ms=expected_wait_ms)


def _unsliceable(terms: Terms, plan: Plan) -> Unsliceable | None:
    if terms.is_durable(plan.product_unit):
        return Unsliceable.DURABLE
    if any(rule.fails_open for rule in plan.rules):
        return Unsliceable.OPEN
    return Unsliceable.SHADOW if plan.has_shadow else None
