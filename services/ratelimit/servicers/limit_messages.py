"""Limits and refusals as messages."""

from collections.abc import Iterable

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from mesh.ratelimit.v1 import rate_limit_service_pb2 as messages
from services.ratelimit.limits import Amounts
from services.ratelimit.window import LimitStatus


def limit_messages(limits: Iterable[LimitStatus]) -> list[messages.LimitStatus]:
    """Every limit as a message."""
    return [
        messages.LimitStatus(
            rule=status.rule.value,
            limit=status.limit,
            used=status.used,
            remaining=status.remaining,
            reset_time=None if status.reset_us is None else timestamp(status.reset_us),
        )
        for status in limits
    ]


def amounts_of(message: messages.Amounts) -> Amounts:
    """The size of a call."""
    return Amounts(message.tokens, message.cost_nano_usd)


def timestamp(us: int) -> Timestamp:
    """A count of microseconds as a message."""
    return Timestamp(seconds=us // 1_000_000, nanos=us % 1_000_000 * 1_000)


def duration(seconds: float) -> Duration:
    """Seconds as a message, to the microsecond."""
    us = round(seconds * 1_000_000)
    return Duration(seconds=us // 1_000_000, nanos=us % 1_000_000 * 1_000)
