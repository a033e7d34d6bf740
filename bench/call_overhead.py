"""What the mesh adds to a provider call: latency over the bare SDK, CPU summed over the five services, memory.

Stub provider, every guard on, one load generator on the same machine. Direct and meshed calls alternate in one run, because the
machine is shared.
"""

import argparse
import asyncio
import json
import platform
import tempfile
import uuid
from dataclasses import dataclass
from pathlib import Path

import anthropic

from bench import bare_hop
from bench.latency import Latencies, closed_loop
from bench.process_cost import CpuReading, resident_megabytes
from devstack.addresses import Ports
from devstack.handbook import Company
from devstack.mesh_client import MeshClient, credentials
from devstack.provisioning import create_tenant
from devstack.stack import Stack, running_stack
from devstack.state import SERVICES, DemoTenant
from mesh.inference.v1 import inference_service_pb2 as pb
from mesh.retrieval.v1 import document_service_pb2

MODEL = "claude-haiku-4-5-20251001"
QUESTION = "How many days of paid holiday does the handbook give, and who approves them?"
MAX_OUTPUT_TOKENS = 64
CALL_TIMEOUT_SECONDS = 30.0
# A tenant may make 600 calls a minute on the largest plan; the load is spread so that none reaches its limit.
TENANTS = 48
DOCUMENTS = [
    (
        "holidays.md",
        "Holidays",
        "# Holidays\n\nThe handbook gives 27 days of paid holiday a year. The team lead approves them within five days.",
    ),
    ("expenses.md", "Expenses", "# Expenses\n\nMeals on a journey cost at most 38 euros a day. Hand the receipt in within three weeks."),
    ("security.md", "Security", "# Security\n\nA lost laptop is reported within two hours to the security desk, by phone."),
]


@dataclass(frozen=True, slots=True)
class Load:
    """What one run does."""

    concurrency: int
    retrieval: bool
    seconds: float


class Bench:
    """A running mesh with tenants, and the two ways to ask the provider."""

    def __init__(self, stack: Stack, client: MeshClient, tenants: list[DemoTenant]) -> None:
        self._client = client
        self._tenants = tenants
        self._pids = {name: stack.processes[name].pid for name in SERVICES}
        self._sdk = anthropic.AsyncAnthropic(
            api_key=stack.provider.api_key, base_url=stack.provider.base_url, max_retries=0, http_client=anthropic.DefaultAioHttpClient()
        )

    async def close(self) -> None:
        """Closes the bare SDK."""
        await self._sdk.close()

    async def direct(self, _: int) -> None:
        """One call of the bare SDK, streamed, as inference makes it."""
        stream = await self._sdk.messages.create(
            model=MODEL, max_tokens=MAX_OUTPUT_TOKENS, messages=[{"role": "user", "content": QUESTION}], stream=True
        )
        async for _event in stream:
            pass

    async def meshed(self, number: int, *, retrieval: bool) -> None:
        """One unary call through the mesh."""
        mode = pb.RETRIEVAL_MODE_REQUIRED if retrieval else pb.RETRIEVAL_MODE_OFF
        request = pb.GenerateRequest(
            messages=[pb.Message(role=pb.ROLE_USER, text=QUESTION)],
            options=pb.GenerateOptions(
                model=MODEL, feature="bench", max_output_tokens=MAX_OUTPUT_TOKENS, retrieval=pb.RetrievalOptions(mode=mode, top_k=3)
            ),
        )
        tenant = self._tenants[number % len(self._tenants)]
        metadata = credentials(tenant.api_key, call_id=uuid.uuid4())
        await self._client.inference.Generate(request, metadata=metadata, timeout=CALL_TIMEOUT_SECONDS)

    async def measure(self, load: Load) -> dict[str, object]:
        """Runs direct, meshed, direct, so that a drift of the machine shows in both."""
        part = load.seconds / 4

        async def meshed(number: int) -> None:
            await self.meshed(number, retrieval=load.retrieval)

        await closed_loop(meshed, concurrency=load.concurrency, seconds=min(2.0, part))
        before = await closed_loop(self.direct, concurrency=load.concurrency, seconds=part)
        cpu = CpuReading.of(self._pids)
        through = await closed_loop(meshed, concurrency=load.concurrency, seconds=2 * part)
        spent = CpuReading.of(self._pids).since(cpu)
        after = await closed_loop(self.direct, concurrency=load.concurrency, seconds=part)
        direct = Latencies(sorted([*before.milliseconds, *after.milliseconds]), before.duration_seconds + after.duration_seconds)
        return self._report(load, direct, through, spent)

    def _report(self, load: Load, direct: Latencies, through: Latencies, spent: dict[str, float]) -> dict[str, object]:
        calls = len(through.milliseconds)
        by_service = {name: round(seconds * 1000 / calls, 3) for name, seconds in spent.items()}
        return {
            "concurrency": load.concurrency,
            "retrieval": load.retrieval,
            "calls": calls,
            "direct_p50_ms": round(direct.percentile(0.5), 2),
            "added_p50_ms": round(through.percentile(0.5) - direct.percentile(0.5), 2),
            "added_p99_ms": round(through.percentile(0.99) - direct.percentile(0.99), 2),
            "calls_per_second": round(through.calls_per_second, 1),
            "direct_calls_per_second": round(direct.calls_per_second, 1),
            "cpu_ms_per_call": round(sum(by_service.values()), 3),
            "cpu_ms_by_service": by_service,
            "rss_mb_by_service": resident_megabytes(self._pids),
        }


