"""A whole mesh whose limits, ledger and provider are reached over a wire that a run controls, and replicas of inference that it kills."""

import asyncio
import sys
import uuid
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import astuple, dataclass, field
from typing import Any

import grpc
import redis.asyncio
from google.protobuf.field_mask_pb2 import FieldMask

from devstack.addresses import Ports
from devstack.environment import service_environment
from devstack.handbook import Company
from devstack.managed_process import ManagedProcess
from devstack.mesh_client import MeshClient, credentials, operator_credentials
from devstack.ports import LOOPBACK, free_port
from devstack.provider_stub.generation import filler
from devstack.provisioning import create_tenant
from devstack.stack import HEALTH_SERVICE_NAMES, SERVICE_READY_SECONDS, Stack, is_serving_at
from devstack.state import DemoTenant, StackState
from mesh.inference.v1 import inference_service_pb2, inference_service_pb2_grpc
from mesh.ratelimit.v1 import rate_limit_service_pb2, rate_limit_service_pb2_grpc
from mesh.tenant.v1 import configuration_service_pb2
from tests.chaos.books import Ledger, Limits, read_holds, read_ledger, read_provider
from tests.protocol.stage.patient import PATIENCE_SECONDS
from tests.protocol.stage.provider_gate import ProviderGate
from tests.protocol.stage.redis_tap import RedisTap
from tests.protocol.stage.wire import Wire, route
from tests.protocol.world import EXTENDED
from tests.ratelimit.rules import rule
from tests.support.mesh import state_folder

CALLS = 2
BUDGET_RULE = "cost_nano_usd_per_month"
QUESTION = "Go on."
MAX_OUTPUT_TOKENS = 100
# What the provider writes for an amount of the model: a little, all it may, or more than it was told.
OUTPUT_TOKENS = {1: 5, 2: MAX_OUTPUT_TOKENS, EXTENDED: 9 * MAX_OUTPUT_TOKENS}
# So much of it that its call must hold more: the whole of the longest.
OVERRUN = filler(OUTPUT_TOKENS[EXTENDED])
_WIRED = {"metering", "ratelimit"}
# Who reaches whom over the wire, by the name of the route.
_TARGETS = {
    "metering": "ratelimit",
    "ratelimit": "metering",
    "inference to ratelimit": "ratelimit",
    "inference to metering": "metering",
}
_LEASE_SECONDS = "60"
_SECONDS = 20.0


class WiredStack(Stack):
    """The mesh, with services that are patient and the wire between those that play."""

    def __init__(self, state: StackState, ports: Ports, served: dict[str, int]) -> None:
        super().__init__(state, ports, trace_sample_ratio=0.0)
        self._served = served

    async def start_service(self, name: str, **extra_environment: str) -> None:
        """Starts a service; those of the protocol as `patient` ones."""
        if name not in _WIRED:
            # Also inference: the mesh's own makes tenants and answers nobody; replicas that die are beside it.
            await super().start_service(name, **extra_environment)
            return
        await self.start_patient(name, name, self.ports.address(name))

    async def start_patient(self, name: str, service: str, address: str) -> ManagedProcess:
        """Starts a replica of a service under a name of its own, and waits until it serves."""
        environment = service_environment(service, self.state, self.ports, self.provider, trace_sample_ratio=0.0)
        peer = {"metering": "RATELIMIT", "ratelimit": "METERING"}.get(service)
        changed = {"TENANTRY_LISTEN_ADDRESS": address}
        if peer is not None:
            changed |= {f"TENANTRY_{peer}_ADDRESS": self._at(service), "TENANTRY_LEASE_SECONDS": _LEASE_SECONDS}
        if service == "metering":
            changed["TENANTRY_RELAY_POLL_SECONDS"] = "0.05"
        if service == "ratelimit":
            # By way of the tap, whose port stands in place of the server's.
            changed["TENANTRY_REDIS_URL"] = self.redis.url.replace(f":{self.ports.redis}/", f":{self._served['redis']}/")
            changed["TENANTRY_REDIS_TIMEOUT_SECONDS"] = "5"
        if service == "inference":
            changed |= {
                "TENANTRY_RATELIMIT_ADDRESS": self._at("inference to ratelimit"),
                "TENANTRY_METERING_ADDRESS": self._at("inference to metering"),
                "TENANTRY_PROVIDER_BASE_URL": f"http://{self._at('provider')}",
                "TENANTRY_DEFAULT_CALL_DEADLINE_SECONDS": str(PATIENCE_SECONDS),
            }
        process = ManagedProcess(
            name,
            [sys.executable, "-m", "tests.protocol.stage.patient", service],
            log_path=self.state.log_path(name),
            env=environment | changed,
        )
        self.processes[name] = process
        await process.start()
        await process.wait_ready(lambda: is_serving_at(address, HEALTH_SERVICE_NAMES[service]), timeout_seconds=SERVICE_READY_SECONDS)
        return process

    def _at(self, route: str) -> str:
        return f"{LOOPBACK}:{self._served[route]}"


