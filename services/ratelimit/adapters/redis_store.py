"""Decisions and holds of every tenant in Redis: each method is one script a tenant, so one atomic step."""

from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from struct import Struct
from typing import cast
from uuid import UUID

import structlog

from services.kernel.errors import Unavailable
from services.kernel.ids import ReservationId, TenantId
from services.ratelimit.adapters.decision_queue import DecisionQueue
from services.ratelimit.adapters.tenant_scripts import Argument, TenantScripts, each_tenant, tenant_of_key
from services.ratelimit.calendar_periods import Boundaries, microseconds
from services.ratelimit.fencing import ExpiredHolds, Fences, FenceVerdict
from services.ratelimit.limit_rule import SECOND_US
from services.ratelimit.limits import NOTHING, Amounts, Demand, Subject
from services.ratelimit.packing import packed
from services.ratelimit.request import LARGEST_ID_AGE_SECONDS, Ask, Question
from services.ratelimit.settlement import Settlement
from services.ratelimit.standing import Answer, Verdict, is_unready
from services.ratelimit.terms import Plan, Terms
from services.ratelimit.turn import Place

log = structlog.get_logger(__name__)

_OUTCOMES = {1: True, 2: False, 3: True, 4: True}
_OVER, _OTHER = 3, 4
# Bounds how long one script keeps the store from others: about a millisecond.
_DECISIONS_A_SCRIPT = 50
_SETTLEMENTS_A_SCRIPT = 50
_LEASES_A_SCRIPT = 200
_SIGNALS = {b"rebuild": Verdict.REBUILD, b"lost": Verdict.LOST, b"behind": Verdict.BEHIND, b"whose": Verdict.ANOTHERS}
# By their numbers: to find one by its type costs as much as the rest of an answer.
_VERDICTS = {int(verdict): verdict for verdict in Verdict}
_NO_SHORTENING = (0, 1, 0)
# As reserve.lua reads them.
_HEAD = Struct(">4q")
_ITEM = Struct(">16s10q")


