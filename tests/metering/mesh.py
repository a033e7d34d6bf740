"""A running metering service with a real database, and short ways to call it as its callers do."""

import base64
import hashlib
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import ClassVar
from urllib.parse import urlsplit, urlunsplit
from uuid import UUID

import asyncpg
import grpc
from pydantic import SecretStr

from mesh.common.v1 import lifecycle_service_pb2_grpc
from mesh.metering.v1 import (
    budget_service_pb2_grpc,
    event_service_pb2_grpc,
    invoice_service_pb2_grpc,
    ledger_service_pb2_grpc,
    price_service_pb2_grpc,
    reconciliation_service_pb2_grpc,
    usage_service_pb2_grpc,
    webhook_service_pb2_grpc,
)
from mesh.metering.v1 import ledger_service_pb2 as pb
from services.kernel.ids import TenantId, new_uuid7
from services.kernel.rpc.channel import MeshChannel
from services.kernel.settings import ServiceSettings
from services.kernel.tenant_context import TenantContext
from services.metering.app import MeteringApp, build
from services.metering.app.loading import migrate_schema
from services.metering.settings import MeteringSettings
from tests.metering.peers import Peers
from tests.support.stores import PostgresStore

PASSWORDS = {
    "metering_service": "service-password",
    "metering_jobs": "jobs-password",
    "metering_partitions": "partitions-password",
}
TOKENS = {name: f"{name}-bearer" for name in ("inference", "ratelimit", "tenant", "metering")}
HASHES = ",".join(f"{name}={hashlib.sha256(token.encode()).hexdigest()}" for name, token in TOKENS.items())
# Reference data and what operators keep: of no tenant.
SHARED_TABLES = (
    *("price_versions", "prices", "event_types", "billing_plan_versions", "dropped_event_months"),
    *("reconciliations", "reconciliation_lines", "export_sinks", "stripe_meters"),
)
MODEL = "claude-haiku-4-5-20251001"
VERSION = "2026-01"


def dsn_of(admin_dsn: str, role: str) -> str:
    """The same database as another role."""
    parts = urlsplit(admin_dsn)
    return urlunsplit(parts._replace(netloc=f"{role}:{PASSWORDS[role]}@{parts.hostname}:{parts.port}"))


def settings_for(admin_dsn: str, peers: Peers, **overrides: object) -> MeteringSettings:
    """Settings of a service on a free port, with leases that only a test lets lapse and sweeps."""
    values: dict[str, object] = {
        "listen_address": "127.0.0.1:0",
        "service_token": SecretStr(TOKENS["metering"]),
        "peer_token_hashes": HASHES,
        "tenant_address": peers.address,
        "ratelimit_address": peers.address,
        "postgres_admin_dsn": SecretStr(admin_dsn),
        "postgres_dsn": SecretStr(dsn_of(admin_dsn, "metering_service")),
        "postgres_jobs_dsn": SecretStr(dsn_of(admin_dsn, "metering_jobs")),
        "postgres_partitions_dsn": SecretStr(dsn_of(admin_dsn, "metering_partitions")),
        "lease_seconds": 60.0,
        "sweep_seconds": 3_600.0,
        "relay_poll_seconds": 0.1,
        # What was left is gone on with when a test says so.
        "rerating_resume_seconds": 3_600.0,
        # Periods are closed when a test says so.
        "invoice_grace_hours": 1_000_000.0,
        "drain_seconds": 0.0,
        "budget_poll_seconds": 0.05,
        "webhook_poll_seconds": 0.05,
        "webhook_seal_keys": SecretStr("1:" + base64.b64encode(bytes(range(32))).decode()),
        "webhook_private_addresses": True,
    }
    return MeteringSettings.model_validate(values | overrides)


@dataclass(frozen=True, slots=True)
class Tenant:
    """A tenant of one test."""

    id: UUID
    context: TenantContext


