"""Units of a product, used at once: durably where a rule counts days, months or cycles, otherwise in the limits alone.

Durable use is a hold that the ledger's outbox ends, so that neither side can lose it: docs/protocol.md, 1 to 5.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import partial
from math import inf
from typing import Protocol

import structlog

from services.kernel.errors import ContentConflict, MeshError, ReservationLost, Unavailable
from services.kernel.ids import ReservationId, TenantId
from services.kernel.tenant_context import TenantContext
from services.ratelimit.decision import Refusal, not_included, refusal
from services.ratelimit.fencing import Fencing
from services.ratelimit.hooks import Guard, NoGuard
from services.ratelimit.limits import NOBODY, Demand, Subject
from services.ratelimit.ready_counters import ReadyCounters, tenant_of
from services.ratelimit.request import Ask, minted_us
from services.ratelimit.reservation import STORE, Held, lost_or_invalid
from services.ratelimit.standing import Answer, Verdict
from services.ratelimit.terms import Plan, Terms
from services.ratelimit.turn import Queued, Stand
from services.ratelimit.waiting_room import WaitingRoom, until_of

log = structlog.get_logger(__name__)

RECORD_TIMEOUT_SECONDS = 2.0


class Recorded(StrEnum):
    """What the ledger says of a use."""

    RECORDED = "recorded"
    STALE_EPOCH = "stale_epoch"
    ENDED = "ended"
    CONFLICT = "conflict"


@dataclass(frozen=True, slots=True)
class Use:
    """So many units of a product, used for somebody, under an id of its own. `max_wait_seconds`: how long it may wait for them."""

    consumption_id: ReservationId
    product_unit: str
    quantity: int
    subject: Subject = NOBODY
    max_wait_seconds: float = 0.0


class UnitsLedger(Protocol):
    """Records uses."""

    async def record_units(self, context: TenantContext, use: Use, epoch: int, reserve_us: int, timeout_seconds: float) -> Recorded:
        """Records a use for good, or says why not; idempotent by its id for ever. Raises: MeshError when it cannot be told."""
        ...


class ConsumptionStore(Protocol):
    """Decides and counts."""

    async def reserve(self, tenant_id: TenantId, terms: Terms, asks: list[Ask]) -> list[Answer]:
        """Takes holds, or uses at once, in their order."""
        ...

    async def look(self, tenant_id: TenantId, terms: Terms, plan: Plan, demand: Demand) -> Answer:
        """Says what is used. Writes nothing."""
        ...

    async def release(self, tenant_id: TenantId, reservation_id: ReservationId, epoch: int) -> bool:
        """Lets a hold of this epoch go; ignores any other. Tells whether it went."""
        ...


class Consumptions:
    """Every use of a product's units."""

    def __init__(
        self,
        store: ConsumptionStore,
        ledger: UnitsLedger,
        counters: ReadyCounters,
        fencing: Fencing,
        *,
        guard: Guard | None = None,
        room: WaitingRoom | None = None,
    ) -> None:
        self._store = store
        self._ledger = ledger
        self._counters = counters
        self._fencing = fencing
        self._guard: Guard = guard or NoGuard()
        self._room = room

    async def consume(self, context: TenantContext, use: Use) -> Held:
        """Uses units under every rule of them: all or nothing. Repeated with the same id it uses nothing more.

        Raises: LimitExceeded, Forbidden FEATURE, ReservationLost, ContentConflict, InvalidRequest, Unavailable.
        """
        outcome = await self.decide(context, use)
        if isinstance(outcome, Refusal):
            raise outcome.error(tenant_of(context))
        return outcome

    async def decide(self, context: TenantContext, use: Use) -> Held | Refusal:
        """The same, with a refusal that tells when it frees and whether its caller may wait for that. Raises: as `consume`."""
        terms = await self._counters.terms_of(context)
        await self._guard.admit(context, terms)
        try:
            outcome = await self._in_turn(context, use)
        except Unavailable as error:
            return self._allowed(context, terms, use, error)
        if isinstance(outcome, Refusal):
            status = outcome.status
            log.info("consumption_refused", rule=status.rule.name, limit=status.limit, used=status.used, needed=outcome.needed)
            await self._guard.refused(context, terms, outcome)
        return outcome

    def _allowed(self, context: TenantContext, terms: Terms, use: Use, error: Unavailable) -> Held:
        # A durable use must be in the ledger: nothing of it is admitted here.
        if use.product_unit not in terms.included_units:
            raise not_included(use.product_unit)
        plan, demand = terms.plan(use.subject, use.product_unit), _demand(use)
        may = error.metadata.get("dependency") == STORE and not terms.is_durable(use.product_unit)
        epoch = self._counters.allowance.admit(tenant_of(context), plan, demand) if may else None
        if epoch is None:
            raise error
        return Held.from_allowance(plan, demand, epoch)

    async def decide_together(self, context: TenantContext, uses: Sequence[Use]) -> list[Held | None] | Refusal:
        """Uses all of them, or none where a rule of one refuses. None stands for a use of nothing, or of a unit that has no rule.

        Raises: LimitExceeded ABUSE_GUARD, ReservationLost, Unavailable.
        """
        terms = await self._counters.terms_of(context)
        await self._guard.admit(context, terms)
        limited = [use for use in uses if use.quantity and use.product_unit in terms.product_units]
        if not limited:
            return [None] * len(uses)
        terms, answers = await self._asked_together(context, limited)
        if any(answer.expired_holds for answer in answers if answer.verdict is Verdict.REFUSED):
            await self._fencing.fence_expired(tenant_of(context))
            terms, answers = await self._asked_together(context, limited)
        held, refusals = _sorted_out(terms, limited, answers)
        if refusals:
            binding = max(refusals, key=lambda item: inf if item.frees_us is None else item.frees_us)
            await self._guard.refused(context, terms, binding)
            return binding
        for use in limited:
            if terms.is_durable(use.product_unit):
                await self._record(context, use, held[use.consumption_id].answer)
        return [held.get(use.consumption_id) for use in uses]

    async def _asked_together(self, context: TenantContext, uses: Sequence[Use]) -> tuple[Terms, list[Answer]]:
        tenant_id = tenant_of(context)

        async def question(terms: Terms) -> list[Answer]:
            return await self._store.reserve(tenant_id, terms, [_ask(terms, use, together=True) for use in uses])

        try:
            return await self._counters.ask(context, question)
        finally:
            self._fencing.watch_lease(tenant_id)

    async def _in_turn(self, context: TenantContext, use: Use) -> Held | Refusal:
        waits = self._room is not None and use.max_wait_seconds > 0
        began = time.monotonic()
        outcome = first = await self._decided(context, use, Stand() if waits else None)
        if self._room is not None and waits:
            until = min(until_of(use.max_wait_seconds), began + use.max_wait_seconds)
            attempt = partial(self._decided, context, use)
            outcome = await self._room.turn(tenant_of(context), use.consumption_id, until, first, attempt)
        if isinstance(outcome, Queued):
            msg = "who stands in no line cannot be behind others in it"
            raise RuntimeError(msg)
        if isinstance(outcome, Held) and outcome is not first:
            return replace(outcome, waited_seconds=time.monotonic() - began)
        return outcome

    async def _decided(self, context: TenantContext, use: Use, stand: Stand | None) -> Held | Refusal | Queued:
        tenant_id = tenant_of(context)
        terms, answer = await self._asked(context, use, stand)
        if answer.verdict is Verdict.REFUSED and answer.expired_holds:
            # What the holds of a dead replica are, only the ledger knows.
            await self._fencing.fence_expired(tenant_id)
            terms, answer = await self._asked(context, use, stand)
        plan, demand = terms.plan(use.subject, use.product_unit), _demand(use)
        match answer.verdict:
            case Verdict.QUEUED if answer.place is not None:
                return Queued(answer.place)
            case Verdict.REFUSED:
                why = refusal(plan, answer, demand)
                if why is None:
                    msg = f"the store refused what its own figures admit: {answer}"
                    raise RuntimeError(msg)
                return why
            case Verdict.HELD:
                if terms.is_durable(use.product_unit):
                    await self._record(context, use, answer)
            case Verdict.OLD | Verdict.ENDED if terms.is_durable(use.product_unit):
                await self._known(context, use, answer)
                answer = await self._store.look(tenant_id, terms, plan, Demand(attempt=0))
            case Verdict.DONE:
                pass
            case _:
                raise lost_or_invalid(answer.verdict, use.consumption_id, "consumption_id")
        return Held(plan, answer, demand)

    async def _asked(self, context: TenantContext, use: Use, stand: Stand | None) -> tuple[Terms, Answer]:
        tenant_id = tenant_of(context)
        minted_us(use.consumption_id, "consumption_id")

        async def question(terms: Terms) -> list[Answer]:
            if use.product_unit not in terms.included_units:
                raise not_included(use.product_unit)
            return await self._store.reserve(tenant_id, terms, [_ask(terms, use, stand=stand)])

        try:
            terms, (answer,) = await self._counters.ask(context, question)
        finally:
            # Also of what was not answered: the store may have held it.
            self._fencing.watch_lease(tenant_id)
        return terms, answer

    async def _record(self, context: TenantContext, use: Use, answer: Answer) -> None:
        # When the ledger's answer is lost, the hold stays: repeated, the use is recorded; left alone, it is fenced when its lease ends.
        recorded = await self._ledger.record_units(context, use, answer.epoch, answer.reserve_us, RECORD_TIMEOUT_SECONDS)
        if recorded is Recorded.RECORDED:
            return
        if recorded is Recorded.CONFLICT:
            # The record of that id is another use's, whose hold or sum is counted: this one goes.
            await self._store.release(tenant_of(context), use.consumption_id, answer.epoch)
        raise _unrecorded(recorded, use)

    async def _known(self, context: TenantContext, use: Use, answer: Answer) -> None:
        # An epoch older than any: the ledger says whether it has this use, and records none.
        recorded = await self._ledger.record_units(context, use, 0, answer.reserve_us, RECORD_TIMEOUT_SECONDS)
        if recorded is Recorded.CONFLICT:
            raise _unrecorded(recorded, use)
        if recorded is not Recorded.RECORDED:
            raise lost_or_invalid(answer.verdict, use.consumption_id, "consumption_id")


