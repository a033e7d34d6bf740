"""Raising what a running call holds, under every rule: all or nothing. Refused, the hold stays, and the call must not go past it."""

from dataclasses import replace
from typing import Protocol

import structlog

from services.kernel.errors import ReservationLost
from services.kernel.ids import ReservationId, TenantId
from services.kernel.tenant_context import TenantContext
from services.ratelimit.decision import needed, refusal
from services.ratelimit.fencing import Fencing
from services.ratelimit.limit_rule import Window
from services.ratelimit.limits import Amounts, Demand, Subject
from services.ratelimit.ready_counters import ReadyCounters, tenant_of
from services.ratelimit.reservation import Held
from services.ratelimit.standing import Answer, Verdict
from services.ratelimit.terms import Plan, Terms

log = structlog.get_logger(__name__)


class ExtensionStore(Protocol):
    """Raises holds."""

    async def extend(
        self, tenant_id: TenantId, terms: Terms, plan: Plan, reservation_id: ReservationId, epoch: int, amounts: Amounts
    ) -> Answer:
        """Raises what a living hold holds to these totals, or says why not; ANOTHERS: by whose plan to ask."""
        ...


class Extensions:
    """Every raising of a hold."""

    def __init__(self, store: ExtensionStore, counters: ReadyCounters, fencing: Fencing) -> None:
        self._store = store
        self._counters = counters
        self._fencing = fencing

    async def extend(self, context: TenantContext, reservation_id: ReservationId, epoch: int, amounts: Amounts) -> Held:
        """Holds at least `amounts`. Idempotent: what is held already changes nothing.

        Raises: LimitExceeded, ReservationLost, Unavailable.
        """
        plan, answer = await self._asked(context, reservation_id, epoch, amounts, Subject())
        if answer.verdict is Verdict.ANOTHERS:
            plan, answer = await self._asked(context, reservation_id, epoch, amounts, answer.subject)
        if answer.verdict is Verdict.REFUSED and answer.expired_holds:
            await self._fencing.fence_expired(tenant_of(context))
            plan, answer = await self._asked(context, reservation_id, epoch, amounts, plan.subject)
        if answer.verdict is Verdict.HELD:
            return Held(plan, answer, Demand(amounts))
        why = None
        if answer.verdict is Verdict.REFUSED:
            held = answer.granted
            more = Amounts(max(0, amounts.tokens - held.tokens), max(0, amounts.cost_nano_usd - held.cost_nano_usd))
            why = refusal(plan, answer, Demand(more))
            if why is not None and why.status.rule.window is Window.REQUEST:
                # It looks at the whole call, and not at what is added.
                why = replace(why, needed=needed(why.status.rule.unit, Demand(amounts)))
        if why is None:
            raise ReservationLost(reservation_id, "the reservation does not live: its call must not go past what it held")
        log.info("extension_refused", rule=why.status.rule.name, limit=why.status.limit, used=why.status.used, needed=why.needed)
        raise why.error(tenant_of(context))

    async def _asked(
        self, context: TenantContext, reservation_id: ReservationId, epoch: int, amounts: Amounts, subject: Subject
    ) -> tuple[Plan, Answer]:
        tenant_id = tenant_of(context)

        async def question(terms: Terms) -> list[Answer]:
            return [await self._store.extend(tenant_id, terms, terms.plan(subject), reservation_id, epoch, amounts)]

        terms, (answer,) = await self._counters.ask(context, question)
        return terms.plan(subject), answer
