"""The tenant service as its callers meet it: a real server on a real database, with scripted peers behind it."""

# grpc is generic in its stubs only.
from __future__ import annotations

import asyncio
import base64
import hashlib
import secrets
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, TypeVar
from urllib.parse import urlsplit
from uuid import UUID, uuid4

import asyncpg
import grpc
from google.protobuf.field_mask_pb2 import FieldMask
from pydantic import SecretStr

from mesh.common.v1 import lifecycle_service_pb2, lifecycle_service_pb2_grpc
from mesh.tenant.v1 import (
    api_key_service_pb2_grpc,
    audit_service_pb2_grpc,
    authentication_service_pb2,
    authentication_service_pb2_grpc,
    configuration_service_pb2,
    configuration_service_pb2_grpc,
    data_key_service_pb2_grpc,
    domain_service_pb2_grpc,
    event_service_pb2_grpc,
    flag_service_pb2,
    flag_service_pb2_grpc,
    issuer_service_pb2_grpc,
    placement_service_pb2,
    plan_service_pb2_grpc,
    secret_service_pb2_grpc,
    tenant_service_pb2,
    tenant_service_pb2_grpc,
    user_service_pb2_grpc,
)
from services.kernel.errors import MeshError
from services.kernel.rpc.wire_status import decode_rpc_error
from services.tenant.api_key import ApiKeyText, OperatorKeyText, new_operator_key, parse
from services.tenant.app import TenantApp, build, migrate_schema
from services.tenant.settings import TenantSettings
from tests.support.stores import PostgresStore

PEERS = ("retrieval", "inference", "ratelimit", "metering")
SERVICES = ("tenant", *PEERS)
BASE_DOMAIN = "tenantry.example"
SERVICE_TOKENS = {name: f"bearer-of-{name}" for name in SERVICES}
# In every transaction of every test: records come before announcements. In two orders, two changes of one tenant could wait for each other.
WATCH_THE_ORDER = """
CREATE FUNCTION public.note_announcement() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    PERFORM set_config('test.announced_in', pg_current_xact_id()::text, true);
    RETURN NULL;
END $$;
CREATE FUNCTION public.refuse_record_after_announcement() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF current_setting('test.announced_in', true) = pg_current_xact_id()::text THEN
        RAISE EXCEPTION 'an audit record after an announcement: %', NEW.action USING ERRCODE = 'assert_failure';
    END IF;
    RETURN NEW;
END $$;
CREATE TRIGGER announcements_are_noted AFTER INSERT ON tenant.changes FOR EACH STATEMENT EXECUTE FUNCTION public.note_announcement();
CREATE TRIGGER records_come_first BEFORE INSERT ON tenant.audit FOR EACH ROW EXECUTE FUNCTION public.refuse_record_after_announcement();
"""
Metadata = Sequence[tuple[str, str]]
Request = TypeVar("Request")
Response = TypeVar("Response")


