"""One Redis, one ratelimit process and the peers it asks, for the length of a run."""

import asyncio
import hashlib
import os
import secrets
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from pydantic import SecretStr

from bench.limits.peer import Peer
from devstack.embedded_redis import EmbeddedRedis
from devstack.managed_process import ManagedProcess
from devstack.ports import LOOPBACK, free_port
from devstack.stack import is_serving_at
from services.kernel.ids import TenantId
from services.kernel.rpc.channel import MeshChannel
from services.kernel.settings import ServiceSettings
from services.ratelimit.adapters.redis_link import PipelinedLink
from services.ratelimit.adapters.redis_snapshots import RedisSnapshots
from services.ratelimit.adapters.redis_store import RedisStore
from services.ratelimit.adapters.tenant_scripts import TenantScripts
from services.ratelimit.rebuild import Snapshot
from services.ratelimit.terms import Terms

SERVICE = "mesh.ratelimit.v1.RateLimitService"
_START_SECONDS = 30.0
_LOADS_AT_ONCE = 64
# On a machine that is shared, the limits' own 40 ms would measure its other users.
_REDIS_SECONDS = "2"


class InferenceSettings(ServiceSettings):
    """A caller that may reserve."""

    service_name: ClassVar[str] = "inference"


class MeteringSettings(ServiceSettings):
    """A caller that may commit."""

    service_name: ClassVar[str] = "metering"


@dataclass(frozen=True, slots=True)
class World:
    """The running parts. `store` and `snapshots` reach the same Redis past the service."""

    redis: EmbeddedRedis
    service: ManagedProcess
    peer: Peer
    inference: MeshChannel
    metering: MeshChannel
    link: PipelinedLink
    store: RedisStore
    snapshots: RedisSnapshots

    @property
    def pids(self) -> dict[str, int]:
        """The processes whose CPU is counted."""
        return {"service": self.service.pid, "redis": self.redis.process.pid}

    async def load(self, tenant_ids: Sequence[TenantId], terms: Terms) -> None:
        """Makes counters as a rebuild does, from a ledger that has nothing."""
        left = iter(tenant_ids)

        async def load_some() -> None:
            for tenant_id in left:
                nonce = secrets.token_hex(16)
                await self.snapshots.begin(tenant_id, nonce, terms)
                await self.snapshots.load(tenant_id, nonce, Snapshot(1, ()), terms)

        async with asyncio.TaskGroup() as group:
            for _ in range(_LOADS_AT_ONCE):
                group.create_task(load_some())

    async def drop(self, tenant_ids: Sequence[TenantId]) -> None:
        """Takes tenants away with all that was held, so that no later run pays for ending it."""
        for tenant_id in tenant_ids:
            await self.store.drop(tenant_id)


@asynccontextmanager
async def running_world(folder: Path) -> AsyncIterator[World]:
    """Starts everything on free ports, and stops it."""
    redis = EmbeddedRedis(folder / "redis", port=free_port(), password=secrets.token_hex(16), log_path=folder / "redis.log")
    peer = Peer()
    port = free_port()
    tokens = {name: secrets.token_hex(16) for name in ("ratelimit", "inference", "metering")}
    service = ManagedProcess(
        "ratelimit",
        [sys.executable, "-m", "services.ratelimit", "serve"],
        log_path=folder / "ratelimit.log",
        env={**os.environ, **_environment(port, redis.url, peer.address, tokens)},
    )
    await redis.start()
    await peer.start()
    await service.start()
    link = PipelinedLink(redis.url, timeout_seconds=10.0)
    scripts = TenantScripts(link, link)
    address = f"{LOOPBACK}:{port}"
    inference, metering = (
        MeshChannel(address, settings=kind(service_token=SecretStr(tokens[kind.service_name])), target_service="ratelimit")
        for kind in (InferenceSettings, MeteringSettings)
    )
    try:
        await service.wait_ready(lambda: is_serving_at(address, SERVICE), timeout_seconds=_START_SECONDS)
        yield World(redis, service, peer, inference, metering, link, RedisStore(scripts), RedisSnapshots(scripts))
    finally:
        for channel in (inference, metering):
            await channel.close()
        await link.close()
        await service.stop()
        await peer.stop()
        await redis.stop()


def _environment(port: int, redis_url: str, peer: str, tokens: dict[str, str]) -> dict[str, str]:
    return {
        "TENANTRY_LISTEN_ADDRESS": f"{LOOPBACK}:{port}",
        "TENANTRY_REDIS_URL": redis_url,
        "TENANTRY_REDIS_TIMEOUT_SECONDS": _REDIS_SECONDS,
        "TENANTRY_TENANT_ADDRESS": peer,
        "TENANTRY_METERING_ADDRESS": peer,
        "TENANTRY_SERVICE_TOKEN": tokens["ratelimit"],
        "TENANTRY_PEER_TOKEN_HASHES": ",".join(f"{name}={hashlib.sha256(text.encode()).hexdigest()}" for name, text in tokens.items()),
        "TENANTRY_TRACE_SAMPLE_RATIO": "0",
        "TENANTRY_DRAIN_SECONDS": "0",
    }
