"""The composition root: builds everything by constructor and closes it in reverse order."""

from collections.abc import Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import structlog

from mesh.common.v1 import lifecycle_service_pb2_grpc
from mesh.tenant.v1 import (
    api_key_service_pb2_grpc,
    authentication_service_pb2_grpc,
    event_service_pb2_grpc,
    plan_service_pb2_grpc,
    tenant_service_pb2_grpc,
)
from services.kernel.background import BackgroundTasks
from services.kernel.context_token import ContextTokenVerifier
from services.kernel.errors import Unavailable
from services.kernel.migrate import migrate
from services.kernel.rpc.channel import MeshChannel
from services.kernel.rpc.server import MeshServer, Registration
from services.kernel.tenant_database import JobsDatabase, TenantDatabase
from services.tenant.adapters.lifecycle_client import GrpcLifecyclePeer
from services.tenant.adapters.plan_loader import load_plans, read_plan_file
from services.tenant.adapters.postgres_credentials import PostgresCredentials
from services.tenant.adapters.postgres_erasure import PostgresErasure
from services.tenant.adapters.postgres_events import PostgresOutbox
from services.tenant.adapters.postgres_keys import PostgresKeys
from services.tenant.adapters.postgres_life import PostgresLife, PostgresRetention
from services.tenant.adapters.postgres_provisioning import PostgresProvisioning
from services.tenant.adapters.postgres_remains import PostgresRemains
from services.tenant.adapters.postgres_sagas import PostgresDueSagas, PostgresSagas
from services.tenant.adapters.postgres_tenants import PostgresTenants
from services.tenant.adapters.smtp_mail import PostgresOwners, SmtpMail
from services.tenant.adapters.webhook import Webhook
from services.tenant.archive import TenantArchive
from services.tenant.authentication import Authenticator
from services.tenant.context_minting import ContextMinter, read_public_keys, read_signing_key
from services.tenant.erasure import EraseStep, ErasurePlan, TenantErasure
from services.tenant.events import EventDesk, EventRelay, EventSink, Sink
from services.tenant.key_ring import KeyRing
from services.tenant.life_ports import NoDataKeys, PoolPlacement
from services.tenant.local_credential_resolver import LocalCredentialResolver
from services.tenant.provisioning import ProvisioningPlan, Step, TenantProvisioning
from services.tenant.retention import RetentionRunner
from services.tenant.saga import SagaEngine, SagaKind, SagaRunner
from services.tenant.servicers.api_key import ApiKeyServicer
from services.tenant.servicers.authentication import AuthenticationServicer
from services.tenant.servicers.event import EventServicer
from services.tenant.servicers.lifecycle import LifecycleServicer
from services.tenant.servicers.plan import PlanServicer
from services.tenant.servicers.tenant import TenantServicer
from services.tenant.settings import TenantSettings
from services.tenant.tenant_life import TenantLife
from services.tenant.tenant_remains import TenantRemains
from services.tenant.usage_trail import UsageTrailBuffer

log = structlog.get_logger(__name__)

SCHEMA = "tenant"
MIGRATIONS = Path(__file__).parent / "migrations"
PLAN_FILE = Path(__file__).parent / "plans.yaml"
PEER_STEPS = (Step.RETRIEVAL, Step.INFERENCE, Step.RATELIMIT, Step.METERING)
ERASURE_PEERS = ("inference", "retrieval", "metering", "ratelimit")


class TenantApp:
    """The running parts of the service."""

    def __init__(self, server: MeshServer, trail: UsageTrailBuffer, resources: AsyncExitStack) -> None:
        self.server = server
        self.trail = trail
        self._resources = resources

    async def close(self) -> None:
        """Writes what the trail still holds, then closes loops, channels and pool."""
        await self._resources.aclose()