class RedisStore:
    """Implements the stores of reservations, looks, extensions and fences."""

    def __init__(self, scripts: TenantScripts, *, lease_seconds: float = 5.0, forget_seconds: float = 2.0 * LARGEST_ID_AGE_SECONDS) -> None:
        self._scripts = scripts
        self._lease_us = int(lease_seconds * SECOND_US)
        self._forget_us = int(forget_seconds * SECOND_US)
        self._queue = DecisionQueue(self._reserve_some)
        self._scan_cursor: object = None
        # How far the store's clock is from this one's, once it mattered.
        self._ahead_us = 0

    async def reserve(self, tenant_id: TenantId, terms: Terms, asks: Sequence[Ask]) -> list[Answer]:
        """Takes holds in their order, each by itself: what is refused changes nothing."""
        if len(asks) == 1 and not asks[0].together and not asks[0].gathered:
            return [await self._queue.submit(tenant_id, terms, asks[0])]
        return await self._reserve_some(tenant_id, terms, asks)

    async def reserve_each(self, questions: Sequence[Question]) -> list[list[Answer] | Exception]:
        """Does the same for many tenants in one exchange with the store; what fails of one fails alone. Raises: Unavailable."""
        clock_us, now_us = self._clocks()
        calls = [(question.tenant_id, self._first_arguments(question, now_us)) for question in questions]
        found: list[list[Answer] | Exception] = []
        for question, reply in zip(questions, await self._scripts.run_each("reserve", calls), strict=True):
            try:
                # Waits only for what more than one script is for.
                found.append(await self._completed(question, reply, clock_us, now_us))
            except Exception as error:
                found.append(error)
        return found

    async def look(self, tenant_id: TenantId, terms: Terms, plan: Plan, demand: Demand) -> Answer:
        """Says what is used and whether the demand would be held. Writes nothing."""
        amounts = demand.amounts
        before = (terms.version, terms.families_digest)
        after = (plan.packed, demand.attempt, amounts.tokens, amounts.cost_nano_usd, demand.quantity)
        return (await self._decided("look", tenant_id, terms, before, after, 1))[0]

    async def extend(
        self, tenant_id: TenantId, terms: Terms, plan: Plan, reservation_id: ReservationId, epoch: int, amounts: Amounts
    ) -> Answer:
        """Raises what a living hold holds to these totals, or says why not and changes nothing."""
        before = (terms.version, terms.families_digest)
        after = (plan.packed, reservation_id.bytes, epoch, amounts.tokens, amounts.cost_nano_usd)
        return (await self._decided("extend", tenant_id, terms, before, after, 1))[0]

    async def release(self, tenant_id: TenantId, reservation_id: ReservationId, epoch: int) -> bool:
        """Lets a hold of this epoch go; ignores any other. Tells whether it went."""
        return bool(await self._scripts.run("release", tenant_id, reservation_id.bytes, epoch))

    async def renew(self, reservations: Sequence[tuple[TenantId, ReservationId]]) -> list[bool]:
        """Prolongs leases; tells of each whether it lives. Raises: Unavailable when it cannot be told of one."""
        alive = [False] * len(reservations)

        async def renew_some(tenant_id: TenantId, places: Sequence[int]) -> None:
            ids = [reservations[place][1].bytes for place in places]
            answers = cast("list[int]", await self._scripts.run("renew", tenant_id, self._lease_us, *ids))
            for place, answer in zip(places, answers, strict=True):
                alive[place] = answer == 1

        await each_tenant([tenant_id for tenant_id, _ in reservations], _LEASES_A_SCRIPT, renew_some)
        return alive

    async def commit(self, settlements: Sequence[Settlement]) -> list[bool]:
        """Applies settlements; tells of each whether it is done. A store that does not answer leaves its items undone."""
        done = [False] * len(settlements)

        async def commit_some(tenant_id: TenantId, places: Sequence[int]) -> None:
            items = [settlements[place] for place in places]
            arguments = [value for item in items for value in _settlement_arguments(item)]
            try:
                answers = cast("list[int]", await self._scripts.run("commit", tenant_id, self._forget_us, *arguments, bulk=True))
            except Unavailable:
                return
            for place, item, answer in zip(places, items, answers, strict=True):
                done[place] = _OUTCOMES[answer]
                if answer in (_OVER, _OTHER):
                    _report(item, answer)

        await each_tenant([item.tenant_id for item in settlements], _SETTLEMENTS_A_SCRIPT, commit_some)
        return done

    async def expired(self, tenant_ids: Sequence[TenantId], at_most: int) -> list[ExpiredHolds]:
        """Lists ended leases and forgets what no rule counts any more. A store that does not answer leaves its tenants out."""
        try:
            replies = await self._scripts.run_each(
                "sweep", [(tenant_id, (self._forget_us, at_most)) for tenant_id in tenant_ids], bulk=True
            )
        except Unavailable:
            return []
        found: list[ExpiredHolds] = []
        for tenant_id, reply in zip(tenant_ids, replies, strict=True):
            if isinstance(reply, Unavailable):
                continue
            if isinstance(reply, Exception):
                raise reply
            epoch, lease_count, later, wait_us, *ids = cast("tuple[int, int, int, int, *tuple[bytes, ...]]", reply)
            reservation_ids = [ReservationId(UUID(bytes=item)) for item in ids]
            leftovers, more, wait_seconds = later > 0, later > 1, wait_us / SECOND_US
            found.append(
                ExpiredHolds(tenant_id, None if epoch == -1 else epoch, lease_count, reservation_ids, leftovers, more, wait_seconds)
            )
        return found

    async def apply_fences(self, fences: Sequence[Fences]) -> list[int | Unavailable]:
        """Releases VOID and SETTLED_BEFORE, pins UNRESOLVED, where epoch and state still fit; SETTLED waits.

        Returns of each tenant how many changed, or that its part of the store is away. Raises: Unavailable.
        """
        changed: list[int | Unavailable] = [0] * len(fences)
        calls = {
            place: (tenant_id, (epoch, *arguments))
            for place, (tenant_id, epoch, verdicts) in enumerate(fences)
            if (arguments := _fence_arguments(verdicts))
        }
        replies = await self._scripts.run_each("fenced", list(calls.values()), bulk=True) if calls else []
        for place, reply in zip(calls, replies, strict=True):
            if isinstance(reply, Exception) and not isinstance(reply, Unavailable):
                raise reply
            changed[place] = cast("int | Unavailable", reply)
        return changed

    async def drop(self, tenant_id: TenantId) -> None:
        """Takes a tenant's counters away, as a loss of data would. Raises: Unavailable."""
        await self._scripts.run("drop", tenant_id)

    async def tenants_with_leases(self) -> Sequence[TenantId]:
        """Looks at the next thousand keys or so for tenants that have leases; goes round and round."""
        self._scan_cursor, found = await self._scripts.bulk.scan("{*}:leases", self._scan_cursor)
        return [tenant_id for key in found if (tenant_id := tenant_of_key(key)) is not None]

    async def _reserve_some(self, tenant_id: TenantId, terms: Terms, asks: Sequence[Ask]) -> list[Answer]:
        answers: list[Answer] = []
        before = self._before(terms)
        for start in range(0, len(asks), _DECISIONS_A_SCRIPT):
            some = asks[start : start + _DECISIONS_A_SCRIPT]
            after = _reserve_arguments(some)
            decided = await self._decided("reserve", tenant_id, terms, before, after, len(some))
            if is_unready(decided):
                # Of all of them: what was held by now is held again, or the same, when all are asked again.
                return decided[:1] * len(asks)
            answers += _all_placed(some, decided)
        return answers

    def _first_arguments(self, question: Question, now_us: int) -> list[Argument]:
        terms = question.terms
        return [*self._before(terms), terms.packed_calendars(now_us), *_reserve_arguments(question.asks[:_DECISIONS_A_SCRIPT])]

    async def _completed(self, question: Question, reply: object | Exception, clock_us: int, now_us: int) -> list[Answer]:
        if isinstance(reply, Exception):
            raise reply
        tenant_id, terms, asks = question.tenant_id, question.terms, question.asks
        first, others = asks[:_DECISIONS_A_SCRIPT], asks[_DECISIONS_A_SCRIPT:]
        answers = self._understood(reply, terms, clock_us, now_us, len(first))
        if answers is None:
            return await self._reserve_some(tenant_id, terms, asks)
        answers = _all_placed(first, answers)
        if not others:
            return answers
        following = await self._reserve_some(tenant_id, terms, others)
        return following[:1] * len(asks) if is_unready(following) else answers + following

    def _before(self, terms: Terms) -> tuple[Argument, Argument]:
        return _HEAD.pack(self._lease_us, self._forget_us, LARGEST_ID_AGE_SECONDS * SECOND_US, terms.version), terms.families_digest

    async def _decided(
        self, name: str, tenant_id: TenantId, terms: Terms, before: Sequence[Argument], after: Sequence[Argument], count: int
    ) -> list[Answer]:
        while True:
            clock_us, now_us = self._clocks()
            reply = await self._scripts.run(name, tenant_id, *before, terms.packed_calendars(now_us), *after)
            answers = self._understood(reply, terms, clock_us, now_us, count)
            if answers is not None:
                return answers

    def _clocks(self) -> tuple[int, int]:
        """The clock of this process, and as near to the store's as is known."""
        clock_us = microseconds(datetime.now(UTC))
        return clock_us, clock_us + self._ahead_us

    def _understood(self, reply: object, terms: Terms, clock_us: int, now_us: int, count: int) -> list[Answer] | None:
        """The answers in a reply; None when the question is to be asked again, by other periods."""
        head, *rest = cast("list[object]", reply)
        if head == b"ok":
            return _answers(rest, terms.boundaries(now_us))
        if head == b"periods":
            # This clock is days off. The store's own time says which periods it needs.
            # Set and not added to: many find out at the same time.
            self._ahead_us = cast("int", rest[0]) - clock_us
            return None
        return [_signal(cast("bytes", head), rest)] * count