class Caller:
    """One service of the mesh calling metering."""

    def __init__(self, name: str, port: int) -> None:
        attributes = {"service_name": name, "__annotations__": {"service_name": ClassVar[str]}}
        settings = type(f"{name.title()}Settings", (ServiceSettings,), attributes)(service_token=TOKENS[name])
        self.address = f"127.0.0.1:{port}"
        self.channel = MeshChannel(self.address, settings=settings, target_service="metering")
        self.ledger = ledger_service_pb2_grpc.LedgerServiceStub(self.channel.channel)
        self.prices = price_service_pb2_grpc.PriceServiceStub(self.channel.channel)
        self.usage = usage_service_pb2_grpc.UsageServiceStub(self.channel.channel)
        self.events = event_service_pb2_grpc.EventServiceStub(self.channel.channel)
        self.lifecycle = lifecycle_service_pb2_grpc.TenantLifecycleServiceStub(self.channel.channel)


class Outside:
    """A tenant's own application: a plain channel, and a key sent as metadata by each call."""

    def __init__(self, port: int) -> None:
        self.channel = grpc.aio.insecure_channel(f"127.0.0.1:{port}")
        self.prices = price_service_pb2_grpc.PriceServiceStub(self.channel)
        self.usage = usage_service_pb2_grpc.UsageServiceStub(self.channel)
        self.budgets = budget_service_pb2_grpc.BudgetServiceStub(self.channel)
        self.webhooks = webhook_service_pb2_grpc.WebhookServiceStub(self.channel)
        self.invoices = invoice_service_pb2_grpc.InvoiceServiceStub(self.channel)
        self.events = event_service_pb2_grpc.EventServiceStub(self.channel)
        self.reconciliations = reconciliation_service_pb2_grpc.ReconciliationServiceStub(self.channel)


