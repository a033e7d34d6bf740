"""Questions about use over a ledger of many entries: latencies of `QueryUsage`, `QueryUsageOfTenants` and `GetBalance` through gRPC.

The ledger is filled in SQL: calls, entries and sums that are consistent, of one large tenant and many small ones, over sixty days. What is
asked is what a dashboard asks. Exit code 1 when the 99th percentile of a question, or of all together, is over 50 ms, or an answer is not
what the entries say. With `--state` the ledger is kept in a folder and asked again without filling it.
"""

import argparse
import asyncio
import json
import platform
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import UUID

import asyncpg
import grpc

from bench.crowd import process_cpu_seconds
from bench.latency import Latencies, closed_loop
from bench.usage_ledger import fill, hurried, verify
from devstack.addresses import Ports
from devstack.environment import DATABASE
from devstack.handbook import Company
from devstack.mesh_client import MeshClient, credentials
from devstack.provisioning import create_tenant
from devstack.stack import Stack, running_stack
from mesh.metering.v1 import usage_service_pb2 as pb
from mesh.metering.v1.usage_service_pb2_grpc import UsageServiceStub

TARGET_MS = 50.0
TIMEOUT_SECONDS = 30.0
MONTH = timedelta(days=30)
# These fill caches and make plans.
WARMING = 10
SESSIONS = "SELECT pid FROM pg_stat_activity WHERE usename ~ '^metering'"

Ask = Callable[[int], Awaitable[None]]


def questions(now: datetime) -> dict[str, pb.UsageQuery]:
    """What a tenant's dashboard asks, by name."""
    midnight = now.replace(hour=0, minute=0, second=0, microsecond=0)
    return {
        "model_of_month": _query(midnight - MONTH, group_by=[pb.USAGE_DIMENSION_MODEL], order_by=pb.USAGE_MEASURE_COST),
        "days_by_feature": _query(midnight - MONTH, group_by=[pb.USAGE_DIMENSION_FEATURE], bucket=pb.USAGE_BUCKET_DAY),
        "days_in_berlin": _query(midnight - MONTH, bucket=pb.USAGE_BUCKET_DAY, time_zone="Europe/Berlin"),
        "hours_of_week": _query(midnight - timedelta(days=7), bucket=pb.USAGE_BUCKET_HOUR),
        "top_users_of_month": _query(midnight - MONTH, group_by=[pb.USAGE_DIMENSION_USER], order_by=pb.USAGE_MEASURE_COST, page_size=20),
        "prompt_that_retries": _query(
            midnight - MONTH, group_by=[pb.USAGE_DIMENSION_PROMPT_VERSION], order_by=pb.USAGE_MEASURE_RETRY_SHARE
        ),
        "provider_that_fails": _query(
            midnight - MONTH,
            group_by=[pb.USAGE_DIMENSION_PROVIDER],
            order_by=pb.USAGE_MEASURE_FAILED,
            filter=pb.UsageFilter(features=["chat"]),
        ),
        "tier_that_is_slow": _query(midnight - MONTH, group_by=[pb.USAGE_DIMENSION_TIER], order_by=pb.USAGE_MEASURE_TOTAL_P95),
    }


def _query(start: datetime, **more: object) -> pb.UsageQuery:
    query = pb.UsageQuery(**more)  # type: ignore[arg-type] # fields of the message
    query.start_time.FromDatetime(start)
    return query


