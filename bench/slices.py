"""Decisions a second of one process that holds slices, against a running mesh; and what they cost in CPU, here and at the service.

Three ways in one run: without a wait where a slice has room, awaited, and use by use at the service. Rates stand by the clock and by
this process's own CPU seconds, as the machine may be shared. Exit code 1 when a CPU second decides fewer than 500,000 uses here, or when
the limits do not count exactly what was used.
"""

import argparse
import asyncio
import json
import platform
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import grpc
from google.protobuf.field_mask_pb2 import FieldMask

from bench.latency import closed_loop
from bench.process_cost import CpuReading
from devstack.addresses import Ports
from devstack.handbook import Company
from devstack.mesh_client import MeshClient, credentials, operator_credentials
from devstack.provisioning import create_tenant
from devstack.stack import Stack, running_stack
from mesh.common.v1 import limit_rule_pb2 as rules
from mesh.ratelimit.v1 import rate_limit_service_pb2 as messages
from mesh.ratelimit.v1.rate_limit_service_pb2_grpc import RateLimitServiceStub
from mesh.tenant.v1 import configuration_service_pb2, configuration_service_pb2_grpc
from services.kernel.ids import new_uuid7
from tenantry.limits import LimitSlices

TARGET_PER_CPU_SECOND = 500_000
UNIT = "searches"
CALL_TIMEOUT_SECONDS = 10.0
CONCURRENCY = 32
# Decisions between two turns of the event loop: what a busy handler does between two awaits that wait.
DECISIONS_A_TURN = 500
# Until the demand is known and slices are as large as it needs.
WARM_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Measured:
    """What one way did: uses, how many of them were decided here, and what they took."""

    uses: int
    local: int
    seconds: float
    own_cpu_seconds: float
    service_cpu_seconds: float

    def figures(self) -> dict[str, float]:
        """Rates and costs."""
        return {
            "decisions_per_second": round(self.uses / self.seconds),
            "decisions_per_own_cpu_second": round(self.uses / self.own_cpu_seconds),
            "local_share": round(self.local / self.uses, 4),
            "own_cpu_us_per_decision": round(self.own_cpu_seconds / self.uses * 1e6, 3),
            "service_cpu_us_per_decision": round(self.service_cpu_seconds / self.uses * 1e6, 3),
        }


class Bench:
    """A tenant with a rule that slides, and the ways to use its unit."""

    def __init__(self, stack: Stack, stub: RateLimitServiceStub, api_key: str) -> None:
        self._pids = {"ratelimit": stack.processes["ratelimit"].pid}
        self._stub = stub
        self._metadata = credentials(api_key)
        self.used = 0

    async def at_once(self, limits: LimitSlices, seconds: float) -> Measured:
        """Decides without a wait where a slice has room."""
        return await self._turns(limits, seconds, awaited=False)

    async def awaited(self, limits: LimitSlices, seconds: float) -> Measured:
        """Decides as callers do who do not care where."""
        return await self._turns(limits, seconds, awaited=True)

    async def at_the_service(self, seconds: float) -> Measured:
        """Consumes use by use."""
        begin, cpu = time.process_time(), CpuReading.of(self._pids)

        async def consume(_: int) -> None:
            request = messages.ConsumeRequest(consumption_id=str(new_uuid7()), product_unit=UNIT, quantity=1)
            await self._stub.Consume(request, metadata=self._metadata, timeout=CALL_TIMEOUT_SECONDS)

        loop = await closed_loop(consume, concurrency=CONCURRENCY, seconds=seconds)
        self.used += len(loop.milliseconds)
        return self._measured(len(loop.milliseconds), 0, loop.duration_seconds, begin, cpu)

    async def counted(self) -> int:
        """What the limits count."""
        response = await self._stub.ListLimits(messages.ListLimitsRequest(), metadata=self._metadata, timeout=CALL_TIMEOUT_SECONDS)
        return next(status.used for status in response.limits if status.rule == UNIT)

    async def _turns(self, limits: LimitSlices, seconds: float, *, awaited: bool) -> Measured:
        warm, _ = await use_until(limits, time.monotonic() + WARM_SECONDS, awaited=awaited)
        begin, cpu, began = time.process_time(), CpuReading.of(self._pids), time.monotonic()
        uses, local = await use_until(limits, began + seconds, awaited=awaited)
        self.used += warm + uses
        return self._measured(uses, local, time.monotonic() - began, begin, cpu)

    def _measured(self, uses: int, local: int, seconds: float, begin: float, cpu: CpuReading) -> Measured:
        spent = CpuReading.of(self._pids).since(cpu)["ratelimit"]
        return Measured(uses, local, seconds, time.process_time() - begin, spent)


