"""The token rule: bounds, sums, and where tokens end."""

import orjson
from hypothesis import given
from hypothesis import strategies as st

from devstack.provider_stub import tokens
from devstack.provider_stub.messages import parse
from devstack.provider_stub.models import catalogue

MODELS = catalogue(["claude-haiku-4-5"])
texts = st.text(min_size=1, max_size=200)
turns = st.lists(texts, min_size=1, max_size=6)


def counted(said: list[str], system: str = "") -> int:
    """The input tokens of a conversation."""
    messages = [{"role": "assistant" if index % 2 else "user", "content": text} for index, text in enumerate(said)]
    body = {"model": "claude-haiku-4-5", "messages": messages, "system": system}
    return parse(orjson.dumps(body), MODELS, counting=True).input_tokens


@given(turns, st.text(max_size=200))
def test_input_is_never_more_tokens_than_its_bytes_and_the_overhead(said: list[str], system: str) -> None:
    """A request holds at most its UTF-8 bytes, 16 a message and 64 tokens."""
    size = sum(len(text.encode()) for text in [*said, system])
    assert 0 < counted(said, system) <= size + 16 * len(said) + 64


@given(turns, texts)
def test_a_message_adds_exactly_its_own_tokens(said: list[str], more: str) -> None:
    """Counts are sums over messages: what stands before a message does not change what it costs."""
    assert counted([*said, more]) - counted(said) == tokens.count_text(more) + tokens.MESSAGE_OVERHEAD_TOKENS


@given(st.text(), st.text())
def test_joined_texts_cost_at_most_one_token_less_than_apart(first: str, second: str) -> None:
    """Within a block the count is subadditive, and rounding is all that is saved."""
    apart = tokens.count_text(first) + tokens.count_text(second)
    assert apart - 1 <= tokens.count_text(first + second) <= apart


@given(st.text())
def test_tokens_of_a_text_are_the_text(text: str) -> None:
    """Streaming every token sends the whole text, and their number is the count."""
    parts = tokens.pieces(text)
    assert "".join(parts) == text
    assert len(parts) == tokens.count_text(text)
    assert all(parts)


@given(st.text(), st.integers(0, 60))
def test_the_first_tokens_of_a_text_count_as_many(text: str, token_count: int) -> None:
    """However early a stream is cut, counting what arrived gives what was generated."""
    start = "".join(tokens.pieces(text)[:token_count])
    assert start == tokens.take(text, token_count)
    assert tokens.count_text(start) == min(token_count, tokens.count_text(text))


@given(texts)
def test_text_in_a_block_counts_like_plain_text(text: str) -> None:
    """A string is shorthand for one text block."""
    assert tokens.count_block({"type": "text", "text": text}) == tokens.count_text(text)


def test_plain_english_is_about_four_characters_a_token() -> None:
    """The rule is near the real tokenizer's rate for prose."""
    assert tokens.count_text("The quick brown fox jumps over the lazy dog.") == 11


def test_every_kind_of_block_is_counted_by_what_it_says() -> None:
    """Documents, tool calls, tool results, search results and images all cost input tokens; identifiers do not."""
    data = "A" * 6400
    blocks: dict[str, dict[str, object]] = {
        "document": {"type": "document", "title": "abcd", "source": {"type": "text", "media_type": "text/plain", "data": "a" * 40}},
        "pdf": {"type": "document", "source": {"type": "base64", "media_type": "application/pdf", "data": data}},
        "image": {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": data * 100}},
        "tool_use": {"type": "tool_use", "id": "toolu_1", "name": "find", "input": {"q": 1}},
        "tool_result": {"type": "tool_result", "tool_use_id": "toolu_1", "content": [{"type": "text", "text": "a" * 8}]},
        "search_result": {"type": "search_result", "title": "abcd", "source": "abcd", "content": [{"type": "text", "text": "abcd"}]},
    }
    assert {name: tokens.count_block(block) for name, block in blocks.items()} == {
        "document": 11,
        "pdf": 100,
        "image": tokens.IMAGE_MAX_TOKENS,
        "tool_use": 3,
        "tool_result": 2,
        "search_result": 3,
    }
