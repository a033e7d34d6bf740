"""A mesh in small for these tests: one served contract, its keys, and channels of services that call it."""

import asyncio
import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, ClassVar

import grpc
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from mesh.common.v1 import error_reason_pb2
from mesh.common.v1 import lifecycle_service_pb2 as pb
from mesh.common.v1 import lifecycle_service_pb2_grpc as pb_grpc
from mesh.common.v1.tenant_claims_pb2 import TenantClaims
from mesh.tenant.v1 import authentication_service_pb2 as auth_pb
from mesh.tenant.v1 import authentication_service_pb2_grpc as auth_grpc
from services.kernel.context_token import ContextTokenVerifier, SigningKey, mint
from services.kernel.errors import MeshError, Unauthenticated
from services.kernel.ids import TenantId, new_uuid7
from services.kernel.rpc.channel import MeshChannel
from services.kernel.rpc.server import MeshServer
from services.kernel.settings import ServiceSettings
from services.kernel.tenant_context import TenantContext

LIFECYCLE = "mesh.common.v1.TenantLifecycleService"
AUTHENTICATION = "mesh.tenant.v1.AuthenticationService"
BEARERS = {"tenant": "tenant-bearer", "inference": "inference-bearer", "metering": "metering-bearer"}
PEER_HASHES = ",".join(f"{name}={hashlib.sha256(bearer.encode()).hexdigest()}" for name, bearer in BEARERS.items())


class TenantSettings(ServiceSettings):
    service_name: ClassVar[str] = "tenant"


class InferenceSettings(ServiceSettings):
    service_name: ClassVar[str] = "inference"


def settings_of(service: type[ServiceSettings] = TenantSettings, **changes: Any) -> ServiceSettings:
    """Settings of a service on a free loopback port."""
    values: dict[str, Any] = {
        "listen_address": "127.0.0.1:0",
        "service_token": BEARERS[service.service_name],
        "peer_token_hashes": PEER_HASHES,
        "drain_seconds": 5.0,
    }
    return service(**(values | changes))


@dataclass
class Keys:
    """A source of verifying keys that counts how often it is asked."""

    signing: list[SigningKey] = field(default_factory=lambda: [SigningKey("k1", Ed25519PrivateKey.generate())])
    fetches: int = 0
    failure: MeshError | None = None

    async def fetch_keys(self) -> Mapping[str, Ed25519PublicKey]:
        self.fetches += 1
        if self.failure is not None:
            raise self.failure
        return {key.key_id: key.private_key.public_key() for key in self.signing}

    def token(self, tenant_id: TenantId | None = None, *, lifetime: float = 200.0, now: datetime | None = None, **claims: Any) -> str:
        return mint(claims_of(tenant_id, lifetime=lifetime, now=now, **claims), self.signing[0])


def claims_of(tenant_id: TenantId | None, *, lifetime: float = 200.0, now: datetime | None = None, **claims: Any) -> TenantClaims:
    """Claims for a tenant; for a new one unless it is named or an operator's."""
    raw = tenant_id.bytes if tenant_id is not None else (b"" if claims.get("operator") else new_uuid7().bytes)
    made = TenantClaims(**({"tenant_id": raw, "tier": "free", "region": "local", "subject": "key:1"} | claims))
    start = now or datetime.now(UTC)
    made.issue_time.FromDatetime(start)
    made.expire_time.FromDatetime(start + timedelta(seconds=lifetime))
    return made


class KeyringResolver:
    """Knows the credentials it was told, as the tenant service's own resolver knows its table."""

    def __init__(self) -> None:
        self.known: dict[str, TenantContext] = {}

    async def resolve(self, credential: str, claimed_tenant_id: TenantId | None) -> TenantContext:
        if credential not in self.known:
            raise Unauthenticated(error_reason_pb2.ERROR_REASON_CREDENTIAL_INVALID, "unknown")
        return self.known[credential]


Handler = Callable[[Any, Any], Awaitable[Any]]


async def _empty(request: Any, context: Any) -> Any:
    return pb.ProvisionTenantResponse()


class Lifecycle(pb_grpc.TenantLifecycleServiceServicer):
    """Runs whatever the test puts in place."""

    def __init__(self) -> None:
        self.provision: Handler = _empty
        self.export: Callable[[Any, Any], AsyncIterator[pb.ExportTenantResponse]] | None = None

    async def ProvisionTenant(self, request: Any, context: Any) -> Any:
        return await self.provision(request, context)

    async def EraseTenant(self, request: Any, context: Any) -> Any:
        return pb.EraseTenantResponse()

    async def ExportTenant(self, request: Any, context: Any) -> AsyncIterator[pb.ExportTenantResponse]:
        assert self.export is not None
        async for item in self.export(request, context):
            yield item


