"""Holds: taken before a call, prolonged while it runs, ended by what the ledger says. Refuses with the rule that binds, never by guess."""

import asyncio
import time
from collections.abc import Awaitable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Protocol
from uuid import UUID

import structlog

from services.kernel.errors import InvalidRequest, MeshError, ReservationLost, Unavailable
from services.kernel.hot_value import hot_value
from services.kernel.ids import ReservationId, TenantId
from services.kernel.tenant_context import TenantContext
from services.ratelimit.calendar_periods import microseconds
from services.ratelimit.decision import Refusal, refusal, shadow_refusals
from services.ratelimit.fencing import Fencing
from services.ratelimit.hooks import AccountShares, Guard, NoGuard, NoShares
from services.ratelimit.limits import Demand
from services.ratelimit.provider_share import ONE_REQUEST, CountedCall, TakenShare, need_of, other_amounts
from services.ratelimit.ready_counters import ReadyCounters, tenant_of
from services.ratelimit.request import LARGEST_ID_AGE_SECONDS, Ask, Question, Request, ask_of, check_request
from services.ratelimit.settlement import Settlement
from services.ratelimit.standing import Answer, LimitStatus, Verdict, statuses
from services.ratelimit.terms import Plan, Terms
from services.ratelimit.turn import Queued, Stand
from services.ratelimit.waiting_room import WaitingRoom, until_of

log = structlog.get_logger(__name__)

# The dependency whose silence open rules survive.
STORE = "redis"


@hot_value
class Held:
    """A hold, with how the limits stand after it."""

    plan: Plan
    answer: Answer
    demand: Demand
    degraded: bool = False
    waited_seconds: float = 0.0

    @classmethod
    def from_allowance(cls, plan: Plan, demand: Demand, epoch: int) -> "Held":
        """What the local allowance admitted: all of it, and nobody knows how the limits stand."""
        now_us = microseconds(datetime.now(UTC))
        output = demand.shortening.max_output_tokens if demand.shortening else 0
        answer = Answer(Verdict.HELD, now_us, epoch, now_us, demand.amounts, output)
        return cls(plan, answer, demand, degraded=True)

    @property
    def limits(self) -> list[LimitStatus]:
        """Every rule that applies, as it stands."""
        return [] if self.degraded else statuses(self.plan, self.answer)

    @property
    def shortened(self) -> bool:
        """Whether fewer output tokens are held than were asked for."""
        wanted = self.demand.shortening
        return wanted is not None and self.answer.output_tokens < wanted.max_output_tokens

    @property
    def shadow_refusals(self) -> list[Refusal]:
        """The rules in shadow mode that would have refused."""
        if self.degraded or not self.plan.has_shadow:
            return []
        return shadow_refusals(self.plan, self.answer, self.demand)


Outcome = Held | Refusal | MeshError
# Of a request that may wait.
Attempted = Outcome | Queued


class ReservationStore(Protocol):
    """Decides and counts, one atomic step a tenant."""

    async def reserve(self, tenant_id: TenantId, terms: Terms, asks: Sequence[Ask]) -> list[Answer]:
        """Takes holds in their order, each by itself: what is refused changes nothing."""
        ...

    async def release(self, tenant_id: TenantId, reservation_id: ReservationId, epoch: int) -> bool:
        """Lets a hold of this epoch go; ignores any other. Tells whether it went."""
        ...

    async def renew(self, reservations: Sequence[tuple[TenantId, ReservationId]]) -> list[bool]:
        """Prolongs leases; tells of each whether it lives."""
        ...

    async def commit(self, settlements: Sequence[Settlement]) -> list[bool]:
        """Applies settlements; tells of each whether it is done. False: send it again."""
        ...


