"""Replicas of the service as processes of their own, that a test may kill, and channels to them."""

import asyncio
import hashlib
import json
import os
import random
import signal
import sys
from asyncio.subprocess import PIPE, Process, create_subprocess_exec
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import SecretStr

from devstack.ports import LOOPBACK, answers, free_port
from mesh.ratelimit.v1.rate_limit_service_pb2_grpc import RateLimitServiceStub
from services.kernel.rpc.channel import MeshChannel
from tests.ratelimit.callers import TOKENS, InferenceSettings, MeteringSettings
from tests.ratelimit.nursery import Order
from tests.ratelimit.scripted_peer import Peer
from tests.support.waiting import eventually

READY_SECONDS = 30.0
_LOOK_AGAIN_SECONDS = 0.05


class Nursery:
    """Where replicas come from."""

    def __init__(self, process: Process) -> None:
        self._process = process
        self._one_at_a_time = asyncio.Lock()

    async def start(self, order: Order) -> int:
        """Starts a replica; returns its process id."""
        orders, answers = self._process.stdin, self._process.stdout
        assert orders is not None
        assert answers is not None
        async with self._one_at_a_time:
            orders.write(json.dumps(order).encode() + b"\n")
            return int(await answers.readline())


@dataclass
class Limiter:
    """One replica, as its callers have it: inference and metering."""

    nursery: Nursery
    order: Order
    port: int
    inference: MeshChannel = field(init=False)
    metering: MeshChannel = field(init=False)
    as_inference: RateLimitServiceStub = field(init=False)
    as_metering: RateLimitServiceStub = field(init=False)
    # Set while it is being killed or started: callers then choose another, as a load balancer would soon.
    is_down: bool = True
    _pid: int = 0
    # Channels are closed at the end only: closing one cancels the calls that still wait on it.
    _channels: list[MeshChannel] = field(default_factory=list)

    async def start(self) -> None:
        """Starts it and waits until it serves."""
        self._pid = await self.nursery.start(self.order)
        await eventually(self._answers, within_seconds=READY_SECONDS)
        self.inference, self.as_inference = self._channel(InferenceSettings(service_token=SecretStr(TOKENS["inference"])))
        self.metering, self.as_metering = self._channel(MeteringSettings(service_token=SecretStr(TOKENS["metering"])))
        self.is_down = False

    async def kill(self) -> None:
        """Ends it in the middle of whatever it does. Callers learn of it by their broken calls alone."""
        with suppress(ProcessLookupError):
            os.kill(self._pid, signal.SIGKILL)
        await eventually(self._is_gone, within_seconds=READY_SECONDS)
        self.is_down = True

    async def disconnect(self) -> None:
        """Closes the channels."""
        for channel in self._channels:
            await channel.close()

    def _channel(self, settings: InferenceSettings | MeteringSettings) -> tuple[MeshChannel, RateLimitServiceStub]:
        channel = MeshChannel(f"{LOOPBACK}:{self.port}", settings=settings, target_service="ratelimit")
        self._channels.append(channel)
        return channel, RateLimitServiceStub(channel.channel)

    async def _answers(self) -> bool:
        return answers(self.port)

    async def _is_gone(self) -> bool:
        try:
            os.kill(self._pid, 0)
        except ProcessLookupError:
            return True
        return False


@dataclass
class Limiters:
    """All replicas."""

    every: Sequence[Limiter]
    random: random.Random
    kill_count: int = 0
    spared: bool = False

    def any(self) -> Limiter:
        """One to call: of those that are up, if any is."""
        return self.random.choice([limiter for limiter in self.every if not limiter.is_down] or self.every)

    async def kill_one_each(self, seconds: float) -> None:
        """Kills one at random every so often and starts it again, until told to stop; one at least is always up."""
        pause = seconds
        async with asyncio.TaskGroup() as restarts:
            while not self.spared:
                await asyncio.sleep(pause)
                up = [limiter for limiter in self.every if not limiter.is_down]
                # Where starts are slow there may be none to spare: then the next one that is up dies at once.
                pause = seconds if len(up) > 1 else _LOOK_AGAIN_SECONDS
                if len(up) > 1:
                    victim = self.random.choice(up)
                    await victim.kill()
                    self.kill_count += 1
                    restarts.create_task(victim.start())


@asynccontextmanager
async def running_limiters(
    peer: Peer, redis_url: str, log_dir: Path, skews: Sequence[float], *, rng: random.Random, **settings: object
) -> AsyncIterator[Limiters]:
    """One replica for each of these skews of its clock (seconds), on free ports, all on one store."""
    async with _nursery() as nursery:
        every = []
        for number, skew in enumerate(skews):
            port = free_port()
            order = Order(
                module="tests.ratelimit.skewed_limiter" if skew else "services.ratelimit",
                log_path=str(log_dir / f"ratelimit-{number}.log"),
                environment=_environment(peer, redis_url, port, skew, settings),
            )
            every.append(Limiter(nursery, order, port))
        try:
            async with asyncio.TaskGroup() as starts:
                for limiter in every:
                    starts.create_task(limiter.start())
            yield Limiters(every, rng)
        finally:
            for limiter in every:
                await limiter.disconnect()
                if not limiter.is_down:
                    await limiter.kill()


@asynccontextmanager
async def _nursery() -> AsyncIterator[Nursery]:
    process = await create_subprocess_exec(sys.executable, "-m", "tests.ratelimit.nursery", stdin=PIPE, stdout=PIPE)
    try:
        yield Nursery(process)
    finally:
        process.kill()
        await process.wait()


def _environment(peer: Peer, redis_url: str, port: int, skew: float, settings: dict[str, object]) -> dict[str, str]:
    told = {
        "listen_address": f"{LOOPBACK}:{port}",
        "peer_token_hashes": ",".join(f"{name}={hashlib.sha256(token.encode()).hexdigest()}" for name, token in TOKENS.items()),
        "service_token": "token-of-ratelimit",
        "tenant_address": peer.address,
        "metering_address": peer.address,
        "redis_url": redis_url,
        "log_level": "WARNING",
        "trace_sample_ratio": 0.0,
        **settings,
    }
    return {f"TENANTRY_{name.upper()}": str(value) for name, value in told.items()} | {"TEST_SKEW_SECONDS": str(skew)}
