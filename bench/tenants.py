"""What it costs to know who is calling, with 1, 1,000 and 100,000 tenants in the database.

Cached: a replica resolves the key of a caller it knows, while the feed of changes vouches for what it remembers. Cold: it knows nothing and
asks; the tenant service, which keeps no answer, asks Postgres. The databases stand side by side and are measured in turn, in short rounds;
costs are CPU time, of this process for cached, of it, the tenant service and its sessions at Postgres for cold. The very first use of a key
is a durable write besides, and is not measured here. Exit code 1 unless the cached cost is the same within 10 %, its interval included.
"""

import argparse
import asyncio
import contextlib
import gc
import json
import platform
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from math import nan
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

from bench.crowd import Crowd, crowds
from bench.latency import Latencies
from bench.paired import Rounds, orders
from devstack.state import StackState
from mesh.tenant.v1 import authentication_service_pb2_grpc
from services.kernel.background import BackgroundTasks
from services.kernel.change_feed import ChangeFeed
from services.kernel.context_token import ContextTokenVerifier
from services.kernel.credential_resolver import RemoteContextKeySource, RemoteCredentialResolver
from services.kernel.rpc.channel import MeshChannel
from services.kernel.settings import ServiceSettings

if TYPE_CHECKING:
    from mesh.tenant.v1.authentication_service_pb2_grpc import AuthenticationServiceStub

SIZES = (1, 1_000, 100_000)
# Credentials in use at once with every size: the cost of more tenants, not that of more callers.
KEYS = 400
CACHED_ROUNDS = 402
COLD_ROUNDS = 90
COLD_CALLS = 10
FRESH_WAIT_SECONDS = 30.0
MOST_LOAD_SECONDS = 60.0
FLAT = 0.10


class DataService(ServiceSettings):
    """A service that may authenticate callers."""

    service_name: ClassVar[str] = "retrieval"


class CountingStub:
    """The stub of a resolver, which counts how often it is reached for: a cached answer needs none."""

    def __init__(self, stub: "AuthenticationServiceStub") -> None:
        self._stub = stub
        self.questions = 0

    @property
    def Authenticate(self) -> Any:
        """The call, counted."""
        self.questions += 1
        return self._stub.Authenticate


@dataclass(slots=True)
class Replica:
    """What a replica of a data service knows callers by, on one crowd's tenant service."""

    crowd: Crowd
    feed: ChangeFeed
    stub: CountingStub
    knowing: RemoteCredentialResolver
    # Has room for one answer, so that it knows nobody when the next key comes.
    forgetful: RemoteCredentialResolver
    cached_ms: list[float] = field(default_factory=list)
    cold_ms: list[float] = field(default_factory=list)
    asked_at: int = 0

    @classmethod
    @contextlib.asynccontextmanager
    async def on(cls, crowd: Crowd, state: StackState) -> AsyncIterator["Replica"]:
        """Connects, and hears the feed."""
        settings = DataService(service_token=state.secrets.service_tokens["retrieval"])  # type: ignore[arg-type] # pydantic wraps it
        channel = MeshChannel(crowd.address, settings=settings, target_service="tenant")
        stub = CountingStub(authentication_service_pb2_grpc.AuthenticationServiceStub(channel.channel))
        taken = cast("AuthenticationServiceStub", stub)
        real = authentication_service_pb2_grpc.AuthenticationServiceStub(channel.channel)
        verifier = ContextTokenVerifier(RemoteContextKeySource(real, channel=channel))
        feed, background = ChangeFeed(channel), BackgroundTasks()
        knowing = RemoteCredentialResolver(taken, verifier, channel=channel, feed=feed)
        forgetful = RemoteCredentialResolver(taken, verifier, channel=channel, cache_size=1)
        background.start("feed", feed.run)
        try:
            yield cls(crowd, feed, stub, knowing, forgetful)
        finally:
            await background.close()
            await channel.close()

    async def warm(self) -> None:
        """Knows every caller, and has opened what it needs: the same state for every size."""
        await self._is_fresh()
        for _ in range(2):
            for key in self.crowd.keys:
                await self.forgetful.resolve(key, None)
                await self.knowing.resolve(key, None)

    async def cached(self) -> float:
        """CPU seconds of this process for one cached resolve; nan when something had to be asked after all."""
        await self._is_fresh()
        # Once before, with a look at the clock: whoever comes first pays for what others left in the processor's caches.
        for key in self.crowd.keys:
            began = time.perf_counter()
            await self.knowing.resolve(key, None)
            self.cached_ms.append((time.perf_counter() - began) * 1000)
        asked, began_cpu = self.stub.questions, time.process_time()
        for key in self.crowd.keys:
            await self.knowing.resolve(key, None)
        spent = time.process_time() - began_cpu
        return spent / len(self.crowd.keys) if self.stub.questions == asked else nan

    async def cold(self) -> float:
        """CPU seconds of all that work on one cold resolve; nan when the service closed or opened a session meanwhile."""
        await self.crowd.find_sessions()
        began_cpu = self._cold_cpu_seconds()
        for _ in range(COLD_CALLS):
            key = self.crowd.keys[self.asked_at % len(self.crowd.keys)]
            self.asked_at += 1
            began = time.perf_counter()
            await self.forgetful.resolve(key, None)
            self.cold_ms.append((time.perf_counter() - began) * 1000)
        spent = self._cold_cpu_seconds() - began_cpu
        return spent / COLD_CALLS if await self.crowd.find_sessions() else nan

    def _cold_cpu_seconds(self) -> float:
        return self.crowd.cpu_seconds() + time.process_time()

    async def _is_fresh(self) -> None:
        async with asyncio.timeout(FRESH_WAIT_SECONDS):
            # Between rounds the feed gets its say; within one nothing else runs.
            await asyncio.sleep(0)
            while not self.feed.is_fresh:  # noqa: ASYNC110 - what another process says
                await asyncio.sleep(0.01)


