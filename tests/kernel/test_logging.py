"""Log lines know their call and keep no secret."""

import json
import logging
from collections.abc import Iterator
from datetime import UTC, datetime

import pytest
import structlog

from services.kernel.ids import TenantId, new_uuid7
from services.kernel.request_context import bind_call_id, bind_tenant, required_scope
from services.kernel.telemetry.logging import configure_logging
from services.kernel.telemetry.trace_parent import new_trace_parent
from services.kernel.tenant_context import TenantContext

KEY = "ten_pro_0123456789abcdef_abcdefghijklmnopqrstuvwxyz0123456789"


@pytest.fixture(autouse=True)
def undone() -> Iterator[None]:
    """Logging is as it was after each test."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = handlers, level
    structlog.reset_defaults()


def last_line(capsys: pytest.CaptureFixture[str]) -> dict[str, object]:
    """The last line on stderr, read as JSON."""
    line: dict[str, object] = json.loads(capsys.readouterr().err.strip().splitlines()[-1])
    return line


def test_a_line_carries_the_ids_of_its_call(capsys: pytest.CaptureFixture[str]) -> None:
    """Tenant, call and trace are on every line without being named by it."""
    configure_logging("tenant", "INFO")
    tenant_id, call_id = TenantId(new_uuid7()), new_uuid7()
    with bind_tenant(TenantContext(tenant_id, "free", "local", "key:1", frozenset(), 1, datetime.now(UTC), False, "token")):
        bind_call_id(call_id)
        trace = required_scope().trace = new_trace_parent()
        structlog.get_logger().info("settled", cost_nano_usd=5)
    line = last_line(capsys)
    assert (line["event"], line["service"], line["level"], line["cost_nano_usd"]) == ("settled", "tenant", "info", 5)
    assert (line["tenant_id"], line["call_id"]) == (str(tenant_id), str(call_id))
    assert (line["trace_id"], line["span_id"]) == (trace.trace_id, trace.span_id)


@pytest.mark.parametrize(
    "fields",
    [
        {"api_key": "short"},
        {"authorization": "x"},
        {"service_token": "x"},
        {"postgres_dsn": "x"},
        {"note": f"called with {KEY}"},
        {"note": "Bearer abcdef"},
        {"nested": {"client_secret": "x", "list": [KEY]}},
        {"url": "postgresql://user:hunter2@host/db"},
        {"token_pair": ("x" * 50 + "." + "y" * 86)},
    ],
)
def test_secrets_are_redacted(capsys: pytest.CaptureFixture[str], fields: dict[str, object]) -> None:
    """By the field's name or by the value's look, at any depth."""
    configure_logging("tenant", "INFO")
    structlog.get_logger().info("event", **fields)
    text = capsys.readouterr().err
    assert "[redacted]" in text
    for secret in ("hunter2", KEY, "abcdef", "y" * 86, '"x"', '"short"'):
        assert secret not in text


def test_counts_of_tokens_are_not_secrets(capsys: pytest.CaptureFixture[str]) -> None:
    """Numbers that are named after tokens stay readable."""
    configure_logging("tenant", "INFO")
    structlog.get_logger().info("used", input_tokens=12, token_count=3)
    assert {"input_tokens": 12, "token_count": 3}.items() <= last_line(capsys).items()


def test_a_traceback_in_a_line_is_redacted(capsys: pytest.CaptureFixture[str]) -> None:
    """What an exception's text carries is cleaned as well."""
    configure_logging("tenant", "INFO")
    try:
        raise ValueError(f"no such key {KEY}")
    except ValueError:
        structlog.get_logger().exception("failed")
    line = last_line(capsys)
    assert "ValueError" in str(line["exception"])
    assert KEY not in str(line)


def test_libraries_log_in_the_same_form(capsys: pytest.CaptureFixture[str]) -> None:
    """The standard library's loggers write JSON lines with the same cleaning."""
    configure_logging("tenant", "INFO")
    logging.getLogger("library").warning("connecting with %s", KEY)
    line = last_line(capsys)
    assert line["event"] == "connecting with [redacted]"
    assert line["level"] == "warning"
