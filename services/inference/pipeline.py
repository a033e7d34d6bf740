"""A call, from the validated question to the settled answer: reserve, open and gather, admit, dispatch, settle.

One attempt at the provider a call: nothing is ever sent to it twice. Only an attempt that was not dispatched may start again, once,
with a reservation of its own. Nothing is dispatched before the ledger acknowledged the open.
"""

import asyncio
import time
from collections.abc import Coroutine
from contextlib import AbstractAsyncContextManager, aclosing
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import structlog

from services.inference.admission import AdmissionGate
from services.inference.call import Attempt, CallRef, Found, Memory, Question, Ready, Report, RetrievalMode, Stage
from services.inference.call_audit import CallAudit
from services.inference.lease_keeper import LeaseKeeper
from services.inference.opening import StartAgain, refuse_unopened
from services.inference.ports import CallToOpen, Documents, Ledger, Limits, OpenOutcome, Provider, Recollection, Sink
from services.inference.prompt_assembly import assemble, known_texts, least_bound, with_prefix
from services.inference.prompt_sizes import PromptSizes
from services.inference.provider_failure import ProviderFailure
from services.inference.refusals import RequestTooLarge
from services.inference.report import remaining_limits
from services.inference.settlement import Settlement
from services.inference.worst_case import (
    CHUNK_BUDGET_BYTES,
    HISTORY_BUDGET_BYTES,
    Hold,
    hold_input_tokens,
    input_bound,
    make_hold,
    text_bytes,
)
from services.kernel.errors import DeadlineExceeded, MeshError, ReservationLost, Unavailable
from services.kernel.ids import ReservationId, new_uuid7

log = structlog.get_logger(__name__)

_PHASES = {Stage.RESERVED: "open", Stage.OPENING: "open", Stage.OPENED: "queue", Stage.DISPATCHED: "answer", Stage.ANSWERED: "settle"}