async def use_until(limits: LimitSlices, end: float, *, awaited: bool) -> tuple[int, int]:
    """Uses units until `end`, on time.monotonic(); returns how many, and how many of them were decided here.

    `awaited`: as callers do who do not care where; otherwise without a wait where a slice has room.
    """
    uses = local = 0
    while time.monotonic() < end:
        here = 0
        for _ in range(DECISIONS_A_TURN):
            if awaited:
                here += (await limits.try_use(UNIT)).local
            elif limits.try_use_locally(UNIT):
                here += 1
            else:
                here += (await limits.try_use(UNIT)).local
        uses, local = uses + DECISIONS_A_TURN, local + here
        await asyncio.sleep(0)
    return uses, local


async def add_rule(tenant_address: str, operator_key: str, tenant_id: str) -> None:
    """Gives the tenant the unit, as an operator does, with a rule whose numbers are never reached."""
    rule = rules.LimitRule(
        name=UNIT,
        unit=rules.LIMIT_UNIT_PRODUCT,
        product_unit=UNIT,
        window=rules.LIMIT_WINDOW_SLIDING,
        window_seconds=600,
        scope=rules.LIMIT_SCOPE_TENANT,
        limit=10**12,
    )
    request = configuration_service_pb2.UpdateConfigurationRequest(update_mask=FieldMask(paths=[f"limit_rules.rules.{UNIT}"]))
    request.overrides.limit_rules.rules.append(rule)
    metadata = (*operator_credentials(operator_key, "bench"), ("x-tenant-id", tenant_id))
    async with grpc.aio.insecure_channel(tenant_address) as channel:
        stub = configuration_service_pb2_grpc.ConfigurationServiceStub(channel)
        await stub.UpdateConfiguration(request, metadata=metadata, timeout=CALL_TIMEOUT_SECONDS)


async def run(seconds: float) -> tuple[dict[str, object], bool]:
    """Starts a mesh of its own, measures and stops it; returns the result, and whether it is as it must be."""
    with tempfile.TemporaryDirectory(prefix="tenantry-bench-") as folder:
        Path(folder).chmod(0o755)  # noqa: ASYNC240 - Postgres may run as another user
        ports = Ports.free()
        async with running_stack(Path(folder) / "state", ports, trace_sample_ratio=0.0) as stack, MeshClient.connect(ports) as client:
            company = Company("slices", "slices", "enterprise", "slices@bench.example.com", "Bench")
            tenant = await create_tenant(stack, client, company)
            await add_rule(ports.address("tenant"), stack.state.secrets.operator_key, tenant.tenant_id)
            async with grpc.aio.insecure_channel(ports.address("ratelimit")) as channel:
                stub = RateLimitServiceStub(channel)
                bench = Bench(stack, stub, tenant.api_key)
                service = await bench.at_the_service(seconds)
                async with LimitSlices(stub, metadata=credentials(tenant.api_key)) as limits:
                    at_once = await bench.at_once(limits, seconds)
                    awaited = await bench.awaited(limits, seconds)
                counted = await bench.counted()
    exact, fast = counted == bench.used, at_once.figures()["decisions_per_own_cpu_second"] >= TARGET_PER_CPU_SECOND
    result: dict[str, object] = {
        "bench": "slices",
        "python": platform.python_version(),
        "target_per_own_cpu_second": TARGET_PER_CPU_SECOND,
        "here_at_once": at_once.figures(),
        "here_awaited": awaited.figures(),
        "at_the_service": {"concurrency": CONCURRENCY} | service.figures(),
        "used": bench.used,
        "counted": counted,
        "holds": exact and fast,
    }
    return result, exact and fast


def main(arguments: list[str]) -> None:
    """Measures and prints. Exits with 1 when it is not as it must be."""
    parser = argparse.ArgumentParser(prog="python -m bench slices", description=__doc__)
    parser.add_argument("--seconds", type=float, default=5.0, help="how long each way is measured")
    options = parser.parse_args(arguments)
    result, holds = asyncio.run(run(options.seconds))
    print(json.dumps(result))
    sys.exit(0 if holds else 1)