@dataclass(frozen=True, slots=True)
class _Parts:
    """What several servicers and loops are built from."""

    settings: TenantSettings
    database: TenantDatabase
    jobs: JobsDatabase
    minter: ContextMinter
    peers: Mapping[str, GrpcLifecyclePeer]
    outbox: PostgresOutbox
    sagas: PostgresSagas
    tenants: PostgresTenants


@dataclass(frozen=True, slots=True)
class _Life:
    """The beginning and the end of tenants."""

    provisioning: TenantProvisioning
    erasure: TenantErasure
    engine: SagaEngine


async def build(settings: TenantSettings) -> TenantApp:
    """Builds the service; it starts while Postgres or the other services are away."""
    async with AsyncExitStack() as stack:
        database = await TenantDatabase.open(settings.postgres_dsn.get_secret_value(), application_name="tenantry-tenant")
        stack.push_async_callback(database.close)
        jobs = await JobsDatabase.open(settings.postgres_jobs_dsn.get_secret_value(), max_size=3, application_name="tenantry-tenant-jobs")
        stack.push_async_callback(jobs.close)
        credentials = PostgresCredentials(database)
        trail = UsageTrailBuffer(credentials)
        stack.push_async_callback(_write_rest, trail)
        background = BackgroundTasks()
        stack.push_async_callback(background.close)
        background.start("usage_trail", trail.run)
        minter = ContextMinter(
            read_signing_key(settings.context_signing_key.get_secret_value()),
            read_public_keys(settings.context_additional_public_keys),
            region=settings.region,
            clock=_now,
        )
        authenticator = Authenticator(credentials, trail, minter, operator_key_hashes=settings.operator_key_hashes(), clock=_now)
        parts = _Parts(
            settings,
            database,
            jobs,
            minter,
            _peers(settings, stack),
            PostgresOutbox(jobs),
            PostgresSagas(database),
            PostgresTenants(database),
        )
        life = _life(parts)
        server = MeshServer(
            settings,
            servicers=_registrations(parts, life, authenticator),
            resolver=LocalCredentialResolver(authenticator),
            verifier=ContextTokenVerifier(minter),
        )
        _start_loops(parts, life, background, stack)
        return TenantApp(server, trail, stack.pop_all())


async def migrate_schema(settings: TenantSettings) -> None:
    """Brings the schema and the plans forward."""
    admin_dsn = settings.postgres_admin_dsn.get_secret_value()
    roles = {"service": settings.postgres_dsn.get_secret_value(), "jobs": settings.postgres_jobs_dsn.get_secret_value()}
    await migrate(admin_dsn, SCHEMA, MIGRATIONS, roles)
    await load_plans(admin_dsn, read_plan_file(PLAN_FILE))


def _life(parts: _Parts) -> _Life:
    settings, placement = parts.settings, PoolPlacement()
    provisioning_store = PostgresProvisioning(parts.database, with_mail=bool(settings.smtp_url.get_secret_value()))
    peers = {step: (step.name.lower(), parts.peers[step.name.lower()]) for step in PEER_STEPS}
    provisioning_plan = ProvisioningPlan(provisioning_store, parts.tenants, peers, placement, parts.minter)
    erasure_store = PostgresErasure(parts.database, parts.jobs)
    erasure_plan = ErasurePlan(
        erasure_store,
        parts.sagas,
        {EraseStep[name.upper()]: parts.peers[name] for name in ERASURE_PEERS},
        placement,
        NoDataKeys(),
        parts.minter,
        read_signing_key(settings.context_signing_key.get_secret_value()),
        clock=_now,
    )
    engine = SagaEngine(
        parts.sagas,
        {SagaKind.PROVISION: provisioning_plan, SagaKind.ERASE: erasure_plan},
        lease_seconds=settings.saga_lease_seconds,
        max_attempts=settings.saga_max_attempts,
    )
    return _Life(
        TenantProvisioning(provisioning_store, parts.sagas, provisioning_plan, engine, parts.tenants, region=settings.region),
        TenantErasure(erasure_store, parts.sagas, erasure_plan, engine),
        engine,
    )


