"""The inference service whole: real Postgres, the provider stub over HTTP, scripted peers."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import grpc
import pytest
from aiohttp import web

from devstack.provider_stub.cache import PromptCache
from devstack.provider_stub.ledger import Ledger
from devstack.provider_stub.models import KNOWN, catalogue
from devstack.provider_stub.server import ProviderStub
from mesh.common.v1 import lifecycle_service_pb2, lifecycle_service_pb2_grpc
from mesh.inference.v1 import conversation_service_pb2_grpc, prompt_service_pb2_grpc
from mesh.inference.v1 import inference_service_pb2 as pb
from mesh.inference.v1 import inference_service_pb2_grpc as pb_grpc
from mesh.tenant.v1 import tenant_service_pb2 as tenant_pb
from services.inference.app import InferenceApp, build, migrate_schema
from services.inference.settings import InferenceSettings
from services.kernel.errors import MeshError
from services.kernel.ids import new_uuid7
from services.kernel.rpc.wire_status import decode_rpc_error
from tests.inference.peers import HAIKU, Peers, Script, Tenant, running_peers
from tests.support.places import PASSWORD
from tests.support.stores import PostgresStore

PROVIDER_KEY = "provider-key"
OWN_KEYS = ("own-key-one", "own-key-two")
CALL_ID_HEADER = "x-tenantry-call-id"


class RecordingStub(ProviderStub):
    """The provider stub, telling the script of every dispatch."""

    script: Script

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        if request.path == "/v1/messages":
            async with self.script.changed:
                self.script.heard.append(("dispatch", dict(request.headers)))
                self.script.changed.notify_all()
        return await super().handle(request)


@dataclass
class World:
    """Everything around one running inference service."""

    app: InferenceApp
    peers: Peers
    channel: grpc.aio.Channel
    stub: ProviderStub
    provider_ledger: Ledger
    inference_dsn: str = ""
    provider_url: str = ""

    def through(self, channel: grpc.aio.Channel) -> World:
        """The same surroundings, called over another channel."""
        return replace(self, channel=channel)

    @property
    def script(self) -> Script:
        return self.peers.script

    @property
    def inference(self) -> pb_grpc.InferenceServiceStub:
        return pb_grpc.InferenceServiceStub(self.channel)

    @property
    def prompts(self) -> prompt_service_pb2_grpc.PromptServiceStub:
        return prompt_service_pb2_grpc.PromptServiceStub(self.channel)

    @property
    def conversations(self) -> conversation_service_pb2_grpc.ConversationServiceStub:
        return conversation_service_pb2_grpc.ConversationServiceStub(self.channel)

    @property
    def lifecycle(self) -> lifecycle_service_pb2_grpc.TenantLifecycleServiceStub:
        return lifecycle_service_pb2_grpc.TenantLifecycleServiceStub(self.channel)

    async def new_tenant(self, *, provision: bool = True, encrypts: bool = False, provider_key: str = "", **limits: Any) -> Tenant:
        """Makes a tenant of its own for a test."""
        config = tenant_pb.TenantConfig(
            tenant_id=str(new_uuid7()),
            version=1,
            tier="professional",
            region="local",
            limits=tenant_pb.PlanLimits(**({"context_tokens": 30_000, "weight": 1} | limits)),
            ai=tenant_pb.AiSettings(
                default_model=HAIKU, allowed_models=[HAIKU], assistant_name="Ada", default_max_output_tokens=200, max_output_tokens=1000
            ),
            display_name="Acme",
        )
        tenant = Tenant(config, f"key-of-{config.tenant_id}", encrypts, provider_key=provider_key)
        self.script.tenants[tenant.key] = tenant
        if provision:
            await self.provision(tenant)
        return tenant

    async def provision(self, tenant: Tenant) -> Any:
        return await self.lifecycle.ProvisionTenant(
            lifecycle_service_pb2.ProvisionTenantRequest(), metadata=self.from_tenant_service(tenant), timeout=5.0
        )

    def from_tenant_service(self, tenant: Tenant) -> Sequence[tuple[str, str]]:
        """The metadata of a call by the tenant service."""
        return (
            ("x-mesh-service", "tenant"),
            ("x-mesh-service-token", "tenant-bearer"),
            ("x-tenant-id", tenant.config.tenant_id),
            ("x-tenant-context", self.peers.trust.token(tenant, "mesh:tenant")),
        )

    def stream(self, tenant: Tenant, question: str | Sequence[pb.Message] = "How are you?", *, call_id: str = "", **options: Any) -> Any:
        """Starts a streamed call."""
        timeout = options.pop("timeout", 10.0)
        request = pb.StreamGenerateRequest(messages=messages(question), options=pb.GenerateOptions(**options))
        return self.inference.StreamGenerate(request, metadata=credentials(tenant, call_id), timeout=timeout)

    async def answer(self, tenant: Tenant, question: str | Sequence[pb.Message] = "How are you?", **options: Any) -> Answer:
        """Makes a streamed call to its end. Raises: MeshError, with what was received in `received`."""
        received = Answer()
        try:
            async for piece in self.stream(tenant, question, **options):
                received.take(piece)
        except grpc.aio.AioRpcError as error:
            refusal = decode_rpc_error(error, "inference")
            refusal.add_note(received.text)
            raise refusal from None
        return received

    async def generate(
        self, tenant: Tenant, question: str | Sequence[pb.Message] = "How are you?", *, call_id: str = "", **options: Any
    ) -> Any:
        """Makes a unary call. Raises: MeshError."""
        request = pb.GenerateRequest(messages=messages(question), options=pb.GenerateOptions(**options))
        try:
            return await self.inference.Generate(request, metadata=credentials(tenant, call_id), timeout=10.0)
        except grpc.aio.AioRpcError as error:
            raise decode_rpc_error(error, "inference") from None

    async def refusal(self, tenant: Tenant, question: str | Sequence[pb.Message] = "How are you?", **options: Any) -> MeshError:
        """Makes a streamed call that must fail and returns how."""
        with pytest.raises(MeshError) as caught:
            await self.answer(tenant, question, **options)
        return caught.value

    def sent(self) -> dict[str, Any]:
        """The body of the last request at the provider."""
        return self.stub._received.last(1)[0]["body"]  # type: ignore[return-value]


async def until(true: Callable[[], bool]) -> None:
    """Returns once the condition holds; for what another process or a store decides, which no event tells."""
    async with asyncio.timeout(30.0):
        while not true():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


class Answer:
    """What a stream brought."""

    def __init__(self) -> None:
        self.started: pb.CallStarted | None = None
        self.deltas: list[str] = []
        self.final: pb.CallSummary | None = None

    def take(self, piece: pb.StreamGenerateResponse) -> None:
        match piece.WhichOneof("event"):
            case "started":
                self.started = piece.started
            case "delta":
                self.deltas.append(piece.delta.text)
            case "final":
                self.final = piece.final

    @property
    def text(self) -> str:
        return "".join(self.deltas)

    @property
    def summary(self) -> pb.CallSummary:
        assert self.final is not None
        return self.final


def messages(question: str | Sequence[pb.Message]) -> Sequence[pb.Message]:
    """One user's message, or the messages as they are."""
    return [pb.Message(role=pb.ROLE_USER, text=question)] if isinstance(question, str) else question