def _ask(terms: Terms, use: Use, *, together: bool = False, stand: Stand | None = None) -> Ask:
    plan, at_once = terms.plan(use.subject, use.product_unit), not terms.is_durable(use.product_unit)
    return Ask(use.consumption_id, minted_us(use.consumption_id), plan, _demand(use), at_once, together, stand)


def _demand(use: Use) -> Demand:
    return Demand(attempt=0, quantity=use.quantity)


def _sorted_out(terms: Terms, uses: Sequence[Use], answers: Sequence[Answer]) -> tuple[dict[ReservationId, Held], list[Refusal]]:
    held, refusals = dict[ReservationId, Held](), list[Refusal]()
    for use, answer in zip(uses, answers, strict=True):
        plan = terms.plan(use.subject, use.product_unit)
        if answer.verdict is Verdict.REFUSED:
            why = refusal(plan, answer, _demand(use))
            refusals += [why] if why is not None else []
        elif answer.verdict in (Verdict.HELD, Verdict.DONE):
            held[use.consumption_id] = Held(plan, answer, _demand(use))
        else:
            raise lost_or_invalid(answer.verdict, use.consumption_id, "consumption_id")
    return held, refusals


def _unrecorded(recorded: Recorded, use: Use) -> MeshError:
    if recorded is Recorded.CONFLICT:
        return ContentConflict("consumption", "this consumption id has another content: make a new id for each use")
    return ReservationLost(use.consumption_id, "the use was not recorded: send it again with a new id")
