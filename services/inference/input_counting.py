"""What a call's input is held at when the strict bound of its bytes does not fit the limits: the provider's own count, where it may help.

Refuses to hold an estimate: that only tells whether counting is worth its time.
"""

import asyncio
from dataclasses import dataclass

import structlog

from mesh.common.v1 import error_reason_pb2, limit_rule_pb2
from services.inference.call import Found, Memory, Question
from services.inference.gathering import Gathering, least_needed, put_together
from services.inference.ports import TokenCounter
from services.inference.prompt_assembly import AssembledPrompt
from services.inference.provider_failure import ProviderFailure
from services.inference.refusals import LimitRefused
from services.inference.token_density import TokenDensities
from services.inference.worst_case import MESSAGE_OVERHEAD_TOKENS, REQUEST_OVERHEAD_TOKENS, Hold, make_hold, text_bytes
from services.kernel.errors import MeshError

log = structlog.get_logger(__name__)

COUNT_SECONDS = 2.0
_OF_SIZE = frozenset(
    (
        error_reason_pb2.ERROR_REASON_PLAN_LIMIT,
        error_reason_pb2.ERROR_REASON_BURST_LIMIT,
        error_reason_pb2.ERROR_REASON_BUDGET,
        error_reason_pb2.ERROR_REASON_REQUEST_TOO_LARGE,
    )
)


@dataclass(frozen=True, slots=True)
class Counted:
    """A request that was put together and counted before anything was held for it."""

    memory: Memory
    found: Found
    prompt: AssembledPrompt
    input_tokens: int


class InputCounting:
    """Estimates by what the models' inputs were so far, and counts."""

    def __init__(self, gathering: Gathering, counter: TokenCounter, densities: TokenDensities) -> None:
        self._gathering = gathering
        self._counter = counter
        self._densities = densities

    def learn(self, question: Question, prompt: AssembledPrompt, input_tokens: int) -> None:
        """Learns from an input that was billed."""
        overhead = _overhead(len(prompt.messages) + 1)
        byte_count = text_bytes(prompt.system) + sum(text_bytes(turn.text) for turn in prompt.messages)
        self._densities.seen(question.model.name, byte_count, input_tokens - overhead)

    def may_fit(self, question: Question, refusal: MeshError, hold: Hold) -> bool:
        """Tells whether the call would fit if its input is what the estimate says, and if little is found and remembered for it."""
        room = refusal.metadata.get("remaining", refusal.metadata.get("limit", ""))
        if refusal.reason not in _OF_SIZE or not room.isdecimal():
            return False
        least_output = min(question.min_output_tokens, hold.max_output_tokens)
        estimate = make_hold(self._estimate(question), least_output, question.price, spare_tokens=hold.spare_tokens)
        return estimate.input_tokens < hold.input_tokens and _needed(estimate, refusal) <= int(room)

    async def count(self, question: Question, hold: Hold) -> Counted | None:
        """Reads all that the call is made of and counts it exactly; None when the provider does not say.

        Raises: MeshError when the call cannot be put together.
        """
        found = await self._gathering.search(question) if question.with_documents else Found()
        memory = await self._gathering.recall(question)
        # As much of it as the strict bound would have let in: what is counted is what the call would have been.
        room = max(hold.input_tokens, least_needed(question, memory))
        prompt = put_together(question, memory, found, room)
        try:
            async with asyncio.timeout(COUNT_SECONDS):
                tokens = await self._counter.count_tokens(question, prompt.system, prompt.messages)
        except (TimeoutError, ProviderFailure) as error:
            log.info("input_not_counted", error=str(error))
            return None
        self.learn(question, prompt, tokens)
        return Counted(memory, found, prompt, tokens)

    def _estimate(self, question: Question) -> int:
        overhead, bound = _overhead(len(question.messages) + 1), self._gathering.least_bound(question)
        return min(bound, overhead + self._densities.bound(question.model.name, max(0, bound - overhead)))


def _overhead(texts: int) -> int:
    return REQUEST_OVERHEAD_TOKENS + MESSAGE_OVERHEAD_TOKENS * texts


def _needed(estimate: Hold, refusal: MeshError) -> int:
    unit = refusal.unit if isinstance(refusal, LimitRefused) else limit_rule_pb2.LIMIT_UNIT_UNSPECIFIED
    match unit:
        case limit_rule_pb2.LIMIT_UNIT_TOKENS:
            return estimate.tokens
        case limit_rule_pb2.LIMIT_UNIT_COST_NANO_USD:
            return estimate.cost_nano_usd
        case _:
            # A refusal that came alone does not tell its unit: what is too large in both cannot fit.
            return min(estimate.tokens, estimate.cost_nano_usd)
