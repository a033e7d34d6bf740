"""Why a call is refused: the rule that binds, when it frees, and a sentence that says what to do. Reads figures, decides nothing itself."""

from dataclasses import dataclass
from math import inf
from uuid import UUID

from mesh.common.v1 import error_reason_pb2
from services.kernel.errors import LimitExceeded, QuotaViolation
from services.ratelimit.limits import Amounts, Limits, Rule
from services.ratelimit.window import MICROSECONDS, LimitStatus, Usage, day_end_us, moment, month_end_us, statuses

# When a running call will end is unknown: a caller may ask again after this long.
CONCURRENCY_HINT_US = MICROSECONDS

_REASONS = {
    Rule.COST_NANO_USD_PER_MONTH: error_reason_pb2.ERROR_REASON_BUDGET,
    Rule.CONCURRENT_CALLS: error_reason_pb2.ERROR_REASON_CONCURRENCY,
}
_NAMES = {
    Rule.REQUESTS_PER_MINUTE: "requests per minute",
    Rule.TOKENS_PER_MINUTE: "tokens per minute",
    Rule.TOKENS_PER_DAY: "tokens per day",
    Rule.COST_NANO_USD_PER_MONTH: "nano-USD per month",
    Rule.CONCURRENT_CALLS: "concurrent calls",
}


@dataclass(frozen=True, slots=True)
class Refusal:
    """The rule that frees last. `retry_after_seconds` is None when waiting does not help."""

    status: LimitStatus
    needed: int
    retry_after_seconds: float | None

    @property
    def message(self) -> str:
        """A sentence for people: what is used up and what to do next."""
        status, name = self.status, _NAMES[self.status.rule]
        if self.retry_after_seconds is None:
            return (
                f"This call needs {self.needed} of the plan's {status.limit} {name}, more than waiting can free: "
                "make the call smaller or move to a larger plan."
            )
        used = f"{status.used} of {status.limit} {name} are in use and this call needs {self.needed} more"
        if status.rule is Rule.CONCURRENT_CALLS:
            return f"{used}: wait for a running call to end, then try again."
        return f"{used}: try again in {self.retry_after_seconds:.3f} s, or move to a larger plan."

    def error(self, tenant_id: UUID) -> LimitExceeded:
        """The refusal as callers meet it."""
        status = self.status
        reset = {} if status.reset_us is None else {"reset_time": moment(status.reset_us).isoformat().replace("+00:00", "Z")}
        return LimitExceeded(
            _REASONS.get(status.rule, error_reason_pb2.ERROR_REASON_PLAN_LIMIT),
            self.message,
            self.retry_after_seconds,
            [QuotaViolation(f"tenant:{tenant_id}", f"{status.rule}: {status.used} of {status.limit} in use, {self.needed} needed")],
            rule=status.rule.value,
            limit=str(status.limit),
            used=str(status.used),
            remaining=str(status.remaining),
            **reset,
        )


def refusal(limits: Limits, usage: Usage, amounts: Amounts, window_us: int) -> Refusal | None:
    """Names the rule that keeps the call out longest; None when no rule does.

    A rule whose limit is below what the call needs never frees, so it binds before all others.
    """
    needs = dict(zip(Rule, (1, amounts.tokens, amounts.tokens, amounts.cost_nano_usd, 1), strict=True))
    binding: tuple[float, LimitStatus] | None = None
    for status in statuses(limits, usage, window_us):
        needed = needs[status.rule]
        if needed <= status.limit - status.used:
            continue
        frees_us = inf if needed > status.limit else _frees_us(status.rule, usage)
        if binding is None or frees_us > binding[0]:
            binding = (frees_us, status)
    if binding is None:
        return None
    frees_us, status = binding
    return Refusal(status, needs[status.rule], None if frees_us == inf else _seconds(frees_us - usage.now_us))


def _frees_us(rule: Rule, usage: Usage) -> float:
    match rule:
        case Rule.REQUESTS_PER_MINUTE:
            return usage.requests_free_us
        case Rule.TOKENS_PER_MINUTE:
            return usage.tokens_free_us
        case Rule.TOKENS_PER_DAY:
            return day_end_us(usage.now_us)
        case Rule.COST_NANO_USD_PER_MONTH:
            return month_end_us(usage.now_us)
        case Rule.CONCURRENT_CALLS:
            return usage.now_us + CONCURRENCY_HINT_US


def _seconds(us: float) -> float:
    # Rounded up to a millisecond: a caller who waits exactly this long must not find the entry still there.
    return max(0, -(-int(us) // 1000)) / 1000
