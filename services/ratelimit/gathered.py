"""Demands of many tenants, decided by one question to the store.

A tenant of whom something else must be known first is decided by itself beside the others, and so is one whose answer is not the last word.
"""

import asyncio
from collections.abc import Callable, Sequence

from services.kernel.errors import MeshError, Unavailable
from services.kernel.tenant_context import TenantContext
from services.ratelimit.decision import Refusal
from services.ratelimit.fencing import Fencing
from services.ratelimit.hooks import Guard, NoGuard
from services.ratelimit.ready_counters import ReadyCounters, tenant_of
from services.ratelimit.reservation import (
    STORE,
    Attempted,
    Outcome,
    Question,
    Request,
    Reservations,
    ReservationStore,
    ask_of,
    check_request,
    final,
    is_doubtful,
    outcome_of,
)
from services.ratelimit.standing import Answer, Verdict
from services.ratelimit.terms import Terms

# The rules of a context's tenant, where they need not be asked for.
Known = Callable[[TenantContext], Terms | None]
# Requests of one tenant, in their order.
Call = tuple[TenantContext, Sequence[Request]]


class GatheredReservations:
    """Decides calls of different tenants as `Reservations` does each of them, with one wait for all that can be told at once."""

    def __init__(
        self,
        reservations: Reservations,
        store: ReservationStore,
        counters: ReadyCounters,
        fencing: Fencing,
        known: Known,
        *,
        guard: Guard | None = None,
    ) -> None:
        self._reservations = reservations
        self._store = store
        self._allowance = counters.allowance
        self._fencing = fencing
        self._known = known
        self._guard: Guard = guard or NoGuard()

    async def decide(self, calls: Sequence[Call]) -> list[Sequence[Outcome] | Exception]:
        """Returns for each call its outcomes, or what `Reservations.decide` would raise."""
        decided: list[Sequence[Outcome] | Exception] = [[] for _ in calls]
        questions: dict[int, Question] = {}

        async def alone(place: int) -> None:
            try:
                decided[place] = await self._reservations.decide(*calls[place])
            except Exception as error:
                decided[place] = error

        async with asyncio.TaskGroup() as group:
            for place, (context, requests) in enumerate(calls):
                question = self._question(context, requests)
                if question is None:
                    group.create_task(alone(place))
                else:
                    questions[place] = question
            answers = await self._asked(list(questions.values()))
            for (place, question), answer in zip(questions.items(), answers, strict=True):
                outcomes = await self._outcomes(*calls[place], question.terms, answer)
                if outcomes is None:
                    group.create_task(alone(place))
                else:
                    decided[place] = outcomes
        return decided

    def _question(self, context: TenantContext, requests: Sequence[Request]) -> Question | None:
        """What the store alone can answer; None for what needs more than that."""
        tenant_id, terms = tenant_of(context), self._known(context)
        if terms is None or self._allowance.owes(tenant_id) or not self._guard.admits(context, terms):
            return None
        try:
            for request in requests:
                if request.account or request.max_wait_seconds:
                    return None
                check_request(request)
        except MeshError:
            return None
        return Question(tenant_id, terms, [ask_of(terms, request) for request in requests])

    async def _asked(self, questions: Sequence[Question]) -> Sequence[list[Answer] | Exception]:
        if not questions:
            return ()
        try:
            return await self._store.reserve_each(questions)
        except Exception as error:
            return [error] * len(questions)

    async def _outcomes(
        self, context: TenantContext, requests: Sequence[Request], terms: Terms, answers: list[Answer] | Exception
    ) -> Sequence[Outcome] | Exception | None:
        """What the answers come to; None when more is to be done. Waits only for the guard, when a refusal opens it."""
        try:
            attempted = self._attempted(context, requests, terms, answers)
            if attempted is None:
                return None
            outcomes = [final(outcome) for outcome in attempted]
            await self._reservations.tell(context, terms, requests, outcomes)
        except Exception as error:
            return error
        return outcomes

    def _attempted(
        self, context: TenantContext, requests: Sequence[Request], terms: Terms, answers: list[Answer] | Exception
    ) -> Sequence[Attempted] | None:
        if isinstance(answers, Exception):
            if isinstance(answers, Unavailable) and answers.metadata.get("dependency") == STORE:
                return [self._reservations.allowed(context, terms, request, answers) for request in requests]
            raise answers
        if answers[0].verdict in (Verdict.REBUILD, Verdict.BEHIND):
            return None
        tenant_id = tenant_of(context)
        if answers[0].epoch:
            self._allowance.learn(tenant_id, answers[0].epoch)
        outcomes = [outcome_of(terms, request, answer) for request, answer in zip(requests, answers, strict=True)]
        if any(isinstance(outcome, Refusal) and is_doubtful(outcome, answer) for outcome, answer in zip(outcomes, answers, strict=True)):
            # Asked again, once the ledger has been. What is held already is held under its id, and answered so.
            return None
        self._fencing.watch(tenant_id)
        return outcomes