def _reserve_arguments(asks: Sequence[Ask]) -> list[Argument]:
    if len(asks) == 1:
        ask = asks[0]
        alone: list[Argument] = [_item(ask, 1), 1, ask.plan.form.packed, 1, 1, ask.plan.own]
        return alone if ask.stand is None else [*alone, _standing(ask)]
    forms: dict[int, int] = {}
    plans: dict[int, int] = {}
    form_texts: list[Argument] = []
    plan_texts: list[Argument] = []
    items = []
    stands = False
    for ask in asks:
        plan = ask.plan
        stands = stands or ask.stand is not None
        place = plans.get(id(plan))
        if place is None:
            form = plan.form
            form_place = forms.get(id(form))
            if form_place is None:
                form_place = forms[id(form)] = len(forms) + 1
                form_texts.append(form.packed)
            place = plans[id(plan)] = len(plans) + 1
            plan_texts += (form_place, plan.own)
        items.append(_item(ask, place))
    standing = [_standing(ask) for ask in asks] if stands else ()
    return [b"".join(items), len(forms), *form_texts, len(plans), *plan_texts, *standing]


def _item(ask: Ask, place: int) -> bytes:
    demand, amounts, short = ask.demand, ask.demand.amounts, ask.demand.shortening
    fitting = _NO_SHORTENING if short is None else (short.max_output_tokens, short.min_output_tokens, short.output_nano_usd_per_million)
    how = ask.at_once + 2 * ask.together
    of_call = (ask.minted_us, demand.attempt, amounts.tokens, amounts.cost_nano_usd, demand.quantity)
    return _ITEM.pack(ask.reservation_id.bytes, *of_call, place, *fitting, how)


