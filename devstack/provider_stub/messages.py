"""What a Messages request may hold: turns its JSON into typed values and refuses, in the API's words, what the API refuses."""

from collections.abc import Mapping
from dataclasses import dataclass

import orjson

from devstack.provider_stub import tokens
from devstack.provider_stub.errors import invalid
from devstack.provider_stub.models import Model, find

ROLES = frozenset({"user", "assistant", "system"})
CACHE_BREAKPOINT_MAX = 4
CACHE_TTL_SECONDS: Mapping[object, int] = {None: 300, "5m": 300, "1h": 3600}
COUNTED_FIELDS = frozenset(
    {
        "model",
        "messages",
        "system",
        "tools",
        "tool_choice",
        "cache_control",
        "container",
        "diagnostics",
        "inference_geo",
        "output_config",
        "service_tier",
        "speed",
        "thinking",
        "temperature",
        "top_p",
        "top_k",
        "context_management",
        "mcp_servers",
    }
)
FIELDS = COUNTED_FIELDS | {"max_tokens", "stream", "stop_sequences", "metadata"}


@dataclass(frozen=True, slots=True)
class Block:
    """One content block; `text` is what it says (or its data), `cache_ttl_seconds` is 0 without a cache mark."""

    kind: str
    text: str
    title: str
    token_count: int
    cache_ttl_seconds: int


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of the conversation."""

    role: str
    blocks: tuple[Block, ...]


@dataclass(frozen=True, slots=True)
class MessagesRequest:
    """A request that passed validation; `max_tokens` is 0 only for a count."""

    model: Model
    messages: tuple[Message, ...]
    system: tuple[Block, ...]
    tools: tuple[Block, ...]
    max_tokens: int
    stream: bool
    stop_sequences: tuple[str, ...]
    user_id: str | None
    input_tokens: int
    cached: bool


def parse(body: bytes, models: Mapping[str, Model], *, counting: bool = False) -> MessagesRequest:
    """Return the request a body holds, `counting` when it only asks how long it is.

    Raises: ApiError 400 when it breaks the contract, 404 for a model not on offer.
    """
    raw = _json(body)
    _known_fields(raw, COUNTED_FIELDS if counting else FIELDS)
    model = find(models, _string(raw, "model"))
    messages = _messages(raw)
    system = _system(raw.get("system"))
    tools = tuple(_tool(tool, f"tools.{index}") for index, tool in enumerate(_list(raw.get("tools") or [], "tools")))
    system, messages = _automatic_mark(raw, system, messages)
    counted = tokens.count_request(
        (block.token_count for block in system),
        (block.token_count for block in tools),
        ((block.token_count for block in message.blocks) for message in messages),
    )
    if messages[-1].role == "assistant" and not model.prefill:
        raise invalid("This model does not support assistant message prefill. The conversation must end with a user message.")
    if counted > model.max_input_tokens:
        raise invalid(f"prompt is too long: {counted} tokens > {model.max_input_tokens} maximum")
    return MessagesRequest(
        model=model,
        messages=messages,
        system=system,
        tools=tools,
        max_tokens=0 if counting else _max_tokens(raw, model),
        stream=_stream(raw),
        stop_sequences=_stop_sequences(raw),
        user_id=_user_id(raw),
        input_tokens=counted,
        cached=_check_marks(tools, system, messages),
    )


def _json(body: bytes) -> dict[str, object]:
    try:
        raw: object = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise invalid(f"The request body is not valid JSON: {error.msg}: line {error.lineno} column {error.colno}") from error
    return _dict(raw, "body")


def _known_fields(raw: Mapping[str, object], known: frozenset[str]) -> None:
    for name in raw:
        if name not in known:
            raise invalid(f"{name}: Extra inputs are not permitted")


def _messages(raw: Mapping[str, object]) -> tuple[Message, ...]:
    if "messages" not in raw:
        raise invalid("messages: Field required")
    listed = _list(raw["messages"], "messages")
    if not listed:
        raise invalid("messages: at least one message is required")
    return tuple(_message(value, index) for index, value in enumerate(listed))


def _message(value: object, index: int) -> Message:
    where = f"messages.{index}"
    raw = _dict(value, where)
    for name in raw:
        if name not in ("role", "content"):
            raise invalid(f"{where}.{name}: Extra inputs are not permitted")
    role = raw.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise invalid(f'messages: Unexpected role "{role}". Allowed roles are "user", "assistant" or "system".')
    if "content" not in raw:
        raise invalid(f"{where}.content: Field required")
    content = raw["content"]
    if content in ("", []):
        raise invalid(f"{where}: {role} messages must have non-empty content")
    return Message(role, _blocks(content, f"{where}.content"))


def _system(value: object) -> tuple[Block, ...]:
    if value is None or value == "":
        return ()
    blocks = _blocks(value, "system")
    if any(block.kind != "text" for block in blocks):
        raise invalid("system: only text blocks are supported")
    return blocks


def _blocks(content: object, where: str) -> tuple[Block, ...]:
    if isinstance(content, str):
        return (Block("text", content, "", tokens.count_text(content), 0),)
    return tuple(_block(value, f"{where}.{index}") for index, value in enumerate(_list(content, where)))


def _block(value: object, where: str) -> Block:
    raw = _dict(value, where)
    kind = raw.get("type")
    if not isinstance(kind, str):
        raise invalid(f"{where}.type: Field required")
    if kind == "text" and not _string(raw, "text", where):
        raise invalid("messages: text content blocks must be non-empty")
    if kind in ("image", "document"):
        _dict(raw.get("source"), f"{where}.source")
    title = raw.get("title")
    return Block(kind, _said(raw), title if isinstance(title, str) else "", tokens.count_block(raw), _ttl(raw, where))


def _said(raw: Mapping[str, object]) -> str:
    match raw.get("type"):
        case "text":
            return str(raw["text"])
        case "document":
            source = raw.get("source")
            return _source_text(source) if isinstance(source, dict) else ""
        case "tool_result" | "search_result":
            return _content_text(raw.get("content"))
        case _:
            return orjson.dumps({name: value for name, value in raw.items() if name != "cache_control"}).decode()


def _source_text(source: Mapping[str, object]) -> str:
    data = source.get("data")
    return data if isinstance(data, str) else _content_text(source.get("content")) or orjson.dumps(source).decode()


def _content_text(content: object) -> str:
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        return "\n".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    return ""


def _tool(value: object, where: str) -> Block:
    raw = _dict(value, where)
    bare = {name: field for name, field in raw.items() if name != "cache_control"}
    return Block("tool", orjson.dumps(bare).decode(), _string(raw, "name", where), tokens.count_json(bare), _ttl(raw, where))


def _ttl(raw: Mapping[str, object], where: str) -> int:
    mark = raw.get("cache_control")
    if mark is None:
        return 0
    fields = _dict(mark, f"{where}.cache_control")
    ttl = fields.get("ttl")
    if fields.get("type") != "ephemeral":
        raise invalid(f"{where}.cache_control.type: Input should be 'ephemeral'")
    if not (ttl is None or isinstance(ttl, str)) or ttl not in CACHE_TTL_SECONDS:
        raise invalid(f"{where}.cache_control.ttl: Input should be '5m' or '1h'")
    return CACHE_TTL_SECONDS[ttl]


def _automatic_mark(
    raw: Mapping[str, object], system: tuple[Block, ...], messages: tuple[Message, ...]
) -> tuple[tuple[Block, ...], tuple[Message, ...]]:
    seconds = _ttl(raw, "body")
    if not seconds:
        return system, messages
    *earlier, last = messages
    *before, block = last.blocks
    marked = Block(block.kind, block.text, block.title, block.token_count, block.cache_ttl_seconds or seconds)
    return system, (*earlier, Message(last.role, (*before, marked)))


def _check_marks(tools: tuple[Block, ...], system: tuple[Block, ...], messages: tuple[Message, ...]) -> bool:
    marks = [block.cache_ttl_seconds for block in (*tools, *system) if block.cache_ttl_seconds]
    marks += [block.cache_ttl_seconds for message in messages for block in message.blocks if block.cache_ttl_seconds]
    if len(marks) > CACHE_BREAKPOINT_MAX:
        raise invalid(f"A maximum of {CACHE_BREAKPOINT_MAX} blocks with cache_control may be provided. Found {len(marks)}.")
    if marks != sorted(marks, reverse=True):
        raise invalid("a ttl='1h' cache_control block must not come after a ttl='5m' cache_control block")
    return bool(marks)


def _max_tokens(raw: Mapping[str, object], model: Model) -> int:
    if "max_tokens" not in raw:
        raise invalid("max_tokens: Field required")
    value = raw["max_tokens"]
    if not isinstance(value, int) or isinstance(value, bool):
        raise invalid("max_tokens: Input should be a valid integer")
    if value < 1:
        raise invalid("max_tokens: Input should be greater than or equal to 1")
    if value > model.max_tokens:
        raise invalid(
            f"max_tokens: {value} > {model.max_tokens}, which is the maximum allowed number of output tokens for {model.id}",
        )
    return value


def _stream(raw: Mapping[str, object]) -> bool:
    value = raw.get("stream", False)
    if not isinstance(value, bool):
        raise invalid("stream: Input should be a valid boolean")
    return value


def _stop_sequences(raw: Mapping[str, object]) -> tuple[str, ...]:
    found: list[str] = []
    for index, value in enumerate(_list(raw.get("stop_sequences") or [], "stop_sequences")):
        if not isinstance(value, str):
            raise invalid(f"stop_sequences.{index}: Input should be a valid string")
        if not value.strip():
            raise invalid("stop_sequences: each stop sequence must contain non-whitespace")
        found.append(value)
    return tuple(found)


def _user_id(raw: Mapping[str, object]) -> str | None:
    if raw.get("metadata") is None:
        return None
    value = _dict(raw["metadata"], "metadata").get("user_id")
    if value is not None and not isinstance(value, str):
        raise invalid("metadata.user_id: Input should be a valid string")
    return value


def _string(raw: Mapping[str, object], name: str, where: str = "") -> str:
    path = f"{where}.{name}" if where else name
    if name not in raw:
        raise invalid(f"{path}: Field required")
    value = raw[name]
    if not isinstance(value, str):
        raise invalid(f"{path}: Input should be a valid string")
    return value


def _list(value: object, where: str) -> list[object]:
    if not isinstance(value, list):
        raise invalid(f"{where}: Input should be a valid list")
    return value


def _dict(value: object, where: str) -> dict[str, object]:
    if not isinstance(value, dict):
        raise invalid(f"{where}: Input should be a valid dictionary")
    return value