class Authentication(auth_grpc.AuthenticationServiceServicer):
    """Answers Authenticate as the test says, and counts."""

    def __init__(self, keys: Keys) -> None:
        self.keys = keys
        self.requests: list[auth_pb.AuthenticateRequest] = []
        self.answer: Callable[[auth_pb.AuthenticateRequest], Awaitable[str]] = self._token
        self.watched_after: list[int] = []
        self.watchers: list[asyncio.Queue[auth_pb.WatchChangesResponse | None]] = []
        self.watch_failure: MeshError | None = None

    async def Authenticate(self, request: Any, context: Any) -> Any:
        self.requests.append(request)
        return auth_pb.AuthenticateResponse(context_token=await self.answer(request))

    async def GetContextKeys(self, request: Any, context: Any) -> Any:
        keys = (await self.keys.fetch_keys()).items()
        return auth_pb.GetContextKeysResponse(keys=[auth_pb.ContextKey(key_id=k, public_key=v.public_bytes_raw()) for k, v in keys])

    async def WatchChanges(self, request: Any, context: Any) -> AsyncIterator[auth_pb.WatchChangesResponse]:
        self.watched_after.append(request.after_change_id)
        if self.watch_failure is not None:
            raise self.watch_failure
        queue: asyncio.Queue[auth_pb.WatchChangesResponse | None] = asyncio.Queue()
        self.watchers.append(queue)
        while (message := await queue.get()) is not None:
            yield message

    def tell(
        self, change_id: int, *changed: TenantId, forget_everything: bool = False, read_age_seconds: float = 0.0, kind: str = "KEY"
    ) -> None:
        """Sends the newest watcher a message."""
        changes = [auth_pb.Change(change_id=change_id, tenant_id=tenant.bytes, kind=kind) for tenant in changed]
        message = auth_pb.WatchChangesResponse(change_id=change_id, changes=changes, forget_everything=forget_everything)
        message.read_age.FromNanoseconds(int(read_age_seconds * 1e9))
        self.watchers[-1].put_nowait(message)

    def end_watch(self) -> None:
        """Ends the newest watcher's stream in good order."""
        self.watchers[-1].put_nowait(None)

    async def _token(self, request: auth_pb.AuthenticateRequest) -> str:
        return self.keys.token(TenantId(new_uuid7()))


@dataclass
class Mesh:
    """A running server, what it runs, and callers' channels to it."""

    server: MeshServer
    lifecycle: Lifecycle
    authentication: Authentication
    keys: Keys
    resolver: KeyringResolver
    tenant: TenantContext
    as_tenant: MeshChannel
    as_inference: MeshChannel
    raw: grpc.aio.Channel

    @property
    def stub(self) -> pb_grpc.TenantLifecycleServiceStub:
        return pb_grpc.TenantLifecycleServiceStub(self.as_tenant.channel)

    async def provision(self, *, timeout_seconds: float = 5.0, **options: Any) -> pb.ProvisionTenantResponse:
        options.setdefault("tenant", self.tenant)
        return await self.as_tenant.unary(
            self.stub.ProvisionTenant, pb.ProvisionTenantRequest(), timeout_seconds=timeout_seconds, **options
        )

    async def raw_call(self, path: str, body: bytes, metadata: Mapping[str, str]) -> bytes:
        """Sends these very bytes, as any client could."""
        return await self.raw_pairs(path, body, *metadata.items())

    async def raw_pairs(self, path: str, body: bytes, *pairs: tuple[str, str]) -> bytes:
        """As `raw_call`, with keys that may repeat."""
        method: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = self.raw.unary_unary(path)
        return await method(body, metadata=pairs, timeout=5.0)


@asynccontextmanager
async def running_mesh(**changes: Any) -> AsyncIterator[Mesh]:
    """Serves the lifecycle and authentication contracts on loopback."""
    keys, resolver, lifecycle = Keys(), KeyringResolver(), Lifecycle()
    authentication = Authentication(keys)
    verifier = ContextTokenVerifier(keys)
    settings = settings_of(**changes)
    server = MeshServer(
        settings,
        servicers=[
            (pb_grpc.add_TenantLifecycleServiceServicer_to_server, lifecycle, LIFECYCLE),
            (auth_grpc.add_AuthenticationServiceServicer_to_server, authentication, AUTHENTICATION),
        ],
        resolver=resolver,
        verifier=verifier,
    )
    await server.start()
    address = f"127.0.0.1:{server.bound_port}"
    as_tenant = MeshChannel(address, settings=settings, target_service="peer")
    as_inference = MeshChannel(address, settings=settings_of(InferenceSettings), target_service="peer")
    raw = grpc.aio.insecure_channel(address)
    tenant = await verifier.verify(keys.token(TenantId(new_uuid7())))
    # Streams of changes have no end of their own.
    server.on_drain(lambda: [queue.put_nowait(None) for queue in authentication.watchers] and None)
    try:
        yield Mesh(server, lifecycle, authentication, keys, resolver, tenant, as_tenant, as_inference, raw)
    finally:
        await as_tenant.close()
        await as_inference.close()
        await raw.close()
        await asyncio.shield(server.stop())