class Mesh:
    """The service, its peers, its callers and an administrator's connection to look behind it."""

    def __init__(self, app: MeteringApp, peers: Peers, admin: asyncpg.Pool, settings: MeteringSettings) -> None:
        self.app = app
        self.peers = peers
        self.admin = admin
        self.settings = settings
        self.inference = Caller("inference", app.server.bound_port)
        self.ratelimit = Caller("ratelimit", app.server.bound_port)
        self.tenant_service = Caller("tenant", app.server.bound_port)
        self.outside = Outside(app.server.bound_port)
        self.to_peers = MeshChannel(peers.address, settings=settings, target_service="tenant")

    @property
    def limits(self):
        """The scripted limits."""
        return self.peers.limits

    async def close(self) -> None:
        """Stops the service and its callers."""
        for caller in (self.inference, self.ratelimit, self.tenant_service, self.outside):
            await caller.channel.close()
        await self.to_peers.close()
        await self.app.server.stop()
        await self.app.close()

    def new_tenant(self) -> Tenant:
        """A tenant nobody else knows, with a context token and the credential "key-<id>"."""
        tenant_id = new_uuid7()
        token = self.peers.tenants.token(tenant_id)
        self.peers.tenants.credentials[f"key-{tenant_id}"] = tenant_id
        expires = datetime.now(UTC) + timedelta(seconds=300)
        context = TenantContext(TenantId(tenant_id), "free", "local", "key:test", frozenset(), 1, expires, False, token)
        return Tenant(tenant_id, context)

    def opening(self, tenant: Tenant, reservation: UUID | None = None, **changes: object) -> pb.OpenCall:
        """A call to open that nothing is wrong with, unless changed."""
        call = pb.OpenCall(
            ref=ref(tenant, reservation or new_uuid7()),
            context_token=tenant.context.token,
            call_id=new_uuid7().bytes,
            attempt=1,
            bound_tokens=1_000,
            bound_nano_usd=5_000_000,
            price_version=VERSION,
            provider="anthropic",
            model=MODEL,
            feature="chat",
            user="user-1",
            prompt_version="default@1",
        )
        call.reserve_time.FromDatetime(datetime.now(UTC))
        call.dispatch_deadline.FromDatetime(datetime.now(UTC) + timedelta(seconds=60))
        for name, value in changes.items():
            if name.endswith(("_time", "_deadline")):
                getattr(call, name).FromDatetime(value)
            else:
                setattr(call, name, value)
        return call

    async def open(self, *calls: pb.OpenCall) -> list[pb.OpenResult]:
        """Opens calls in one batch."""
        response = await self.inference.channel.unary(self.inference.ledger.OpenCalls, pb.OpenCallsRequest(calls=calls), timeout_seconds=10)
        return list(response.results)

    async def opened(self, tenant: Tenant, **changes: object) -> pb.OpenCall:
        """Opens one call and returns it."""
        call = self.opening(tenant, **changes)
        (result,) = await self.open(call)
        assert result.outcome == pb.OPEN_OUTCOME_OPENED
        return call

    async def settle(self, *calls: pb.SettleCall) -> list[pb.SettleResult]:
        """Settles calls in one batch."""
        response = await self.inference.channel.unary(
            self.inference.ledger.SettleCalls, pb.SettleCallsRequest(calls=calls), timeout_seconds=10
        )
        return list(response.results)

    async def void(self, *calls: pb.VoidCall) -> list[int]:
        """Ends calls without a bill in one batch."""
        response = await self.inference.channel.unary(self.inference.ledger.VoidCalls, pb.VoidCallsRequest(calls=calls), timeout_seconds=10)
        return list(response.states)

    async def renew(self, refs: Sequence[pb.CallRef]) -> list[pb.CallRef]:
        """Renews leases; returns the lost ones."""
        response = await self.inference.channel.unary(
            self.inference.ledger.RenewCalls, pb.RenewCallsRequest(calls=refs), timeout_seconds=10
        )
        return list(response.lost)

    async def fence(self, *calls: pb.FenceCall) -> list[int]:
        """Fences calls as the limits do."""
        response = await self.ratelimit.channel.unary(
            self.ratelimit.ledger.FenceCalls, pb.FenceCallsRequest(calls=calls), timeout_seconds=10
        )
        return list(response.outcomes)

    async def extend(self, *calls: pb.ExtendCall) -> list[int]:
        """Raises bounds in one batch."""
        response = await self.inference.channel.unary(
            self.inference.ledger.ExtendCalls, pb.ExtendCallsRequest(calls=calls), timeout_seconds=10
        )
        return list(response.outcomes)

    def use(self, tenant: Tenant, consumption: UUID | None = None, **changes: object) -> pb.RecordUnits:
        """A use of units that nothing is wrong with, unless changed."""
        item = pb.RecordUnits(
            ref=ref(tenant, consumption or new_uuid7()),
            context_token=tenant.context.token,
            product_unit="ai_interviews",
            quantity=1,
            user="user-1",
            feature="hiring",
        )
        item.reserve_time.FromDatetime(datetime.now(UTC))
        for name, value in changes.items():
            if isinstance(value, datetime):
                getattr(item, name).FromDatetime(value)
            else:
                setattr(item, name, value)
        return item

    async def record(self, *items: pb.RecordUnits) -> list[int]:
        """Records uses of units in one batch, as the limits do."""
        response = await self.ratelimit.channel.unary(
            self.ratelimit.ledger.RecordUnits, pb.RecordUnitsRequest(items=items), timeout_seconds=10
        )
        return list(response.outcomes)

    def refusals(self, tenant: Tenant, count: int = 1, **changes: object) -> pb.RefusalCount:
        """A count of refusals that nothing is wrong with, unless changed."""
        item = pb.RefusalCount(
            tenant_id=tenant.id.bytes,
            context_token=tenant.context.token,
            reason="PLAN_LIMIT",
            rule="tokens_per_minute",
            model="claude-haiku-4-5",
            feature="chat",
            user="user-1",
            count=count,
        )
        item.minute_time.FromDatetime(datetime.now(UTC))
        for name, value in changes.items():
            if isinstance(value, datetime):
                getattr(item, name).FromDatetime(value)
            else:
                setattr(item, name, value)
        return item

    async def refuse(self, *counts: pb.RefusalCount, replica_id: bytes = bytes(16)) -> list[int]:
        """Tells counts of refusals as a process of inference does."""
        request = pb.RecordRefusalsRequest(replica_id=replica_id, counts=counts)
        response = await self.inference.channel.unary(self.inference.ledger.RecordRefusals, request, timeout_seconds=10)
        return list(response.outcomes)

    async def begin_epoch(
        self, tenant: Tenant, nonce: str = "n", periods: Sequence[pb.CountedPeriod] = (), recent_seconds: int = 0
    ) -> pb.BeginEpochResponse:
        """Begins an epoch as the limits do."""
        request = pb.BeginEpochRequest(nonce=nonce, periods=periods, recent_seconds=recent_seconds)
        return await self.ratelimit.channel.unary(self.ratelimit.ledger.BeginEpoch, request, timeout_seconds=10, tenant=tenant.context)

    async def row(self, reference: pb.CallRef) -> asyncpg.Record | None:
        """The call's row, past row-level security."""
        return await self.admin.fetchrow(
            "SELECT * FROM metering.calls WHERE tenant_id = $1 AND reservation_id = $2",
            UUID(bytes=reference.tenant_id),
            UUID(bytes=reference.reservation_id),
        )

    async def state(self, reference: pb.CallRef) -> int:
        """The call's state, 0 when there is no row."""
        row = await self.row(reference)
        return 0 if row is None else row["state"]

    async def outbox_kinds(self, tenant: Tenant) -> list[int]:
        """Kinds of what is in the tenant's outbox."""
        rows = await self.admin.fetch("SELECT kind FROM metering.outbox WHERE tenant_id = $1 ORDER BY create_time", tenant.id)
        return [row["kind"] for row in rows]

    async def lapse_leases(self, tenant: Tenant) -> None:
        """Lets every lease of the tenant be over."""
        await self.admin.execute("UPDATE metering.call_leases SET lease_until = now() - interval '1 s' WHERE tenant_id = $1", tenant.id)


