"""What the caller learns at the end: the limits as the settled call leaves them. Pure."""

from services.inference.call import Attempt, LimitLeft, Settled

_TOKEN_RULES = frozenset(("tokens_per_minute", "tokens_per_day"))
_COST_RULES = frozenset(("cost_nano_usd_per_month",))
_SLOT_RULES = frozenset(("concurrent_calls",))


def remaining_limits(attempt: Attempt, settled: Settled) -> tuple[LimitLeft, ...]:
    """Returns the limits after the hold, given back what the call did not use of it. Other calls' changes since then are not in it."""
    unused_tokens = attempt.hold.tokens - attempt.received.usage.total
    unused_cost = attempt.hold.cost_nano_usd - settled.cost_nano_usd
    return tuple(_with(limit, _given_back(limit.rule, unused_tokens, unused_cost)) for limit in attempt.reservation.limits)


def _given_back(rule: str, unused_tokens: int, unused_cost: int) -> int:
    if rule in _TOKEN_RULES:
        return unused_tokens
    if rule in _COST_RULES:
        return unused_cost
    return 1 if rule in _SLOT_RULES else 0


def _with(limit: LimitLeft, given_back: int) -> LimitLeft:
    return LimitLeft(limit.rule, limit.limit, max(0, min(limit.limit, limit.remaining + given_back)))
