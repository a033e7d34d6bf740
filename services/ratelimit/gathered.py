"""Demands that the store alone can answer, put to it without a detour: a lone call's, or those of many tenants together.

A tenant of whom something else must be known first is decided by `Reservations`, in a batch by itself beside the others; one whose answer
is not the last word goes on there.
"""

import asyncio
from collections.abc import Callable, Sequence
from typing import Protocol

from services.kernel.errors import MeshError
from services.kernel.tenant_context import TenantContext
from services.ratelimit.hooks import Guard, NoGuard
from services.ratelimit.open_allowance import OpenAllowance
from services.ratelimit.ready_counters import tenant_of
from services.ratelimit.request import Question, Request, ask_of, check_shortening
from services.ratelimit.reservation import Held, Outcome, Reservations, ReservationStore, held_or_raised
from services.ratelimit.standing import Answer, Verdict, is_unready
from services.ratelimit.terms import Terms

# The rules of a context's tenant, where they need not be asked for.
Known = Callable[[TenantContext], Terms | None]
# Requests of one tenant, in their order.
Call = tuple[TenantContext, Sequence[Request]]
_Answers = list[Answer] | Exception


class GatheringStore(ReservationStore, Protocol):
    """Decides and counts, one atomic step a tenant."""

    async def reserve_each(self, questions: Sequence[Question]) -> list[list[Answer] | Exception]:
        """Takes holds of many tenants, of each in their order; what fails of one fails alone. Raises: Unavailable."""
        ...


class GatheredReservations:
    """Decides calls as `Reservations` does each of them; those of different tenants with one wait for all that the store alone can tell."""

    def __init__(
        self, reservations: Reservations, store: GatheringStore, allowance: OpenAllowance, known: Known, *, guard: Guard | None = None
    ) -> None:
        self._reservations = reservations
        self._store = store
        self._allowance = allowance
        self._known = known
        self._guard: Guard = guard or NoGuard()

    async def reserve(self, context: TenantContext, request: Request) -> Held:
        """Holds the worst case of one call, as `Reservations.reserve` does, in half of its steps. Raises: as that."""
        question = self._question(context, [request])
        if question is None:
            return await self._reservations.reserve(context, request)
        try:
            answers: _Answers = await self._store.reserve(question.tenant_id, question.terms, question.asks)
        except Exception as error:
            answers = error
        outcomes = self._taken(question, answers)
        if outcomes is None:
            outcomes = await self._by_itself(context, [request], question, answers)
        return held_or_raised(context, outcomes[0])

    async def decide(self, calls: Sequence[Call]) -> list[Sequence[Outcome] | Exception]:
        """Returns for each call its outcomes, or what `Reservations.decide` would raise. No two calls may be of one tenant."""
        decided: list[Sequence[Outcome] | Exception] = [()] * len(calls)
        questions: dict[int, Question] = {}

        async def by_itself(place: int, answers: _Answers | None = None) -> None:
            try:
                decided[place] = await self._by_itself(*calls[place], questions.get(place), answers)
            except Exception as error:
                decided[place] = error

        async with asyncio.TaskGroup() as group:
            for place, call in enumerate(calls):
                question = self._question(*call)
                if question is None:
                    group.create_task(by_itself(place))
                else:
                    questions[place] = question
            for place, answers in zip(questions, await self._asked(list(questions.values())), strict=True):
                outcomes = self._taken(questions[place], answers)
                if outcomes is None:
                    group.create_task(by_itself(place, answers))
                else:
                    decided[place] = outcomes
        return decided

    async def _by_itself(
        self, context: TenantContext, requests: Sequence[Request], question: Question | None, answers: _Answers | None
    ) -> Sequence[Outcome]:
        """Decides one tenant's requests from what the store has answered, or from the beginning."""
        if question is None or answers is None or (not isinstance(answers, Exception) and is_unready(answers)):
            return await self._reservations.decide(context, requests)
        return await self._reservations.conclude(context, question.terms, requests, answers)

    def _question(self, context: TenantContext, requests: Sequence[Request]) -> Question | None:
        """What the store alone can answer; None for what needs more than that."""
        tenant_id, terms = tenant_of(context), self._known(context)
        if terms is None or self._allowance.owes(tenant_id) or not self._guard.admits(context, terms):
            return None
        try:
            for request in requests:
                if request.account or request.max_wait_seconds:
                    return None
                check_shortening(request.demand)
            return Question(tenant_id, terms, [ask_of(terms, request) for request in requests])
        except MeshError:
            return None

    async def _asked(self, questions: Sequence[Question]) -> Sequence[_Answers]:
        if not questions:
            return ()
        try:
            return await self._store.reserve_each(questions)
        except Exception as error:
            return [error] * len(questions)

    def _taken(self, question: Question, answers: _Answers) -> Sequence[Outcome] | None:
        """The holds, where the answers are nothing else; None when more is to be done than to return them."""
        if isinstance(answers, Exception):
            return None
        if answers[0].epoch:
            self._allowance.learn(question.tenant_id, answers[0].epoch)
        for answer in answers:
            if answer.verdict is not Verdict.HELD:
                return None
        return self._reservations.taken(question, answers)