async def run(seconds: float, concurrencies: list[int], trace_sample_ratio: float) -> dict[str, object]:
    """Starts a mesh of its own, measures every combination, and stops it."""
    hops = {concurrency: round(await bare_hop.cpu_milliseconds(concurrency), 3) for concurrency in concurrencies}
    with tempfile.TemporaryDirectory(prefix="tenantry-bench-") as folder:
        Path(folder).chmod(0o755)  # noqa: ASYNC240 - Postgres may run as another user
        ports = Ports.free()
        mesh = running_stack(Path(folder) / "state", ports, trace_sample_ratio=trace_sample_ratio)
        async with mesh as stack, MeshClient.connect(ports) as client:
            bench = Bench(stack, client, await _tenants(stack, client))
            try:
                runs = [await bench.measure(Load(number, retrieval, seconds)) for retrieval in (False, True) for number in concurrencies]
            finally:
                await bench.close()
    return {
        "bench": "call_overhead",
        "python": platform.python_version(),
        "seconds_per_run": seconds,
        "trace_sample_ratio": trace_sample_ratio,
        "tenants": TENANTS,
        "bare_hop_cpu_ms": hops,
        "runs": runs,
    }


async def _tenants(stack: Stack, client: MeshClient) -> list[DemoTenant]:
    tenants = []
    request = document_service_pb2.UpsertDocumentsRequest(
        documents=[document_service_pb2.DocumentInput(document_key=key, title=title, text=text) for key, title, text in DOCUMENTS]
    )
    for number in range(TENANTS):
        company = Company(f"bench-{number}", f"Bench {number}", "enterprise", f"owner{number}@bench.example.com", "Bench")
        tenant = await create_tenant(stack, client, company)
        await client.documents.UpsertDocuments(request, metadata=credentials(tenant.api_key), timeout=CALL_TIMEOUT_SECONDS)
        tenants.append(tenant)
    return tenants


def main(arguments: list[str]) -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(prog="python -m bench call_overhead", description=__doc__)
    parser.add_argument(
        "--seconds", type=float, default=12.0, help="of each combination: a quarter direct, a half meshed, a quarter direct"
    )
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--trace-sample-ratio", type=float, default=0.1, help="share of calls that are traced and exported")
    options = parser.parse_args(arguments)
    result = asyncio.run(run(options.seconds, options.concurrency, options.trace_sample_ratio))
    print(json.dumps(result))