@dataclass
class Replica:
    """One process of inference, and the caller's channel to it."""

    address: str
    process: ManagedProcess
    channel: grpc.aio.Channel
    alive: bool = True

    @property
    def inference(self) -> inference_service_pb2_grpc.InferenceServiceStub:
        """Its stub."""
        return inference_service_pb2_grpc.InferenceServiceStub(self.channel)


@dataclass
class Theatre:
    """Everything a run needs, in nano-USD.

    `hold`: what a call is held at, before it came to use more; `bills`: what the provider bills for an amount.
    """

    stack: WiredStack
    client: MeshClient
    wire: Wire
    replicas: list[Replica]
    limiters: list[rate_limit_service_pb2_grpc.RateLimitServiceStub]
    tap: RedisTap
    hold: int = 0
    bills: dict[int, int] = field(default_factory=dict)

    async def tenant(self, budget_nano_usd: int) -> DemoTenant:
        """Makes a tenant with that budget and no other limit that a run would meet."""
        name = f"run-{uuid.uuid4().hex[:12]}"
        tenant = await create_tenant(self.stack, self.client, Company(name, name.title(), "enterprise", f"{name}@example.com", "Player"))
        request = configuration_service_pb2.UpdateConfigurationRequest(
            overrides=configuration_service_pb2.ConfigurationOverrides(
                limit_rules=configuration_service_pb2.LimitRuleOverrides(rules=[rule(BUDGET_RULE, "cost", "month", budget_nano_usd)])
            ),
            update_mask=FieldMask(paths=[f"limit_rules.rules.{BUDGET_RULE}"]),
        )
        operator = operator_credentials(self.stack.state.secrets.operator_key, "a run of the model")
        metadata = (*operator, ("x-tenant-id", tenant.tenant_id))
        await self.client.configuration.UpdateConfiguration(request, metadata=metadata, timeout=_SECONDS)
        return tenant

    def budget(self, *, extended: bool) -> int:
        """The budget of a run: a call and a half; of one with an extension, in which there is one call, what that may come to hold."""
        return 3 * self.hold if extended else self.hold + (self.bills[1] + self.bills[2]) // 2

    async def ask_limits(self, tenant: DemoTenant, limiter: int = 0) -> dict[str, int]:
        """Asks a replica of the limits what is used of each: without their data they ask for a snapshot first."""
        listed = await self.limiters[limiter].ListLimits(
            rate_limit_service_pb2.ListLimitsRequest(), metadata=credentials(tenant.api_key), timeout=PATIENCE_SECONDS
        )
        return {limit.rule: limit.used for limit in listed.limits}

    async def lose_limits_data(self) -> None:
        """Empties Redis."""
        async with redis.asyncio.from_url(self.stack.redis.url) as client:
            await client.flushall()

    async def limits(self, tenant: DemoTenant) -> Limits:
        """What the limits have of the tenant."""
        used = await self.ask_limits(tenant)
        holds, lease_count = await read_holds(self.stack.redis.url, tenant.tenant_id)
        return Limits(holds, lease_count, used)

    async def ledger(self, tenant: DemoTenant) -> Ledger:
        """What the ledger has of the tenant."""
        return await read_ledger(self.stack.postgres.dsn("tenantry"), tenant.tenant_id)

    def billed(self, call_ids: set[str]) -> list[Any]:
        """What the provider billed for the calls."""
        return [line for line in read_provider(self.stack.state.folder / "provider-ledger.jsonl") if line.call_id in call_ids]

    def question(self, replica: int, tenant: DemoTenant, call_id: uuid.UUID) -> Any:
        """Asks a replica the one question of every run."""
        request = inference_service_pb2.StreamGenerateRequest(
            messages=[inference_service_pb2.Message(role=inference_service_pb2.ROLE_USER, text=QUESTION)],
            options=inference_service_pb2.GenerateOptions(max_output_tokens=MAX_OUTPUT_TOKENS),
        )
        metadata = credentials(tenant.api_key, call_id=call_id)
        return self.replicas[replica].inference.StreamGenerate(request, metadata=metadata, timeout=PATIENCE_SECONDS)

    async def revive(self) -> None:
        """Starts every replica again that a run has killed."""
        async with asyncio.TaskGroup() as group:
            for number, replica in enumerate(self.replicas):
                if not replica.alive:
                    group.create_task(self._revive(number))

    async def _revive(self, number: int) -> None:
        await self.replicas[number].channel.close()
        self.replicas[number] = await _replica(self.stack, number, self.replicas[number].address)


