"""The provider's own count of tokens over the Anthropic SDK: free of charge, by the clients and keys of the calls themselves.

Never retries: who asks has an answer for not being told.
"""

from collections.abc import Sequence

import aiohttp
import anthropic
import httpx2
from anthropic.types import AssistantMessageParam, MessageParam, UserMessageParam

from services.inference.adapters.endpoint_clients import EndpointClients, key_headers
from services.inference.call import Question
from services.inference.prompt_assembly import USER, Turn
from services.inference.provider_failure import ProviderFailure

_MOST_SECONDS = 2.0


class AnthropicCounter:
    """Counts by Anthropic's endpoint, or by anything that speaks it."""

    def __init__(self, clients: EndpointClients) -> None:
        self._clients = clients

    async def count_tokens(self, question: Question, system: str, messages: Sequence[Turn]) -> int:
        """Returns the input tokens of these texts. Raises: ProviderFailure."""
        listed = [_message(turn) for turn in messages]
        try:
            async with self._clients.lend(question.endpoint) as client:
                counted = await client.messages.count_tokens(
                    model=question.model.name,
                    system=system or anthropic.omit,
                    messages=listed,
                    extra_headers=key_headers(question.provider_key),
                    timeout=max(0.001, min(question.remaining_seconds(), _MOST_SECONDS)),
                )
        except (TimeoutError, anthropic.AnthropicError, httpx2.HTTPError, aiohttp.ClientError, OSError) as error:
            raise ProviderFailure("not_counted", own_key=bool(question.provider_key)) from error
        if type(counted.input_tokens) is not int or counted.input_tokens < 0:
            raise ProviderFailure("not_counted", own_key=bool(question.provider_key))
        return counted.input_tokens


def _message(turn: Turn) -> MessageParam:
    if turn.role == USER:
        return UserMessageParam(role="user", content=turn.text)
    return AssistantMessageParam(role="assistant", content=turn.text)