def ref(tenant: Tenant, reservation: UUID | None = None) -> pb.CallRef:
    """A reference to a reservation of the tenant."""
    return pb.CallRef(tenant_id=tenant.id.bytes, reservation_id=(reservation or new_uuid7()).bytes)


def bill(reference: pb.CallRef, *, input_tokens: int = 100, output_tokens: int = 50, **more: int) -> pb.SettleCall:
    """What a call was billed."""
    usage = pb.TokenUsage(input_tokens=input_tokens, output_tokens=output_tokens, **more)
    return pb.SettleCall(ref=reference, usage=usage, stop_reason="end_turn", provider_request_id="req_1", first_token_ms=5, total_ms=9)


def not_billed(reference: pb.CallRef, cause: str = "provider_429") -> pb.VoidCall:
    """A call that was certainly not billed."""
    return pb.VoidCall(ref=reference, kind=pb.VOID_KIND_NOT_BILLED, cause=cause)


def unknown(reference: pb.CallRef, received: pb.TokenUsage | None = None) -> pb.VoidCall:
    """A call whose bill cannot be known."""
    return pb.VoidCall(ref=reference, kind=pb.VOID_KIND_UNKNOWN, cause="cut", received=received)


def period(unit: int, scope: int, start: datetime, end: datetime, product_unit: str = "") -> pb.CountedPeriod:
    """A unit to add up from `start` to before `end`."""
    wanted = pb.CountedPeriod(unit=unit, scope=scope, product_unit=product_unit)  # type: ignore[arg-type] # the enum's numbers
    wanted.start_time.FromDatetime(start)
    wanted.end_time.FromDatetime(end)
    return wanted


async def running_mesh(admin_dsn: str, peers: Peers, admin: asyncpg.Pool, **overrides: object) -> Mesh:
    """Builds and starts a service on a migrated database."""
    settings = settings_for(admin_dsn, peers, **overrides)
    app = await build(settings)
    await app.server.start()
    return Mesh(app, peers, admin, settings)


async def migrated(admin_dsn: str, peers: Peers) -> None:
    """Brings the database forward and loads the packaged price book."""
    await migrate_schema(settings_for(admin_dsn, peers))


@asynccontextmanager
async def mesh_of_its_own(postgres: PostgresStore, peers: Peers, **overrides: object) -> AsyncIterator[Mesh]:
    """A service on a database of its own, with the tenants of whoever asks for it and no others."""
    dsn = await postgres.fresh_database()
    await migrated(dsn, peers)
    async with asyncpg.create_pool(dsn, min_size=1, max_size=4) as admin:
        mesh = await running_mesh(dsn, peers, admin, **overrides)
        yield mesh
        await mesh.close()
