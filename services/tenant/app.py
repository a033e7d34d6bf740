"""The composition root: builds everything by constructor and closes it in reverse order."""

from contextlib import AsyncExitStack
from datetime import UTC, datetime
from pathlib import Path

import structlog

from mesh.common.v1 import lifecycle_service_pb2_grpc
from mesh.tenant.v1 import (
    api_key_service_pb2_grpc,
    authentication_service_pb2_grpc,
    placement_service_pb2_grpc,
    plan_service_pb2_grpc,
    tenant_service_pb2_grpc,
)
from services.kernel.background import BackgroundTasks
from services.kernel.cell import cell_of
from services.kernel.context_token import ContextTokenVerifier
from services.kernel.errors import Unavailable
from services.kernel.migrate import migrate
from services.kernel.rpc.channel import MeshChannel
from services.kernel.rpc.server import MeshServer
from services.kernel.tenant_database import TenantDatabase
from services.tenant.adapters.lifecycle_client import GrpcLifecyclePeer
from services.tenant.adapters.plan_loader import load_plans, read_plan_file
from services.tenant.adapters.postgres_credentials import PostgresCredentials
from services.tenant.adapters.postgres_keys import PostgresKeys
from services.tenant.adapters.postgres_moves import PostgresMoves
from services.tenant.adapters.postgres_placements import PostgresPlacements
from services.tenant.adapters.postgres_provisioning import PostgresProvisioning
from services.tenant.adapters.postgres_remains import PostgresRemains
from services.tenant.adapters.postgres_tenants import PostgresTenants
from services.tenant.adapters.schema_maker import PostgresSchemaMaker, prepare_schema_maker
from services.tenant.adapters.silo_maker import PostgresSiloMaker
from services.tenant.authentication import Authenticator
from services.tenant.context_minting import ContextMinter, read_public_keys, read_signing_key
from services.tenant.key_ring import KeyRing
from services.tenant.local_credential_resolver import LocalCredentialResolver
from services.tenant.moving import TenantMoves
from services.tenant.placement import Placements
from services.tenant.provisioning import Step, TenantProvisioning
from services.tenant.secret_box import SecretBox
from services.tenant.servicers.api_key import ApiKeyServicer
from services.tenant.servicers.authentication import AuthenticationServicer
from services.tenant.servicers.lifecycle import LifecycleServicer
from services.tenant.servicers.placement import PlacementServicer
from services.tenant.servicers.plan import PlanServicer
from services.tenant.servicers.tenant import TenantServicer
from services.tenant.settings import TenantSettings
from services.tenant.tenant_remains import TenantRemains
from services.tenant.usage_trail import UsageTrailBuffer

log = structlog.get_logger(__name__)

SCHEMA = "tenant"
MIGRATIONS = Path(__file__).parent / "migrations"
PLAN_FILE = Path(__file__).parent / "plans.yaml"


class TenantApp:
    """The running parts of the service."""

    def __init__(self, server: MeshServer, trail: UsageTrailBuffer, resources: AsyncExitStack) -> None:
        self.server = server
        self.trail = trail
        self._resources = resources

    async def close(self) -> None:
        """Writes what the trail still holds, then closes loops, channels and pool."""
        await self._resources.aclose()


async def build(settings: TenantSettings) -> TenantApp:
    """Builds the service; it starts while Postgres or the other services are away."""
    async with AsyncExitStack() as stack:
        database = await TenantDatabase.open(settings.postgres_dsn.get_secret_value(), application_name="tenantry-tenant")
        stack.push_async_callback(database.close)
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
        authenticator = Authenticator(
            credentials, trail, minter, operator_key_hashes=settings.operator_key_hashes(), clock=_now, cell=cell_of(settings)
        )
        peers = _peers(settings, stack)
        placements, moves = _placements(settings, database, peers, minter)
        background.start("moves", moves.sweep_forever)
        server = _server(settings, database, authenticator, minter, peers, placements, moves)
        return TenantApp(server, trail, stack.pop_all())


