"""A call, from the validated question to the settled answer: reserve, or take what is held ahead, open and gather, admit, dispatch, settle.

One attempt at the provider a call: nothing is ever sent to it twice. Only an attempt that was not dispatched may start again, once,
with a reservation of its own. Nothing is dispatched before the ledger acknowledged the open.
"""

import asyncio
import time
from collections.abc import Coroutine
from contextlib import AbstractAsyncContextManager, aclosing
from datetime import UTC, datetime, timedelta

from services.inference.admission import AdmissionGate
from services.inference.call import Attempt, CallRef, Found, HoldToTake, Memory, Question, Ready, Report, Stage
from services.inference.call_audit import CallAudit
from services.inference.gathering import Gathering, least_needed, put_together
from services.inference.holds_ahead import HoldsAhead
from services.inference.input_counting import Counted, InputCounting
from services.inference.lease_keeper import LeaseKeeper
from services.inference.opening import StartAgain, refuse_unopened
from services.inference.overrun import StreamGuard
from services.inference.ports import CallToOpen, Ledger, OpenOutcome, Provider, Sink
from services.inference.prompt_assembly import AssembledPrompt
from services.inference.provider_failure import ProviderFailure
from services.inference.refusal_tally import RefusalTally
from services.inference.report import remaining_limits
from services.inference.settlement import Settlement
from services.inference.worst_case import Hold, granted_hold, make_hold
from services.kernel.errors import DeadlineExceeded, MeshError, ReservationLost, Unavailable
from services.kernel.ids import ReservationId, new_uuid7
from services.kernel.telemetry import names
from services.kernel.telemetry.tracing import annotate

_PHASES = {Stage.RESERVED: "open", Stage.OPENING: "open", Stage.OPENED: "queue", Stage.DISPATCHED: "answer", Stage.ANSWERED: "settle"}