class ScriptedPeer(lifecycle_service_pb2_grpc.TenantLifecycleServiceServicer):
    """A service that takes part in a tenant's life as a test wants: it fails, waits, asks back first or keeps something back."""

    def __init__(self) -> None:
        self.tenants: list[UUID] = []
        self.failures: list[grpc.StatusCode] = []
        self.erase_failures: list[grpc.StatusCode] = []
        self.erased: list[UUID] = []
        self.exported: list[lifecycle_service_pb2.ExportTenantResponse] = []
        self.left_over: list[str] = []
        self.purged: list[tuple[UUID, datetime]] = []
        self.entered = asyncio.Event()
        self.gate: asyncio.Event | None = None
        self.before_answer: Callable[[str], Any] | None = None
        self.address = ""
        self.reencrypted: list[int] = []
        self.pages_left = 0

    def reset(self) -> None:
        """Forgets every script and call."""
        self.tenants.clear()
        self.failures.clear()
        self.reencrypted.clear()
        self.pages_left = 0
        self.erase_failures.clear()
        self.erased.clear()
        self.exported.clear()
        self.left_over.clear()
        self.purged.clear()
        self.entered = asyncio.Event()
        self.gate = None
        self.before_answer = None

    async def ProvisionTenant(self, request: Any, context: Any) -> Any:
        metadata = dict(context.invocation_metadata())
        self.entered.set()
        if self.gate is not None:
            await self.gate.wait()
        if self.failures:
            await context.abort(self.failures.pop(0), "scripted")
        if self.before_answer is not None:
            await self.before_answer(metadata["x-tenant-context"])
        self.tenants.append(UUID(metadata["x-tenant-id"]))
        return lifecycle_service_pb2.ProvisionTenantResponse()

    async def ReencryptTenant(self, request: Any, context: Any) -> Any:
        """Has `pages_left` pages of one record each to seal again."""
        if self.failures:
            await context.abort(self.failures.pop(0), "scripted")
        self.reencrypted.append(request.active_version)
        sealed_now, self.pages_left = min(self.pages_left, 1), max(self.pages_left - 1, 0)
        return lifecycle_service_pb2.ReencryptTenantResponse(resealed_count=sealed_now, done=not self.pages_left)

    async def EraseTenant(self, request: Any, context: Any) -> Any:
        tenant_id = UUID(dict(context.invocation_metadata())["x-tenant-id"])
        if self.erase_failures:
            await context.abort(self.erase_failures.pop(0), "scripted")
        found = self.tenants.count(tenant_id)
        self.tenants[:] = [kept for kept in self.tenants if kept != tenant_id]
        self.erased.append(tenant_id)
        erased = [lifecycle_service_pb2.ErasedRecords(kind="scripted:tenants", count=found)]
        return lifecycle_service_pb2.EraseTenantResponse(erased=erased)

    async def ExportTenant(self, request: Any, context: Any) -> AsyncIterator[Any]:
        for record in self.exported:
            yield record

    async def ScanTenant(self, request: Any, context: Any) -> Any:
        tenant_id = UUID(dict(context.invocation_metadata())["x-tenant-id"])
        store = lifecycle_service_pb2.ScannedStore(store="scripted:tenants", found_count=self.tenants.count(tenant_id), sight="all")
        store.canary_count = sum(canary in text for text in self.left_over for canary in request.canaries)
        return lifecycle_service_pb2.ScanTenantResponse(stores=[store])

    async def PurgeTenant(self, request: Any, context: Any) -> Any:
        self.purged.append((UUID(dict(context.invocation_metadata())["x-tenant-id"]), request.older_than.ToDatetime(UTC)))
        more = len(self.purged) % 2 == 1
        return lifecycle_service_pb2.PurgeTenantResponse(purged=[lifecycle_service_pb2.ErasedRecords(kind="k", count=3)], more=more)


@asynccontextmanager
async def running_peer() -> AsyncIterator[ScriptedPeer]:
    """A peer on a free loopback port."""
    peer = ScriptedPeer()
    server = grpc.aio.server()
    lifecycle_service_pb2_grpc.add_TenantLifecycleServiceServicer_to_server(peer, server)
    peer.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    try:
        yield peer
    finally:
        await server.stop(None)