def _standing(ask: Ask) -> bytes:
    return b"" if ask.stand is None else packed((int(ask.stand.keep), ask.stand.since_us, ask.plan.lanes))


def _all_placed(asks: Sequence[Ask], answers: list[Answer]) -> list[Answer]:
    if all(ask.stand is None for ask in asks):
        return answers
    return [_placed(ask, answer) for ask, answer in zip(asks, answers, strict=True)]


def _placed(ask: Ask, answer: Answer) -> Answer:
    if ask.stand is None or answer.verdict not in (Verdict.REFUSED, Verdict.QUEUED):
        return answer
    # Where a hold would say when it was taken and how much of what, these say where it stands: see turns.lua.
    since_us, granted = answer.reserve_us, answer.granted
    place = Place(answer.now_us, since_us, granted.cost_nano_usd, granted.tokens, answer.expired_holds)
    return replace(answer, reserve_us=0, granted=NOTHING, place=place)


def _answers(rest: list[object], periods: tuple[Boundaries, ...]) -> list[Answer]:
    now_us, epoch, *items = cast("tuple[int, int, *tuple[list[int], ...]]", rest)
    answers = []
    for item in items:
        verdict = _VERDICTS[item[0]]
        if len(item) == 1:
            answers.append(Answer(verdict))
            continue
        _, reserve_us, tokens, cost, output, expired, *figures = item
        answers.append(Answer(verdict, now_us, epoch, reserve_us, Amounts(tokens, cost), output, expired, figures, periods))
    return answers


def _signal(head: bytes, rest: list[object]) -> Answer:
    verdict = _SIGNALS[head]
    if verdict is Verdict.BEHIND:
        return Answer(verdict, version=cast("int", rest[0]))
    if verdict is Verdict.ANOTHERS:
        user, feature = cast("list[bytes]", rest)
        return Answer(verdict, subject=Subject(user.decode(), feature.decode()))
    return Answer(verdict)


def _fence_arguments(verdicts: Sequence[tuple[ReservationId, FenceVerdict]]) -> list[Argument]:
    arguments: list[Argument] = []
    for reservation_id, verdict in verdicts:
        # SETTLED in this epoch: its commit is on its way, and it alone knows the amount.
        if verdict is not FenceVerdict.SETTLED:
            pins = verdict is FenceVerdict.UNRESOLVED
            arguments += (reservation_id.bytes, FenceVerdict.UNRESOLVED.value if pins else FenceVerdict.VOID.value)
    return arguments


def _settlement_arguments(item: Settlement) -> tuple[Argument, ...]:
    return (item.reservation_id.bytes, item.epoch, item.kind.value, item.actual.tokens, item.actual.cost_nano_usd)


def _report(item: Settlement, answer: int) -> None:
    # Over: all of it is charged; the hold was a bound that the provider did not keep. Other: what was counted first stays.
    log.warning(
        "actual_exceeds_hold" if answer == _OVER else "commit_differs",
        tenant_id=str(item.tenant_id),
        reservation_id=str(item.reservation_id),
        tokens=item.actual.tokens,
        cost_nano_usd=item.actual.cost_nano_usd,
    )
