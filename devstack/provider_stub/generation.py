"""What a request will be answered with: the text, cut by `stop_sequences` and `max_tokens`, and why it stops. Pure."""

from collections.abc import Iterable
from dataclasses import dataclass

from devstack.provider_stub import tokens
from devstack.provider_stub.answer import Prompt, answer
from devstack.provider_stub.faults import Faults
from devstack.provider_stub.messages import MessagesRequest

FILLER = "The committee reviewed the remaining items and noted that each of them had been settled as agreed. "


@dataclass(frozen=True, slots=True)
class Generation:
    """An answer in full, with its length by the token rule."""

    text: str
    token_count: int
    stop_reason: str
    stop_sequence: str | None


def generate(request: MessagesRequest, prompt: Prompt, faults: Faults) -> Generation:
    """Return the answer to the request, or filler of the ordered length."""
    text = answer(prompt) if faults.output_tokens is None else filler(faults.output_tokens)
    text, stopped_by = _until_stop(text, request.stop_sequences)
    token_count = tokens.count_text(text)
    if token_count > request.max_tokens and not faults.ignore_max_tokens:
        text = tokens.take(text, request.max_tokens)
        return Generation(text, tokens.count_text(text), "max_tokens", None)
    return Generation(text, token_count, "end_turn" if stopped_by is None else "stop_sequence", stopped_by)


def filler(token_count: int) -> str:
    """Return text of exactly this many tokens."""
    size = token_count * tokens.BYTES_PER_TOKEN
    return (FILLER * (size // len(FILLER) + 1))[:size]


def _until_stop(text: str, stop_sequences: Iterable[str]) -> tuple[str, str | None]:
    found = [(position, stop) for stop in stop_sequences if (position := text.find(stop)) >= 0]
    if not found:
        return text, None
    position, stop = min(found)
    return text[:position], stop