class Reservations:
    """Every hold on a tenant's limits."""

    def __init__(
        self,
        store: ReservationStore,
        counters: ReadyCounters,
        fencing: Fencing,
        *,
        guard: Guard | None = None,
        shares: AccountShares | None = None,
        room: WaitingRoom | None = None,
    ) -> None:
        self._store = store
        self._counters = counters
        self._fencing = fencing
        self._guard: Guard = guard or NoGuard()
        self._shares: AccountShares = shares or NoShares()
        self._room = room

    async def reserve(self, context: TenantContext, request: Request) -> Held:
        """Holds the worst case of a call. Repeated with the same id and amounts it gives the same hold.

        Raises: LimitExceeded, ReservationLost, InvalidRequest, ContentConflict, Unavailable.
        """
        (outcome,) = await self.decide(context, [request])
        return held_or_raised(context, outcome)

    async def decide(self, context: TenantContext, requests: Sequence[Request]) -> list[Outcome]:
        """Decides requests of one tenant in their order. A refusal tells when it frees and whether its caller may wait for that.

        Raises: Unavailable, NotFound, LimitExceeded ABUSE_GUARD, when none can be decided.
        """
        terms = await self._counters.terms_of(context)
        await self._guard.admit(context, terms)
        room = self._room
        if room is None or not any(request.max_wait_seconds for request in requests):
            outcomes = [_final(outcome) for outcome in await self._attempted(context, terms, requests)]
        else:
            outcomes = await self._in_turn(room, context, terms, requests)
        await self._tell(context, terms, outcomes)
        return outcomes

    async def conclude(
        self, context: TenantContext, terms: Terms, requests: Sequence[Request], answers: list[Answer] | Exception
    ) -> list[Outcome]:
        """Decides as `decide` does, from what the store has answered, or failed with, to requests without account or waiting.

        Raises: as `decide`.
        """

        async def concluded() -> list[Attempted]:
            if isinstance(answers, Exception):
                raise answers
            return await self._concluded(context, requests, terms, answers)

        outcomes = [_final(outcome) for outcome in await self._or_allowed(context, terms, requests, concluded())]
        await self._tell(context, terms, outcomes)
        return outcomes

    def taken(self, question: Question, answers: Sequence[Answer]) -> list[Outcome]:
        """The same without waiting, where all is held."""
        self._fencing.watch_lease(question.tenant_id)
        outcomes: list[Outcome] = []
        for ask, answer in zip(question.asks, answers, strict=True):
            held = Held(ask.plan, answer, ask.demand)
            if ask.plan.has_shadow:
                _log(held)
            outcomes.append(held)
        return outcomes

    async def release(self, context: TenantContext, reservation_id: ReservationId, epoch: int) -> None:
        """Lets a hold go whose call was never opened, or was voided. Unknown or ended ones are ignored."""
        tenant_id = tenant_of(context)
        # What has ended otherwise was counted then, by what it used.
        if await self._store.release(tenant_id, reservation_id, epoch):
            await self._shares.count([CountedCall(tenant_id, reservation_id, ONE_REQUEST)])

    async def renew(self, reservations: Sequence[tuple[TenantId, ReservationId]]) -> list[bool]:
        """Prolongs leases; tells of each whether it lives."""
        return await self._store.renew(reservations)

    async def commit(self, settlements: Sequence[Settlement]) -> list[bool]:
        """Applies what the ledger says; tells of each whether it is done."""
        counted = [call for item in settlements if (call := item.counted_call) is not None]
        async with asyncio.TaskGroup() as group:
            done = group.create_task(self._store.commit(settlements))
            group.create_task(self._shares.count(counted))
        return done.result()

    async def _tell(self, context: TenantContext, terms: Terms, outcomes: Sequence[Outcome]) -> None:
        for outcome in outcomes:
            _log(outcome)
            if isinstance(outcome, Refusal):
                await self._guard.refused(context, terms, outcome)

    async def _in_turn(self, room: WaitingRoom, context: TenantContext, terms: Terms, requests: Sequence[Request]) -> list[Outcome]:
        began = time.monotonic()
        untils = [until_of(request.max_wait_seconds) if request.max_wait_seconds else began for request in requests]
        standing = [replace(request, stand=Stand()) if until > began else request for request, until in zip(requests, untils, strict=True)]
        first = await self._attempted(context, terms, standing)
        async with asyncio.TaskGroup() as group:
            # In their order: who is first here takes its place in line first.
            tasks = [
                group.create_task(self._turn(room, context, terms, request, until, outcome))
                for request, until, outcome in zip(standing, untils, first, strict=True)
            ]
        return [task.result() for task in tasks]

    async def _turn(
        self, room: WaitingRoom, context: TenantContext, terms: Terms, request: Request, until: float, first: Attempted
    ) -> Outcome:
        began = time.monotonic()

        async def attempt(stand: Stand | None) -> Attempted:
            return (await self._attempted(context, terms, [replace(request, stand=stand)]))[0]

        if request.stand is None:
            return _final(first)
        try:
            outcome = _final(await room.turn(tenant_of(context), request.reservation_id, until, first, attempt))
        except MeshError as error:
            return error
        waited = isinstance(outcome, Held) and outcome is not first
        return replace(outcome, waited_seconds=time.monotonic() - began) if waited and isinstance(outcome, Held) else outcome

    async def _attempted(self, context: TenantContext, terms: Terms, requests: Sequence[Request]) -> list[Attempted]:
        shares = await self._shares_of(context, terms, requests)
        outcomes: list[Attempted | None] = [share if isinstance(share, Queued | MeshError | Held) else None for share in shares]
        open_places = [place for place, outcome in enumerate(outcomes) if outcome is None]
        if open_places:
            try:
                asked = [requests[place] for place in open_places]
                decided = await self._or_allowed(context, terms, asked, self._decided(context, asked))
            except BaseException:
                await self._shares.give_back([share for share in shares if isinstance(share, TakenShare)])
                raise
            for place, outcome in zip(open_places, decided, strict=True):
                outcomes[place] = outcome
            # All at once: who is cancelled meanwhile keeps none.
            left = zip(shares, outcomes, strict=True)
            await self._shares.give_back(
                [share for share, outcome in left if isinstance(share, TakenShare) and not isinstance(outcome, Held)]
            )
        return [outcome for outcome in outcomes if outcome is not None]

    async def _shares_of(
        self, context: TenantContext, terms: Terms, requests: Sequence[Request]
    ) -> Sequence[TakenShare | Queued | MeshError | Held | None]:
        if len(requests) == 1:
            return [await self._shared(context, terms, requests[0])]
        tasks: list[asyncio.Task[TakenShare | Queued | MeshError | Held | None]] = []
        try:
            async with asyncio.TaskGroup() as group:
                # In their order on the way to the store, which they share.
                tasks += [group.create_task(self._shared(context, terms, request)) for request in requests]
        except BaseException:
            ended = [task.result() for task in tasks if not task.cancelled() and task.exception() is None]
            await self._shares.give_back([share for share in ended if isinstance(share, TakenShare)])
            raise
        return [task.result() for task in tasks]

    async def _shared(self, context: TenantContext, terms: Terms, request: Request) -> TakenShare | Queued | MeshError | Held | None:
        """Checks the request by itself and takes its part of its account; what keeps it out, or admits it without asking further."""
        try:
            check_request(request)
            if request.account:
                need = need_of(request.demand, request.input_tokens)
                return await self._shares.take(
                    request.account, tenant_of(context), terms.weight, request.reservation_id, need, request.stand
                )
        except Unavailable as error:
            # Asked again, a store that is away would cost the caller its time twice.
            return self._allowed(context, terms, request, error) if error.metadata.get("dependency") == STORE else error
        except MeshError as error:
            return error
        return None

    async def _or_allowed(
        self, context: TenantContext, terms: Terms, requests: Sequence[Request], decided: Awaitable[list[Attempted]]
    ) -> list[Attempted]:
        try:
            return await decided
        except Unavailable as error:
            # The store may have held what it did not answer.
            self._fencing.watch_lease(tenant_of(context))
            if error.metadata.get("dependency") != STORE:
                raise
            return [self._allowed(context, terms, request, error) for request in requests]

    def _allowed(self, context: TenantContext, terms: Terms, request: Request, error: Unavailable) -> Held | Unavailable:
        plan = terms.plan(request.subject)
        epoch = self._counters.allowance.admit(tenant_of(context), plan, request.demand)
        return error if epoch is None else Held.from_allowance(plan, request.demand, epoch)

    async def _decided(self, context: TenantContext, requests: Sequence[Request]) -> list[Attempted]:
        return await self._concluded(context, requests, *await self._asked(context, requests))

    async def _concluded(self, context: TenantContext, requests: Sequence[Request], terms: Terms, answers: list[Answer]) -> list[Attempted]:
        tenant_id = tenant_of(context)
        outcomes = [_outcome(terms, request, answer) for request, answer in zip(requests, answers, strict=True)]
        doubtful = [
            place
            for place, (outcome, answer) in enumerate(zip(outcomes, answers, strict=True))
            if isinstance(outcome, Refusal) and outcome.frees_us is not None and answer.expired_holds
        ]
        if doubtful:
            # What the holds of a dead caller are, only the ledger knows.
            await self._fencing.fence_expired(tenant_id)
            terms, answers = await self._asked(context, [requests[place] for place in doubtful])
            for place, answer in zip(doubtful, answers, strict=True):
                outcomes[place] = _outcome(terms, requests[place], answer)
        self._fencing.watch_lease(tenant_id)
        return outcomes

    async def _asked(self, context: TenantContext, requests: Sequence[Request]) -> tuple[Terms, list[Answer]]:
        tenant_id = tenant_of(context)

        async def question(terms: Terms) -> list[Answer]:
            return await self._store.reserve(tenant_id, terms, [ask_of(terms, item) for item in requests])

        return await self._counters.ask(context, question)


