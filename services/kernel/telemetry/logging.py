"""Logs as JSON lines on stderr, each with the ids of its call, none with a secret."""

import logging
import re
import sys
from collections.abc import MutableMapping
from typing import Any

import structlog

from services.kernel.request_context import scope
from services.kernel.telemetry import names

REDACTED = "[redacted]"
_SECRET_KEY = re.compile(r"secret|authorization|api_?key$|password|credential$|(^|_)token$|dsn$", re.IGNORECASE)
_SECRET_VALUE = re.compile(
    r"ten_[a-z0-9]+_[A-Za-z0-9]+_[A-Za-z0-9_-]{8,}"  # an API key of ours
    r"|sk-[A-Za-z0-9_-]{16,}"  # a provider's
    r"|Bearer\s+\S+"
    r"|\b[A-Za-z0-9_-]{40,}\.[A-Za-z0-9_-]{60,}"  # a signed token
    r"|(?<=://)[^/\s:@]+:[^/\s@]+(?=@)",  # user and password in a URL
)
_MAX_DEPTH = 4

EventDict = MutableMapping[str, Any]


def configure_logging(service: str, level: str) -> None:
    """Sets the process up to log JSON lines at `level` and above, the standard library's loggers included."""
    number = logging.getLevelNamesMapping().get(level.upper(), logging.INFO)
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        add_call,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
        _add_service(service),
    ]
    structlog.configure(
        processors=[*shared, redact, structlog.processors.JSONRenderer(default=str)],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=structlog.WriteLoggerFactory(file=sys.stderr),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stderr)
    renderer = structlog.processors.JSONRenderer(default=str)
    # Cleaning comes after the formatter has taken its own record out of the event.
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, redact, renderer],
        )
    )
    logging.basicConfig(handlers=[handler], level=max(number, logging.INFO), force=True)


def add_call(_logger: object, _method: str, event: EventDict) -> EventDict:
    """Adds the ids of the call in hand to a line."""
    found = scope()
    if found is None:
        return event
    if found.tenant is not None and found.tenant.tenant_id is not None:
        event.setdefault(names.LOG_TENANT_ID, str(found.tenant.tenant_id))
    call_id = found.call_id or found.client_call_id
    if call_id is not None:
        event.setdefault(names.LOG_CALL_ID, str(call_id))
    if found.trace is not None:
        event.setdefault(names.LOG_TRACE_ID, found.trace.trace_id)
        event.setdefault(names.LOG_SPAN_ID, found.trace.span_id)
    return event


def redact(_logger: object, _method: str, event: EventDict) -> EventDict:
    """Removes secrets: by the name of the field, and by the look of a value anywhere in the line."""
    for key, value in event.items():
        event[key] = REDACTED if _SECRET_KEY.search(key) and value is not None else _clean(value, 0)
    return event


def _clean(value: Any, depth: int) -> Any:
    if isinstance(value, str):
        return _SECRET_VALUE.sub(REDACTED, value)
    if depth >= _MAX_DEPTH:
        return REDACTED if isinstance(value, dict | list | tuple) else value
    if isinstance(value, dict):
        return {key: REDACTED if _SECRET_KEY.search(str(key)) else _clean(item, depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_clean(item, depth + 1) for item in value]
    if isinstance(value, int | float | bool | None):
        return value
    return _SECRET_VALUE.sub(REDACTED, str(value))


def _add_service(service: str) -> structlog.typing.Processor:
    def add(_logger: object, _method: str, event: EventDict) -> EventDict:
        event.setdefault("service", service)
        return event

    return add
