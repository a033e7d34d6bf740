"""One measured way of deciding: its rate and latencies, and what the processes spent on each decision."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from bench.latency import Call, Latencies, closed_loop
from bench.limits.world import World
from bench.process_cost import CpuReading

_WARM_SECONDS = 0.4


@dataclass(frozen=True, slots=True)
class Row:
    """`p50_ms` and `p99_ms` are of a call, which may be of many decisions. CPU is in microseconds a decision."""

    decisions_per_second: float
    p50_ms: float
    p99_ms: float
    service_cpu_us: float
    redis_cpu_us: float
    client_cpu_us: float

    @classmethod
    def best_of(cls, rows: Sequence[Row]) -> Row:
        """Each figure as it was in its best round: what else a machine does only ever makes it worse."""
        return cls(
            max(row.decisions_per_second for row in rows),
            min(row.p50_ms for row in rows),
            min(row.p99_ms for row in rows),
            min(row.service_cpu_us for row in rows),
            min(row.redis_cpu_us for row in rows),
            min(row.client_cpu_us for row in rows),
        )

    @property
    def busiest_cpu_us(self) -> float:
        """CPU of a decision by the busier of service and store: what bounds them with a core for each."""
        return max(self.service_cpu_us, self.redis_cpu_us, 0.001)

    def figures(self) -> dict[str, float]:
        """The row as it is printed."""
        return {
            "decisions_per_second": round(self.decisions_per_second),
            "p50_ms": round(self.p50_ms, 2),
            "p99_ms": round(self.p99_ms, 2),
            "service_cpu_us": round(self.service_cpu_us, 1),
            "redis_cpu_us": round(self.redis_cpu_us, 1),
            "client_cpu_us": round(self.client_cpu_us, 1),
        }


async def measure(world: World, call: Call, *, concurrency: int, seconds: float, decisions_a_call: int = 1, service_pid: int = 0) -> Row:
    """Runs a closed loop, after a short one that warms what is to be measured. `service_pid`: of what serves in the service's place."""
    pids = {**world.pids, "service": service_pid} if service_pid else world.pids
    await closed_loop(call, concurrency=concurrency, seconds=_WARM_SECONDS)
    before, client = CpuReading.of(pids), time.process_time()
    latencies = await closed_loop(call, concurrency=concurrency, seconds=seconds)
    spent, client = CpuReading.of(pids).since(before), time.process_time() - client
    return _row(latencies, spent, client, decisions_a_call)


def _row(latencies: Latencies, spent: dict[str, float], client: float, decisions_a_call: int) -> Row:
    decisions = len(latencies.milliseconds) * decisions_a_call
    return Row(
        latencies.calls_per_second * decisions_a_call,
        latencies.percentile(0.5),
        latencies.percentile(0.99),
        spent["service"] * 1e6 / decisions,
        spent["redis"] * 1e6 / decisions,
        client * 1e6 / decisions,
    )
