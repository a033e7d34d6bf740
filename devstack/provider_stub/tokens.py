"""The token rule: how many tokens a request holds, and where the tokens of an answer end.

A token is four UTF-8 bytes of one block's text, the last one possibly shorter. Every count is a sum over blocks and messages, so a message
added to a request adds exactly its own tokens. Refuses nothing: what a block may be is for `messages` to say.
"""

from collections.abc import Iterable, Mapping

import orjson

BYTES_PER_TOKEN = 4
REQUEST_OVERHEAD_TOKENS = 8
MESSAGE_OVERHEAD_TOKENS = 4
BASE64_CHARACTERS_PER_TOKEN = 64
IMAGE_MAX_TOKENS = 1600


def count_text(text: str) -> int:
    """Return ceil(UTF-8 bytes / 4); an empty text holds no token."""
    size = len(text) if text.isascii() else len(text.encode())
    return -(-size // BYTES_PER_TOKEN)


def count_json(value: object) -> int:
    """Return the tokens of a value written as compact JSON."""
    return -(-len(orjson.dumps(value)) // BYTES_PER_TOKEN)


def count_binary(data: str) -> int:
    """Return the tokens of base64 data, one for 64 characters, rounded up."""
    return -(-len(data) // BASE64_CHARACTERS_PER_TOKEN)


def take(text: str, token_count: int) -> str:
    """Return the longest start of the text that fits in the tokens, never splitting a character."""
    if text.isascii():
        return text[: token_count * BYTES_PER_TOKEN]
    return text.encode()[: token_count * BYTES_PER_TOKEN].decode("utf-8", "ignore")


def pieces(text: str) -> list[str]:
    """Return the text cut into its tokens: any first k of them count exactly k tokens, and together they are the text."""
    if text.isascii():
        return [text[start : start + BYTES_PER_TOKEN] for start in range(0, len(text), BYTES_PER_TOKEN)]
    encoded = text.encode()
    found: list[str] = []
    start = 0
    for limit in range(BYTES_PER_TOKEN, len(encoded) + BYTES_PER_TOKEN, BYTES_PER_TOKEN):
        end = min(limit, len(encoded))
        while end < len(encoded) and encoded[end] & 0xC0 == 0x80:
            end -= 1
        found.append(encoded[start:end].decode())
        start = end
    return found


def count_request(system: Iterable[int], tools: Iterable[int], messages: Iterable[Iterable[int]]) -> int:
    """Return the input tokens of a request from the tokens of its blocks, message by message."""
    return REQUEST_OVERHEAD_TOKENS + sum(system) + sum(tools) + sum(MESSAGE_OVERHEAD_TOKENS + sum(blocks) for blocks in messages)


def count_block(block: Mapping[str, object]) -> int:
    """Return the tokens of one content block as it stands in the request; identifiers and cache marks are free."""
    match block.get("type"):
        case "text":
            return _text(block, "text")
        case "image":
            return min(IMAGE_MAX_TOKENS, _source(block.get("source")))
        case "document":
            return _text(block, "title") + _text(block, "context") + _source(block.get("source"))
        case "tool_use":
            return _text(block, "name") + count_json(block.get("input"))
        case "tool_result":
            return _content(block.get("content"))
        case "thinking":
            return _text(block, "thinking")
        case "search_result":
            return _text(block, "title") + _text(block, "source") + _content(block.get("content"))
        case _:
            return count_json({name: value for name, value in block.items() if name != "cache_control"})


def _text(block: Mapping[str, object], name: str) -> int:
    value = block.get(name)
    return count_text(value) if isinstance(value, str) else 0


def _content(content: object) -> int:
    if isinstance(content, str):
        return count_text(content)
    if isinstance(content, list):
        return sum(count_block(block) for block in content if isinstance(block, dict))
    return 0


def _source(source: object) -> int:
    if not isinstance(source, dict):
        return 0
    match source.get("type"):
        case "base64":
            data = source.get("data")
            return count_binary(data) if isinstance(data, str) else 0
        case "text":
            return _text(source, "data")
        case "content":
            return _content(source.get("content"))
        case _:
            return _text(source, "url") + _text(source, "file_id")
