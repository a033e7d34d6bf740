"""How large holds that lie ahead are, and how many of them the limits have room for before anybody could miss it. Pure.

A hold that lies ahead keeps from others what it holds. So all of a tenant's together are a small part of what is left of every rule,
and near an edge there are none.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Self

from mesh.common.v1 import limit_rule_pb2
from services.inference.call import LimitLeft
from services.inference.worst_case import Hold

# Of what is left of a rule, the part that may lie ahead; twice that part is too much to go on with.
LEFT_PARTS = 16
NEAR_PARTS = LEFT_PARTS // 2
# Sizes from one power of two to the next: a call is held at most a quarter above its own worst case.
_SIZES_A_DOUBLING_BITS = 2


@dataclass(frozen=True, slots=True)
class Ahead:
    """What lies ahead of calls, all together."""

    count: int = 0
    tokens: int = 0
    cost_nano_usd: int = 0

    @classmethod
    def of(cls, holds: Iterable[tuple[Hold, int]]) -> Self:
        """Adds up holds, each so many times."""
        each = list(holds)
        return cls(
            sum(count for _, count in each),
            sum(hold.tokens * count for hold, count in each),
            sum(hold.cost_nano_usd * count for hold, count in each),
        )


def rounded_up(tokens: int) -> int:
    """Returns the next of the sizes in which input is held ahead, so that calls of like size can use the same holds."""
    step = 1 << max(0, tokens.bit_length() - 1 - _SIZES_A_DOUBLING_BITS)
    return -(-tokens // step) * step


def room(limits: Sequence[LimitLeft], hold: Hold, ahead: Ahead) -> int | None:
    """Returns how many such holds may be taken beside what lies ahead already; None where no rule counts any."""
    one = Ahead.of([(hold, 1)])
    rooms = [
        (limit.remaining // LEFT_PARTS - _counted(limit, ahead)) // need
        for limit in limits
        if not _by_itself(limit) and (need := _counted(limit, one))
    ]
    return max(0, min(rooms)) if rooms else None


def is_near(limits: Sequence[LimitLeft], ahead: Ahead) -> bool:
    """Tells whether what lies ahead is so much of what a rule has left that others may soon miss it."""
    return any(_counted(limit, ahead) > limit.remaining // NEAR_PARTS for limit in limits if not _by_itself(limit))


def _by_itself(limit: LimitLeft) -> bool:
    # After a hold, what counts it has something in use: a rule that has not looks at each request by itself.
    return limit.remaining >= limit.limit


def _counted(limit: LimitLeft, ahead: Ahead) -> int:
    match limit.unit:
        case limit_rule_pb2.LIMIT_UNIT_TOKENS:
            return ahead.tokens
        case limit_rule_pb2.LIMIT_UNIT_COST_NANO_USD:
            return ahead.cost_nano_usd
        case limit_rule_pb2.LIMIT_UNIT_RETRIES | limit_rule_pb2.LIMIT_UNIT_PRODUCT:
            return 0
        case _:
            return ahead.count