@dataclass
class Harness:
    """One running tenant service and what surrounds it."""

    app: TenantApp
    settings: TenantSettings
    channel: grpc.aio.Channel
    admin_dsn: str
    operator: OperatorKeyText
    front: OperatorKeyText
    peers: dict[str, ScriptedPeer]

    def __post_init__(self) -> None:
        self.authentication = authentication_service_pb2_grpc.AuthenticationServiceStub(self.channel)
        self.tenants = tenant_service_pb2_grpc.TenantServiceStub(self.channel)
        self.keys = api_key_service_pb2_grpc.ApiKeyServiceStub(self.channel)
        self.audits = audit_service_pb2_grpc.AuditServiceStub(self.channel)
        self.issuers = issuer_service_pb2_grpc.IssuerServiceStub(self.channel)
        self.domains = domain_service_pb2_grpc.DomainServiceStub(self.channel)
        self.users = user_service_pb2_grpc.UserServiceStub(self.channel)
        self.plans = plan_service_pb2_grpc.PlanServiceStub(self.channel)
        self.configuration = configuration_service_pb2_grpc.ConfigurationServiceStub(self.channel)
        self.flags = flag_service_pb2_grpc.FlagServiceStub(self.channel)
        self.data_keys = data_key_service_pb2_grpc.DataKeyServiceStub(self.channel)
        self.secrets = secret_service_pb2_grpc.SecretServiceStub(self.channel)
        self.events = event_service_pb2_grpc.EventServiceStub(self.channel)
        self.lifecycle = lifecycle_service_pb2_grpc.TenantLifecycleServiceStub(self.channel)

    def as_operator(self, tenant_id: str | None = None, reason: str | None = "customer call 4711") -> Metadata:
        """Metadata of the operator."""
        pairs = [("authorization", f"Bearer {self.operator}")]
        if reason is not None:
            pairs.append(("x-operator-reason", reason))
        if tenant_id is not None:
            pairs.append(("x-tenant-id", tenant_id))
        return pairs

    def as_front(self) -> Metadata:
        """Metadata of a front end."""
        return [("authorization", f"Bearer {self.front}")]

    async def create(self, **changes: str) -> tenant_service_pb2.CreateTenantResponse:
        """Makes a tenant over the wire."""
        return await call(self.tenants.CreateTenant, wish(**changes), self.as_operator())

    async def authenticate(
        self,
        credential: str,
        *,
        claimed: bytes = b"",
        reason: str = "",
        caller: str = "inference",
        peer_address: str = "192.0.2.7",
        host: str = "",
        path: str = "",
    ) -> authentication_service_pb2.AuthenticateResponse:
        """Asks who a credential is, as another service does."""
        request = authentication_service_pb2.AuthenticateRequest(
            credential=credential, claimed_tenant_id=claimed, operator_reason=reason, peer_address=peer_address, host=host, path=path
        )
        return await call(self.authentication.Authenticate, request, as_service(caller))

    @asynccontextmanager
    async def superuser(self) -> AsyncIterator[asyncpg.Connection]:
        """Looks into the database past every policy."""
        connection = await asyncpg.connect(self.admin_dsn)
        try:
            yield connection
        finally:
            await connection.close()

    @asynccontextmanager
    async def service_role(self) -> AsyncIterator[asyncpg.Connection]:
        """Connects as the service itself does."""
        connection = await asyncpg.connect(self.settings.postgres_dsn.get_secret_value())
        try:
            yield connection
        finally:
            await connection.close()

    async def execute(self, sql: str, *args: object) -> str:
        """Changes the database from outside, as time or an administrator would."""
        async with self.superuser() as connection:
            return str(await connection.execute(sql, *args))

    async def value(self, sql: str, *args: object) -> Any:
        """Reads one value past every policy."""
        async with self.superuser() as connection:
            return await connection.fetchval(sql, *args)

    async def own_database(self) -> placement_service_pb2.SiloStores:
        """Makes a database as an operator would for one tenant, with roles for its tables' owner and for each service."""
        name, password = f"own_{secrets.token_hex(6)}", secrets.token_hex(16)
        owner, finder, answerer = (f"{name}_{role}" for role in ("maker", "finder", "answerer"))
        for role in (owner, finder, answerer):
            await self.execute(f"CREATE ROLE {role} LOGIN PASSWORD '{password}'")
        await self.execute(f"CREATE DATABASE {name} OWNER {owner}")
        address = urlsplit(self.admin_dsn).netloc.rpartition("@")[2]
        dsns = [f"postgresql://{role}:{password}@{address}/{name}" for role in (owner, finder, answerer)]
        return placement_service_pb2.SiloStores(postgres_owner_dsn=dsns[0], retrieval_postgres_dsn=dsns[1], inference_postgres_dsn=dsns[2])

    async def audit(self, tenant_id: str, action: str) -> list[asyncpg.Record]:
        """Reads a tenant's audit records of one kind, with everything still in memory written first."""
        await self.app.trail.flush(everything=True)
        async with self.superuser() as connection:
            return list(
                await connection.fetch(
                    "SELECT * FROM tenant.audit WHERE tenant_id = $1 AND action = $2 ORDER BY audit_id", UUID(tenant_id), action
                )
            )


def as_service(name: str, token: str | None = None, tenant_id: str | None = None) -> Metadata:
    """Metadata of a service of the mesh, for a tenant when a context token is given."""
    pairs = [("x-mesh-service", name), ("x-mesh-service-token", SERVICE_TOKENS[name])]
    if token is not None:
        pairs.append(("x-tenant-context", token))
    if tenant_id is not None:
        pairs.append(("x-tenant-id", tenant_id))
    return pairs


def with_key(api_key: str) -> Metadata:
    """Metadata of a caller with a tenant's key."""
    return [("authorization", f"Bearer {api_key}")]


def wish(**changes: str) -> tenant_service_pb2.CreateTenantRequest:
    """A request for a tenant that nobody else asks for."""
    unique = secrets.token_hex(6)
    fields = {
        "request_id": str(uuid4()),
        "slug": f"acme-{unique}",
        "display_name": "Acme Corporation",
        "plan": "professional",
        "owner_email": f"owner-{unique}@example.com",
        "assistant_name": "Ada",
    }
    return tenant_service_pb2.CreateTenantRequest(**{**fields, **changes})


async def call(
    method: grpc.aio.UnaryUnaryMultiCallable[Request, Response], request: Request, metadata: Metadata, timeout_seconds: float = 10.0
) -> Response:
    """Makes one call and raises what the service refused it with."""
    try:
        return await method(request, metadata=tuple(metadata), timeout=timeout_seconds)
    except grpc.aio.AioRpcError as error:
        raise decode_rpc_error(error, "tenant") from None


