"""What it saves that a hot tenant's calls take holds that lie ahead: the same calls without it and with it, in turn, in one run.

Two inference processes stand side by side on one mesh. Compared within a round, as the machine is shared.
"""

import argparse
import asyncio
import json
import platform
import re
import statistics
import tempfile
import uuid
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import grpc
from google.protobuf.field_mask_pb2 import FieldMask

from bench.call_overhead import CALL_TIMEOUT_SECONDS, MAX_OUTPUT_TOKENS, MODEL, QUESTION
from bench.latency import closed_loop
from bench.process_cost import CpuReading
from devstack.addresses import Ports
from devstack.handbook import Company
from devstack.managed_process import ManagedProcess
from devstack.mesh_client import MeshClient, credentials, operator_credentials
from devstack.provisioning import create_tenant
from devstack.replica import start_replica
from devstack.stack import Stack, running_stack
from devstack.state import DemoTenant
from mesh.inference.v1 import inference_service_pb2 as pb
from mesh.inference.v1.inference_service_pb2_grpc import InferenceServiceStub
from mesh.tenant.v1 import configuration_service_pb2

# Far from every edge however fast the machine is.
LIMITS = {
    "requests_per_minute": 1_000_000,
    "tokens_per_minute": 1_000_000_000,
    "tokens_per_day": 100_000_000_000,
    "concurrent_calls": 10_000,
}
PACES = {"asked": "0", "ahead": "20"}
SHARED = ("tenant", "ratelimit", "metering")
WARM_SECONDS = 2.0
COUNTED = re.compile(r"[^}]*".join(rf'"{name}": ?(\d+)' for name in ("ahead", "asked", "unused")))

Figures = dict[str, float]


class Side:
    """One inference process and its caller."""

    def __init__(self, name: str, stack: Stack, process: ManagedProcess, address: str, tenants: Sequence[DemoTenant]) -> None:
        self.name = name
        self.process = process
        self.failed = Counter[str]()
        self._stack = stack
        self._tenants = tenants
        self._channel = grpc.aio.insecure_channel(address)
        self._stub = InferenceServiceStub(self._channel)

    async def turn(self, seconds: float, concurrency: int) -> Figures:
        """Makes calls for so long, after a warm-up, and says what each cost."""
        await closed_loop(self._call, concurrency=concurrency, seconds=WARM_SECONDS)
        pids = {name: self._stack.processes[name].pid for name in SHARED} | {"inference": self.process.pid}
        before = CpuReading.of(pids)
        latencies = await closed_loop(self._call, concurrency=concurrency, seconds=seconds)
        spent = CpuReading.of(pids).since(before)
        calls = len(latencies.milliseconds)
        return {
            "calls_per_second": latencies.calls_per_second,
            "p50_ms": latencies.percentile(0.5),
            "p99_ms": latencies.percentile(0.99),
            "cpu_ms": sum(spent.values()) * 1000 / calls,
        } | {f"cpu_ms_{name}": used * 1000 / calls for name, used in spent.items()}

    async def close(self) -> dict[str, object]:
        """Stops the process; returns how its calls came to their holds."""
        await self._channel.close()
        await self.process.stop()
        log = self._stack.state.log_path(f"inference-{self.name}").read_text()
        found = COUNTED.search(next(line for line in reversed(log.splitlines()) if "holds_counted" in line))
        counted = {} if found is None else dict(zip(("ahead", "asked", "unused"), map(int, found.groups()), strict=True))
        return counted | {"failed": dict(self.failed)}

    async def _call(self, number: int) -> None:
        request = pb.GenerateRequest(
            messages=[pb.Message(role=pb.ROLE_USER, text=QUESTION)],
            options=pb.GenerateOptions(model=MODEL, feature="bench", max_output_tokens=MAX_OUTPUT_TOKENS),
        )
        tenant = self._tenants[number % len(self._tenants)]
        try:
            await self._stub.Generate(request, metadata=credentials(tenant.api_key, call_id=uuid.uuid4()), timeout=CALL_TIMEOUT_SECONDS)
        except grpc.aio.AioRpcError as error:
            # On a machine that others starve a store may be late: told, and not the end of the run.
            if error.code() is not grpc.StatusCode.UNAVAILABLE:
                raise
            self.failed[error.details() or error.code().name] += 1


async def run(seconds: float, rounds: int, concurrency: int, tenant_count: int) -> dict[str, object]:
    """Starts a mesh of its own, measures by turns, and stops it."""
    with tempfile.TemporaryDirectory(prefix="tenantry-bench-") as folder:
        Path(folder).chmod(0o755)  # noqa: ASYNC240 - Postgres may run as another user
        ports = Ports.free()
        async with running_stack(Path(folder) / "state", ports, trace_sample_ratio=0.0) as stack:
            async with MeshClient.connect(ports) as client:
                tenants = [await _tenant(stack, client, number) for number in range(tenant_count)]
            sides = []
            for name, pace in PACES.items():
                process, address = await start_replica(stack, "inference", f"inference-{name}", TENANTRY_AHEAD_CALLS_PER_SECOND=pace)
                sides.append(Side(name, stack, process, address, tenants))
            turns: dict[str, list[Figures]] = {name: [] for name in PACES}
            for number in range(rounds):
                for side in sides if number % 2 else reversed(sides):
                    turns[side.name].append(await side.turn(seconds, concurrency))
            holds = {side.name: await side.close() for side in sides}
    return {
        "bench": "holds_ahead",
        "python": platform.python_version(),
        "concurrency": concurrency,
        "tenants": tenant_count,
        "seconds": seconds,
        "rounds": rounds,
        "holds": holds,
        "ratio_median": {figure: round(_ratio(turns, figure), 3) for figure in turns["asked"][0]},
        "median": {name: {figure: round(_median(turns[name], figure), 3) for figure in turns[name][0]} for name in turns},
    }


def _ratio(turns: dict[str, list[Figures]], figure: str) -> float:
    return statistics.median(ahead[figure] / asked[figure] for ahead, asked in zip(turns["ahead"], turns["asked"], strict=True))


def _median(turns: list[Figures], figure: str) -> float:
    return statistics.median(turn[figure] for turn in turns)


async def _tenant(stack: Stack, client: MeshClient, number: int) -> DemoTenant:
    company = Company(f"hot-{number}", f"Hot {number}", "enterprise", f"owner{number}@bench.example.com", "Bench")
    tenant = await create_tenant(stack, client, company)
    operator = operator_credentials(stack.state.secrets.operator_key, "a hot tenant")
    request = configuration_service_pb2.UpdateConfigurationRequest(
        overrides=configuration_service_pb2.ConfigurationOverrides(limits=configuration_service_pb2.LimitOverrides(**LIMITS)),
        update_mask=FieldMask(paths=[f"limits.{term}" for term in LIMITS]),
    )
    await client.configuration.UpdateConfiguration(request, metadata=(*operator, ("x-tenant-id", tenant.tenant_id)), timeout=20)
    return tenant


def main(arguments: list[str]) -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(prog="python -m bench holds_ahead", description=__doc__)
    parser.add_argument("--seconds", type=float, default=8.0, help="of each turn, beside its warm-up")
    parser.add_argument("--rounds", type=int, default=4, help="of two turns each")
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--tenants", type=int, default=1, help="among which the calls are spread")
    options = parser.parse_args(arguments)
    print(json.dumps(asyncio.run(run(options.seconds, options.rounds, options.concurrency, options.tenants))))
