"""Questions about use over a ledger of many entries: latencies of `QueryUsage`, `QueryUsageOfTenants` and `GetBalance` through gRPC.

The ledger is filled in SQL: calls, entries and sums that are consistent, of one large tenant and many small ones, over sixty days. What is
asked is what a dashboard asks. Exit code 1 when the 99th percentile of all questions together is over 50 ms, or an answer is not what the
entries say.
"""

import argparse
import asyncio
import json
import platform
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import UUID

import asyncpg
import grpc

from bench.latency import Latencies, closed_loop
from bench.usage_ledger import fill, verify
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


async def measured(asks: dict[str, Ask], seconds: float, concurrency: int) -> tuple[dict[str, object], Latencies]:
    """Each question by itself first, then all in turn, as a dashboard that is opened again and again."""
    alone: dict[str, object] = {}
    for name, ask in asks.items():
        await ask(0)
        loop = await closed_loop(ask, concurrency=1, seconds=seconds)
        alone[name] = {"p50_ms": round(loop.percentile(0.5), 1), "p99_ms": round(loop.percentile(0.99), 1), "asked": len(loop.milliseconds)}
    every = list(asks.values())
    return alone, await closed_loop(lambda number: every[number % len(every)](number), concurrency=concurrency, seconds=3 * seconds)


async def run(options: argparse.Namespace) -> tuple[dict[str, object], bool]:
    """Starts a mesh of its own, fills its ledger, measures and stops it."""
    with tempfile.TemporaryDirectory(prefix="tenantry-bench-") as folder:
        Path(folder).chmod(0o755)  # noqa: ASYNC240 - Postgres may run as another user
        ports, now = Ports.free(), datetime.now(UTC)
        async with running_stack(Path(folder) / "state", ports, trace_sample_ratio=0.0) as stack, MeshClient.connect(ports) as client:
            tenant = await create_tenant(stack, client, Company("usage", "usage", "enterprise", "usage@bench.example.com", "Bench"))
            admin = await asyncpg.connect(stack.postgres.dsn(DATABASE))
            try:
                began = time.monotonic()
                await fill(admin, UUID(str(tenant.tenant_id)), now, entries=options.entries, tenants=options.tenants, users=options.users)
                filled = time.monotonic() - began
                sizes, exact = await verify(admin)
            finally:
                await admin.close()
            alone, together = await _asked(stack, ports, tenant.api_key, now, options)
    fast = together.percentile(0.99) <= TARGET_MS
    result: dict[str, object] = {
        "bench": "usage_query",
        "python": platform.python_version(),
        "entries": options.entries,
        "tenants": options.tenants,
        "users_of_the_large_one": options.users,
        "fill_seconds": round(filled),
        **sizes,
        "target_p99_ms": TARGET_MS,
        "each_question": alone,
        "together": {
            "concurrency": options.concurrency,
            "asked": len(together.milliseconds),
            "p50_ms": round(together.percentile(0.5), 1),
            "p99_ms": round(together.percentile(0.99), 1),
        },
        "sums_are_the_entries": exact,
        "holds": exact and fast,
    }
    return result, exact and fast


async def _asked(
    stack: Stack, ports: Ports, api_key: str, now: datetime, options: argparse.Namespace
) -> tuple[dict[str, object], Latencies]:
    async with grpc.aio.insecure_channel(ports.address("metering")) as channel:
        bench = Bench(UsageServiceStub(channel), api_key, stack.state.secrets.operator_key, now)
        return await measured(bench.asks(), options.seconds, options.concurrency)


def main(arguments: list[str]) -> None:
    """Measures and prints. Exits with 1 when it is not as it must be."""
    parser = argparse.ArgumentParser(prog="python -m bench usage_query", description=__doc__)
    parser.add_argument("--entries", type=int, default=10_000_000, help="entries in the ledger")
    parser.add_argument("--tenants", type=int, default=200, help="tenants; the first has a tenth of all entries")
    parser.add_argument("--users", type=int, default=500, help="users of the large tenant")
    parser.add_argument("--seconds", type=float, default=3.0, help="how long each question is asked alone")
    parser.add_argument("--concurrency", type=int, default=2, help="questions at once in the end")
    result, holds = asyncio.run(run(parser.parse_args(arguments)))
    print(json.dumps(result))
    sys.exit(0 if holds else 1)
