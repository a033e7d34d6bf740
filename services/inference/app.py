"""The inference service put together: builds everything by constructor, closes everything in reverse."""

from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

from mesh.common.v1.lifecycle_service_pb2_grpc import add_TenantLifecycleServiceServicer_to_server
from mesh.inference.v1.conversation_service_pb2_grpc import add_ConversationServiceServicer_to_server
from mesh.inference.v1.inference_service_pb2_grpc import add_InferenceServiceServicer_to_server
from mesh.inference.v1.prompt_service_pb2_grpc import add_PromptServiceServicer_to_server
from services.inference.adapters.anthropic import AnthropicProvider
from services.inference.adapters.metering_client import MeteringLedger
from services.inference.adapters.metering_prices_client import MeteringPrices
from services.inference.adapters.postgres import PostgresMemory
from services.inference.adapters.ratelimit_client import RatelimitLimits
from services.inference.adapters.retrieval_client import RetrievalDocuments
from services.inference.adapters.traced_provider import TracedProvider
from services.inference.admission import AdmissionGate
from services.inference.finishing import Finishing
from services.inference.lease_keeper import LeaseKeeper
from services.inference.pipeline import AnswerPipeline
from services.inference.servicers.conversation_service import ConversationService
from services.inference.servicers.inference_service import InferenceService
from services.inference.servicers.lifecycle import LifecycleServicer
from services.inference.servicers.prompt_service import PromptService
from services.inference.settings import InferenceSettings
from services.inference.settlement import Settlement
from services.kernel.background import BackgroundTasks
from services.kernel.credential_resolver import remote_trust
from services.kernel.migrate import migrate, migrate_all_places
from services.kernel.place_making import PlaceMaker
from services.kernel.placement import PlaceDirectory, RemotePlaces
from services.kernel.rpc.channel import MeshChannel
from services.kernel.rpc.server import MeshServer, Registration
from services.kernel.silo_pools import SiloPools
from services.kernel.table_copying import TenantTable
from services.kernel.tenant_config import TenantConfigCache
from services.kernel.tenant_database import TenantDatabase
from services.kernel.tenant_moving import TenantMover

MIGRATIONS = Path(__file__).parent / "migrations"
SCHEMA = "inference"
# Parents first.
TENANT_TABLES = (
    TenantTable("prompts", ("version",)),
    TenantTable("conversations", ("conversation_id",)),
    TenantTable("turns", ("conversation_id", "sequence")),
)


@dataclass(frozen=True, slots=True)
class InferenceApp:
    """The running parts."""

    server: MeshServer
    leases: LeaseKeeper
    gate: AdmissionGate
    closing: AsyncExitStack

    async def close(self) -> None:
        """Lets settlements finish, then closes clients and pools."""
        await self.closing.aclose()


async def build(settings: InferenceSettings) -> InferenceApp:
    """Builds the service. Stores and peers may be down: calls answer Unavailable until they are back."""
    async with AsyncExitStack() as stack:
        database = await TenantDatabase.open(
            settings.postgres_dsn.get_secret_value(), max_size=settings.postgres_pool_size, application_name="inference"
        )
        stack.push_async_callback(database.close)
        to_tenant = _channel(stack, settings, settings.tenant_address, "tenant")
        places, mover = _follow_placements(stack, settings, database, to_tenant)
        to_metering = _channel(stack, settings, settings.metering_address, "metering")
        limits = RatelimitLimits(_channel(stack, settings, settings.ratelimit_address, "ratelimit"))
        documents = RetrievalDocuments(_channel(stack, settings, settings.retrieval_address, "retrieval"))
        memory, ledger, prices = PostgresMemory(database), MeteringLedger(to_metering), MeteringPrices(to_metering)
        stack.push_async_callback(ledger.close)
        provider = AnthropicProvider(
            base_url=settings.provider_base_url,
            api_key=settings.anthropic_api_key.get_secret_value(),
            call_id_header=settings.provider_call_id_header,
            max_connections=settings.max_concurrent_provider_calls,
        )
        stack.push_async_callback(provider.close)
        leases = LeaseKeeper(limits, ledger)
        background = BackgroundTasks()
        stack.push_async_callback(background.close)
        background.start("lease_keeper", leases.run)
        # Closed before everything it settles with.
        finishing = Finishing()
        stack.push_async_callback(finishing.close)
        gate = AdmissionGate(settings.max_concurrent_provider_calls, settings.max_waiting_calls)
        pipeline = AnswerPipeline(
            limits=limits,
            ledger=ledger,
            documents=documents,
            memory=memory,
            provider=TracedProvider(provider),
            gate=gate,
            leases=leases,
            settlement=Settlement(ledger, limits, memory, leases, finishing),
        )
        configs = TenantConfigCache(to_tenant)
        inference = InferenceService(pipeline, configs, prices, settings.default_call_deadline_seconds)
        servicers = _registrations(inference, memory, LifecycleServicer(memory, configs, places, mover))
        resolver, verifier = remote_trust(to_tenant)
        server = MeshServer(settings, servicers=servicers, resolver=resolver, verifier=verifier)
        return InferenceApp(server, leases, gate, stack.pop_all())


def _follow_placements(
    stack: AsyncExitStack, settings: InferenceSettings, database: TenantDatabase, to_tenant: MeshChannel
) -> tuple[PlaceMaker, TenantMover]:
    remote = RemotePlaces(to_tenant)
    silos = SiloPools(settings.max_silo_pools, application_name="inference")
    stack.push_async_callback(silos.close)
    database.follow(SCHEMA, PlaceDirectory(remote), silos)
    maker = PlaceMaker(database, remote, SCHEMA, MIGRATIONS, settings.postgres_placement_dsn)
    return maker, TenantMover(database, remote, maker, SCHEMA, TENANT_TABLES)


def _registrations(inference: InferenceService, memory: PostgresMemory, lifecycle: LifecycleServicer) -> list[Registration]:
    return [
        (add_InferenceServiceServicer_to_server, inference, "mesh.inference.v1.InferenceService"),
        (add_PromptServiceServicer_to_server, PromptService(memory), "mesh.inference.v1.PromptService"),
        (add_ConversationServiceServicer_to_server, ConversationService(memory), "mesh.inference.v1.ConversationService"),
        (add_TenantLifecycleServiceServicer_to_server, lifecycle, "mesh.common.v1.TenantLifecycleService"),
    ]


async def migrate_schema(settings: InferenceSettings) -> None:
    """Brings the schema forward."""
    admin_dsn = settings.postgres_admin_dsn.get_secret_value()
    roles = {"service": settings.postgres_dsn.get_secret_value(), "placement": settings.postgres_placement_dsn.get_secret_value()}
    await migrate(admin_dsn, SCHEMA, MIGRATIONS, roles)
    await migrate_all_places(admin_dsn, settings.silo_migration_dsn.get_secret_value(), SCHEMA, MIGRATIONS)


def _channel(stack: AsyncExitStack, settings: InferenceSettings, address: str, service: str) -> MeshChannel:
    channel = MeshChannel(address, settings=settings, target_service=service)
    stack.push_async_callback(channel.close)
    return channel
