"""Decisions from slices that this process holds, and what a limiter costs here that nobody else knows of."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass

from bench.limits.service_load import TRACEPARENT
from bench.limits.world import World
from bench.process_cost import CpuReading
from bench.slices import UNIT, WARM_SECONDS, use_until
from mesh.common.v1 import limit_rule_pb2 as pb
from mesh.ratelimit.v1.rate_limit_service_pb2_grpc import RateLimitServiceStub
from services.kernel.ids import TenantId, new_uuid7
from tenantry.limits import LimitSlices
from tenantry.slice_lane import CLOCK

# Of very many tenants, those that one process uses so much that it holds slices of them.
HOLDERS = 32
_FLOOR_USES = 200_000
_TIMED_USES = 10_000
_LIMIT = 10**15
_WINDOW_SECONDS = (600, 300, 120, 60, 30)


@dataclass(frozen=True, slots=True)
class LeasedRow:
    """`own_cpu_us`: of this process, which decides. `local_share`: of uses that were decided here."""

    decisions_per_second: float
    p50_us: float
    p99_us: float
    own_cpu_us: float
    service_cpu_us: float
    local_share: float

    @classmethod
    def best_of(cls, rows: Sequence[LeasedRow]) -> LeasedRow:
        """Each figure as it was in its best round."""
        return cls(
            max(row.decisions_per_second for row in rows),
            min(row.p50_us for row in rows),
            min(row.p99_us for row in rows),
            min(row.own_cpu_us for row in rows),
            min(row.service_cpu_us for row in rows),
            max(row.local_share for row in rows),
        )

    @property
    def per_cpu_second(self) -> float:
        """Decisions a CPU second of this process."""
        return 1e6 / self.own_cpu_us

    def figures(self) -> dict[str, float]:
        """The row as it is printed."""
        return {
            "decisions_per_second": round(self.decisions_per_second),
            "per_own_cpu_second": round(self.per_cpu_second),
            "p50_us": round(self.p50_us, 2),
            "p99_us": round(self.p99_us, 2),
            "own_cpu_us": round(self.own_cpu_us, 3),
            "service_cpu_us": round(self.service_cpu_us, 3),
            "local_share": round(self.local_share, 4),
        }


def unit_rules(count: int) -> pb.LimitRules:
    """So many rules over one unit that slide and never bind: of the tenant, of users, of features."""
    scopes = (pb.LIMIT_SCOPE_TENANT, pb.LIMIT_SCOPE_USER, pb.LIMIT_SCOPE_FEATURE)
    windows = [(scope, seconds) for scope in scopes for seconds in _WINDOW_SECONDS][:count]
    return pb.LimitRules(
        rules=[
            pb.LimitRule(
                name=f"searches_{number}",
                unit=pb.LIMIT_UNIT_PRODUCT,
                product_unit=UNIT,
                window=pb.LIMIT_WINDOW_SLIDING,
                window_seconds=seconds,
                scope=scope,
                limit=_LIMIT,
            )
            for number, (scope, seconds) in enumerate(windows)
        ]
    )


async def measure(world: World, rule_count: int, tenant_count: int, seconds: float) -> LeasedRow:
    """Uses a unit of up to `HOLDERS` tenants beside each other, as fast as this process can."""
    stub, rules = RateLimitServiceStub(world.inference.channel), unit_rules(rule_count)
    async with AsyncExitStack() as stack:
        holders = []
        for _ in range(min(tenant_count, HOLDERS)):
            tenant_id = TenantId(new_uuid7())
            token = world.peer.tenants.token(tenant_id, rules)
            metadata = (*world.inference.metadata(None, TRACEPARENT), ("x-tenant-context", token), ("x-tenant-id", str(tenant_id)))
            holders.append(await stack.enter_async_context(LimitSlices(stub, metadata=metadata)))
        await _use_all(holders, time.monotonic() + 2 * WARM_SECONDS)
        before, own, began = CpuReading.of(world.pids), time.process_time(), time.monotonic()
        uses, local = await _use_all(holders, began + seconds)
        elapsed, own = time.monotonic() - began, time.process_time() - own
        spent = CpuReading.of(world.pids).since(before)["service"]
        one_by_one = sorted(_timed(limits) for limits in holders for _ in range(_TIMED_USES // len(holders)))
    return LeasedRow(
        uses / elapsed,
        one_by_one[len(one_by_one) // 2],
        one_by_one[int(len(one_by_one) * 0.99)],
        own * 1e6 / uses,
        spent * 1e6 / uses,
        local / uses,
    )


async def _use_all(holders: Sequence[LimitSlices], end: float) -> tuple[int, int]:
    # Beside each other: in turn, all would wait for the one that asks for its first slice, until theirs are given back as unused.
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(use_until(limits, end, awaited=False)) for limits in holders]
    return sum(task.result()[0] for task in tasks), sum(task.result()[1] for task in tasks)


async def alone_cpu_us() -> float:
    """CPU of a decision by the least that could be one: what is left of a budget found by its name, and whether it is over."""
    budgets = _Budgets()
    best = float("inf")
    for _ in range(5):
        begin = time.process_time()
        for _ in range(_FLOOR_USES // 5):
            budgets.try_use(UNIT)
        best = min(best, (time.process_time() - begin) * 1e6 / (_FLOOR_USES // 5))
        await asyncio.sleep(0)
    return best


class _Budgets:
    def __init__(self) -> None:
        self._budgets = {(UNIT, "", ""): _Budget()}

    def try_use(self, unit: str, quantity: int = 1, *, user: str = "", feature: str = "") -> bool:
        budget = self._budgets.get((unit, user, feature))
        return budget is not None and budget.use(quantity)


class _Budget:
    __slots__ = ("_ends_at", "_room")

    def __init__(self) -> None:
        self._room, self._ends_at = _LIMIT, CLOCK() + 3600.0

    def use(self, quantity: int) -> bool:
        if 0 < quantity <= self._room and CLOCK() < self._ends_at:
            self._room -= quantity
            return True
        return False


def _timed(limits: LimitSlices) -> float:
    begin = time.perf_counter()
    limits.try_use_locally(UNIT)
    return (time.perf_counter() - begin) * 1e6
