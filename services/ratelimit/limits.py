"""The limits of a tenant and the size of a call. Knows no time and no store; 0 as a limit means unlimited."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol


class Rule(StrEnum):
    """The rules, in the order in which scripts take their limits and answers list them."""

    REQUESTS_PER_MINUTE = "requests_per_minute"
    TOKENS_PER_MINUTE = "tokens_per_minute"
    TOKENS_PER_DAY = "tokens_per_day"
    COST_NANO_USD_PER_MONTH = "cost_nano_usd_per_month"
    CONCURRENT_CALLS = "concurrent_calls"


class PlanLimits(Protocol):
    """The part of a plan that is counted here."""

    requests_per_minute: int
    tokens_per_minute: int
    tokens_per_day: int
    cost_nano_usd_per_month: int
    concurrent_calls: int


@dataclass(frozen=True, slots=True)
class Amounts:
    """What a call needs at most, or used: 0–10^7 tokens, 0–10^15 nano-USD."""

    tokens: int
    cost_nano_usd: int


@dataclass(frozen=True, slots=True)
class Limits:
    """The most a tenant may use, by rule. Every value is below 2^53, so that a Lua double keeps it exactly."""

    requests_per_minute: int = 0
    tokens_per_minute: int = 0
    tokens_per_day: int = 0
    cost_nano_usd_per_month: int = 0
    concurrent_calls: int = 0

    @classmethod
    def of(cls, plan: PlanLimits) -> "Limits":
        """Takes the counted limits out of a plan."""
        return cls(
            plan.requests_per_minute,
            plan.tokens_per_minute,
            plan.tokens_per_day,
            plan.cost_nano_usd_per_month,
            plan.concurrent_calls,
        )

    def in_order(self) -> tuple[int, int, int, int, int]:
        """The limits in the order of `Rule`."""
        return (
            self.requests_per_minute,
            self.tokens_per_minute,
            self.tokens_per_day,
            self.cost_nano_usd_per_month,
            self.concurrent_calls,
        )