class AnswerPipeline:
    """Answers questions, each by the same steps in the same order."""

    def __init__(
        self,
        *,
        ledger: Ledger,
        gathering: Gathering,
        counting: InputCounting,
        provider: Provider,
        guard: StreamGuard,
        gate: AdmissionGate,
        leases: LeaseKeeper,
        settlement: Settlement,
        ahead: HoldsAhead,
        audit: CallAudit,
        refusals: RefusalTally,
        spare_tokens: int,
    ) -> None:
        self._ledger = ledger
        self._gathering = gathering
        self._counting = counting
        self._provider = provider
        self._guard = guard
        self._gate = gate
        self._leases = leases
        self._settlement = settlement
        self._ahead = ahead
        self._audit = audit
        self._refusals = refusals
        self._spare_tokens = spare_tokens

    async def answer(self, question: Question, sink: Sink) -> Report:
        """Answers within the question's deadline. Raises: MeshError, after every hold and record of the call was brought to its end."""
        try:
            return await self._attempt(question, sink)
        except StartAgain:
            # Whatever made this hold useless did so with those beside it.
            self._ahead.drop(question.tenant_id)
        try:
            return await self._attempt(question, sink)
        except StartAgain as again:
            raise again.refusal from None

    async def _attempt(self, question: Question, sink: Sink) -> Report:
        attempt: Attempt | None = None
        try:
            # One timer a call, never one a read.
            async with asyncio.timeout(max(0.0, question.remaining_seconds())):
                attempt, counted = await self._reserve(question)
                ready = await self._answer(attempt, counted, sink)
                settled = await self._settlement.settle(attempt)
        except ProviderFailure as failure:
            raise failure.as_refusal(question.call_id) from failure
        except TimeoutError:
            raise DeadlineExceeded(_PHASES[attempt.stage] if attempt else "reserve") from None
        self._counting.learn(question, ready.prompt, attempt.received.usage.total_input)
        self._guard.learn(attempt)
        return Report(question, ready, attempt.received, settled, remaining_limits(attempt, settled))

    async def _answer(self, attempt: Attempt, counted: Counted | None, sink: Sink) -> Ready:
        try:
            attempt.hold = _held(attempt)
            ready = await (self._open_and_gather(attempt) if counted is None else self._open_counted(attempt, counted))
            # Before anybody is shown anything: neither the caller nor the provider sees a document of which there is no record.
            await self._audit.documents_read(attempt.question, ready)
            async with self._slot(attempt, ready):
                await self._dispatch(attempt, ready, sink)
        except BaseException as error:
            await self._settlement.end(attempt, error)
            raise
        return ready

    async def _reserve(self, question: Question) -> tuple[Attempt, Counted | None]:
        try:
            return await self._reserve_by_size(question)
        except MeshError as refusal:
            self._refusals.add(question, refusal)
            raise

    async def _reserve_by_size(self, question: Question) -> tuple[Attempt, Counted | None]:
        hold = self._hold(question, self._gathering.input_bound(question))
        try:
            return await self._take(question, hold), None
        except MeshError as refusal:
            if not self._counting.may_fit(question, refusal, hold):
                raise
            counted = await self._counting.count(question, hold)
            if counted is None or counted.input_tokens >= hold.input_tokens:
                raise
        return await self._take(question, self._hold(question, counted.input_tokens)), counted

    def _hold(self, question: Question, input_tokens: int) -> Hold:
        return make_hold(input_tokens, question.max_output_tokens, question.price, spare_tokens=self._spare_tokens)

    async def _take(self, question: Question, hold: Hold) -> Attempt:
        # From here on it is this attempt's, and nothing is awaited before whatever ends the attempt ends it too.
        if (held := self._ahead.take(question, hold)) is not None:
            annotate(names.HOLD, "ahead")
            return Attempt(question, held.hold, held.reservation, held.lease, hold.input_tokens)
        try:
            return await self._ask(question, hold)
        except MeshError as refusal:
            if refusal.code.name != "RESOURCE_EXHAUSTED" or not await self._ahead.give_way(question.tenant_id):
                raise
        # Refused beside what this process keeps for calls that may not come: nobody is, for that.
        return await self._ask(question, hold)

    async def _ask(self, question: Question, hold: Hold, number: int = 1) -> Attempt:
        reservation_id = ReservationId(new_uuid7())
        reservation = await self._settlement.reserve(HoldToTake(reservation_id, question, hold, number))
        self._ahead.asked(question, hold, reservation)
        lease = self._leases.begin(CallRef(question.tenant_id, reservation_id))
        return Attempt(question, hold, reservation, lease, hold.input_tokens, number)

    async def _open_and_gather(self, attempt: Attempt) -> Ready:
        question = attempt.question
        if question.with_documents:
            found, memory = await self._at_once(self._gathering.search(question), self._recall_and_open(attempt))
        else:
            found, memory = Found(), await self._recall_and_open(attempt)
        # What is held ahead may be more than the call's own worst case. What the provider is sent does not depend on it.
        room = max(attempt.input_tokens, least_needed(question, memory))
        return _ready(attempt, put_together(question, memory, found, room), memory, found)

    async def _open_counted(self, attempt: Attempt, counted: Counted) -> Ready:
        await self._open(attempt, counted.memory)
        return _ready(attempt, counted.prompt, counted.memory, counted.found)

    async def _at_once(self, search: Coroutine[object, object, Found], opening: Coroutine[object, object, Memory]) -> tuple[Found, Memory]:
        try:
            async with asyncio.TaskGroup() as legs:
                found = legs.create_task(search)
                memory = legs.create_task(opening)
        except BaseExceptionGroup as group:
            raise group.exceptions[0] from None
        return found.result(), memory.result()

    async def _recall_and_open(self, attempt: Attempt) -> Memory:
        # Read before the open, not beside it: the ledger records which prompt version is in use.
        memory = await self._gathering.recall(attempt.question)
        if least_needed(attempt.question, memory) > attempt.hold.input_tokens:
            # The prompt is larger than the one last seen: its size is known now.
            reservation_id = attempt.ref.reservation_id
            raise StartAgain(ReservationLost(reservation_id, "the tenant's prompt keeps growing while the call begins; start it again"))
        await self._open(attempt, memory)
        return memory

    async def _open(self, attempt: Attempt, memory: Memory) -> None:
        question = attempt.question
        dispatch_deadline = datetime.now(UTC) + timedelta(seconds=question.remaining_seconds())
        attempt.stage = Stage.OPENING
        opened = await self._ledger.open(
            CallToOpen(attempt.ref, question, attempt.hold, attempt.reservation, _version_name(memory), dispatch_deadline, attempt.number)
        )
        if opened.outcome is not OpenOutcome.OPENED:
            refuse_unopened(attempt, opened)
        attempt.stage = Stage.OPENED
        attempt.lease.opened = True

    def _slot(self, attempt: Attempt, ready: Ready) -> AbstractAsyncContextManager[None]:
        question = attempt.question
        return self._gate.slot(
            question.tenant_id,
            weight=question.weight,
            expected_tokens=attempt.hold.input_tokens + attempt.hold.max_output_tokens,
            remaining_seconds=question.remaining_seconds(),
        )

    async def _dispatch(self, attempt: Attempt, ready: Ready, sink: Sink) -> None:
        question, received = attempt.question, attempt.received
        await sink.started(question, ready)
        # Nothing is awaited between these checks and the request.
        if question.remaining_seconds() <= 0:
            raise DeadlineExceeded("queue")
        if attempt.lease.lost:
            raise ReservationLost(
                attempt.ref.reservation_id, "the reservation ended while the call waited; start it again with a new call id"
            )
        attempt.stage = Stage.DISPATCHED
        received.dispatch_time = time.monotonic()
        try:
            stream = self._provider.stream(question, ready.prompt, attempt.hold.max_output_tokens, received)
            # Closing the stream closes the connection: whatever ends this block, the provider is told at once.
            async with aclosing(stream) as pieces:
                async for piece in pieces:
                    if piece:
                        sink.add(piece)
                    await self._guard.watch(attempt)
        except ProviderFailure:
            if not received.complete:
                raise
        finally:
            received.end_time = time.monotonic()
        attempt.stage = Stage.ANSWERED


def _held(attempt: Attempt) -> Hold:
    question, reservation = attempt.question, attempt.reservation
    hold = granted_hold(attempt.hold, reservation.output_tokens, question.price)
    if not 1 <= reservation.output_tokens <= attempt.hold.max_output_tokens or not hold.within(
        reservation.tokens, reservation.cost_nano_usd
    ):
        # Nothing may be sent on a hold that does not cover it.
        raise Unavailable("ratelimit", "the limits held less than the call may cost; try again shortly")
    return hold


def _ready(attempt: Attempt, prompt: AssembledPrompt, memory: Memory, found: Found) -> Ready:
    return Ready(prompt, _version_name(memory), found.degraded, attempt.allowance)


def _version_name(memory: Memory) -> str:
    return f"default@{memory.prompt_version}"