async def update(
    harness: Harness, metadata: Metadata, paths: Sequence[str], *, expected_version: int = 0, validate_only: bool = False, **overrides: Any
) -> configuration_service_pb2.UpdateConfigurationResponse:
    """Changes what the paths name of a tenant's configuration."""
    request = configuration_service_pb2.UpdateConfigurationRequest(
        overrides=configuration_service_pb2.ConfigurationOverrides(**overrides),
        update_mask=FieldMask(paths=paths),
        expected_version=expected_version,
        validate_only=validate_only,
    )
    return await call(harness.configuration.UpdateConfiguration, request, metadata)


async def put_flag(
    harness: Harness, name: str, *, expected_version: int = 0, validate_only: bool = False, **rules: Any
) -> flag_service_pb2.PutFlagResponse:
    """Keeps a flag as the operator."""
    request = flag_service_pb2.PutFlagRequest(
        flag=flag_service_pb2.Flag(name=name, **rules), expected_version=expected_version, validate_only=validate_only
    )
    return await call(harness.flags.PutFlag, request, harness.as_operator())


async def refusal(awaitable: Any) -> MeshError:
    """Awaits a call that must be refused and returns the refusal."""
    try:
        answer = await awaitable
    except MeshError as error:
        return error
    message = f"the call was answered: {answer}"
    raise AssertionError(message)


def taken_apart(api_key: str) -> ApiKeyText:
    """Parses a tenant's key that must be whole."""
    key = parse(api_key)
    assert isinstance(key, ApiKeyText)
    return key


def new_master_key(name: str) -> str:
    """A master key as the environment names it."""
    return f"{name}:{base64.b64encode(secrets.token_bytes(32)).decode()}"


def settings_for(
    admin_dsn: str,
    service_dsn: str,
    operator: OperatorKeyText,
    peers: dict[str, str],
    front: OperatorKeyText | None = None,
    *,
    key_store_dsn: str = "",
) -> TenantSettings:
    """Settings of a service on free ports. Without a key store of its own, as administrator, it is put beside the data."""
    key_admin = urlsplit(key_store_dsn or admin_dsn)
    as_service = key_admin._replace(netloc=f"tenant_keys_service:key-store-password@{key_admin.hostname}:{key_admin.port}")
    hashes = ",".join(f"{name}={hashlib.sha256(token.encode()).hexdigest()}" for name, token in SERVICE_TOKENS.items())
    addresses: dict[str, Any] = {f"{name}_address": address for name, address in peers.items()}
    return TenantSettings(
        listen_address="127.0.0.1:0",
        service_token=SecretStr(SERVICE_TOKENS["tenant"]),
        peer_token_hashes=hashes,
        postgres_dsn=SecretStr(service_dsn),
        postgres_jobs_dsn=SecretStr(service_dsn.replace("tenant_service", "tenant_jobs")),
        postgres_admin_dsn=SecretStr(admin_dsn),
        context_signing_key=SecretStr(base64.b64encode(secrets.token_bytes(32)).decode()),
        base_domains=BASE_DOMAIN,
        jwks_private_addresses=True,
        front_key_sha256="" if front is None else front.text_sha256().hex(),
        operator_key_sha256=operator.text_sha256().hex(),
        key_store_admin_dsn=SecretStr(key_admin.geturl()),
        key_store_dsn=SecretStr(as_service.geturl()),
        master_keys=SecretStr(new_master_key("first")),
        drain_seconds=0.0,
        **addresses,
    )


@asynccontextmanager
async def running_service(postgres: PostgresStore) -> AsyncIterator[Harness]:
    """A migrated database, four peers and the service itself."""
    async with running_peer() as retrieval, running_peer() as inference, running_peer() as ratelimit, running_peer() as metering:
        peers = dict(zip(PEERS, (retrieval, inference, ratelimit, metering), strict=True))
        admin_dsn = await postgres.fresh_database()
        service_dsn = postgres.dsn(urlsplit(admin_dsn).path.lstrip("/"), "tenant_service", "service-password")
        operator, front, key_store_dsn = new_operator_key(), new_operator_key(), await postgres.fresh_database()
        addresses = {name: peer.address for name, peer in peers.items()}
        settings = settings_for(admin_dsn, service_dsn, operator, addresses, front, key_store_dsn=key_store_dsn)
        await migrate_schema(settings)
        await _watch_the_order(admin_dsn)
        app = await build(settings)
        await app.server.start()
        channel = grpc.aio.insecure_channel(f"127.0.0.1:{app.server.bound_port}", options=[("grpc.use_local_subchannel_pool", 1)])
        try:
            yield Harness(app, settings, channel, admin_dsn, operator, front, peers)
        finally:
            await channel.close()
            await app.server.stop()
            await app.close()


async def _watch_the_order(admin_dsn: str) -> None:
    connection = await asyncpg.connect(admin_dsn)
    try:
        await connection.execute(WATCH_THE_ORDER)
    finally:
        await connection.close()