class Bench:
    """The service's own port, asked as a tenant and as an operator."""

    def __init__(self, stub: UsageServiceStub, api_key: str, operator_key: str, now: datetime) -> None:
        self._stub = stub
        self._tenant = credentials(api_key)
        self._operator = (*credentials(operator_key), ("x-operator-reason", "bench"))
        self._questions = questions(now)

    def asks(self) -> dict[str, Ask]:
        """Every question by name."""
        own = {name: self._ask(query) for name, query in self._questions.items()}
        return own | {"balance": self._balance, "tenant_that_costs": self._tenant_that_costs}

    def _ask(self, query: pb.UsageQuery) -> Ask:
        async def ask(_: int) -> None:
            answer = await self._stub.QueryUsage(pb.QueryUsageRequest(query=query), metadata=self._tenant, timeout=TIMEOUT_SECONDS)
            if not answer.rows:
                raise AssertionError(query)

        return ask

    async def _balance(self, _: int) -> None:
        await self._stub.GetBalance(pb.GetBalanceRequest(), metadata=self._tenant, timeout=TIMEOUT_SECONDS)

    async def _tenant_that_costs(self, _: int) -> None:
        query = pb.UsageQuery()
        query.CopyFrom(self._questions["model_of_month"])
        query.ClearField("group_by")
        query.group_by.append(pb.USAGE_DIMENSION_TENANT)
        request = pb.QueryUsageOfTenantsRequest(query=query)
        await self._stub.QueryUsageOfTenants(request, metadata=self._operator, timeout=TIMEOUT_SECONDS)


class Costs:
    """CPU of metering and of its sessions at Postgres."""

    def __init__(self, admin: asyncpg.Connection, service_pid: int) -> None:
        self._admin = admin
        self._service_pid = service_pid

    async def read(self) -> tuple[float, float]:
        """Returns the CPU seconds of the service and of its sessions so far; sessions do not end meanwhile."""
        sessions = [row["pid"] for row in await self._admin.fetch(SESSIONS)]
        return process_cpu_seconds(self._service_pid), sum(map(process_cpu_seconds, sessions))

    async def of(self, ask: Ask, *, concurrency: int, seconds: float) -> tuple[Latencies, dict[str, object]]:
        """Keeps asking; returns how long answers took, and that with the CPU of each in milliseconds."""
        before = await self.read()
        loop = await closed_loop(ask, concurrency=concurrency, seconds=seconds)
        service, postgres = (after - so_far for after, so_far in zip(await self.read(), before, strict=True))
        asked = len(loop.milliseconds)
        return loop, {
            "p50_ms": round(loop.percentile(0.5), 1),
            "p99_ms": round(loop.percentile(0.99), 1),
            "postgres_cpu_ms": round(1_000 * postgres / asked, 2),
            "service_cpu_ms": round(1_000 * service / asked, 2),
            "asked": asked,
        }


async def measured(costs: Costs, asks: dict[str, Ask], options: argparse.Namespace) -> tuple[dict[str, object], bool]:
    """Each question by itself first, then all in turn, as a dashboard that is opened again and again; and whether all were fast."""
    alone: dict[str, object] = {}
    slowest = 0.0
    for name, ask in asks.items():
        for _ in range(WARMING):
            await ask(0)
        loop, alone[name] = await costs.of(ask, concurrency=1, seconds=options.seconds)
        slowest = max(slowest, loop.percentile(0.99))
    every = list(asks.values())
    together, mixed = await costs.of(
        lambda number: every[number % len(every)](number), concurrency=options.concurrency, seconds=3 * options.seconds
    )
    fast = max(slowest, together.percentile(0.99)) <= TARGET_MS
    return {"each_question": alone, "together": {"concurrency": options.concurrency} | mixed}, fast


@dataclass(frozen=True, slots=True)
class Ledger:
    """A ledger that was filled: with what, for whom, when, and what that cost."""

    entries: int
    tenants: int
    users: int
    api_key: str
    now: str
    fill_seconds: int
    fill_cpu_seconds: int

    def is_of(self, options: argparse.Namespace) -> bool:
        """True where it is the one that is asked for."""
        return (self.entries, self.tenants, self.users) == (options.entries, options.tenants, options.users)


