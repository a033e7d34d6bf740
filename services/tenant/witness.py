"""What services may put on record. Refuses kinds that a service never sees happen, and times at which it cannot have happened."""

from collections.abc import Mapping
from datetime import datetime, timedelta

import structlog

from mesh.common.v1 import error_reason_pb2
from services.kernel.errors import Forbidden, InvalidRequest

log = structlog.get_logger(__name__)

ACTIONS: Mapping[str, frozenset[str]] = {
    "inference": frozenset({"DOCUMENTS_READ", "CALL_ENDED"}),
    "retrieval": frozenset({"DOCUMENTS_READ"}),
    "ratelimit": frozenset({"ABUSE_GUARD_LIFTED"}),
}
# Clocks of one mesh differ by less, or certificates and tokens do not hold either.
CLOCK_SKEW = timedelta(seconds=30)
# Longer than any outage after which what waited is still believed.
MAX_AGE = timedelta(days=7)


def refuse_action(caller: str, action: str, field: str) -> None:
    """Returns for an action that is the caller's to record. Raises: Forbidden(CALLER_NOT_ALLOWED)."""
    allowed = ACTIONS.get(caller, frozenset())
    if action in allowed:
        return
    log.error("audit_action_refused", security_event=True, caller=caller, action=action)
    listed = ", ".join(sorted(allowed)) or "nothing"
    raise Forbidden(
        error_reason_pb2.ERROR_REASON_CALLER_NOT_ALLOWED,
        f"{field}: {caller} may record {listed}, not {action}; nothing was recorded: send what it may record without it",
        caller=caller,
        action=action,
        field=field,
    )


def refuse_moment(occur_time: datetime, now: datetime, field: str) -> None:
    """Returns for a moment that may have been. Raises: InvalidRequest."""
    if occur_time > now + CLOCK_SKEW:
        description = f"is more than {CLOCK_SKEW.total_seconds():.0f} s in the future; nothing was recorded: set the caller's clock"
        raise InvalidRequest(field, description)
    if occur_time < now - MAX_AGE:
        raise InvalidRequest(field, f"is older than {MAX_AGE.days} days; nothing was recorded: set it aside and send the others")
