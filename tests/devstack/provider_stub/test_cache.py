"""What a cached prefix costs, as seen on one clock."""

import orjson

from devstack.provider_stub.cache import InputUsage, PromptCache
from devstack.provider_stub.messages import MessagesRequest, parse
from devstack.provider_stub.models import catalogue

MODELS = catalogue(["claude-haiku-4-5", "claude-sonnet-4-6"])
FIVE_MINUTES = {"cache_control": {"type": "ephemeral"}}
ONE_HOUR = {"cache_control": {"type": "ephemeral", "ttl": "1h"}}


def request(*blocks: dict[str, object], turns: tuple[dict[str, object], ...] = (), model: str = "claude-haiku-4-5") -> MessagesRequest:
    """A request with these system blocks, then these turns and a question."""
    messages = [*turns, {"role": "user", "content": "Why?"}]
    return parse(orjson.dumps({"model": model, "max_tokens": 9, "system": blocks, "messages": messages}), MODELS)


def text(said: str, **mark: object) -> dict[str, object]:
    """A text block, marked or not."""
    return {"type": "text", "text": said, **mark}


def total(usage: InputUsage) -> int:
    """All input tokens, however billed."""
    return usage.input_tokens + usage.cache_creation_5m + usage.cache_creation_1h + usage.cache_read


def test_prefix_is_written_once_and_read_until_its_time_is_up() -> None:
    """A read starts the five minutes anew; unread for five minutes, the prefix is written again."""
    cache, asked = PromptCache(), request(text("a" * 400, **FIVE_MINUTES))
    written = InputUsage(asked.input_tokens - 100, cache_creation_5m=100)
    read = InputUsage(asked.input_tokens - 100, cache_read=100)
    assert [cache.bill(asked, "key", now) for now in (0, 299, 598, 898)] == [written, read, read, written]


def test_nothing_is_shared_between_keys_or_models() -> None:
    """What one key cached, another pays for in full; so does another model."""
    cache = PromptCache()
    cache.bill(request(text("a" * 400, **FIVE_MINUTES)), "key", 0)
    assert cache.bill(request(text("a" * 400, **FIVE_MINUTES)), "other", 1).cache_read == 0
    assert cache.bill(request(text("a" * 400, **FIVE_MINUTES), model="claude-sonnet-4-6"), "key", 1).cache_read == 0


def test_two_marks_bill_each_part_at_its_own_time_to_live() -> None:
    """The hour-long part and the rest are written apart, and read together."""
    cache, asked = PromptCache(), request(text("a" * 400, **ONE_HOUR), text("b" * 80, **FIVE_MINUTES))
    first, second, later = (cache.bill(asked, "key", now) for now in (0, 1, 1000))
    assert (first.cache_creation_1h, first.cache_creation_5m, first.cache_read) == (100, 20, 0)
    assert (second.cache_creation_1h, second.cache_creation_5m, second.cache_read) == (0, 0, 120)
    assert (later.cache_creation_1h, later.cache_creation_5m, later.cache_read) == (0, 20, 100)
    assert total(first) == total(second) == total(later) == asked.input_tokens


def test_a_changed_prefix_is_not_read() -> None:
    """One different character before the mark and the cache does not know it."""
    cache = PromptCache()
    cache.bill(request(text("a" * 400, **FIVE_MINUTES)), "key", 0)
    assert cache.bill(request(text("a" * 399 + "b", **FIVE_MINUTES)), "key", 1).cache_read == 0


def test_a_growing_conversation_reads_what_it_wrote_before() -> None:
    """The mark moves on with the conversation; the earlier prefix is found behind it."""
    cache = PromptCache()
    opening: dict[str, object] = {"role": "user", "content": [text("a" * 400, **FIVE_MINUTES)]}
    cache.bill(request(turns=(opening,)), "key", 0)
    unmarked: dict[str, object] = {"role": "user", "content": [text("a" * 400)]}
    reply: dict[str, object] = {"role": "assistant", "content": [text("b" * 40, **FIVE_MINUTES)]}
    usage = cache.bill(request(turns=(unmarked, reply)), "key", 1)
    assert (usage.cache_read, usage.cache_creation_5m) == (104, 14)


def test_a_prefix_under_the_minimum_is_not_cached() -> None:
    """Where a minimum is set, shorter prefixes cost plain input."""
    asked = request(text("a" * 400, **FIVE_MINUTES))
    assert PromptCache(minimum_tokens=101).bill(asked, "key", 0) == InputUsage(asked.input_tokens)