async def measure(replicas: Sequence[Replica]) -> tuple[Rounds, Rounds]:
    """Cached and cold, in turn."""
    by_size = {replica.crowd.tenant_count: replica for replica in replicas}
    sizes = list(by_size)
    for replica in replicas:
        await replica.warm()
    # What is there now stays: a collection in the middle of a round would be paid by whoever is measured then.
    gc.collect()
    gc.freeze()
    cached, cold = Rounds(sizes), Rounds(sizes)
    for order in orders(sizes, CACHED_ROUNDS):
        costs = {size: await by_size[size].cached() for size in order}
        cached.add(costs)
    for order in orders(sizes, COLD_ROUNDS):
        cold.add({size: await by_size[size].cold() for size in order})
    return cached, cold


def told_of(replica: Replica, cached: Rounds, cold: Rounds) -> dict[str, float]:
    """One size's figures."""
    size = replica.crowd.tenant_count
    known, asked = (Latencies(sorted(each), 1.0) for each in (replica.cached_ms, replica.cold_ms))
    return {
        "tenants": size,
        "load_seconds": round(replica.crowd.load_seconds, 1),
        "cached_cpu_us": round(cached.median_cost(size) * 1e6, 3),
        "cached_cpu_relative": round(cached.relative(size), 4),
        "cached_p50_us": round(known.percentile(0.5) * 1000, 2),
        "cached_p99_us": round(known.percentile(0.99) * 1000, 2),
        "cold_cpu_ms": round(cold.median_cost(size) * 1e3, 3),
        "cold_cpu_relative": round(cold.relative(size), 4),
        "cold_p50_ms": round(asked.percentile(0.5), 2),
        "cold_p99_ms": round(asked.percentile(0.99), 2),
    }


def _spread(name: str, rounds: Rounds) -> dict[str, object]:
    interval = [round(end, 4) for end in rounds.spread_interval()]
    return {f"{name}_rounds": len(rounds.costs), f"{name}_spread": round(rounds.spread(), 4), f"{name}_spread_95": interval}


async def run(sizes: Sequence[int]) -> tuple[dict[str, object], bool]:
    """Starts what is needed, measures and stops it; returns the result, and whether the cached cost is flat."""
    with tempfile.TemporaryDirectory(prefix="tenantry-bench-") as folder:
        Path(folder).chmod(0o755)  # noqa: ASYNC240 - Postgres may run as another user
        async with crowds(Path(folder) / "state", sizes, KEYS) as (state, found), contextlib.AsyncExitStack() as closing:
            replicas = [await closing.enter_async_context(Replica.on(crowd, state)) for crowd in found]
            cached, cold = await measure(replicas)
            runs = [told_of(replica, cached, cold) for replica in replicas]
    is_flat = cached.spread_interval()[1] <= FLAT
    result: dict[str, object] = {"bench": "tenants", "python": platform.python_version(), "keys_in_use": KEYS, "runs": runs}
    result |= _spread("cached", cached) | _spread("cold", cold)
    result |= {"cached_is_flat": is_flat, "load_in_time": max(crowd.load_seconds for crowd in found) < MOST_LOAD_SECONDS}
    return result, is_flat


def main(arguments: list[str]) -> None:
    """Measures and prints. Exits with 1 when the cached cost is not flat."""
    parser = argparse.ArgumentParser(prog="python -m bench tenants", description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES), help="how many tenants there are in each database")
    result, is_flat = asyncio.run(run(parser.parse_args(arguments).sizes))
    print(json.dumps(result))
    sys.exit(0 if is_flat else 1)