def held_or_raised(context: TenantContext, outcome: Outcome) -> Held:
    """The hold. Raises: what keeps the call out."""
    if isinstance(outcome, Held):
        return outcome
    raise outcome.error(tenant_of(context)) if isinstance(outcome, Refusal) else outcome


def lost_or_invalid(verdict: Verdict, reservation_id: UUID, field: str = "reservation_id") -> MeshError:
    """What a verdict that is neither a hold nor a refusal is to the caller. `field`: what that one calls the id."""
    noun = field.removesuffix("_id")
    match verdict:
        case Verdict.AHEAD:
            return InvalidRequest(
                field,
                f"carries a time more than {LARGEST_ID_AGE_SECONDS} s ahead of the store's clock; correct the clock that made it",
            )
        case Verdict.CONFLICT:
            return other_amounts(noun)
        case Verdict.OLD:
            why = f"the {noun} id is older than {LARGEST_ID_AGE_SECONDS} s"
        case _:
            why = f"the {noun} has ended"
    return ReservationLost(reservation_id, f"{why}: start the {'call' if noun == 'reservation' else noun} again with a new one")


def _outcome(terms: Terms, request: Request, answer: Answer) -> Attempted:
    plan = terms.plan(request.subject)
    if answer.verdict is Verdict.QUEUED and answer.place is not None:
        return Queued(answer.place)
    if answer.verdict is Verdict.HELD:
        return Held(plan, answer, request.demand)
    if answer.verdict is not Verdict.REFUSED:
        return lost_or_invalid(answer.verdict, request.reservation_id)
    why = refusal(plan, answer, request.demand)
    if why is None:
        msg = f"the store refused what its own figures admit: {answer}"
        raise RuntimeError(msg)
    return why


def _final(outcome: Attempted) -> Outcome:
    if isinstance(outcome, Queued):
        msg = "who stands in no line cannot be behind others in it"
        raise RuntimeError(msg)
    return outcome


def _log(outcome: Outcome) -> None:
    if isinstance(outcome, Refusal):
        status = outcome.status
        log.info("reservation_refused", rule=status.rule.name, limit=status.limit, used=status.used, needed=outcome.needed)
    elif isinstance(outcome, Held):
        for shadow in outcome.shadow_refusals:
            status = shadow.status
            log.info("shadow_rule_refused", rule=status.rule.name, limit=status.limit, used=status.used, needed=shadow.needed)