async def ledger_of(stack: Stack, client: MeshClient, options: argparse.Namespace) -> Ledger:
    """Returns the ledger of the stack's folder, filled when there is none. Exits where there is another one, or half of one."""
    path = stack.state.folder / "usage-ledger.json"
    if path.exists():
        kept = Ledger(**json.loads(path.read_text()))
        if not kept.is_of(options):
            sys.exit(f"{path} is not of so many entries, tenants and users: ask for those that it tells, or for another folder")
        return kept
    dsn, now = stack.postgres.dsn(DATABASE), datetime.now(UTC)
    tenant = await create_tenant(stack, client, Company("usage", "usage", "enterprise", "usage@bench.example.com", "Bench"))
    admin = await asyncpg.connect(dsn)
    shape = {"entries": options.entries, "tenants": options.tenants, "users": options.users}
    began = time.monotonic()
    try:
        if await admin.fetchval("SELECT EXISTS (SELECT FROM metering.calls WHERE tenant_id IS NOT NULL)"):
            sys.exit(f"{path.parent} has half a ledger: remove it")
        async with hurried(admin):
            cpu = await fill(dsn, UUID(tenant.tenant_id), now, **shape, progress=lambda step: print(step, file=sys.stderr))
    finally:
        await admin.close()
    took = round(time.monotonic() - began)
    made = Ledger(**shape, api_key=tenant.api_key, now=now.isoformat(), fill_seconds=took, fill_cpu_seconds=round(cpu))
    path.touch(mode=0o600)
    path.write_text(json.dumps(asdict(made)))
    return made


@asynccontextmanager
async def _folder(options: argparse.Namespace) -> AsyncIterator[Path]:
    if options.state is not None:
        yield options.state
        return
    with tempfile.TemporaryDirectory(prefix="tenantry-bench-") as folder:
        Path(folder).chmod(0o755)  # noqa: ASYNC240 - Postgres may run as another user
        yield Path(folder) / "state"


async def run(options: argparse.Namespace) -> tuple[dict[str, object], bool]:
    """Starts a mesh of its own, fills its ledger, measures and stops it."""
    ports = Ports.free()
    async with (
        _folder(options) as folder,
        running_stack(folder, ports, trace_sample_ratio=0.0) as stack,
        MeshClient.connect(ports) as client,
        grpc.aio.insecure_channel(ports.address("metering")) as channel,
    ):
        ledger = await ledger_of(stack, client, options)
        admin = await asyncpg.connect(stack.postgres.dsn(DATABASE))
        try:
            sizes, exact = await verify(admin)
            bench = Bench(UsageServiceStub(channel), ledger.api_key, stack.state.secrets.operator_key, datetime.fromisoformat(ledger.now))
            answers, fast = await measured(Costs(admin, stack.processes["metering"].pid), bench.asks(), options)
        finally:
            await admin.close()
    result: dict[str, object] = {
        "bench": "usage_query",
        "python": platform.python_version(),
        "entries": ledger.entries,
        "tenants": ledger.tenants,
        "users_of_the_large_one": ledger.users,
        "fill_seconds": ledger.fill_seconds,
        "fill_postgres_cpu_seconds": ledger.fill_cpu_seconds,
        **sizes,
        "target_p99_ms": TARGET_MS,
        **answers,
        "sums_are_the_entries": exact,
        "holds": exact and fast,
    }
    return result, exact and fast


def main(arguments: list[str]) -> None:
    """Measures and prints. Exits with 1 when it is not as it must be."""
    parser = argparse.ArgumentParser(prog="python -m bench usage_query", description=__doc__)
    parser.add_argument("--entries", type=int, default=10_000_000, help="entries in the ledger")
    parser.add_argument("--tenants", type=int, default=200, help="tenants; the first has a tenth of all entries")
    parser.add_argument("--users", type=int, default=500, help="users of the large tenant")
    parser.add_argument("--seconds", type=float, default=3.0, help="how long each question is asked alone")
    parser.add_argument("--concurrency", type=int, default=2, help="questions at once in the end")
    parser.add_argument("--state", type=Path, help="a folder that keeps the ledger; by default it is gone in the end")
    result, holds = asyncio.run(run(parser.parse_args(arguments)))
    print(json.dumps(result))
    sys.exit(0 if holds else 1)
