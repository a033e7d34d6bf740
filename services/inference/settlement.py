"""How attempts end: settled exactly, void, or unresolved; the limits hear of it only after the ledger. Never guesses a bill."""

import asyncio
from collections.abc import Coroutine
from typing import assert_never

import structlog

from services.inference.call import Attempt, HoldToTake, Reservation, Settled, Stage
from services.inference.call_audit import CallAudit
from services.inference.finishing import Finishing, until_acknowledged
from services.inference.lease_keeper import LeaseKeeper
from services.inference.ports import CallToSettle, CallToVoid, Ledger, Limits, Recollection
from services.inference.prompt_assembly import ASSISTANT, Turn
from services.inference.provider_failure import ProviderFailure
from services.inference.refusals import SettlementPending
from services.kernel.errors import MeshError

log = structlog.get_logger(__name__)

# How long the caller waits for an acknowledgement; the work itself goes on.
SETTLE_SECONDS = 5.0
REMEMBER_SECONDS = 2.0


class Settlement:
    """Brings every attempt to its end at the ledger, whatever happens to the caller meanwhile."""

    def __init__(
        self, ledger: Ledger, limits: Limits, memory: Recollection, leases: LeaseKeeper, finishing: Finishing, audit: CallAudit
    ) -> None:
        self._ledger = ledger
        self._limits = limits
        self._memory = memory
        self._leases = leases
        self._finishing = finishing
        self._audit = audit

    async def reserve(self, wanted: HoldToTake) -> Reservation:
        """Takes the hold. A caller that goes away meanwhile leaves none behind: what was held is let go as soon as it is known."""
        question = wanted.question
        reserving = self._finishing.start(question.tenant, self._limits.reserve(wanted), call_id=question.call_id)
        try:
            return await asyncio.shield(reserving)
        except asyncio.CancelledError:
            if question.max_wait_seconds > 0:
                # It gives up its place in the line. A hold that was just being given ends with its lease.
                reserving.cancel()
            else:
                self._finishing.start(question.tenant, self._release_late(wanted, reserving), call_id=question.call_id)
            raise

    async def settle(self, attempt: Attempt) -> Settled:
        """Records the exact usage and the conversation's turns.

        Raises: SettlementPending when the ledger did not confirm in time; the settlement goes on, with the lease kept.
        """
        question = attempt.question
        # Both are started before anything is awaited: a cancellation that is already on its way must not come between.
        settling = self._finishing.start(question.tenant, self._settle(attempt), call_id=question.call_id)
        remembering = None
        if question.conversation_id:
            remembering = self._finishing.start(question.tenant, self._remember(attempt), call_id=question.call_id)
        settled = await self._finishing.wait(settling, SETTLE_SECONDS)
        if remembering is not None:
            await self._finishing.wait(remembering, REMEMBER_SECONDS)
        if settled is None:
            raise SettlementPending(question.call_id)
        return settled

    async def end(self, attempt: Attempt, error: BaseException) -> None:
        """Ends an attempt that did not come to its answer, by how far it got and by what is certain about its bill."""
        work = self._ending(attempt, error)
        try:
            question = attempt.question
            await self._finishing.wait(self._finishing.start(question.tenant, work, call_id=question.call_id), SETTLE_SECONDS)
        except MeshError as failure:
            # The caller hears why its call failed, not how the clean-up did; the lease sweep covers the rest.
            log.error("attempt_end_refused", reservation_id=str(attempt.ref.reservation_id), error=str(failure))

    def _ending(self, attempt: Attempt, error: BaseException) -> Coroutine[object, object, object]:
        match attempt.stage:
            case Stage.RESERVED:
                return self._release(attempt)
            case Stage.OPENING | Stage.OPENED:
                return self._void_and_release(attempt, _cause(attempt, error))
            case Stage.DISPATCHED if attempt.received.complete:
                return self._settle(attempt)
            case Stage.ANSWERED:
                # The answer is whole and something failed on the way to its settlement: what is billed is known all the same.
                return self._settle(attempt)
            case Stage.DISPATCHED if isinstance(error, ProviderFailure) and error.unbilled:
                return self._void_and_release(attempt, error.cause)
            case Stage.DISPATCHED:
                return self._leave_unresolved(attempt, _cause(attempt, error))
            case _:
                assert_never(attempt.stage)

    async def _settle(self, attempt: Attempt) -> Settled:
        try:
            settled = await until_acknowledged(lambda: self._ledger.settle(CallToSettle(attempt.ref, attempt.received)))
        finally:
            self._leases.end(attempt.lease)
        _log_settled(attempt, settled)
        self._audit.call_ended(attempt, "settled", cost_nano_usd=settled.cost_nano_usd)
        return settled

    async def _void_and_release(self, attempt: Attempt, cause: str) -> None:
        # Released only after the void was acknowledged: a late Open must find the tombstone, not a freed hold.
        await self._void(attempt, CallToVoid(attempt.ref, certain=True, cause=cause))
        await self._release(attempt)

    async def _leave_unresolved(self, attempt: Attempt, cause: str) -> None:
        await self._void(attempt, CallToVoid(attempt.ref, certain=False, cause=cause, received=attempt.received.usage))

    async def _void(self, attempt: Attempt, call: CallToVoid) -> None:
        try:
            await until_acknowledged(lambda: self._ledger.void(call))
        finally:
            self._leases.end(attempt.lease)
        log.info("call_voided" if call.certain else "call_unresolved", cause=call.cause, model=attempt.question.model.name)
        self._audit.call_ended(attempt, "void" if call.certain else "unresolved", cause=call.cause)

    async def _release(self, attempt: Attempt) -> None:
        self._leases.end(attempt.lease)
        try:
            await self._limits.release(attempt.question.tenant, attempt.ref.reservation_id, attempt.reservation.epoch)
        except MeshError as error:
            # Only an early release: the ledger's outbox or the lease's end let the hold go as well.
            log.warning("hold_not_released", reservation_id=str(attempt.ref.reservation_id), error=str(error))

    async def _release_late(self, wanted: HoldToTake, reserving: "asyncio.Task[Reservation]") -> None:
        try:
            reservation = await reserving
            await self._limits.release(wanted.question.tenant, wanted.reservation_id, reservation.epoch)
        except MeshError as error:
            # Refused, so nothing is held; or not told, and then the lease's end and the ledger let it go.
            log.info("late_hold_not_released", reservation_id=str(wanted.reservation_id), error=str(error))

    async def _remember(self, attempt: Attempt) -> None:
        question = attempt.question
        turns = (*question.messages, Turn(ASSISTANT, attempt.received.text))
        try:
            await until_acknowledged(lambda: self._memory.remember(question.tenant_id, question.conversation_id, question.call_id, turns))
        except Exception:
            # The answer is billed and delivered whatever becomes of the conversation.
            log.exception("turns_not_stored", call_id=str(question.call_id))


def _log_settled(attempt: Attempt, settled: Settled) -> None:
    question, received = attempt.question, attempt.received
    log.info(
        "call_settled",
        model=question.model.name,
        input_tokens=received.usage.input_tokens,
        output_tokens=received.usage.output_tokens,
        cost_nano_usd=settled.cost_nano_usd,
        stop_reason=received.stop_reason,
        first_token_ms=received.first_token_ms,
        total_ms=received.total_ms,
    )


def _cause(attempt: Attempt, error: BaseException) -> str:
    if isinstance(error, ProviderFailure):
        return error.cause
    if isinstance(error, MeshError):
        return error.reason_name.lower()
    return "deadline" if attempt.question.remaining_seconds() <= 0 else "cancelled"
