"""What the caller learns at the end: the limits as the settled call leaves them. Pure."""

from mesh.common.v1 import limit_rule_pb2
from services.inference.call import Attempt, LimitLeft, Settled


def remaining_limits(attempt: Attempt, settled: Settled) -> tuple[LimitLeft, ...]:
    """Returns the limits after the hold, given back what the call did not use of it. Other calls' changes since then are not in it."""
    given_back = {
        limit_rule_pb2.LIMIT_UNIT_TOKENS: attempt.hold.tokens - attempt.received.usage.total,
        limit_rule_pb2.LIMIT_UNIT_COST_NANO_USD: attempt.hold.cost_nano_usd - settled.cost_nano_usd,
        limit_rule_pb2.LIMIT_UNIT_CONCURRENT_CALLS: 1,
    }
    return tuple(_with(limit, given_back.get(limit.unit, 0)) for limit in attempt.reservation.limits)


def _with(limit: LimitLeft, given_back: int) -> LimitLeft:
    return LimitLeft(limit.rule, limit.limit, max(0, min(limit.limit, limit.remaining + given_back)), limit.unit)