def _start_loops(parts: _Parts, life: _Life, background: BackgroundTasks, stack: AsyncExitStack) -> None:
    settings = parts.settings
    runner = SagaRunner(PostgresDueSagas(parts.jobs), life.engine, poll_seconds=settings.saga_poll_seconds)
    background.start("saga_runner", runner.run)
    calendar = PostgresRetention(parts.database, parts.jobs)
    retention = RetentionRunner(calendar, calendar, parts.peers, parts.minter, clock=_now, poll_seconds=settings.retention_poll_seconds)
    background.start("retention", retention.run)
    sinks: dict[Sink, EventSink] = {}
    if settings.event_webhook_url:
        webhook = Webhook(settings.event_webhook_url, settings.event_webhook_secret.get_secret_value(), region=settings.region)
        stack.push_async_callback(webhook.close)
        sinks[Sink.WEBHOOK] = webhook
    if settings.smtp_url.get_secret_value():
        owners = PostgresOwners(parts.database)
        sinks[Sink.MAIL] = SmtpMail(settings.smtp_url.get_secret_value(), settings.smtp_from, owners.find)
    if sinks:
        relay = EventRelay(parts.outbox, sinks, poll_seconds=settings.event_poll_seconds, max_attempts=settings.event_max_attempts)
        background.start("event_relay", relay.run)


def _registrations(parts: _Parts, life: _Life, authenticator: Authenticator) -> list[Registration]:
    tenants, remains = parts.tenants, PostgresRemains(parts.database)
    archive = TenantArchive(remains.export, parts.peers, parts.minter, clock=_now)
    tenant_life = TenantLife(PostgresLife(parts.database), parts.sagas, tenants)
    return [
        (
            authentication_service_pb2_grpc.add_AuthenticationServiceServicer_to_server,
            AuthenticationServicer(authenticator, parts.minter),
            "mesh.tenant.v1.AuthenticationService",
        ),
        (
            tenant_service_pb2_grpc.add_TenantServiceServicer_to_server,
            TenantServicer(life.provisioning, tenants, tenant_life, life.erasure, archive),
            "mesh.tenant.v1.TenantService",
        ),
        (
            api_key_service_pb2_grpc.add_ApiKeyServiceServicer_to_server,
            ApiKeyServicer(KeyRing(PostgresKeys(parts.database), clock=_now)),
            "mesh.tenant.v1.ApiKeyService",
        ),
        (plan_service_pb2_grpc.add_PlanServiceServicer_to_server, PlanServicer(tenants), "mesh.tenant.v1.PlanService"),
        (event_service_pb2_grpc.add_EventServiceServicer_to_server, EventServicer(EventDesk(parts.outbox)), "mesh.tenant.v1.EventService"),
        (
            lifecycle_service_pb2_grpc.add_TenantLifecycleServiceServicer_to_server,
            LifecycleServicer(TenantRemains(remains), PostgresErasure(parts.database, parts.jobs).scan),
            "mesh.common.v1.TenantLifecycleService",
        ),
    ]


def _peers(settings: TenantSettings, stack: AsyncExitStack) -> dict[str, GrpcLifecyclePeer]:
    addresses = {
        "inference": settings.inference_address,
        "retrieval": settings.retrieval_address,
        "metering": settings.metering_address,
        "ratelimit": settings.ratelimit_address,
    }
    peers: dict[str, GrpcLifecyclePeer] = {}
    for name, address in addresses.items():
        channel = MeshChannel(address, settings=settings, target_service=name)
        stack.push_async_callback(channel.close)
        peers[name] = GrpcLifecyclePeer(channel)
    return peers


async def _write_rest(trail: UsageTrailBuffer) -> None:
    try:
        await trail.flush(everything=True)
    except Unavailable as error:
        log.warning("usage_trail_lost", reason=error.reason_name)


def _now() -> datetime:
    return datetime.now(UTC)
