"""What is held against what: the targets, and the floor of each way of deciding.

By the clock a machine with two cores, or one that others use too, says more of itself than of the limits: judged is what CPU allows. A
target is of one CPU second of the process that decides; a floor is compared by the busiest process of either.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bench.limits.leased import LeasedRow
from bench.limits.row import Row

TARGET_BATCH, TARGET_UNARY, TARGET_LEASED, TARGET_OF_FLOOR, TARGET_BYTES = 10_000, 2_500, 500_000, 0.6, 2_048


@dataclass(frozen=True, slots=True)
class Verdict:
    """Decisions by the clock and by a CPU second of what decides, and which part of what its floor allows."""

    by_clock: float
    by_cpu: float
    of_floor: float
    target: int

    def figures(self) -> dict[str, object]:
        """The verdict as it is printed."""
        return {
            "by_clock": round(self.by_clock),
            "by_cpu": round(self.by_cpu),
            "target": self.target,
            "of_floor": round(self.of_floor, 2),
            "target_of_floor": TARGET_OF_FLOOR,
            "clock_met": self.by_clock >= self.target,
        }

    def missed(self, name: str) -> list[str]:
        """What of it is missed, in words."""
        found = []
        if self.by_cpu < self.target:
            found.append(f"{name}: {self.by_cpu:.0f} decisions a CPU second of {self.target}")
        if self.of_floor < TARGET_OF_FLOOR:
            found.append(f"{name}: {self.of_floor:.2f} of its floor of {TARGET_OF_FLOOR}")
        return found


def verdicts(rows: Mapping[str, Row], leased: LeasedRow, alone_cpu_us: float) -> dict[str, Verdict]:
    """The verdicts of one shape, by the way of deciding."""
    unary, batch, single, pipelined, echo = (rows[name] for name in ("unary", "batch", "raw_one_at_a_time", "raw_pipelined", "grpc_echo"))
    # A unary decision is a call that is answered and a command that is sent, both by one process, and a script.
    unary_floor_us = max(echo.service_cpu_us + single.client_cpu_us, single.redis_cpu_us)
    batch_floor_us = max(pipelined.client_cpu_us, pipelined.redis_cpu_us)
    return {
        "unary": Verdict(unary.decisions_per_second, 1e6 / unary.service_cpu_us, unary_floor_us / unary.busiest_cpu_us, TARGET_UNARY),
        "batch": Verdict(batch.decisions_per_second, 1e6 / batch.service_cpu_us, batch_floor_us / batch.busiest_cpu_us, TARGET_BATCH),
        "leased": Verdict(leased.decisions_per_second, leased.per_cpu_second, alone_cpu_us / leased.own_cpu_us, TARGET_LEASED),
    }


def missed_bytes(at_rest: int | None) -> Sequence[str]:
    """What is missed of a tenant's bytes in the store, in words."""
    if at_rest is None:
        return ["a tenant did not come to rest"]
    return [f"a tenant at rest: {at_rest} bytes of {TARGET_BYTES}"] if at_rest > TARGET_BYTES else []
