"""Limits, refusals, ids and amounts as messages, and out of them."""

from collections.abc import Iterable

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from mesh.common.v1 import limit_rule_pb2 as rules
from mesh.ratelimit.v1 import rate_limit_service_pb2 as messages
from services.kernel.ids import ReservationId, TenantId, uuid_from_bytes
from services.ratelimit.decision import Refusal
from services.ratelimit.limit_rule import Unit
from services.ratelimit.limits import NOBODY, Amounts
from services.ratelimit.standing import LimitStatus

_UNITS = {unit: rules.LimitUnit.ValueType(unit) for unit in Unit}
_MODES = (rules.LIMIT_MODE_ENFORCE, rules.LIMIT_MODE_SHADOW)


def limit_messages(limits: Iterable[LimitStatus]) -> list[messages.LimitStatus]:
    """Every limit as a message."""
    return [limit_message(status) for status in limits]


def limit_message(status: LimitStatus) -> messages.LimitStatus:
    """One limit as a message."""
    rule, reset, subject = status.rule, status.reset_us, status.subject
    message = messages.LimitStatus(
        rule=rule.name, limit=rule.limit, used=status.used, remaining=status.remaining, unit=_UNITS[rule.unit], mode=_MODES[rule.shadow]
    )
    if subject is not NOBODY:
        message.user, message.feature = subject.user, subject.feature
    if reset is not None:
        set_timestamp(message.reset_time, reset)
    return message


def refusal_message(refusal: Refusal) -> messages.Refusal:
    """Why something was refused, or would be, as a message."""
    message = messages.Refusal(
        reason=refusal.reason_name,
        status=limit_message(refusal.status),
        needed=refusal.needed,
        retry_after=None if refusal.retry_after_seconds is None else duration(refusal.retry_after_seconds),
        message=refusal.message,
        lifting_plan=refusal.status.rule.lifting_plan,
    )
    set_timestamp(message.decide_time, refusal.now_us)
    return message


def ids_of(ref: messages.ReservationRef) -> tuple[TenantId, ReservationId]:
    """Which reservation of which tenant."""
    return TenantId(uuid_from_bytes(ref.tenant_id, "tenant_id")), ReservationId(uuid_from_bytes(ref.reservation_id, "reservation_id"))


def amounts_of(message: messages.Amounts) -> Amounts:
    """The size of a call."""
    return Amounts(message.tokens, message.cost_nano_usd)


def amounts_message(amounts: Amounts) -> messages.Amounts:
    """The size of a call as a message."""
    return messages.Amounts(tokens=amounts.tokens, cost_nano_usd=amounts.cost_nano_usd)


def set_timestamp(message: Timestamp, us: int) -> None:
    """Writes a count of microseconds into a message."""
    message.seconds, message.nanos = us // 1_000_000, us % 1_000_000 * 1_000


def seconds_of(message: Duration) -> float:
    """A message as seconds; 0 for an absent one."""
    return message.seconds + message.nanos / 1e9


def duration(seconds: float) -> Duration:
    """Seconds as a message, to the microsecond."""
    us = round(seconds * 1_000_000)
    return Duration(seconds=us // 1_000_000, nanos=us % 1_000_000 * 1_000)