def credentials(tenant: Tenant, call_id: str = "") -> tuple[tuple[str, str], ...]:
    """The metadata of an outside caller."""
    pairs = (("authorization", f"Bearer {tenant.key}"),)
    return (*pairs, ("x-request-id", call_id)) if call_id else pairs


@asynccontextmanager
async def running_provider(script: Script, folder: Path) -> AsyncIterator[tuple[ProviderStub, Ledger, str]]:
    """The provider stub on a loopback port."""
    ledger = Ledger(folder / "provider-ledger.jsonl")
    stub = RecordingStub(ledger, [PROVIDER_KEY, *OWN_KEYS], catalogue([model.id for model in KNOWN]), PromptCache(), allow_directives=True)
    stub.script = script
    runner, port = await stub.listen(0)
    try:
        yield stub, ledger, f"http://127.0.0.1:{port}"
    finally:
        await runner.cleanup()
        await ledger.close()


def service_settings(dsn: str, peers: str, provider_url: str, **changes: Any) -> InferenceSettings:
    """Settings of a service on a free port, all its peers at one address."""
    values: dict[str, Any] = {
        "listen_address": "127.0.0.1:0",
        "service_token": "inference-bearer",
        "peer_token_hashes": f"tenant={hashlib.sha256(b'tenant-bearer').hexdigest()}",
        "drain_seconds": 0.5,
        "postgres_dsn": dsn,
        "postgres_jobs_dsn": dsn.replace("inference_service:", "inference_jobs:"),
        "tenant_address": peers,
        "ratelimit_address": peers,
        "metering_address": peers,
        "retrieval_address": peers,
        "provider_base_url": provider_url,
        "anthropic_api_key": PROVIDER_KEY,
        "provider_call_id_header": CALL_ID_HEADER,
    }
    return InferenceSettings(**(values | changes))


@asynccontextmanager
async def running_service(settings: InferenceSettings) -> AsyncIterator[tuple[InferenceApp, grpc.aio.Channel]]:
    """A running inference service and a caller's channel to it."""
    app = await build(settings)
    await app.server.start()
    channel = grpc.aio.insecure_channel(f"127.0.0.1:{app.server.bound_port}")
    try:
        yield app, channel
    finally:
        await channel.close()
        await app.server.stop()
        await app.close()


@pytest.fixture(scope="session")
async def inference_dsn(postgres: PostgresStore) -> str:
    """A migrated database, as the service's role."""
    admin = await postgres.fresh_database()
    dsn = postgres.dsn(urlsplit(admin).path.lstrip("/"), "inference_service", PASSWORD)
    settings = InferenceSettings(
        postgres_admin_dsn=admin, postgres_dsn=dsn, postgres_jobs_dsn=dsn.replace("inference_service:", "inference_jobs:")
    )
    await migrate_schema(settings)
    return dsn


@pytest.fixture(scope="session")
async def shared_world(inference_dsn: str, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[World]:
    """One running service for the folder."""
    async with (
        running_peers() as peers,
        running_provider(peers.script, tmp_path_factory.mktemp("provider")) as (stub, ledger, url),
        running_service(service_settings(inference_dsn, peers.address, url)) as (app, channel),
    ):
        yield World(app, peers, channel, stub, ledger, inference_dsn, url)


@pytest.fixture
async def world(shared_world: World) -> World:
    """The folder's service with a clean script."""
    shared_world.script.hooks.clear()
    shared_world.script.heard.clear()
    shared_world.stub._received.clear()
    return shared_world


@pytest.fixture
async def tenant(world: World) -> Tenant:
    """A tenant of the test's own."""
    made = await world.new_tenant()
    world.script.heard.clear()
    return made