class AnswerPipeline:
    """Answers questions, each by the same steps in the same order."""

    def __init__(
        self,
        *,
        limits: Limits,
        ledger: Ledger,
        documents: Documents,
        memory: Recollection,
        provider: Provider,
        gate: AdmissionGate,
        leases: LeaseKeeper,
        settlement: Settlement,
        audit: CallAudit,
    ) -> None:
        self._limits = limits
        self._ledger = ledger
        self._documents = documents
        self._memory = memory
        self._provider = provider
        self._gate = gate
        self._leases = leases
        self._settlement = settlement
        self._audit = audit
        self._prompt_sizes = PromptSizes()

    async def answer(self, question: Question, sink: Sink) -> Report:
        """Answers within the question's deadline. Raises: MeshError, after every hold and record of the call was brought to its end."""
        try:
            return await self._attempt(question, sink)
        except StartAgain:
            pass
        try:
            return await self._attempt(question, sink)
        except StartAgain as again:
            raise again.refusal from None

    async def _attempt(self, question: Question, sink: Sink) -> Report:
        attempt: Attempt | None = None
        try:
            # One timer a call, never one a read.
            async with asyncio.timeout(max(0.0, question.remaining_seconds())):
                attempt = await self._reserve(question)
                ready = await self._answer(attempt, sink)
                settled = await self._settlement.settle(attempt)
        except ProviderFailure as failure:
            raise failure.as_refusal(question.call_id) from failure
        except TimeoutError:
            raise DeadlineExceeded(_PHASES[attempt.stage] if attempt else "reserve") from None
        return Report(question, ready, attempt.received, settled, remaining_limits(attempt, settled))

    async def _answer(self, attempt: Attempt, sink: Sink) -> Ready:
        try:
            ready = await self._open_and_gather(attempt)
            # Before anybody is shown anything: neither the caller nor the provider sees a document of which there is no record.
            await self._audit.documents_read(attempt.question, ready)
            async with self._slot(attempt, ready):
                await self._dispatch(attempt, ready, sink)
        except BaseException as error:
            await self._settlement.end(attempt, error)
            raise
        return ready

    async def _reserve(self, question: Question) -> Attempt:
        hold = self._worst_case(question)
        reservation_id = ReservationId(new_uuid7())
        reservation = await self._settlement.reserve(question, reservation_id, hold)
        lease = self._leases.begin(CallRef(question.tenant_id, reservation_id))
        return Attempt(question, hold, reservation, lease)

    def _worst_case(self, question: Question) -> Hold:
        input_tokens = hold_input_tokens(
            input_bound(known_texts(question.messages, with_documents=question.with_documents)),
            # Of the two parts of the prompt only the stored one has to be guessed.
            prompt_budget=self._prompt_sizes.expected(question.tenant_id) + text_bytes(with_prefix(question.prompt_prefix, "")),
            history_budget=HISTORY_BUDGET_BYTES if question.conversation_id else 0,
            documents_budget=CHUNK_BUDGET_BYTES * question.top_k if question.with_documents else 0,
            cap=question.context_tokens,
        )
        return make_hold(input_tokens, question.max_output_tokens, question.price)

    async def _open_and_gather(self, attempt: Attempt) -> Ready:
        question = attempt.question
        found, memory = Found(), None
        if question.with_documents:
            found, memory = await self._at_once(self._search(question), self._recall_and_open(attempt))
        else:
            memory = await self._recall_and_open(attempt)
        prompt = assemble(
            memory.prompt,
            memory.history,
            found.chunks,
            question.messages,
            with_documents=question.with_documents,
            hold=attempt.hold.input_tokens,
        )
        return Ready(prompt, _version_name(memory), found.degraded)

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
        question = attempt.question
        memory = await self._memory.recall(question.tenant_id, question.conversation_id, HISTORY_BUDGET_BYTES)
        self._prompt_sizes.seen(question.tenant_id, text_bytes(memory.prompt))
        memory = replace(memory, prompt=with_prefix(question.prompt_prefix, memory.prompt))
        self._require_room(attempt, memory)
        dispatch_deadline = datetime.now(UTC) + timedelta(seconds=question.remaining_seconds())
        attempt.stage = Stage.OPENING
        opened = await self._ledger.open(
            CallToOpen(attempt.ref, question, attempt.hold, attempt.reservation, _version_name(memory), dispatch_deadline)
        )
        if opened.outcome is not OpenOutcome.OPENED:
            refuse_unopened(attempt, opened)
        attempt.stage = Stage.OPENED
        attempt.lease.opened = True
        return memory

    def _require_room(self, attempt: Attempt, memory: Memory) -> None:
        question = attempt.question
        needed = least_bound(memory.prompt, question.messages, with_documents=question.with_documents)
        if needed > question.context_tokens:
            raise RequestTooLarge("messages", "max_context_tokens", question.context_tokens, needed)
        if needed > attempt.hold.input_tokens:
            # The prompt is larger than the one last seen: its size is known now.
            reservation_id = attempt.ref.reservation_id
            raise StartAgain(ReservationLost(reservation_id, "the tenant's prompt keeps growing while the call begins; start it again"))

    async def _search(self, question: Question) -> Found:
        try:
            return await self._documents.search(question.tenant, question.messages[-1].text, question.top_k)
        except MeshError as error:
            if question.retrieval is RetrievalMode.BEST_EFFORT:
                log.warning("retrieval_degraded", error=str(error))
                return Found(degraded=True)
            if isinstance(error, Unavailable) or error.code.name == "UNAVAILABLE":
                raise
            raise Unavailable("retrieval") from error

    def _slot(self, attempt: Attempt, ready: Ready) -> AbstractAsyncContextManager[None]:
        question = attempt.question
        return self._gate.slot(
            question.tenant_id,
            weight=question.weight,
            expected_tokens=ready.prompt.bound + question.max_output_tokens,
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
            async with aclosing(self._provider.stream(question, ready.prompt, received)) as pieces:
                async for piece in pieces:
                    sink.add(piece)
        except ProviderFailure:
            if not received.complete:
                raise
        finally:
            received.end_time = time.monotonic()
        attempt.stage = Stage.ANSWERED


def _version_name(memory: Memory) -> str:
    return f"default@{memory.prompt_version}"