async def _replica(stack: WiredStack, number: int, address: str) -> Replica:
    process = await stack.start_patient(f"inference-{number}", "inference", address)
    return Replica(address, process, grpc.aio.insecure_channel(address, (("grpc.use_local_subchannel_pool", 1),)))


@asynccontextmanager
async def running_theatre() -> AsyncIterator[tuple[Theatre, ProviderGate]]:
    """A theatre on free ports, rehearsed: it knows what a call is held at and what it costs."""
    async with AsyncExitStack() as exits:
        folder = exits.enter_context(state_folder())
        ports, wire = Ports.free(), Wire()
        wire.open = True
        served = _more_ports(ports)
        tap, gate = RedisTap(ports.redis), ProviderGate(wire, f"http://{ports.address('provider')}")
        await exits.enter_async_context(tap.serving(served["redis"]))
        await exits.enter_async_context(gate.serving(served["provider"]))
        for name, target in _TARGETS.items():
            await exits.enter_async_context(route(wire, name, served[name], ports.address(target)))
        stack = WiredStack(StackState.open(folder), ports, served)
        await stack.start()
        exits.push_async_callback(stack.stop)
        client = await exits.enter_async_context(MeshClient.connect(ports))
        limiter = f"{LOOPBACK}:{served['ratelimit-1']}"
        async with asyncio.TaskGroup() as group:
            group.create_task(stack.start_patient("ratelimit-1", "ratelimit", limiter))
            addresses = [f"{LOOPBACK}:{served[f'inference-{number}']}" for number in range(CALLS)]
            starts = [group.create_task(_replica(stack, number, address)) for number, address in enumerate(addresses)]
        channel = await exits.enter_async_context(grpc.aio.insecure_channel(limiter))
        limiters = [client.limits, rate_limit_service_pb2_grpc.RateLimitServiceStub(channel)]
        theatre = Theatre(stack, client, wire, [start.result() for start in starts], limiters, tap)
        exits.push_async_callback(_end, stack, theatre)
        await _rehearse(theatre, gate)
        yield theatre, gate


def _more_ports(ports: Ports) -> dict[str, int]:
    """A free port for each thing that is not part of a mesh, none of them one of the mesh's."""
    taken, chosen = set(astuple(ports)), dict[str, int]()
    for name in (*_TARGETS, "provider", "redis", "ratelimit-1", *(f"inference-{number}" for number in range(CALLS))):
        while (port := free_port()) in taken:
            pass
        chosen[name] = port
        taken.add(port)
    return chosen


async def _end(stack: WiredStack, theatre: Theatre) -> None:
    for replica in theatre.replicas:
        await replica.channel.close()
        await replica.process.stop()
    await stack.processes["ratelimit-1"].stop()


async def _rehearse(theatre: Theatre, gate: ProviderGate) -> None:
    tenant = await theatre.tenant(10**12)
    for amount in OUTPUT_TOKENS:
        # Each replica once: what it holds for a prompt it has not seen is what a run's call is held at.
        await _rehearsed(theatre, gate, tenant, (amount - 1) % CALLS, amount)
        if amount == CALLS:
            (theatre.hold,) = {call.bound_nano_usd for call in (await theatre.ledger(tenant)).calls}
    assert theatre.hold < theatre.bills[EXTENDED] < theatre.budget(extended=True)


async def _rehearsed(theatre: Theatre, gate: ProviderGate, tenant: DemoTenant, replica: int, amount: int) -> None:
    call_id = uuid.uuid4()
    gate.output_tokens[str(call_id)] = OUTPUT_TOKENS[amount]
    async for event in theatre.question(replica, tenant, call_id):
        if event.WhichOneof("event") == "final":
            theatre.bills[amount] = event.final.cost.nano_usd
