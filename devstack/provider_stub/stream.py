"""The bytes of a Messages response: the plain body and the server-sent events, in the API's order and field names. Pure."""

import orjson

from devstack.provider_stub.cache import InputUsage
from devstack.provider_stub.errors import error_body
from devstack.provider_stub.generation import Generation

BLOCK_START = b'event: content_block_start\ndata: {"type":"content_block_start","index":0,"content_block":{"type":"text","text":""}}\n\n'
PING = b'event: ping\ndata: {"type": "ping"}\n\n'
BLOCK_STOP = b'event: content_block_stop\ndata: {"type":"content_block_stop","index":0}\n\n'
MESSAGE_STOP = b'event: message_stop\ndata: {"type":"message_stop"}\n\n'
_DELTA_START = b'event: content_block_delta\ndata: {"type":"content_block_delta","index":0,"delta":{"type":"text_delta","text":'


def plain_body(message_id: str, model: str, usage: InputUsage, generation: Generation) -> bytes:
    """Return the body of a plain response."""
    content = [{"type": "text", "text": generation.text}] if generation.text else []
    message = _message(message_id, model, usage, generation.token_count, content)
    message["stop_reason"] = generation.stop_reason
    message["stop_sequence"] = generation.stop_sequence
    return orjson.dumps(message)


def opening(message_id: str, model: str, usage: InputUsage) -> bytes:
    """Return the events before the first token."""
    start = {"type": "message_start", "message": _message(message_id, model, usage, 1, [])}
    return b"event: message_start\ndata: %b\n\n%b%b" % (orjson.dumps(start), BLOCK_START, PING)


def text_delta(text: str) -> bytes:
    """Return the event that carries the next tokens."""
    return b"%b%b}}\n\n" % (_DELTA_START, orjson.dumps(text))


def closing(usage: InputUsage, generation: Generation) -> bytes:
    """Return the events after the content block: why it stopped, what it used, and the end."""
    delta = {
        "type": "message_delta",
        "delta": {"stop_reason": generation.stop_reason, "stop_sequence": generation.stop_sequence, "stop_details": None},
        "usage": _input(usage) | {"output_tokens": generation.token_count},
    }
    return b"event: message_delta\ndata: %b\n\n%b" % (orjson.dumps(delta), MESSAGE_STOP)


def error_event(status: int, request_id: str) -> bytes:
    """Return the event that ends a stream with an error."""
    return b"event: error\ndata: %b\n\n" % error_body(status, "", request_id)


def _message(message_id: str, model: str, usage: InputUsage, output_tokens: int, content: list[dict[str, str]]) -> dict[str, object]:
    billed = _input(usage) | {
        "cache_creation": {"ephemeral_5m_input_tokens": usage.cache_creation_5m, "ephemeral_1h_input_tokens": usage.cache_creation_1h},
        "output_tokens": output_tokens,
        "service_tier": "standard",
        "inference_geo": "not_available",
    }
    return {
        "model": model,
        "id": message_id,
        "type": "message",
        "role": "assistant",
        "content": content,
        "stop_reason": None,
        "stop_sequence": None,
        "stop_details": None,
        "usage": billed,
    }


def _input(usage: InputUsage) -> dict[str, object]:
    return {
        "input_tokens": usage.input_tokens,
        "cache_creation_input_tokens": usage.cache_creation_5m + usage.cache_creation_1h,
        "cache_read_input_tokens": usage.cache_read,
    }
