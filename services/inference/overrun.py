"""Keeps a stream inside what is held for it: counts, then asks the limits and the ledger for more, else ends it at once.

Refuses to trust `max_tokens`: a provider that ignores it is cut off before its bill can pass the hold.
"""

import asyncio

import structlog

from services.inference.call import Attempt
from services.inference.ports import Ledger, Limits, TokenCounter
from services.inference.prompt_assembly import USER, Turn
from services.inference.provider_failure import ProviderFailure
from services.inference.refusals import AnswerStopped
from services.inference.stream_bound import extension, past_the_line
from services.inference.token_density import TokenDensities
from services.inference.worst_case import make_hold, text_bytes
from services.kernel.errors import MeshError, ReservationLost, Unavailable

log = structlog.get_logger(__name__)

# The provider writes on while it is counted and while more is asked for: together within what `in_flight_tokens` stands for.
COUNT_SECONDS = 0.25
EXTEND_SECONDS = 0.5


class StreamGuard:
    """Watches every stream of the process."""

    def __init__(self, limits: Limits, ledger: Ledger, counter: TokenCounter, densities: TokenDensities, in_flight_tokens: int) -> None:
        self._limits = limits
        self._ledger = ledger
        self._counter = counter
        self._densities = densities
        self._in_flight_tokens = in_flight_tokens

    async def watch(self, attempt: Attempt) -> None:
        """Returns when the stream may go on; without waiting, as long as it is far from its bound.

        Raises: AnswerStopped when it must not: whoever reads it closes it at once.
        """
        if attempt.received.complete or self._past(attempt) <= 0:
            return
        await self._count(attempt)
        past = self._past(attempt)
        if past > 0:
            await self._extend(attempt, past)

    def learn(self, attempt: Attempt) -> None:
        """Learns from a finished answer how dense the model writes."""
        received = attempt.received
        self._densities.seen(attempt.question.model.name, received.output_bytes, received.usage.output_tokens)

    def _past(self, attempt: Attempt) -> int:
        return past_the_line(attempt, self._densities, self._in_flight_tokens)

    async def _count(self, attempt: Attempt) -> None:
        received, text = attempt.received, attempt.received.text
        size = text_bytes(text)
        if size != received.output_bytes or not text.strip():
            # It wrote something that is not text, which cannot be counted as if it were.
            return
        try:
            async with asyncio.timeout(COUNT_SECONDS):
                counted = await self._counter.count_tokens(attempt.question, "", (Turn(USER, text),))
        except (TimeoutError, ProviderFailure) as error:
            log.info("output_not_counted", error=str(error))
            return
        received.counted_tokens, received.counted_bytes = max(counted, received.counted_tokens), size

    async def _extend(self, attempt: Attempt, past_tokens: int) -> None:
        question, held = attempt.question, attempt.hold
        spare = held.spare_tokens + extension(held, past_tokens)
        hold = make_hold(held.input_tokens, held.max_output_tokens, question.price, spare_tokens=spare)
        try:
            async with asyncio.timeout(EXTEND_SECONDS):
                # In this order: what the ledger lets a call use is held at the limits before.
                await self._limits.extend(question.tenant, attempt.reservation, hold)
                extended = await self._ledger.extend(attempt.ref, hold)
        except TimeoutError:
            raise AnswerStopped(Unavailable("ratelimit"), question.call_id) from None
        except MeshError as refusal:
            raise AnswerStopped(refusal, question.call_id) from None
        if not extended:
            raise AnswerStopped(ReservationLost(attempt.ref.reservation_id, "the call's lease ended while it ran"), question.call_id)
        attempt.hold = hold
        log.warning("stream_past_its_max_tokens", model=question.model.name, spare_tokens=spare, output_bytes=attempt.received.output_bytes)