async def migrate_schema(settings: TenantSettings) -> None:
    """Brings the schema and the plans forward."""
    admin_dsn = settings.postgres_admin_dsn.get_secret_value()
    await migrate(admin_dsn, SCHEMA, MIGRATIONS, {"service": settings.postgres_dsn.get_secret_value()})
    await prepare_schema_maker(admin_dsn, settings.postgres_placement_dsn.get_secret_value())
    await load_plans(admin_dsn, read_plan_file(PLAN_FILE))


def _server(
    settings: TenantSettings,
    database: TenantDatabase,
    authenticator: Authenticator,
    minter: ContextMinter,
    peers: dict[Step, tuple[str, GrpcLifecyclePeer]],
    placements: Placements,
    moves: TenantMoves,
) -> MeshServer:
    tenants = PostgresTenants(database)
    provisioning = TenantProvisioning(PostgresProvisioning(database), tenants, peers, minter, placements, region=settings.region)
    return MeshServer(
        settings,
        servicers=[
            (
                authentication_service_pb2_grpc.add_AuthenticationServiceServicer_to_server,
                AuthenticationServicer(authenticator, minter),
                "mesh.tenant.v1.AuthenticationService",
            ),
            (
                tenant_service_pb2_grpc.add_TenantServiceServicer_to_server,
                TenantServicer(provisioning, tenants, cell_of(settings)),
                "mesh.tenant.v1.TenantService",
            ),
            (
                api_key_service_pb2_grpc.add_ApiKeyServiceServicer_to_server,
                ApiKeyServicer(KeyRing(PostgresKeys(database), clock=_now)),
                "mesh.tenant.v1.ApiKeyService",
            ),
            (
                placement_service_pb2_grpc.add_PlacementServiceServicer_to_server,
                PlacementServicer(placements, moves),
                "mesh.tenant.v1.PlacementService",
            ),
            (plan_service_pb2_grpc.add_PlanServiceServicer_to_server, PlanServicer(tenants), "mesh.tenant.v1.PlanService"),
            (
                lifecycle_service_pb2_grpc.add_TenantLifecycleServiceServicer_to_server,
                LifecycleServicer(TenantRemains(PostgresRemains(database), placements)),
                "mesh.common.v1.TenantLifecycleService",
            ),
        ],
        resolver=LocalCredentialResolver(authenticator),
        verifier=ContextTokenVerifier(minter),
    )


def _placements(
    settings: TenantSettings, database: TenantDatabase, peers: dict[Step, tuple[str, GrpcLifecyclePeer]], minter: ContextMinter
) -> tuple[Placements, TenantMoves]:
    store = PostgresPlacements(database, SecretBox(settings.master_key.get_secret_value()))
    placements = Placements(
        store,
        PostgresSchemaMaker(settings.postgres_placement_dsn.get_secret_value(), settings.max_bridge_schemas),
        PostgresSiloMaker(settings.silo_admin_dsn.get_secret_value()),
    )
    moves = TenantMoves(
        placements,
        PostgresMoves(database, store),
        PostgresTenants(database),
        dict(peers.values()),
        minter,
        grace_seconds=settings.move_grace_seconds,
    )
    return placements, moves


def _peers(settings: TenantSettings, stack: AsyncExitStack) -> dict[Step, tuple[str, GrpcLifecyclePeer]]:
    addresses = {
        Step.RETRIEVAL: settings.retrieval_address,
        Step.INFERENCE: settings.inference_address,
        Step.RATELIMIT: settings.ratelimit_address,
        Step.METERING: settings.metering_address,
    }
    peers: dict[Step, tuple[str, GrpcLifecyclePeer]] = {}
    for step, address in addresses.items():
        name = step.name.lower()
        channel = MeshChannel(address, settings=settings, target_service=name)
        stack.push_async_callback(channel.close)
        peers[step] = (name, GrpcLifecyclePeer(channel))
    return peers


async def _write_rest(trail: UsageTrailBuffer) -> None:
    try:
        await trail.flush(everything=True)
    except Unavailable as error:
        log.warning("usage_trail_lost", reason=error.reason_name)


def _now() -> datetime:
    return datetime.now(UTC)
