"""Work done once for several callers: it takes nothing of theirs along but a parent for its spans.

The first caller's tenant, deadline or identity must not reach the others' work; its span may, so that one call's trace stays whole.
"""

import contextvars

from opentelemetry import context as otel_context
from opentelemetry.context import Context

from services.kernel.telemetry.tracing import is_recording


def span_parent() -> Context | None:
    """Returns what spans begun now would hang under; None when spans go nowhere."""
    return otel_context.get_current() if is_recording() else None


def context_under(parent: Context | None) -> contextvars.Context:
    """Returns an empty context in which spans hang under `parent`."""
    fresh = contextvars.Context()
    if parent is not None:
        fresh.run(otel_context.attach, parent)
    return fresh
