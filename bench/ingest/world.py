"""A running mesh with a tenant that may record events, and readings of what the ledger and its Postgres cost."""

import asyncio
import tempfile
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

import asyncpg
import grpc
import psutil

from bench.process_cost import CpuReading
from devstack.addresses import Ports
from devstack.environment import DATABASE
from devstack.handbook import Company
from devstack.mesh_client import MeshClient, Metadata, credentials, operator_credentials
from devstack.provisioning import create_tenant
from devstack.stack import Stack, running_stack
from mesh.metering.v1 import event_service_pb2 as pb
from mesh.metering.v1 import event_service_pb2_grpc
from mesh.tenant.v1 import authentication_service_pb2, authentication_service_pb2_grpc

PRODUCT, TYPE = "hiring", "interview.completed"
CALL_TIMEOUT_SECONDS = 30.0
UNFOLDED = "SELECT EXISTS (SELECT FROM metering.usage_pending WHERE tenant_id = $1)"
FOLD = "SELECT metering.fold_usage(5000)"
# The service folds too, and one folds at a time.
FOLD_PAUSE_SECONDS = 0.005
INFERENCE = "inference"


@dataclass(frozen=True, slots=True)
class World:
    """The mesh, an administrator's connection, and who calls."""

    stack: Stack
    ports: Ports
    admin: asyncpg.Connection
    tenant_id: UUID
    metadata: Metadata
    context_token: str

    @property
    def as_inference(self) -> Metadata:
        """How inference says who it is, on loopback."""
        return (("x-mesh-service", INFERENCE), ("x-mesh-service-token", self.stack.state.secrets.service_tokens[INFERENCE]))

    async def fold(self) -> None:
        """Folds what was recorded into sums until nothing is left, so that nobody pays for what others recorded."""
        while await self.admin.fetchval(UNFOLDED, self.tenant_id):
            if not await self.admin.fetchval(FOLD):
                await asyncio.sleep(FOLD_PAUSE_SECONDS)

    @asynccontextmanager
    async def connection(self) -> AsyncIterator[asyncpg.Connection]:
        """A further connection of the administrator's."""
        connection = await asyncpg.connect(self.stack.postgres.dsn(DATABASE))
        try:
            yield connection
        finally:
            await connection.close()

    def cpu(self) -> CpuReading:
        """CPU seconds of the service, and of Postgres with all its connections."""
        postgres = psutil.Process(self.stack.processes["postgres"].pid)
        pids: Mapping[str, int] = {"metering": self.stack.processes["metering"].pid, "postgres": postgres.pid}
        return CpuReading.of({**pids, **{f"postgres {child.pid}": child.pid for child in postgres.children()}})


@dataclass(frozen=True, slots=True)
class Spent:
    """CPU seconds of the service and of Postgres."""

    metering: float
    postgres: float

    @classmethod
    def since(cls, world: World, earlier: CpuReading) -> "Spent":
        """What was spent since; a connection that came meanwhile counts from its beginning, one that went not at all."""
        now = world.cpu().seconds
        spent = {name: seconds - earlier.seconds.get(name, 0.0) for name, seconds in now.items()}
        return cls(spent.pop("metering"), sum(spent.values()))


@asynccontextmanager
async def running_world() -> AsyncIterator[World]:
    """Starts a mesh of its own, with a tenant and a type of event, and stops it."""
    with tempfile.TemporaryDirectory(prefix="tenantry-bench-") as folder:
        Path(folder).chmod(0o755)  # noqa: ASYNC240 - Postgres may run as another user
        ports = Ports.free()
        async with running_stack(Path(folder) / "state", ports, trace_sample_ratio=0.0) as stack, MeshClient.connect(ports) as client:
            company = Company("ingest", "ingest", "enterprise", "ingest@bench.example.com", "Bench")
            tenant = await create_tenant(stack, client, company)
            await _register(stack, ports)
            admin = await asyncpg.connect(stack.postgres.dsn(DATABASE))
            try:
                token = await _context_token(stack, ports, tenant.api_key)
                yield World(stack, ports, admin, UUID(tenant.tenant_id), credentials(tenant.api_key), token)
            finally:
                await admin.close()


async def _register(stack: Stack, ports: Ports) -> None:
    wanted = pb.EventType(product=PRODUCT, type=TYPE, unit="ai_interviews", aggregation=pb.AGGREGATION_SUM)
    async with grpc.aio.insecure_channel(ports.address("metering")) as channel:
        stub = event_service_pb2_grpc.EventServiceStub(channel)
        metadata = operator_credentials(stack.state.secrets.operator_key, "measuring")
        await stub.RegisterEventType(pb.RegisterEventTypeRequest(event_type=wanted), metadata=metadata, timeout=CALL_TIMEOUT_SECONDS)


async def _context_token(stack: Stack, ports: Ports, api_key: str) -> str:
    metadata = (("x-mesh-service", INFERENCE), ("x-mesh-service-token", stack.state.secrets.service_tokens[INFERENCE]))
    async with grpc.aio.insecure_channel(ports.address("tenant")) as channel:
        stub = authentication_service_pb2_grpc.AuthenticationServiceStub(channel)
        request = authentication_service_pb2.AuthenticateRequest(credential=api_key)
        return str((await stub.Authenticate(request, metadata=metadata, timeout=CALL_TIMEOUT_SECONDS)).context_token)
